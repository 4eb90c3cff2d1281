"""Which loading backend a run takes, and why."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from rocket_fast.image_augment import ImageAugmentConfig
from rocket_fast.loaders.base import DataConfig, Loader
from rocket_fast.loaders.cpu import CPULoader
from rocket_fast.loaders.dali import DALILoader
from rocket_fast.loaders.gpu_views import GPUViewsLoader
from rocket_fast.loaders.unpaired import WithUnpaired, unpaired_data, unpaired_views
from rocket_fast.text_augment import TextAugmentConfig
from rocket_fast.tokenizer import Tokenizer


class LoaderChoice(NamedTuple):
    """A backend, and the reason for people."""

    name: Literal["cpu", "cpu+gpu", "dali"]
    reason: str


def choose_loader(data: DataConfig, device: torch.device) -> LoaderChoice:
    """``data.backend``; ``auto`` is the CPU until the others' parts on CUDA have passed their tests on a card."""
    if data.backend != "auto":
        return LoaderChoice(data.backend, "as data.backend says")
    if device.type == "cuda":
        reason = "data.backend = 'dali' decodes on the GPU, 'cpu+gpu' augments there; both have yet to prove themselves"
        return LoaderChoice("cpu", reason)
    return LoaderChoice("cpu", "the device is not CUDA")


def open_loader(
    data: DataConfig,
    image: ImageAugmentConfig,
    text: TextAugmentConfig | None,
    tokenizer: Tokenizer,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Loader, LoaderChoice]:
    """The loader that ``choose_loader`` names, with another beside it for ``data.unpaired``. Raises what they do.

    ``dtype``: what the step computes in, for the images of a loader that normalises them.
    """
    choice = choose_loader(data, device)

    def opened(data: DataConfig, image: ImageAugmentConfig, tokenizer: Tokenizer | None) -> Loader:
        options: dict[str, Any] = {"seed": seed, "rank": rank, "world_size": world_size}
        if choice.name == "cpu":
            return CPULoader(data, image, text, tokenizer, pin_memory=device.type == "cuda", **options)
        if choice.name == "cpu+gpu":
            return GPUViewsLoader(data, image, text, tokenizer, device=device, dtype=dtype, **options)
        number = None if device.type != "cuda" else device.index or 0
        return DALILoader(data, image, text, tokenizer, device_id=number, **options)

    pictures = unpaired_data(data, world_size) if data.unpaired else None
    paired = opened(data, image, tokenizer)
    if pictures is None:
        return paired, choice
    try:
        return WithUnpaired(paired, opened(pictures, unpaired_views(image), None)), choice
    except BaseException:
        paired.close()
        raise
