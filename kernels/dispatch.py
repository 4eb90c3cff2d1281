"""Which implementation serves a tensor: Triton kernels where they run, tiles of torch everywhere else."""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rocket_fast.kernels import tiled


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_kernels() -> ModuleType:
    """The Triton implementation; it is not imported before it is needed."""
    from rocket_fast.kernels import triton_contrastive

    return triton_contrastive


def autocast_on(device_type: str) -> bool:
    """Whether autocast is on; some devices, "meta" among them, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Operations choose their own precision; nothing is entered where autocast is off, which takes a while."""
    return torch.autocast(device_type, enabled=False) if autocast_on(device_type) else nullcontext()


def takes_triton(x: Tensor) -> bool:
    """Whether Triton kernels serve ``x``: on CUDA (and ROCm), and on the CPU under its interpreter; if it is installed.

    float64 never: no tensor core computes with it, and who uses it wants the digits.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return x.dtype != torch.float64 and (x.is_cuda or interpreted) and _triton_installed()


def implementation(x: Tensor) -> ModuleType:
    """The module whose contrastive operations serve ``x``."""
    return _triton_kernels() if takes_triton(x) else tiled
