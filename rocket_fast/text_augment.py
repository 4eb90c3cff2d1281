"""Augmentation of captions: stop word removal, and on strong views one edit of EDA (Wei & Zou 2019, arXiv:1901.11196).

Words are what white space separates. Stop words are matched as written, so capitalised ones stay unless the caption is
lowercased first. An edit that would leave no words is undone. How often each happens follows Fini et al. (TMLR 2023).
"""

from __future__ import annotations

import functools
import lzma
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rocket_fast.errors import require
from rocket_fast.tokenizer import clean_lower

_DATA = Path(__file__).parent / "data"
_table_lock = threading.Lock()
# Endings and what WordNet's morphy puts for them to find the base form, by part of speech (morphy(7WN)).
_ENDINGS = [
    [rule.split(">") for rule in rules.split()]
    for rules in (
        "s> ses>s ves>f xes>x zes>z ches>ch shes>sh men>man ies>y",  # nouns
        "s> ies>y es>e es> ed>e ed> ing>e ing>",  # verbs
        "er> est> er>e est>e",  # adjectives
        "",  # adverbs
    )
]


@dataclass(frozen=True, kw_only=True)
class TextAugmentConfig:
    """How captions are changed; a weak view loses stop words at most, a strong view is edited once more."""

    clean_lowercase: bool = False
    """Repair and lowercase the caption first, as the tokenizer would later (uncurated captions)."""
    stopword_prob: float = 0.8
    """Probability that a view's stop words are removed."""
    synonym: float = 0.4
    """Probability that a strong view has one word replaced by a WordNet synonym."""
    swap: float = 0.4
    """Probability that a strong view has two words exchanged."""
    deletion: float = 0.2
    """Probability that a strong view has words deleted."""
    identity: float = 0.0
    """Probability that a strong view keeps its words; the four add up to 1."""
    deletion_word_prob: float = 0.1
    """Probability that a deletion drops a given word."""

    def __post_init__(self) -> None:
        for name in ("stopword_prob", "synonym", "swap", "deletion", "identity", "deletion_word_prob"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"text.{name}", value, "a probability in [0, 1]")
        total = self.synonym + self.swap + self.deletion + self.identity
        require(
            abs(total - 1) < 1e-6, "text.synonym + swap + deletion + identity", total, "probabilities adding up to 1"
        )


@functools.cache
def stopwords() -> frozenset[str]:
    """The 127 English stop words of Snowball, NLTK and EDA."""
    return frozenset((_DATA / "english_stopwords.txt").read_text().split())


@functools.cache
def _load_table() -> dict[str, str]:
    """Per word its line of the synonym table: lemmas by part of speech (see data/build_tables.py)."""
    lines = lzma.decompress((_DATA / "wordnet_synonyms.txt.xz").read_bytes()).decode().split("\n")
    return {word: lemmas for word, _, lemmas in (line.partition("\t") for line in lines)}


@functools.lru_cache(maxsize=1 << 17)
def synonyms(word: str) -> tuple[str, ...]:
    """Lemmas that share a WordNet synset with ``word`` or with its base form, sorted; none for stop words.

    As in EDA, part of speech and sense are not told apart, and a synonym may have several words.
    """
    with _table_lock:  # so that threads starting together load it once
        table = _load_table()
    word = word.lower()
    if word in stopwords():
        return ()
    found = set(table.get(word, "").replace("\t", ",").split(","))
    for part, endings in enumerate(_ENDINGS):
        for ending, base_ending in endings:
            if word.endswith(ending) and (lemmas := table.get(word.removesuffix(ending) + base_ending)):
                found.update(lemmas.split("\t")[part].split(","))
    return tuple(sorted(found - {word, ""}))


def augment_weak(caption: str, config: TextAugmentConfig | None, rng: np.random.Generator) -> str:
    """A caption for a weak view: stop words removed with ``stopword_prob``; None leaves it alone."""
    if config is None:
        return caption
    return " ".join(_without_stopwords(_words(caption, config), config, rng.random()))


def augment_strong(caption: str, config: TextAugmentConfig | None, rng: np.random.Generator) -> str:
    """A caption for a strong view: stop words removed as in a weak one, then one edit; None leaves it alone."""
    if config is None:
        return caption
    for_stopwords, for_edit, first, second = rng.random(4).tolist()
    words = _without_stopwords(_words(caption, config), config, for_stopwords)
    if for_edit < config.synonym:
        words = _replace_by_synonym(words, first, second)
    elif for_edit < config.synonym + config.swap:
        words = _swap(words, first, second)
    elif for_edit < 1 - config.identity:
        words = _delete(words, config.deletion_word_prob, rng)
    return " ".join(words)


def _words(caption: str, config: TextAugmentConfig) -> list[str]:
    return (clean_lower(caption) if config.clean_lowercase else caption).split()


def _without_stopwords(words: list[str], config: TextAugmentConfig, chance: float) -> list[str]:
    if chance >= config.stopword_prob:
        return words
    removed = stopwords()
    return [word for word in words if word not in removed] or words


def _replace_by_synonym(words: list[str], first: float, second: float) -> list[str]:
    """Of the words that have synonyms, one becomes one of them; ``first`` and ``second`` in [0, 1) pick which."""
    replaceable = [place for place, word in enumerate(words) if synonyms(word)]
    if not replaceable:
        return words
    place = replaceable[int(first * len(replaceable))]
    choices = synonyms(words[place])
    return [*words[:place], choices[int(second * len(choices))], *words[place + 1 :]]


def _swap(words: list[str], first: float, second: float) -> list[str]:
    """Exchange two words at different places, picked by ``first`` and ``second`` in [0, 1)."""
    if len(words) < 2:
        return words
    i, j = int(first * len(words)), int(second * (len(words) - 1))
    j += j >= i
    swapped = list(words)
    swapped[i], swapped[j] = words[j], words[i]
    return swapped


def _delete(words: list[str], word_prob: float, rng: np.random.Generator) -> list[str]:
    return [
        word for word, chance in zip(words, rng.random(len(words)).tolist(), strict=True) if chance >= word_prob
    ] or words
