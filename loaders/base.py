"""What every loading backend agrees on: the data's configuration, the loader protocol, the order of random numbers."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from torch import Tensor

from rocket_fast.batch import Batch
from rocket_fast.errors import require

IMAGE_STREAM, TEXT_STREAM = 0, 1
Backend = Literal["auto", "cpu", "cpu+gpu", "dali"]
Quality = Literal["exact", "fast"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which image-text pairs to train on, and how they are batched."""

    train: tuple[str, ...]
    """Tars, .csv, .parquet, .npy, .json, .pkl, folders; globs (data/*.tar), braces ({000..331}), ?images=FOLDER."""
    unpaired: tuple[str, ...] = ()
    """Pictures to train a companion's heads on beside the pairs, with or without captions: patterns as train's."""
    unpaired_ratio: int = 4
    """Samples of a batch to each unpaired picture beside it: a step has batch_size / unpaired_ratio of the latter."""
    weights: tuple[float, ...] | None = None
    """How often an epoch shows the samples of each of these; 0.5 shows half of them, drawn anew; None is once each."""
    batch_size: int = 256
    """Samples per optimizer step over all processes; a multiple of their number."""
    workers: int = 2
    """Threads that decode and augment; unpaired pictures have workers / unpaired_ratio more, at least one."""
    captions: Literal["txt", "several"] = "txt"
    """txt: the .txt member (or the first caption), in all views; several: the list "captions" in the .json member (or
    all that the data has), one drawn per view."""
    shuffle: bool = True
    """A new order of all samples every epoch; False keeps the order of the shards."""
    drop_last: bool = True
    """Leave out the last, partial global batch of an epoch; False fills it up with samples marked not valid."""
    prefetch: int = 2
    """Batches made ahead of the trainer; 0 makes each when it is asked for."""
    trim_margins: bool = False
    """Cut off margins of one colour before any view is made, in evaluation too: drawings on canvases of all sizes."""
    pixel_limit: int = 100_000_000
    """Larger pictures are skipped before they are decoded (decompression bombs)."""
    strict: bool = False
    """Stop at the first sample that cannot be used and name it, instead of skipping and counting them."""
    quality: Quality = "exact"
    """exact: pictures decoded whole, views as Pillow's; fast: JPEGs decoded at a size that does for the crops, with
    quicker arithmetic: the same crops, about a grey level off on average, and more at sharp edges (CPU only)."""
    backend: Backend = "auto"
    """cpu: threads decode and make the views; cpu+gpu: they crop, the GPU does colours, blur and normalisation; dali:
    DALI decodes and does it all on the GPU; auto is cpu for now."""

    def __post_init__(self) -> None:
        patterns = not isinstance(self.train, str) and len(self.train) > 0
        require(patterns, "data.train", self.train, "a tuple of patterns")
        if self.weights is not None:
            usable = len(self.weights) == len(self.train) and all(0 < weight < math.inf for weight in self.weights)
            require(usable, "data.weights", self.weights, f"{len(self.train)} positive numbers, one per data.train")
        require(not isinstance(self.unpaired, str), "data.unpaired", self.unpaired, "a tuple of patterns")
        require(self.batch_size >= 1, "data.batch_size", self.batch_size, "a number >= 1")
        require(self.unpaired_ratio >= 1, "data.unpaired_ratio", self.unpaired_ratio, "a number >= 1")
        divides = not self.unpaired or self.batch_size % self.unpaired_ratio == 0
        expected = f"a divisor of data.batch_size = {self.batch_size}"
        require(divides, "data.unpaired_ratio", self.unpaired_ratio, expected)
        require(self.workers >= 1, "data.workers", self.workers, "a number >= 1")
        require(self.captions in ("txt", "several"), "data.captions", self.captions, "'txt' or 'several'")
        require(self.prefetch >= 0, "data.prefetch", self.prefetch, "a number >= 0")
        require(self.pixel_limit >= 1, "data.pixel_limit", self.pixel_limit, "a number >= 1")
        require(self.quality in get_args(Quality), "data.quality", self.quality, f"one of {get_args(Quality)}")
        require(self.backend in get_args(Backend), "data.backend", self.backend, f"one of {get_args(Backend)}")

    @property
    def unpaired_batch(self) -> int:
        """Unpaired pictures per optimizer step over all processes."""
        return self.batch_size // self.unpaired_ratio if self.unpaired else 0


class Loader(Protocol):
    """Batches of one process, in an order that depends on seed, epoch and data only.

    Of ``skipped``, samples found when the shards were indexed count once, those found on reading in every epoch.
    """

    @property
    def samples(self) -> int:
        """Samples in an epoch over all processes."""

    @property
    def skipped(self) -> Counter[str]:
        """Samples left out so far, by reason."""

    def __len__(self) -> int:
        """Batches per epoch, the same on every process."""

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch: from the first batch not yet delivered; nothing once it has ended."""

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; does nothing if that is the current one, so a resumed epoch goes on."""

    def state_dict(self) -> dict[str, Any]:
        """The place after the last delivered batch (batches made ahead do not count); equal on every process."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, bit for bit, with the batch that would have come next; ValueError if data or batches differ."""

    def close(self) -> None:
        """Stop and join all threads; harmless to repeat."""


@dataclass(frozen=True, kw_only=True)
class EvalBatch:
    """Pictures to evaluate on: ``images`` uint8 (B, 3, S, S), and per picture its caption and key."""

    images: Tensor
    captions: tuple[str, ...]
    keys: tuple[str, ...]


class BadSampleError(Exception):
    """One sample cannot be used; ``reason`` is what ``Loader.skipped`` counts it under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Reusable(threading.local):
    """One generator per thread; setting a Philox state takes a fifth of the time of making a new generator."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.generator = np.random.Generator(self.philox)
        self.start = self.philox.state
        self.key, self.counter = self.start["state"]["key"], self.start["state"]["counter"]
        self.last: str | None = None  # whose hash the counter holds


_reusable = _Reusable()


def sample_generator(seed: int, epoch: int, key: str, view: int, stream: int = IMAGE_STREAM) -> np.random.Generator:
    """The random numbers of one view of one sample in one epoch, whoever makes it and whatever was made before.

    Philox with key (seed, epoch) and counter (0, view and stream, 128-bit BLAKE2b hash of ``key``). The generator is
    shared within a thread: it is good until the thread's next call.
    """
    reusable = _reusable
    reusable.key[:] = seed, epoch
    counter = reusable.counter
    if key != reusable.last:
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        counter[2:], reusable.last = np.frombuffer(digest, dtype="<u8"), key
    counter[0], counter[1] = 0, 2 * view + stream
    reusable.philox.state = reusable.start
    return reusable.generator
