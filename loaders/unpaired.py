"""Pictures without captions beside the pairs: two loaders as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from rocket_fast.batch import Batch
from rocket_fast.errors import require
from rocket_fast.image_augment import ImageAugmentConfig
from rocket_fast.loaders.base import DataConfig, Loader


def unpaired_data(data: DataConfig, world_size: int) -> DataConfig:
    """What a loader of ``data.unpaired`` is made from, without a tokenizer; of shuffle, drop_last and weights it has
    its own: always, always, none.

    Raises ValueError where a step's pictures cannot be divided among the processes.
    """
    size, ratio = data.unpaired_batch, data.unpaired_ratio
    expected = f"a number that leaves {world_size} processes equally many of {data.batch_size} / {ratio} pictures"
    require(size % world_size == 0, "data.unpaired_ratio", ratio, expected)
    return replace(
        data,
        train=data.unpaired,
        unpaired=(),
        weights=None,
        batch_size=size,
        workers=max(1, data.workers // ratio),
        shuffle=True,
        drop_last=True,
    )


def unpaired_views(image: ImageAugmentConfig) -> ImageAugmentConfig:
    """The views of an unpaired picture: the strong ones, which a companion compares with each other."""
    first, *others = image.strong
    return ImageAugmentConfig(weak=first, strong=tuple(others))


class WithUnpaired:
    """The batches of ``paired``, each with the next pictures of ``unpaired``; implements ``loaders.base.Loader``.

    Epochs are those of ``paired``. ``unpaired`` goes through its own, one after the other, as long as there are
    batches; its place is part of the state. What it skips is counted as "unpaired: REASON".
    """

    def __init__(self, paired: Loader, unpaired: Loader) -> None:
        self._paired, self._unpaired = paired, unpaired
        self._pictures: Iterator[Batch] | None = None  # kept between epochs: pictures made ahead are not made again

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._paired)

    @property
    def samples(self) -> int:
        """Pairs in an epoch."""
        return self._paired.samples

    @property
    def skipped(self) -> Counter[str]:
        """Of both."""
        return self._paired.skipped + Counter({f"unpaired: {why}": n for why, n in self._unpaired.skipped.items()})

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch."""
        if self._pictures is None:
            self._pictures = self._endless()
        for batch in self._paired:
            yield replace(batch, unpaired=next(self._pictures).images)

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self._unpaired
            self._unpaired.set_epoch(self._unpaired.state_dict()["epoch"] + 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch`` of the pairs; unpaired pictures go on where they are."""
        self._paired.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The places in both, the same on every process."""
        return {**self._paired.state_dict(), "unpaired": self._unpaired.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        require("unpaired" in state, "data.unpaired", "a saved place without", "the saved run's: it had none")
        self._forget()
        self._paired.load_state_dict(state)
        self._unpaired.load_state_dict(state["unpaired"])

    def close(self) -> None:
        """Stop and join the threads of both."""
        self._forget()
        self._paired.close()
        self._unpaired.close()

    def _forget(self) -> None:
        """Pictures made ahead belong to the place before."""
        pictures: Any = self._pictures
        if pictures is not None:
            pictures.close()
        self._pictures = None
