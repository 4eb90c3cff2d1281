"""Read a data set once as training would, and say what would be skipped and why: `rocket-fast data check`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from rocket_fast.errors import require
from rocket_fast.loaders.base import BadSampleError
from rocket_fast.loaders.cpu import decode_image, read_caption, read_captions
from rocket_fast.loaders.ordered_map import AHEAD, ordered_map
from rocket_fast.loaders.shards import ShardSet

EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """``usable`` samples; what is left out, by reason; the first few keys of each reason found on reading."""

    usable: int
    skipped: Counter[str]
    examples: dict[str, list[str]]
    pixels: tuple[int, int] | None
    """Height times width of the smallest and of the largest picture; None where there is none."""


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
    skipped, examples = Counter(shards.skipped), defaultdict[str, list[str]](list)
    usable, smallest, largest = 0, 0, 0

    def look(index: int) -> tuple[str, str | int]:
        key = f"sample {index}"
        try:
            raw = shards.read(index)
            key = raw.key
            read_caption(raw.text) if captions == "txt" else read_captions(raw.json)
            image = decode_image(raw.image, pixel_limit)
        except BadSampleError as error:
            return key, error.reason
        return key, image.shape[0] * image.shape[1]

    with ThreadPoolExecutor(workers) as pool:
        for done, (key, found) in enumerate(ordered_map(pool, look, range(len(shards)), workers * AHEAD), start=1):
            advance(done, len(shards))
            if isinstance(found, int):
                usable += 1
                smallest, largest = min(smallest or found, found), max(largest, found)
                continue
            skipped[found] += 1
            if len(examples[found]) < EXAMPLES:
                examples[found].append(key)
    extent = (smallest, largest) if usable else None
    return CheckReport(usable=usable, skipped=skipped, examples=dict(examples), pixels=extent)
