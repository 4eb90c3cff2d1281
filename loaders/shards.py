"""From shard patterns to an epoch's order: which samples there are, who takes which, and where a run stands."""

from __future__ import annotations

import glob
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rocket_fast.errors import InvalidArgument, require
from rocket_fast.loaders.sources import RawSample
from rocket_fast.loaders.sources.beton import BetonSource
from rocket_fast.loaders.sources.webdataset import CaptionMember, FileCache, TarSource

_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_braces(pattern: str) -> list[str]:
    """Every text that ``{000..331}`` (zero-padded as the first number is) and ``{a,b}`` stand for, in order."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, dots, last = match[1].partition("..")
    if dots and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
        values = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        require("," in match[1], "shards", pattern, "braces like {000..331} or {a,b}")
        values = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [text for value in values for text in expand_braces(before + value + after)]


def expand_patterns(patterns: Sequence[str]) -> list[tuple[Path, str]]:
    """Shard files and the pattern each came from, in the order given, a glob's sorted; ValueError for a missing one."""
    found: dict[Path, str] = {}
    for pattern in patterns:
        for text in expand_braces(pattern):
            literal = not glob.has_magic(text) or Path(text).exists()
            paths = [text] if literal else sorted(glob.glob(text, recursive=True))
            require(
                len(paths) > 0,
                "shards",
                pattern,
                "a pattern that some file matches (for the demo: rocket-fast data emoji)",
            )
            for path in map(Path, paths):
                require(path.is_file(), "shards", pattern, f"existing files, but there is no file {path}")
                require(path not in found, "shards", pattern, f"each shard once, but {path} is named again")
                found[path] = pattern
    return list(found.items())


class ShardSet:
    """All samples of the shards that ``patterns`` name, numbered 0 ... in shard order.

    ``skipped`` counts the samples that lack an image or the wanted caption, by reason. Raises ValueError naming pattern
    and path for a shard that is missing or cannot be read, and if there is no usable sample.
    """

    def __init__(self, patterns: Sequence[str], *, caption: CaptionMember = "txt") -> None:
        files = FileCache()
        self.sources: list[TarSource | BetonSource] = []
        for path, pattern in expand_patterns(patterns):
            try:
                open_source = BetonSource if path.suffix == ".beton" else TarSource
                self.sources.append(open_source(path, files, caption=caption))
            except (OSError, ValueError) as error:
                raise InvalidArgument(f"shards: {path} (pattern {pattern!r}) cannot be read: {error}") from error
        self.skipped: Counter[str] = sum((source.skipped for source in self.sources), Counter())
        counts = [len(source) for source in self.sources]
        self._ends = np.cumsum(counts)
        found = (
            f"at least one sample with image and .{caption} (data.captions says which), but there are none; "
            f"left out: {dict(self.skipped)}"
        )
        require(len(self) > 0, "shards", tuple(patterns), found)
        listing = "\n".join(f"{source.name} {count}" for source, count in zip(self.sources, counts, strict=True))
        self.fingerprint = hashlib.blake2b(listing.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> RawSample:
        """The bytes of one sample."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[shard].read(index - (int(self._ends[shard - 1]) if shard else 0))


def epoch_order(samples: int, seed: int, epoch: int, *, shuffle: bool) -> np.ndarray:
    """Sample numbers in the order of one epoch over all processes."""
    order = np.arange(samples, dtype=np.uint32 if samples < 2**32 else np.uint64)
    if shuffle:
        # The counters that sample_generator starts from hold a hash of the sample, this one zeros.
        np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))).shuffle(order)
    return order


class Cursor:
    """Divides an epoch of ``samples`` among processes, and knows how many batches of it have been delivered.

    Global batch g is ``global_batch`` samples in a row of the epoch's order, whatever their split: process ``rank``
    takes the ``rank``-th part of it, ``batch_size`` samples. A partial last one, if kept, is dealt out one by one.
    """

    def __init__(
        self, samples: int, global_batch: int, *, rank: int = 0, world_size: int = 1, drop_last: bool = True
    ) -> None:
        require(0 <= rank < world_size, "rank", rank, f"0 <= rank < world_size = {world_size}")
        expected = f"a multiple of the number of processes, {world_size}"
        require(global_batch % world_size == 0, "data.batch_size", global_batch, expected)
        self.samples, self.global_batch, self.rank, self.world_size = samples, global_batch, rank, world_size
        self.batch_size = global_batch // world_size
        self.batches = samples // global_batch if drop_last else -(-samples // global_batch)
        expected = f"at most the number of samples, {samples}; or data.drop_last = False"
        require(self.batches > 0, "data.batch_size", global_batch, expected)
        self.epoch = 0
        self.delivered = 0

    def places(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in the epoch's order of this process's ``batch``: int64 (B,); and bool (B,), False beyond the end."""
        start = batch * self.global_batch
        if start + self.global_batch <= self.samples:
            places = start + self.rank * self.batch_size + np.arange(self.batch_size)
        else:
            places = start + self.rank + self.world_size * np.arange(self.batch_size)
        return places % self.samples, places < self.samples

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch."""
        require(epoch >= 0, "epoch", epoch, "a number >= 0")
        if epoch != self.epoch:
            self.epoch, self.delivered = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Epoch and global samples delivered in it: the place is the same for any split of the same global batch."""
        return {"epoch": self.epoch, "delivered": self.delivered * self.global_batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place; ValueError if it lies between two batches of this size."""
        delivered = state["delivered"]
        expected = f"a multiple of the global batch {self.global_batch} up to {self.batches * self.global_batch}"
        fits = delivered % self.global_batch == 0 and delivered <= self.batches * self.global_batch
        require(fits, "samples delivered in the saved epoch", delivered, expected)
        self.epoch, self.delivered = state["epoch"], delivered // self.global_batch
