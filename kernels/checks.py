"""Argument checks shared by the kernels: every error names the argument, the value got and the value expected."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from rocket_fast.errors import require


def require_matrix(name: str, x: Tensor) -> None:
    """A floating point matrix with at least one row and one column."""
    require(isinstance(x, Tensor), name, type(x), "a tensor")
    shape = tuple(x.shape)
    require(x.ndim == 2 and min(shape) > 0, name, shape, "a shape (N, D) with N >= 1 and D >= 1")
    require(x.is_floating_point(), name, x.dtype, "a floating point dtype")


def require_pair(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Two matrices of one shape, dtype and device."""
    require_matrix(first_name, first)
    shape = tuple(first.shape)
    require(tuple(second.shape) == shape, second_name, tuple(second.shape), f"the shape of {first_name}, {shape}")
    require(second.dtype == first.dtype, second_name, second.dtype, f"the dtype of {first_name}, {first.dtype}")
    require(second.device == first.device, second_name, second.device, f"the device of {first_name}, {first.device}")


def require_views(first_name: str, first: Sequence[Tensor], second_name: str, second: Sequence[Tensor]) -> None:
    """Equally many views on both sides, all of one shape, dtype and device."""
    count = len(first)
    require(len(second) == count, f"len({second_name})", len(second), f"{count}, the number of views in {first_name}")
    for index in range(count):
        require_pair(f"{first_name}[0]", first[0], f"{first_name}[{index}]", first[index])
        require_pair(f"{first_name}[0]", first[0], f"{second_name}[{index}]", second[index])


def require_same_width(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Two matrices (N, D) and (M, D) on one device; dtypes may differ."""
    require_matrix(first_name, first)
    require_matrix(second_name, second)
    width = first.shape[1]
    expected = f"a shape (M, {width}), as wide as {first_name}"
    require(second.shape[1] == width, second_name, tuple(second.shape), expected)
    require(second.device == first.device, second_name, second.device, f"the device of {first_name}, {first.device}")


def require_same_rows(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Two matrices (N, D), row by row belonging together."""
    require_same_width(first_name, first, second_name, second)
    expected = f"a shape {tuple(first.shape)}, a row for each of {first_name}"
    require(len(second) == len(first), second_name, tuple(second.shape), expected)


def require_scalar(name: str, value: Tensor | float, device: torch.device | None = None) -> None:
    """One number: finite wherever that can be seen without waiting for a device, on ``device`` if it is a tensor."""
    if not isinstance(value, Tensor):
        number = isinstance(value, numbers.Real) and math.isfinite(value)
        require(number, name, value, "a finite number or a tensor of one")
        return
    require(value.numel() == 1, name, f"a tensor of shape {tuple(value.shape)}", "one value")
    require_finite(name, value)
    require(device is None or value.device == device, name, value.device, f"the device of the embeddings, {device}")


def require_finite(name: str, value: Tensor) -> None:
    """Finite values, looked at only on the CPU and outside a compiled graph, where it costs nothing."""
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        values = value.tolist()
        finite = math.isfinite(values) if isinstance(values, float) else bool(value.detach().isfinite().all())
        require(finite, name, values, "finite values")


def require_smoothing(label_smoothing: float, name: str = "label_smoothing") -> None:
    """A number in [0, 1)."""
    require(0.0 <= label_smoothing < 1.0, name, label_smoothing, "a number in [0, 1)")
