"""What each augmentation may change, how often, and that the same key gives the same words."""

import importlib.util
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rocket_fast.text_augment as text_augment
from rocket_fast.text_augment import TextAugmentConfig, augment_strong, augment_weak, stopwords, synonyms

CAPTION = "a small dog on the sunny beach with its owner"
KEPT = ["small", "dog", "sunny", "beach", "owner"]  # without stop words
TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from(["the", "a", "dog", "Dogs", "é", "&amp;", "x"]), max_size=8
).map(" ".join)
SEEDS = st.integers(0, 2**64 - 1)


def philox(key: int, counter: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def only(**probabilities: float) -> TextAugmentConfig:
    """A configuration in which nothing happens but what is named."""
    return TextAugmentConfig(**{"stopword_prob": 0.0, "synonym": 0.0, "swap": 0.0, "deletion": 0.0} | probabilities)


def assert_frequencies(counts: list[int], expected: list[float]) -> None:
    """Pearson's chi-square stays below its 1 - 1e-6 quantile (40 bounds it for up to 6 degrees of freedom)."""
    total = sum(counts)
    statistic = sum((count - total * p) ** 2 / (total * p) for count, p in zip(counts, expected, strict=True))
    assert len(counts) <= 7
    assert statistic < 40


def test_none_and_identity_leave_the_caption() -> None:
    odd = "  The\tDog &amp; the Cat "
    assert augment_weak(odd, None, philox(0)) == augment_strong(odd, None, philox(0)) == odd
    assert augment_weak(odd, only(identity=1.0), philox(0)) == "The Dog &amp; the Cat"
    assert augment_strong(odd, only(identity=1.0), philox(0)) == "The Dog &amp; the Cat"


def test_clean_lowercase_comes_before_stop_words() -> None:
    as_written = only(identity=1.0, stopword_prob=1.0)
    cleaned = only(identity=1.0, stopword_prob=1.0, clean_lowercase=True)
    for augment in (augment_weak, augment_strong):
        assert augment("The Caf\xc3\xa9 &amp; THE Dog", as_written, philox(0)) == "The Caf\xc3\xa9 &amp; THE Dog"
        assert augment("The Caf\xc3\xa9 &amp; THE Dog", cleaned, philox(0)) == "caf\xe9 & dog"


def test_stopword_removal_happens_as_often_as_asked() -> None:
    config = only(identity=1.0, stopword_prob=0.8)
    for augment in (augment_weak, augment_strong):
        counts = Counter(augment(CAPTION, config, philox(1, counter)) for counter in range(4000))
        assert set(counts) == {CAPTION, " ".join(KEPT)}
        assert_frequencies([counts[" ".join(KEPT)], counts[CAPTION]], [0.8, 0.2])


def operation(words: list[str]) -> str:
    if words == KEPT:
        return "identity"
    if len(words) < len(KEPT):
        return "deletion"
    return "swap" if sorted(words) == sorted(KEPT) else "synonym"


def test_strong_edits_happen_as_often_as_asked() -> None:
    config = TextAugmentConfig(
        stopword_prob=1.0, synonym=0.3, swap=0.25, deletion=0.2, identity=0.25, deletion_word_prob=0.5
    )
    rng = philox(2)
    counts = Counter(operation(augment_strong(CAPTION, config, rng).split()) for _ in range(6000))
    nothing = 0.2 * 2 * 0.5**5  # a deletion of no words, and one of all words, which is undone
    expected = {"synonym": 0.3, "swap": 0.25, "deletion": 0.2 - nothing, "identity": 0.25 + nothing}
    assert_frequencies([counts[name] for name in expected], list(expected.values()))


def test_swap_takes_every_pair_alike() -> None:
    rng, config = philox(3), only(swap=1.0)
    pairs = Counter()
    for _ in range(3000):
        changed = augment_strong("n0 n1 n2 n3", config, rng).split()
        pairs[tuple(i for i, word in enumerate(changed) if word != f"n{i}")] += 1
    assert set(map(len, pairs)) == {2}
    assert_frequencies(list(pairs.values()), [1 / 6] * 6)


def test_synonym_takes_every_place_that_has_one_alike() -> None:
    rng, config = philox(4), only(synonym=1.0)
    words = ["dog", "qqq", "photo", "the", "car"]
    places: Counter[int] = Counter()
    for _ in range(3000):
        changed = augment_strong(" ".join(words), config, rng)
        (place,) = (
            p
            for p, word in enumerate(words)
            if any(changed == " ".join([*words[:p], s, *words[p + 1 :]]) for s in synonyms(word))
        )
        places[place] += 1
    assert sorted(places) == [0, 2, 4]
    assert_frequencies(list(places.values()), [1 / 3] * 3)


def test_deletion_drops_each_word_alike() -> None:
    rng, config = philox(5), only(deletion=1.0)
    words = [f"n{i}" for i in range(20)]
    kept = Counter(word for _ in range(2000) for word in augment_strong(" ".join(words), config, rng).split())
    total = sum(kept.values())
    assert abs(total / (2000 * 20) - 0.9) < 6 * (0.9 * 0.1 / (2000 * 20)) ** 0.5
    assert all(abs(kept[word] / 2000 - 0.9) < 6 * (0.9 * 0.1 / 2000) ** 0.5 for word in words)


@settings(deadline=None)
@given(TEXTS, SEEDS, st.booleans())
def test_words_never_run_out(caption: str, key: int, clean: bool) -> None:
    config = TextAugmentConfig(clean_lowercase=clean, stopword_prob=1.0, deletion_word_prob=0.9)
    words = text_augment._words(caption, config)
    for augment in (augment_weak, augment_strong):
        changed = augment(caption, config, philox(key))
        assert bool(changed.split()) == bool(words)
        assert changed == " ".join(changed.split())
        assert changed == augment(caption, config, philox(key))


@settings(deadline=None)
@given(TEXTS, SEEDS)
def test_each_edit_changes_what_it_says(caption: str, key: int) -> None:
    words = caption.split()
    assert set(augment_weak(caption, only(identity=1.0, stopword_prob=1.0), philox(key)).split()) <= set(words)
    swapped = augment_strong(caption, only(swap=1.0), philox(key)).split()
    assert sorted(swapped) == sorted(words)
    assert sum(a != b for a, b in zip(swapped, words, strict=True)) in (0, 2)
    deleted = iter(words)
    assert all(word in deleted for word in augment_strong(caption, only(deletion=1.0), philox(key)).split())
    replaced = augment_strong(caption, only(synonym=1.0), philox(key))
    one_word_changed = [
        " ".join([*words[:p], synonym, *words[p + 1 :]]) for p, word in enumerate(words) for synonym in synonyms(word)
    ]
    assert replaced in (one_word_changed or [" ".join(words)])


@pytest.mark.parametrize("caption", ["dog", "the", "qqq", "", " "])
def test_one_word_or_none(caption: str) -> None:
    config = TextAugmentConfig(stopword_prob=1.0, deletion_word_prob=1.0)
    seen = {augment_strong(caption, config, philox(0, counter)) for counter in range(200)}
    assert seen <= {caption.strip(), *synonyms(caption.strip())}
    assert (len(seen) > 10) == (caption == "dog")
    assert augment_weak(caption, config, philox(0)) == caption.strip()


def test_an_edit_that_leaves_no_words_is_undone() -> None:
    assert augment_weak("the of a", only(identity=1.0, stopword_prob=1.0), philox(0)) == "the of a"
    assert augment_strong("two dogs", only(deletion=1.0, deletion_word_prob=1.0), philox(0)) == "two dogs"


def test_keys_and_counters_give_other_words() -> None:
    config = TextAugmentConfig()
    assert len({augment_strong(CAPTION, config, philox(key)) for key in range(50)}) > 20
    assert len({augment_strong(CAPTION, config, philox(0, counter)) for counter in range(50)}) > 20


def test_synonyms_follow_wordnet() -> None:
    assert synonyms("photo") == ("exposure", "photograph", "pic", "picture")
    assert {"domestic dog", "canis familiaris", "chase"} <= set(synonyms("dog"))
    assert {"dog", *synonyms("dog")} == set(synonyms("dogs"))  # regular inflection
    assert "mouse" in synonyms("mice")  # irregular inflection
    assert "big" in synonyms("larger")
    assert synonyms("Photo") == synonyms("photo")
    assert synonyms("the") == synonyms("qqq") == synonyms("") == synonyms("dog.") == ()
    assert "a" in text_augment._load_table()  # only being a stop word keeps angstrom and adenine out
    assert synonyms("a") == ()


def test_table_holds_clean_words() -> None:
    table = text_augment._load_table()
    assert len(table) > 80_000
    for word, lemmas in table.items():
        assert re.fullmatch("[a-z-]+", word)
        assert lemmas.count("\t") == 3
        assert re.fullmatch("[a-z ,\t-]+", lemmas)
    assert len(stopwords()) == 127


def test_table_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    original = text_augment.lzma.decompress
    monkeypatch.setattr(text_augment.lzma, "decompress", lambda packed: loads.append(1) or original(packed))
    text_augment._load_table.cache_clear()
    synonyms.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: synonyms("dog"), range(32)))) == 1
    assert len(loads) == 1


def test_config_errors() -> None:
    with pytest.raises(ValueError, match=re.escape("text.swap: got 1.5, expected a probability in [0, 1]")):
        TextAugmentConfig(swap=1.5)
    with pytest.raises(ValueError, match=r"synonym \+ swap \+ deletion \+ identity: got 1\.1, expected"):
        TextAugmentConfig(synonym=0.5)


@pytest.fixture(scope="module")
def build_tables() -> ModuleType:
    """The script that made the tables; it lies among the data, outside any package."""
    path = Path(text_augment.__file__).parent / "data" / "build_tables.py"
    spec = importlib.util.spec_from_file_location("build_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_synonym_table_is_built_from_wordnet_files(build_tables: ModuleType, tmp_path: Path) -> None:
    for name in build_tables.PARTS_OF_SPEECH:
        (tmp_path / f"data.{name}").write_text("  1 The licence  \n")
        (tmp_path / f"{name}.exc").write_text("")
    noun_lines = [
        "00000001 05 n 02 mouse 0 House_Mouse 0 001 @ 00000002 n 0000 | small rodent  ",
        "00000002 05 n 01 mouse 1 000 | quiet person  ",
    ]
    (tmp_path / "data.noun").write_text("  1 The licence  \n" + "\n".join(noun_lines) + "\n")
    (tmp_path / "data.adj").write_text("00000003 00 s 02 ready(p) 0 on_one's_toes(p) 0 000 | alert  \n")
    (tmp_path / "noun.exc").write_text("mice mouse\nfungi fungus\n")
    text = build_tables.table_text(build_tables.synonym_table(tmp_path))
    assert text.split("\n") == [
        "mice\thouse mouse,mouse\t\t\t",
        "mouse\thouse mouse,mouse\t\t\t",
        "ready\t\t\ton ones toes,ready\t",
    ]
