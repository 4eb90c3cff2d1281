"""Which implementation serves a tensor: Triton kernels where they run, tiles of torch everywhere else."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rocket_fast.kernels import tiled


@functools.cache
def _triton_module(name: str) -> ModuleType | None:
    """A file of Triton kernels, or None where triton is not installed; it is not imported before it is needed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"rocket_fast.kernels.{name}")


def autocast_on(device_type: str) -> bool:
    """Whether autocast is on; some devices, "meta" among them, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Operations choose their own precision; nothing is entered where autocast is off, which takes a while."""
    return torch.autocast(device_type, enabled=False) if autocast_on(device_type) else nullcontext()


def triton_kernels(name: str, x: Tensor) -> ModuleType | None:
    """That file's kernels if they serve ``x``: on CUDA (and ROCm), and on the CPU under Triton's interpreter.

    Never float64: no tensor core computes with it, and who uses it wants the digits.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if x.dtype == torch.float64 or not (x.is_cuda or interpreted):
        return None
    return _triton_module(name)


def implementation(x: Tensor) -> ModuleType:
    """The module whose contrastive operations serve ``x``: Triton's kernels where they run, else the tiles."""
    return triton_kernels("triton_contrastive", x) or tiled
