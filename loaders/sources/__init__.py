"""Where samples come from; each file reads one format and gives ``RawSample``s by number."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

CaptionMember = Literal["txt", "json", "none"]
"""Where a sample's captions are; none: pictures alone are wanted, with or without."""
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jpe", "jfif"})


@dataclass(frozen=True)
class RawSample:
    """One sample's undecoded bytes, under ``key`` (``shard/key``); any caption wanted is in ``text`` or ``json``."""

    key: str
    image: bytes
    text: bytes | None
    json: bytes | None


class Skipped(Counter[str]):
    """Samples left out, counted by reason; ``first`` holds for each reason the key of the first (or its number)."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, str] = {}

    def add(self, reason: str, key: str, count: int = 1) -> None:
        """``count`` samples, the first of them ``key``."""
        self[reason] += count
        self.first.setdefault(reason, key)


class Source(Protocol):
    """Samples of one file or folder, numbered; what can be seen to be unusable without reading is left out.

    ``name`` begins every key. ``skipped`` counts by reason what was left out. ``blocks``: int64 (len,), ascending, the
    block that each sample lies in where a block is read as a whole; None where samples are read one by one.
    """

    name: str
    skipped: Skipped
    blocks: np.ndarray | None

    def __len__(self) -> int:
        """Samples, the same number every time."""

    def key(self, index: int) -> str:
        """Sample ``index``'s key, without reading its picture. OSError where it has to be read and cannot be."""

    def read(self, index: int) -> RawSample:
        """Sample ``index``, from any thread; BadSampleError if it cannot be used. Its key is always the same, and no
        other sample's."""
