"""Argument checks shared by the kernels: every error names the argument, the value got and the value expected."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses import FakeTensor

from rocket_fast.errors import require

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_matrix(name: str, x: Tensor) -> None:
    """A floating point matrix with at least one row and one column."""
    require(isinstance(x, Tensor), name, type(x), "a tensor")
    require(x.layout == torch.strided, name, x.layout, "a dense tensor")
    shape = tuple(x.shape)
    require(x.ndim == 2 and min(shape) > 0, name, shape, "a shape (N, D) with N >= 1 and D >= 1")
    require(x.dtype in DTYPES, name, x.dtype, "float16, bfloat16, float32 or float64")
    if not torch.compiler.is_compiling():
        # Operations without a forward derivative would let the tangent vanish without a word.
        tangent = forward_ad.unpack_dual(x).tangent
        require(tangent is None, name, "a tensor with a tangent (jvp)", "one without: derivatives are backward only")


def require_pair(first_name: str, first: Tensor, second_name: str, second: Tensor, *, one_dtype: bool = True) -> None:
    """Two matrices of one shape and device, and of one dtype where asked."""
    require_matrix(first_name, first)
    require(isinstance(second, Tensor), second_name, type(second), "a tensor")
    shape, got = tuple(first.shape), tuple(second.shape)
    require(got == shape, second_name, got, lambda: f"the shape of {first_name}, {shape}")
    fits = second.dtype == first.dtype or not one_dtype
    require(fits, second_name, second.dtype, f"the dtype of {first_name}, {first.dtype}")
    require(second.device == first.device, second_name, second.device, f"the device of {first_name}, {first.device}")


def require_views(
    first_name: str, first: Sequence[Tensor], second_name: str, second: Sequence[Tensor], *, one_dtype: bool = True
) -> None:
    """Equally many views on both sides, all of one shape and device, and of one dtype (or one for each side)."""
    for name, views in ((first_name, first), (second_name, second)):
        listed = isinstance(views, Sequence) and all(isinstance(view, Tensor) for view in views)
        require(listed, name, type(views), "a list or tuple of tensors, one for each view")
    count = len(first)
    require(len(second) == count, f"len({second_name})", len(second), f"{count}, the number of views in {first_name}")
    for index in range(count):
        require_pair(f"{first_name}[0]", first[0], f"{first_name}[{index}]", first[index])
        require_pair(f"{first_name}[0]", first[0], f"{second_name}[{index}]", second[index], one_dtype=one_dtype)
        require_pair(f"{second_name}[0]", second[0], f"{second_name}[{index}]", second[index])


def require_same_width(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Two matrices (N, D) and (M, D) on one device; dtypes may differ."""
    require_matrix(first_name, first)
    require_matrix(second_name, second)
    width, got = first.shape[1], tuple(second.shape)
    require(got[1] == width, second_name, got, lambda: f"a shape (M, {width}), as wide as {first_name}")
    require(second.device == first.device, second_name, second.device, f"the device of {first_name}, {first.device}")


def require_same_rows(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Two matrices (N, D), row by row belonging together."""
    require_same_width(first_name, first, second_name, second)
    shape, got = tuple(first.shape), tuple(second.shape)
    require(got[0] == shape[0], second_name, got, lambda: f"a shape {shape}, a row for each of {first_name}")


def require_scalar(name: str, value: Tensor | float, device: torch.device | None = None) -> None:
    """One number: finite wherever that can be seen without waiting for a device, on ``device`` if it is a tensor."""
    if not isinstance(value, Tensor):
        known = not torch.compiler.is_compiling()  # a number that changes from call to call is a symbol there
        number = isinstance(value, numbers.Real) and not isinstance(value, bool) and (not known or math.isfinite(value))
        require(number, name, value, "a finite number or a tensor of one")
        return
    require(value.numel() == 1, name, f"a tensor of shape {tuple(value.shape)}", "one value")
    require_finite(name, value)
    require(device is None or value.device == device, name, value.device, f"the device of the embeddings, {device}")


def require_scale(name: str, value: Tensor | float, device: torch.device | None = None) -> None:
    """``require_scalar``, and where it is seen not negative: an inverse temperature, after exp."""
    require_scalar(name, value, device)
    if isinstance(value, Tensor):
        known = values_visible(value)
        require(not known or float(value.detach()) >= 0, name, value, "an inverse temperature >= 0, after exp")
    elif not torch.compiler.is_compiling():
        require(value >= 0, name, value, "an inverse temperature >= 0, after exp")


def values_visible(value: Tensor) -> bool:
    """Whether values can be looked at at no cost: they exist, on the CPU, and no graph is being made."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(value, FakeTensor)


def require_integer(name: str, value: object) -> None:
    """A whole number of any kind."""
    require(isinstance(value, numbers.Integral) and not isinstance(value, bool), name, value, "an integer")


def require_finite(name: str, value: Tensor) -> None:
    """Finite values, wherever they are visible."""
    if values_visible(value):
        values = value.tolist()
        finite = math.isfinite(values) if isinstance(values, float) else bool(value.detach().isfinite().all())
        require(finite, name, values, "finite values")


def require_smoothing(label_smoothing: float, name: str = "label_smoothing") -> None:
    """A number in [0, 1)."""
    fits = isinstance(label_smoothing, numbers.Real) and 0.0 <= label_smoothing < 1.0
    require(fits, name, label_smoothing, "a number in [0, 1)")
