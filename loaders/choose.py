"""Which loading backend a run takes, and why."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from rocket_fast.errors import installed
from rocket_fast.image_augment import ImageAugmentConfig
from rocket_fast.loaders.base import DataConfig, Loader
from rocket_fast.loaders.cpu import CPULoader
from rocket_fast.loaders.dali import DALILoader, unsupported_option
from rocket_fast.text_augment import TextAugmentConfig
from rocket_fast.tokenizer import Tokenizer


class LoaderChoice(NamedTuple):
    """A backend, and the reason for people."""

    name: Literal["cpu", "dali"]
    reason: str


def choose_loader(data: DataConfig, image: ImageAugmentConfig, device: torch.device) -> LoaderChoice:
    """``data.backend``, or for ``auto`` DALI where ``device`` is CUDA, it is installed and can do what is wanted."""
    if data.backend != "auto":
        return LoaderChoice(data.backend, "as data.backend says")
    if device.type != "cuda":
        return LoaderChoice("cpu", "the device is not CUDA")
    option = unsupported_option(data, image)
    if option is not None:
        return LoaderChoice("cpu", "DALI cannot do {} = {}".format(*option))
    if not installed("nvidia.dali"):
        return LoaderChoice("cpu", "DALI is not installed: pip install 'rocket-fast[gpu]'")
    return LoaderChoice("dali", "the GPU decodes and augments")


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
) -> tuple[Loader, LoaderChoice]:
    """The loader that ``choose_loader`` names. Raises what its constructor does."""
    choice = choose_loader(data, image, device)
    if choice.name == "cpu":
        return CPULoader(data, image, text, tokenizer, seed=seed, rank=rank, world_size=world_size), choice
    device_id = None if device.type != "cuda" else device.index or 0
    loader = DALILoader(data, image, text, tokenizer, seed=seed, rank=rank, world_size=world_size, device_id=device_id)
    return loader, choice
