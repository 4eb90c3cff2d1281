"""Ids against open_clip's, and against a slow twin on text nobody has seen."""

import html
import json
import pickle
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path

import ftfy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rocket_fast import tokenizer as tokenizer_module
from rocket_fast.tokenizer import Tokenizer, clean_lower

CASES = json.loads((Path(__file__).parent / "fixtures" / "tokenizer_cases.json").read_text())
SOT, EOT = 49406, 49407

# Ids of open_clip 3.3.0 without start and end of text: case folding, separators, control characters, entities.
ODD = [
    ("it'\u017f", [585, 6, 129, 379]),
    ("'S 'RE 'Ll", [568, 982, 1342]),
    ("a\u0345b", [320, 321]),
    ("\u0345", []),
    ("\u0345 " * 90 + "dog", [1929]),
    ("\u0391\u03a3 \u0391\u03a3.", [138, 109, 139, 480, 138, 109, 139, 480, 269]),
    ("<START_OF_TEXT>a<End_Of_Text>b", [49406, 320, 49407, 321]),
    ("<\u017ftart_of_text>", [27, 129, 123, 16707, 62, 684, 62, 18169, 285]),
    ("\u0130stanbul", [328, 16384, 11231]),
    ("\u2163 \u2173 \xbd\xb2", [158, 227, 367, 158, 227, 367, 33613, 41175]),
    ("\u4e00\u3007\uff13", [19759, 478, 4092, 485, 274]),
    ("a\x1cb\x1db", [38297]),
    ("a\x0bb\x0cc", [3937, 322]),
    ("\x1b[31mred\x1b[0m", [736]),
    ("\x85next\xa0line", [959, 1131, 1148]),
    ("\ud800lone", [39802, 13576]),
    ("\ud83d\ude00", [7334]),
    ("a\r\nb\tc", [320, 321, 322]),
    ("&#x1c;a&#128;&#0;b", [320, 34919, 39802, 321]),
    ("&AMP;amp; &lt;&#39;s", [261, 27, 262, 338]),
    ("&notit; &eacute", [126, 361, 585, 282, 4166]),
    ("a\u200bb\ufeffc\xad", [320, 9844, 2162, 22618]),
    ("\u2019s \u201cDON\u2019T\u201d", [568, 257, 847, 713, 257]),
    ("\uff06\uff41\uff4d\uff50\uff1b", [261]),
    ("e\u0301 i\u0307", [4166, 328, 16384]),
    ("123abc456", [272, 273, 274, 5334, 275, 276, 277]),
    ("!!'s?'t", [1443, 262, 338, 13610, 339]),
    ("x\xb2'll", [343, 41175, 1342]),
    ("&amp;amp;amp; dog", [261, 1929]),
    ("<b> &amp;lt; dog", [283, 321, 285, 283, 1929]),
    ("AT&T a&b", [536, 261, 339, 320, 261, 321]),
]

# Text that reaches the odd branches more often than random characters do.
FRAGMENTS = [
    "'s",
    "'RE",
    "'",
    "&",
    "&amp;",
    "&#39;",
    "<start_of_text>",
    "\u017f",
    "\u0345",
    "\u03a3",
    "\u0130",
    "Ã©",
    "â€™",
]
FRAGMENTS += [
    "dog",
    "Photo",
    "12",
    "\n",
    "\t",
    "\x1c",
    "\x00",
    "\xa0",
    "\u200b",
    "\ufeff",
    "\u2028",
    "\u3000",
    "½",
    "日本",
    "\ud800",
]
ODD_TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=6), max_size=12).map("".join)
ASCII_TEXT = st.text(st.characters(max_codepoint=127), max_size=40)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def slow_words(text: str) -> list[str]:
    """The word pattern of open_clip, one character at a time."""
    specials = ("<start_of_text>", "<end_of_text>", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
    words, at = [], 0
    while at < len(text):
        kinds = [kind(character) for character in text[at:]]
        folded = text[at:].replace("\u017f", "s")
        length = next((len(special) for special in specials if folded.startswith(special)), 0)
        if not length:
            same = next((n for n, k in enumerate(kinds) if k != kinds[0]), len(kinds))
            length = 1 if kinds[0] == "number" else same
            if kinds[0] == "gap":
                at += length
                continue
        words.append(text[at : at + length])
        at += length
    return words


def kind(character: str) -> str:
    if character.isspace() or character == "\u0345":
        return "gap"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")


def slow_merge(ids: list[int]) -> list[int]:
    """Byte-pair encoding by its definition: look for the first merge, apply it everywhere, again."""
    merges = tokenizer_module._merges()
    while found := [merges[pair] for pair in pairwise(ids) if pair in merges]:
        merged, at = [], 0
        while at < len(ids):
            hit = merges.get(tuple(ids[at : at + 2])) == min(found)
            merged.append(min(found) if hit else ids[at])
            at += 2 if hit else 1
        ids = merged
    return ids


def slow_ids(caption: str) -> list[int]:
    text = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    text = " ".join(text.split()).strip().lower()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    ids = []
    for word in slow_words(text):
        if word in ("<start_of_text>", "<end_of_text>"):
            ids.append(SOT if "start" in word else EOT)
            continue
        word_ids = [order.index(byte) for byte in word.encode()]
        ids += slow_merge([*word_ids[:-1], word_ids[-1] + 256])
    return ids


def test_ids_equal_open_clip(tokenizer: Tokenizer) -> None:
    rows = tokenizer.encode([case["text"] for case in CASES])
    assert len(CASES) == 280
    for row, case in zip(rows, CASES, strict=True):
        assert row == case["ids"], case["text"]


@pytest.mark.parametrize(("text", "ids"), ODD, ids=ascii)
def test_odd_text_equals_open_clip(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode([text]) == [[SOT, *ids, EOT]]


@settings(deadline=None)
@given(ODD_TEXT)
def test_any_text_equals_slow_twin(text: str) -> None:
    ids = slow_ids(text)
    assert Tokenizer(context_length=10_000).encode([text]) == [[SOT, *ids, EOT]]
    short = [SOT, *ids, EOT] if len(ids) <= 5 else [SOT, *ids[:5], EOT]
    assert Tokenizer(context_length=7).encode([text]) == [short]


@settings(deadline=None)
@given(ASCII_TEXT)
def test_cleaning_is_skipped_only_where_it_changes_nothing(text: str) -> None:
    cleaned = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    assert clean_lower(text).split() == " ".join(cleaned.split()).lower().split()


def test_every_ascii_character_beside_every_other_is_cleaned_alike() -> None:
    for first in map(chr, range(128)):
        for text in (f"{first}{chr(second)}x {chr(second)}{first}" for second in range(128)):
            if tokenizer_module._NOTHING_TO_REPAIR(text):
                assert html.unescape(ftfy.fix_text(text)).split() == text.split()


@settings(deadline=None)
@given(st.text("ab", max_size=60) | st.text("abcdefghij", max_size=60) | st.text(max_size=40))
def test_merging_by_heap_equals_merging_by_definition(word: str) -> None:
    ids = [tokenizer_module._BYTE_IDS[byte] for byte in word.encode(errors="replace")]
    assert tokenizer_module._merge(ids) == slow_merge(ids)


def test_merges_make_larger_ids() -> None:
    merges = tokenizer_module._merges()
    assert len(merges) == 49408 - 512 - 2  # what _merge relies on
    assert all(max(pair) < merged for pair, merged in merges.items())


def test_pack_lays_rows_end_to_end(tokenizer: Tokenizer) -> None:
    captions = [case["text"] for case in CASES]
    packed = tokenizer.pack(captions)
    assert packed.tokens.dtype == packed.lengths.dtype == torch.int64
    assert packed.tokens.tolist() == list(chain.from_iterable(case["ids"] for case in CASES))
    assert packed.lengths.tolist() == [len(case["ids"]) for case in CASES]
    assert len(tokenizer.pack([])) == 0


def test_decode(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode(["A  photo of a DOG, isn't it? caf\xe9 \u65e5\u672c"])
    assert tokenizer.decode(ids) == "a photo of a dog , isn 't it ? caf\xe9 \u65e5\u672c"
    assert tokenizer.decode(np.array([SOT, EOT])) == ""
    assert tokenizer.decode(ids[:-2]).startswith("a photo")  # a character cut in two is no error
    with pytest.raises(ValueError, match=re.escape("ids: got 49408, expected ids in [0, 49408)")):
        tokenizer.decode([49408])


def test_errors_name_the_caption(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=re.escape("captions[1]: got None, expected a string")):
        tokenizer.encode(["a dog", None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=re.escape("captions[0]: got b'dog'")):
        tokenizer.pack([b"dog"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="captions: got 'a dog'"):
        tokenizer.encode("a dog")
    with pytest.raises(ValueError, match="context_length: got 1, expected a number >= 2"):
        Tokenizer(context_length=1)


def test_threads_share_a_memory_that_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_REMEMBERED_CHUNKS", 30)
    tokenizer_module._chunk_ids.clear()
    tokenizer = pickle.loads(pickle.dumps(Tokenizer()))
    captions, expected = [case["text"] for case in CASES], [case["ids"] for case in CASES]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: tokenizer.encode(captions), range(12)))
    assert all(rows == expected for rows in results)
    assert len(tokenizer_module._chunk_ids) <= 30 + 4


def test_endless_word_ends(tokenizer: Tokenizer) -> None:
    letters = "".join(map(chr, np.random.default_rng(0).integers(ord("a"), ord("z") + 1, 50_000).tolist()))
    (ids,) = tokenizer.encode([letters])
    assert len(ids) == 77
    assert letters.startswith(tokenizer.decode(ids))
    assert letters not in tokenizer_module._chunk_ids
