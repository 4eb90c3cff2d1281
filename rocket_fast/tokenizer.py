"""CLIP's byte-pair tokenizer: open_clip's ids, chunk by chunk from memory.

A caption is cleaned (mojibake, HTML entities, white space), lowercased and cut at white space into chunks. No token
reaches over white space, so a chunk's ids do not depend on its neighbours and are remembered; only a chunk not met
before goes through the word pattern and the merges.

The vocabulary is CLIP's (Radford et al. 2021, https://github.com/openai/CLIP; licence in data/CLIP_LICENSE). The ids
equal those of open_clip's ``SimpleTokenizer`` except around letters and digits younger than the running Python's
Unicode tables (``unicodedata.unidata_version``), which count as punctuation here.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from rocket_fast.batch import PackedText
from rocket_fast.errors import optional_import, require

_MERGES_FILE = Path(__file__).parent / "data" / "clip_merges.npy"
# Ids 0-255 are single bytes, printable ones first; 256-511 the same bytes at the end of a word; then one id per merge.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES_BY_ID = [*_PRINTABLE, *(byte for byte in range(256) if byte not in _PRINTABLE)]
_BYTE_IDS = [BYTES_BY_ID.index(byte) for byte in range(256)]
_END_OF_WORD = 256
_FIRST_MERGE = 512
_SOT, _EOT = 49406, 49407
_SPECIAL = {"<start_of_text>": _SOT, "<end_of_text>": _EOT}

# Printable ASCII and line breaks without an ampersand: ftfy and html.unescape leave it alone but for white space.
_NOTHING_TO_REPAIR = re.compile(r"[\t\n\r !-%'-~]*").fullmatch
# Words of a chunk in which _SHADOW has replaced what is not ASCII.
_WORD = re.compile(r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^a-z0-9]+")
_IOTA_SUBSCRIPT = "\u0345"  # to open_clip's pattern, which ignores case, neither a letter nor anything else: a gap

_REMEMBERED_LENGTH = 40  # longer chunks are addresses and sentences of scripts without spaces: hardly met twice
_REMEMBERED_CHUNKS = 1 << 17  # tens of megabytes; then the memory starts afresh, and the frequent words are soon back
_chunk_ids: dict[str, tuple[int, ...]] = {}  # shared by all threads: values never change, so a race only repeats work


class _Shadow(dict[int, str]):
    """Table for ``str.translate``: a letter becomes z, a number 0, anything else !; ASCII stays."""

    def __missing__(self, code: int) -> str:
        kind = unicodedata.category(chr(code))[0]
        stand_in = chr(code) if code < 0x80 else {"L": "z", "N": "0"}.get(kind, "!")
        self[code] = stand_in
        return stand_in


_SHADOW = _Shadow({ord("ſ"): "s"})  # open_clip's pattern ignores case, so it takes 'ſ for 's


@functools.cache
def _merges() -> dict[tuple[int, int], int]:
    """The id that two neighbouring ids make; smaller ones are merged first."""
    return {(left, right): _FIRST_MERGE + row for row, (left, right) in enumerate(np.load(_MERGES_FILE).tolist())}


@functools.cache
def _texts() -> list[bytes]:
    """What each id stands for; the end of a word is a space, start and end of text are nothing."""
    texts = [bytes([byte]) for byte in BYTES_BY_ID]
    texts += [text + b" " for text in texts]
    for left, right in _merges():
        texts.append(texts[left] + texts[right])
    return [*texts, b"", b""]


def _merge(word: list[int]) -> list[int]:
    """Merge neighbours, the smallest resulting id first and then the leftmost, until none is left; O(n log n).

    A merged id is larger than its parts, so the heap meets all places of one merge before any of a later one.
    """
    merges = _merges()
    heap = [(merged, place) for place, pair in enumerate(pairwise(word)) if (merged := merges.get(pair))]
    heapify(heap)
    ids = [*word, -1]  # -1: merged away, or beyond the end
    after, before = list(range(1, len(ids))), list(range(-1, len(word)))
    while heap:
        merged, place = heappop(heap)
        right = after[place]
        if merges.get((ids[place], ids[right])) != merged:
            continue  # one of the two has gone into another merge since
        ids[place], ids[right] = merged, -1
        after[place] = after[right]
        before[after[place]] = place
        for left in (before[place], place):
            if new := merges.get((ids[left], ids[after[left]])):
                heappush(heap, (new, left))
    return [token for token in ids if token >= 0]


def _word_ids(word: str) -> Iterable[int]:
    if word in _SPECIAL:
        return (_SPECIAL[word],)
    ids = [_BYTE_IDS[byte] for byte in word.encode()]
    ids[-1] += _END_OF_WORD
    return _merge(ids)


def _learn(chunk: str) -> tuple[int, ...]:
    """Ids of lowercase text without white space."""
    shadow = chunk if chunk.isascii() else chunk.translate(_SHADOW)
    words = (chunk[match.start() : match.end()] for match in _WORD.finditer(shadow))
    ids = tuple(chain.from_iterable(map(_word_ids, words)))
    if len(chunk) <= _REMEMBERED_LENGTH:
        if len(_chunk_ids) >= _REMEMBERED_CHUNKS:
            _chunk_ids.clear()
        _chunk_ids[chunk] = ids
    return ids


def clean_lower(caption: str) -> str:
    """Repair mojibake (ftfy), resolve HTML entities twice, lowercase: open_clip's cleaning but for white space."""
    if _NOTHING_TO_REPAIR(caption):
        return caption.lower()
    fixed = optional_import("ftfy", "train").fix_text(caption)
    return html.unescape(html.unescape(fixed)).lower().replace(_IOTA_SUBSCRIPT, " ")


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Captions to ids and back; safe to share between threads."""

    context_length: int = 77
    """Longest row of ids, start and end of text included."""

    vocab_size: ClassVar[int] = 49408
    sot_id: ClassVar[int] = _SOT
    eot_id: ClassVar[int] = _EOT

    def __post_init__(self) -> None:
        require(self.context_length >= 2, "context_length", self.context_length, "a number >= 2")
        _merges()  # loaded before threads ask for it

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of each caption from start to end of text, cut to ``context_length`` with end of text last.

        ValueError for anything but a sequence of strings.
        """
        require(not isinstance(captions, str), "captions", captions, "a sequence of strings, not one string")
        longest, known, rows = self.context_length - 1, _chunk_ids, []
        for index, caption in enumerate(captions):
            if not isinstance(caption, str):
                require(False, f"captions[{index}]", caption, "a string")
            ids = [_SOT]
            for chunk in clean_lower(caption).split(None, longest)[:longest]:  # each gives an id or more
                ids += known.get(chunk) or _learn(chunk)
            del ids[longest:]
            ids.append(_EOT)
            rows.append(ids)
        return rows

    def pack(self, captions: Sequence[str]) -> PackedText:
        """``encode`` laid end to end: int64 tokens (T,) and lengths (B,)."""
        rows = self.encode(captions)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        tokens = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
        longest = int(lengths.max(initial=0))
        return PackedText(tokens=torch.from_numpy(tokens), lengths=torch.from_numpy(lengths), longest=longest)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: lowercase, one space after each word, without start and end of text."""
        tokens, texts = list(ids), _texts()
        for token in tokens:
            require(0 <= token < self.vocab_size, "ids", token, f"ids in [0, {self.vocab_size})")
        return b"".join(texts[token] for token in tokens).decode(errors="replace").rstrip(" ")
