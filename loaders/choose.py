"""Which loading backend a run takes, and why."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from rocket_fast.image_augment import ImageAugmentConfig
from rocket_fast.loaders.base import DataConfig, Loader
from rocket_fast.loaders.cpu import CPULoader
from rocket_fast.loaders.dali import DALILoader
from rocket_fast.text_augment import TextAugmentConfig
from rocket_fast.tokenizer import Tokenizer


class LoaderChoice(NamedTuple):
    """A backend, and the reason for people."""

    name: Literal["cpu", "dali"]
    reason: str


def choose_loader(data: DataConfig, device: torch.device) -> LoaderChoice:
    """``data.backend``; ``auto`` is the CPU until DALI's part on CUDA has passed its test on a card (gpu_suite)."""
    if data.backend != "auto":
        return LoaderChoice(data.backend, "as data.backend says")
    if device.type == "cuda":
        return LoaderChoice("cpu", "data.backend = 'dali' decodes on the GPU, which is new and has yet to prove itself")
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
) -> tuple[Loader, LoaderChoice]:
    """The loader that ``choose_loader`` names. Raises what its constructor does."""
    choice = choose_loader(data, device)
    if choice.name == "cpu":
        pin = device.type == "cuda"
        loader = CPULoader(data, image, text, tokenizer, seed=seed, rank=rank, world_size=world_size, pin_memory=pin)
        return loader, choice
    device_id = None if device.type != "cuda" else device.index or 0
    place = {"rank": rank, "world_size": world_size}
    return DALILoader(data, image, text, tokenizer, seed=seed, **place, device_id=device_id), choice
