"""From patterns to an epoch's order: which samples there are, who takes which, and where a run stands."""

from __future__ import annotations

import bisect
import glob
import hashlib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rocket_fast.errors import InvalidArgument, require
from rocket_fast.loaders.sources import CaptionMember, RawSample, Source
from rocket_fast.loaders.sources.formats import open_source
from rocket_fast.loaders.sources.parquet import OPEN_ROW_GROUPS, RowGroupCache
from rocket_fast.loaders.sources.table import SourceOptions
from rocket_fast.loaders.sources.webdataset import FileCache

_BRACES = re.compile(r"\{([^{}]*)\}")
_OPTIONS = re.compile(r"(.+?)\?((?:\w+=[^&]*)(?:&\w+=[^&]*)*)")  # a question mark is a glob's as well
_FRACTIONS = 1 << 32  # the counters of the samples' own generators are below, and hold a hash


class Found(NamedTuple):
    """A file or folder of samples, the pattern that named it and its place among them, and the options behind it."""

    path: Path
    pattern: str
    number: int
    options: dict[str, str]


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


def expand_patterns(patterns: Sequence[str], *, field: str = "shards") -> list[Found]:
    """What the patterns name, in the order given, a glob's sorted; ValueError, naming ``field``, for a missing one."""
    found: dict[Path, Found] = {}
    for number, pattern in enumerate(patterns):
        for text in expand_braces(pattern):
            match = None if Path(text).exists() else _OPTIONS.fullmatch(text)
            place, query = match.groups() if match else (text, "")
            options = dict(option.split("=", 1) for option in query.split("&") if option)
            for path in map(Path, _paths(place, pattern, field)):
                require(path.exists(), field, pattern, f"existing files, but there is no file {path}")
                require(path not in found, field, pattern, f"each shard once, but {path} is named again")
                found[path] = Found(path, pattern, number, options)
    return list(found.values())


def _paths(place: str, pattern: str, field: str) -> list[str]:
    if not glob.has_magic(place) or Path(place).exists():
        return [place]
    paths = sorted(glob.glob(place, recursive=True))
    require(len(paths) > 0, field, pattern, "a pattern that some file matches (for the demo: rocket-fast data emoji)")
    return paths


class ShardSet:
    """All samples of the sources that ``patterns`` name, numbered 0 ... in the order of the sources.

    ``skipped`` counts the samples that lack an image or the wanted caption, by reason. ``weights``, one per pattern, is
    how often an epoch shows each of its samples; see ``epoch_order``. Raises ValueError naming pattern and path for a
    source that is missing or cannot be read, and if there is no usable sample; it names ``field``.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        *,
        caption: CaptionMember = "txt",
        weights: Sequence[float] | None = None,
        field: str = "shards",
    ) -> None:
        weights_fit = weights is None or len(weights) == len(patterns)
        require(weights_fit, "weights", weights, lambda: f"{len(patterns)} numbers, one a pattern")
        shared = SourceOptions(caption=caption, files=FileCache(), row_groups=RowGroupCache())
        self.sources: list[Source] = []
        found = expand_patterns(patterns, field=field)
        for path, pattern, _, options in found:
            try:
                self.sources.append(open_source(path, options, shared))
            except (OSError, ValueError) as error:
                raise InvalidArgument(f"{field}: {path} (pattern {pattern!r}) cannot be read: {error}") from error
        self.paths = [each.path for each in found]
        if stale := shared.stale_indexes:
            warnings.warn(
                f"{len(stale)} index files cannot be used, and the tars' headers are read instead, which takes longer; "
                f"`rocket-fast data index` writes them anew. The first: {stale[0]}",
                stacklevel=2,
            )
        self.skipped: Counter[str] = sum((source.skipped for source in self.sources), Counter())
        counts = [len(source) for source in self.sources]
        self._ends = np.cumsum(counts).tolist()  # a list: numpy takes 10 us to find a place in an array
        wanted = "an image" if caption == "none" else f"image and .{caption}"
        if caption == "json":
            wanted += " (data.captions = several asks for it; txt for a .txt)"
        expected = f"at least one sample with {wanted}, but there are none; left out: {dict(self.skipped)}"
        require(len(self) > 0, field, tuple(patterns), expected)
        names = [source.name for source in self.sources]
        listing = "\n".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
        if weights is not None:
            listing += f"\n{tuple(map(float, weights))}"
        self.fingerprint = hashlib.blake2b(listing.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        for source, name in zip(self.sources, _distinct(names, self.paths), strict=True):
            source.name = name
        self._portions = _portions(
            [each.number for each in found], counts, [1.0] * len(patterns) if weights is None else weights
        )
        self.epoch_samples = sum(portion.samples * portion.whole + portion.extra for portion in self._portions)
        self._blocks = _number_blocks(self.sources) if any(s.blocks is not None for s in self.sources) else None

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, number: int) -> RawSample:
        """The bytes of one sample. Numbers from ``len`` on are showings after the first: the same under other keys."""
        showing, shard, index = self._place(number)
        sample = self.sources[shard].read(index)
        return sample if showing == 0 else replace(sample, key=f"{sample.key}#{showing + 1}")

    def locate(self, number: int) -> tuple[Path, str]:
        """The file or folder of the sample that ``read`` gives, and its key, or its number there if that is lost."""
        _, shard, index = self._place(number)
        try:
            return self.paths[shard], self.sources[shard].key(index)
        except OSError:
            return self.paths[shard], f"number {index}"

    def skipped_keys(self) -> dict[str, list[str]]:
        """Of what was left out, by reason, the first key of each source that has such."""
        keys = defaultdict[str, list[str]](list)
        for source in self.sources:
            for reason, key in source.skipped.first.items():
                keys[reason].append(f"{source.name}/{key}")
        return dict(keys)

    def first_skipped(self) -> tuple[Path, str, str] | None:
        """Of the first sample that was left out: file or folder, key, and reason. None if all can be used."""
        for path, source in zip(self.paths, self.sources, strict=True):
            for reason, key in source.skipped.first.items():
                return path, key, reason
        return None

    def _place(self, number: int) -> tuple[int, int, int]:
        """Showing, source, and index in it."""
        showing, index = divmod(number, len(self))
        shard = bisect.bisect_right(self._ends, index)
        return showing, shard, index - (self._ends[shard - 1] if shard else 0)

    def epoch_order(self, seed: int, epoch: int, *, shuffle: bool) -> np.ndarray:
        """The numbers that ``read`` takes, in the order of one epoch over all processes: (epoch_samples,).

        A pattern of weight 2.25 has each sample shown twice, and a quarter of them, drawn for the epoch, once more.
        Where a source can be read only by blocks (parquet that holds the pictures), the order has about 8 blocks in
        use at a time; everything else goes anywhere.
        """
        numbers = self._epoch_numbers(seed, epoch)
        if shuffle and self._blocks is not None:
            blocks = self._blocks[numbers % len(self)]
            return numbers[_order_near_blocks(blocks, numbers // len(self), _generator(seed, epoch))]
        return numbers[epoch_order(self.epoch_samples, seed, epoch, shuffle=shuffle)]

    def _epoch_numbers(self, seed: int, epoch: int) -> np.ndarray:
        """The numbers of an epoch, unshuffled."""
        parts = []
        for place, portion in enumerate(self._portions):
            own = portion.start + np.arange(portion.samples)
            parts += [own + showing * len(self) for showing in range(portion.whole)]
            if portion.extra:
                rng = _generator(seed, epoch, _FRACTIONS + place)
                chosen = np.sort(rng.choice(portion.samples, portion.extra, replace=False))
                parts.append(own[chosen] + portion.whole * len(self))
        return np.concatenate(parts)


class _Portion(NamedTuple):
    """The samples of one pattern: how often an epoch shows each, and how many of them once more."""

    start: int
    samples: int
    whole: int
    extra: int


def _portions(patterns: Sequence[int], counts: Sequence[int], weights: Sequence[float]) -> list[_Portion]:
    """Per weight its portion, from the sources' pattern numbers (ascending) and sample counts."""
    totals = [0] * len(weights)
    for pattern, count in zip(patterns, counts, strict=True):
        totals[pattern] += count
    starts = np.cumsum([0, *totals]).tolist()
    return [
        _Portion(start, total, int(weight), round(weight % 1 * total))
        for start, total, weight in zip(starts[:-1], totals, weights, strict=True)
    ]


def _distinct(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """The sources' names; where several are the same, as much of the end of the path as tells them apart."""
    distinct = list(names)
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        counts = Counter(distinct)
        if len(counts) == len(distinct):
            break
        pairs = zip(distinct, paths, strict=True)
        distinct = [name if counts[name] == 1 else "/".join(path.parts[-parts:]) for name, path in pairs]
    return distinct


def _number_blocks(sources: Sequence[Source]) -> np.ndarray:
    """int64 (samples,): the blocks of all sources numbered through, -1 for samples that are read one by one."""
    parts, before = [], 0
    for source in sources:
        blocks = source.blocks
        parts.append(np.full(len(source), -1) if blocks is None else blocks + before)
        before = max(before, int(parts[-1].max(initial=-1)) + 1)
    return np.concatenate(parts)


def _order_near_blocks(block: np.ndarray, showing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A shuffled order in which the samples of a block come within a window of ``OPEN_ROW_GROUPS`` blocks.

    Every sample has a time in [0, 1): a single one any, one of a block its block's plus a part of the window, around
    the end back to the beginning. Blocks begin evenly spaced, so that the number in use hardly varies.
    """
    time = rng.random(len(block))
    inside = block >= 0
    _, group = np.unique(block[inside] + showing[inside] * (int(block.max()) + 1), return_inverse=True)
    groups = int(group.max()) + 1
    begin = (rng.permutation(groups) + rng.random(groups)) / groups
    window = min(1.0, OPEN_ROW_GROUPS / groups)
    time[inside] = (begin[group] + window * time[inside]) % 1
    return np.argsort(time, kind="stable")


def _generator(seed: int, epoch: int, stream: int = 0) -> np.random.Generator:
    # The counters that sample_generator starts from hold a hash of the sample, these ones zeros.
    key, counter = np.array([seed, epoch], dtype=np.uint64), np.array([0, stream, 0, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def epoch_order(samples: int, seed: int, epoch: int, *, shuffle: bool) -> np.ndarray:
    """Sample numbers in the order of one epoch over all processes."""
    order = np.arange(samples, dtype=np.uint32 if samples < 2**32 else np.uint64)
    if shuffle:
        _generator(seed, epoch).shuffle(order)
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
