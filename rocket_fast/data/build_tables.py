"""Makes the tables in this folder from their sources; run once, kept so that they can be made again.

python rocket_fast/data/build_tables.py --wordnet /usr/share/wordnet --clip-vocabulary bpe_simple_vocab_16e6.txt.gz

``/usr/share/wordnet`` is Debian's package wordnet-base; the vocabulary lies in OpenAI's CLIP repository and in the
package open_clip_torch.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rocket_fast.tokenizer import BYTES_BY_ID

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
MERGES = 48_894  # 49,408 ids less 2 x 256 bytes and 2 special ones


def read_synsets(data_file: Path) -> Iterator[list[str]]:
    """Lemmas of each synset of a WordNet data file (format: wndb(5WN))."""
    for line in data_file.read_text().splitlines():
        if not line.startswith(" "):  # the licence is indented
            fields = line.split(" ")
            count = int(fields[3], 16)
            yield [lemma.split("(")[0].lower() for lemma in fields[4 : 4 + 2 * count : 2]]  # adjectives: galore(ip)


def synonym_table(wordnet: Path) -> dict[str, list[set[str]]]:
    """Per single word and part of speech, the cleaned lemmas of all its synsets, itself included.

    Irregular forms (mice, went) get those of their base, so that they are found like regular ones.
    """
    table: dict[str, list[set[str]]] = defaultdict(lambda: [set() for _ in PARTS_OF_SPEECH])
    for part, name in enumerate(PARTS_OF_SPEECH):
        for lemmas in read_synsets(wordnet / f"data.{name}"):
            cleaned = {re.sub("[^a-z -]", "", lemma.replace("_", " ")).strip() for lemma in lemmas} - {""}
            for lemma in filter(is_word, lemmas):
                table[lemma][part] |= cleaned
        for line in (wordnet / f"{name}.exc").read_text().splitlines():
            form, *bases = line.split()
            found = [table[base][part] for base in bases if base in table]
            if is_word(form) and any(found):
                table[form][part] |= set().union(*found)
    return table


def is_word(lemma: str) -> bool:
    """Whether a lemma is one word of letters and hyphens."""
    return re.fullmatch("[a-z-]+", lemma) is not None


def table_text(table: dict[str, list[set[str]]]) -> str:
    """Lines ``word TAB nouns TAB verbs TAB adjectives TAB adverbs``, each a comma-separated list."""
    return "\n".join("\t".join([word, *(",".join(sorted(group)) for group in table[word])]) for word in sorted(table))


def merge_ids(vocabulary: Path) -> np.ndarray:
    """CLIP's merges as pairs of ids, uint16 (48894, 2); merge k makes id 512 + k."""
    lines = gzip.decompress(vocabulary.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    # The file writes unprintable bytes, which come last among the ids, as characters from 256 on.
    names = [chr(byte) if index < 188 else chr(256 + index - 188) for index, byte in enumerate(BYTES_BY_ID)]
    ids = {name: index for index, name in enumerate([*names, *(name + "</w>" for name in names)])}
    pairs = []
    for line in lines:
        left, right = line.split()
        pairs.append((ids[left], ids[right]))
        ids[left + right] = len(ids)
    assert len(ids) == 512 + MERGES, "two merges make the same token"
    return np.array(pairs, dtype=np.uint16)


def main() -> None:
    """Write the tables whose sources are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path)
    parser.add_argument("--clip-vocabulary", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    if options.wordnet:
        text = table_text(synonym_table(options.wordnet))
        packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
        (options.out / "wordnet_synonyms.txt.xz").write_bytes(packed)
    if options.clip_vocabulary:
        np.save(options.out / "clip_merges.npy", merge_ids(options.clip_vocabulary))


if __name__ == "__main__":
    main()
