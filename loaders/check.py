"""Read a data set once as training would, and say what would be skipped and why: `rocket-fast data check`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rocket_fast.errors import require
from rocket_fast.loaders.base import BadSampleError
from rocket_fast.loaders.cpu import decode_image, read_caption, read_captions
from rocket_fast.loaders.ordered_map import AHEAD, ordered_map
from rocket_fast.loaders.shards import ShardSet

EXAMPLES = 3
SHOWN = 12  # samples kept to be looked at


class Shown(NamedTuple):
    """A sample for the contact sheet: uint8 (H, W, 3) and its first caption."""

    key: str
    image: np.ndarray
    caption: str


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """``usable`` samples; what is left out, by reason; the first few keys of each reason."""

    usable: int
    skipped: Counter[str]
    examples: dict[str, list[str]]
    pixels: tuple[int, int] | None
    """Height times width of the smallest and of the largest picture; None where there is none."""
    sides: Counter[int]
    """Pictures by their shorter side in pixels."""
    words: Counter[int]
    """Captions by their number of words."""
    shown: tuple[Shown, ...]
    """Up to 12 samples spread over the data."""


class _Looked(NamedTuple):
    pixels: int
    side: int
    words: list[int]
    shown: Shown | None


def check_shards(
    patterns: Sequence[str],
    *,
    captions: Literal["txt", "several"] = "txt",
    pixel_limit: int = 100_000_000,
    workers: int = 2,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> CheckReport:
    """Index the shards, then read and decode every sample; ``advance(done, total)`` is called as it goes.

    Raises ``ValueError`` naming pattern and path for a shard that is missing or cannot be read.
    """
    require(workers >= 1, "workers", workers, "a number >= 1")
    shards = ShardSet(patterns, caption="txt" if captions == "txt" else "json")
    skipped = Counter(shards.skipped)
    examples = defaultdict[str, list[str]](list, {k: keys[:EXAMPLES] for k, keys in shards.skipped_keys().items()})
    pixels, sides, words, shown = Counter[int](), Counter[int](), Counter[int](), list[Shown]()
    showing = set(np.linspace(0, len(shards) - 1, SHOWN).astype(int).tolist())

    def look(index: int) -> tuple[str, str | _Looked]:
        key = f"sample {index}"
        try:
            raw = shards.read(index)
            key = raw.key
            texts = [read_caption(raw.text)] if captions == "txt" else read_captions(raw.json)
            image = decode_image(raw.image, pixel_limit)
        except BadSampleError as error:
            return key, error.reason
        height, width = image.shape[:2]
        kept = Shown(key, image, texts[0]) if index in showing else None
        return key, _Looked(height * width, min(height, width), [len(text.split()) for text in texts], kept)

    with ThreadPoolExecutor(workers) as pool:
        found = ordered_map(pool, look, range(len(shards)), workers * AHEAD)
        for done, (key, result) in enumerate(found, start=1):
            advance(done, len(shards))
            if isinstance(result, str):
                skipped[result] += 1
                if len(examples[result]) < EXAMPLES:
                    examples[result].append(key)
                continue
            pixels[result.pixels] += 1
            sides[result.side] += 1
            words.update(result.words)
            shown += [result.shown] if result.shown else []
    return CheckReport(
        usable=pixels.total(),
        skipped=skipped,
        examples=dict(examples),
        pixels=(min(pixels), max(pixels)) if pixels else None,
        sides=sides,
        words=words,
        shown=tuple(shown),
    )
