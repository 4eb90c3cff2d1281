"""The passes of batch normalisation as Triton kernels, as projector_passes.py describes them. Needs triton.

Shape legend: x, gradients and results (N, C), contiguous; vectors (C,). A program reads a tile of rows by columns as
often as its slab has tiles. Sums over rows go through partial ones, (S, 2, C) of S slabs of rows, that a second small
kernel adds up: no atomics, every sum in a fixed order.

================  ========  ==============================  ================================================
pass              launches  memory, in x's bytes (N C b)    beside
================  ========  ==============================  ================================================
moments           2         1 read                          8 S C bytes of partial sums written and read
normalize         1         1 read, 1 written
sums              2         2 read                          8 S C bytes of partial sums written and read
input_gradient    1         2 read, 1 written
================  ========  ==============================  ================================================

Forward and backward, 8 x N C b in 6 launches, and a few of a vector's size; kept are x and two vectors. Torch's batch
norm with ReLU in place moves 5 x forward and 8 x backward (3 the ReLU's, 5 the norm's) and keeps x and y. With the
linear layer after it (``batch_norm_linear``) backward makes y once more: 2 x N C b and one launch for not keeping it.

With ``TRITON_INTERPRET=1`` set before the import, everything here runs on CPU tensors.
"""

from __future__ import annotations

import typing as t  # kernels find names in modules only
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rocket_fast.errors import optional_import
from rocket_fast.kernels.launch import launch as _launch
from rocket_fast.kernels.launch import on_device_of as _on

triton: Any = optional_import("triton", "gpu")
tl: Any = optional_import("triton.language", "gpu")


@dataclass(frozen=True)
class Config:
    """Rows and columns of a tile, slabs of rows at most (a power of two), warps of a program."""

    rows: int
    columns: int
    slabs: int
    warps: int


CONFIG = Config(rows=32, columns=128, slabs=32, warps=4)
"""Of every device: memory decides, and a row of a tile is 256 bytes or more."""

# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(row: t.Any, column: t.Any, last: t.Any, C: t.Any) -> Any:
    """Places of a tile in (N, C), and which of them exist."""
    return row.to(tl.int64)[:, None] * C + column[None, :], (row < last)[:, None] & (column < C)[None, :]


@triton.jit
def _moments_kernel(
    x_ptr: t.Any, partial_ptr: t.Any, N: t.Any, C: t.Any, slab: t.Any, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    """Mean, less the batch's first row, and sum of squares of a slab's rows: a tile's about its own mean, then moved to
    the slab's (Chan et al.). Without a row taken off, float32 would round large means."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * slab
    last = tl.minimum(first + slab, N)
    origin = tl.load(x_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    mean, squares = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, last, ROWS):
        at, ok = _tile(start + tl.arange(0, ROWS), column, last, C)
        x = tl.where(ok, tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32) - origin[None, :], 0.0)
        before, count = (start - first).to(tl.float32), tl.minimum(last - start, ROWS).to(tl.float32)
        about = tl.sum(x, 0) / count
        centred = tl.where(ok, x - about[None, :], 0.0)
        apart, share = about - mean, count / (before + count)
        squares += tl.sum(centred * centred, 0) + apart * apart * (before * share)
        mean += apart * share
    partial_ptr += tl.program_id(1).to(tl.int64) * 2 * C + column
    tl.store(partial_ptr, mean, mask=column < C)
    tl.store(partial_ptr + C, squares, mask=column < C)


@triton.jit
def _common_moments_kernel(
    x_ptr: t.Any, partial_ptr: t.Any, out_ptr: t.Any, N: t.Any, C: t.Any, slab: t.Any, SLABS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """Those of all rows from those of the slabs, moved to the common mean."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.arange(0, SLABS)
    count = tl.minimum(tl.maximum(N - index * slab, 0), slab).to(tl.float32)[:, None]
    ok = (index * slab < N)[:, None] & (column < C)[None, :]
    at = index.to(tl.int64)[:, None] * 2 * C + column[None, :]
    means = tl.load(partial_ptr + at, mask=ok, other=0.0)
    mean = tl.sum(means * count, 0) / N
    apart = means - mean[None, :]
    squares = tl.load(partial_ptr + at + C, mask=ok, other=0.0) + tl.where(ok, apart * apart * count, 0.0)
    origin = tl.load(x_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    tl.store(out_ptr + column, origin + mean, mask=column < C)
    tl.store(out_ptr + C + column, tl.sum(squares, 0), mask=column < C)


@triton.jit
def _affine(
    column: t.Any, inverse_ptr: t.Any, weight_ptr: t.Any, bias_ptr: t.Any, C: t.Any, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
) -> Any:  # fmt: skip
    """Inverse deviation, what a centred x is multiplied with, what is added then."""
    inverse = tl.load(inverse_ptr + column, mask=column < C, other=0.0)
    scale, shift = inverse, tl.zeros_like(inverse)
    if WEIGHT:
        scale *= tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    if BIAS:
        shift = tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    return inverse, scale, shift


@triton.jit
def _normalize_kernel(
    x_ptr: t.Any, mean_ptr: t.Any, inverse_ptr: t.Any, weight_ptr: t.Any, bias_ptr: t.Any, out_ptr: t.Any,
    N: t.Any, C: t.Any,
    RELU: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    _, scale, shift = _affine(column, inverse_ptr, weight_ptr, bias_ptr, C, WEIGHT, BIAS)
    mean = tl.load(mean_ptr + column, mask=column < C, other=0.0)
    at, ok = _tile(tl.program_id(1) * ROWS + tl.arange(0, ROWS), column, N, C)
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    y = (x - mean[None, :]) * scale[None, :] + shift[None, :]
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # a NaN stays
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _passed(
    d_y_ptr: t.Any, x_ptr: t.Any, at: t.Any, ok: t.Any, mean: t.Any, scale: t.Any, shift: t.Any, RELU: tl.constexpr
) -> Any:
    """x less its mean, and the gradient where the ReLU lets it pass; zero where nothing is."""
    centred = tl.where(ok, tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[None, :], 0.0)
    d = tl.load(d_y_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        d = tl.where(centred * scale[None, :] + shift[None, :] <= 0.0, 0.0, d)
    return centred, d


@triton.jit
def _sums_kernel(
    d_y_ptr: t.Any, x_ptr: t.Any, mean_ptr: t.Any, inverse_ptr: t.Any, weight_ptr: t.Any, bias_ptr: t.Any,
    partial_ptr: t.Any, N: t.Any, C: t.Any, slab: t.Any,
    RELU: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """A slab's part of both sums."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inverse, scale, shift = _affine(column, inverse_ptr, weight_ptr, bias_ptr, C, WEIGHT, BIAS)
    mean = tl.load(mean_ptr + column, mask=column < C, other=0.0)
    first = tl.program_id(1) * slab
    last = tl.minimum(first + slab, N)
    one, other = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, last, ROWS):
        at, ok = _tile(start + tl.arange(0, ROWS), column, last, C)
        centred, d = _passed(d_y_ptr, x_ptr, at, ok, mean, scale, shift, RELU)
        one += tl.sum(d, 0)
        other += tl.sum(d * centred, 0)
    partial_ptr += tl.program_id(1).to(tl.int64) * 2 * C + column
    tl.store(partial_ptr, one, mask=column < C)
    tl.store(partial_ptr + C, other * inverse, mask=column < C)


@triton.jit
def _total_kernel(
    partial_ptr: t.Any, out_ptr: t.Any, slabs: t.Any, numbers: t.Any, SLABS: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    """(S, numbers) summed over slabs."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.arange(0, SLABS)
    at, ok = _tile(index, column, slabs, numbers)
    tl.store(out_ptr + column, tl.sum(tl.load(partial_ptr + at, mask=ok, other=0.0), 0), mask=column < numbers)


@triton.jit
def _input_kernel(
    d_y_ptr: t.Any, x_ptr: t.Any, mean_ptr: t.Any, inverse_ptr: t.Any, weight_ptr: t.Any, bias_ptr: t.Any,
    means_ptr: t.Any, out_ptr: t.Any, N: t.Any, C: t.Any,
    RELU: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inverse, scale, shift = _affine(column, inverse_ptr, weight_ptr, bias_ptr, C, WEIGHT, BIAS)
    mean = tl.load(mean_ptr + column, mask=column < C, other=0.0)
    level = tl.load(means_ptr + column, mask=column < C, other=0.0)
    slope = tl.load(means_ptr + C + column, mask=column < C, other=0.0) * inverse
    at, ok = _tile(tl.program_id(1) * ROWS + tl.arange(0, ROWS), column, N, C)
    centred, d = _passed(d_y_ptr, x_ptr, at, ok, mean, scale, shift, RELU)
    gradient = scale[None, :] * (d - level[None, :] - centred * slope[None, :])
    tl.store(out_ptr + at, gradient.to(out_ptr.dtype.element_ty), mask=ok)


# --- passes -----------------------------------------------------------------------------------------------------------


def moments(x_NC: Tensor) -> Tensor:
    """As in projector_passes.py."""
    N, C = x_NC.shape
    found_2C = x_NC.new_zeros(2, C, dtype=torch.float32)
    if N == 0:
        return found_2C
    slab, slabs = _slabs(N)
    partial_S2C = x_NC.new_empty(slabs, 2, C, dtype=torch.float32)
    columns = triton.cdiv(C, CONFIG.columns)
    with _on(x_NC):
        _launch(_moments_kernel, (columns, slabs), x_NC, partial_S2C, N, C, slab, *_tiles(), **_built())
        _launch(
            _common_moments_kernel, (columns,), x_NC, partial_S2C, found_2C, N, C, slab, CONFIG.slabs, CONFIG.columns,
            **_built(),
        )  # fmt: skip
    return found_2C


def normalize(
    x_NC: Tensor,
    mean_C: Tensor,
    inverse_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    relu: bool,
    out_NC: Tensor,
) -> None:
    """As in projector_passes.py."""
    vectors, flags = _vectors(mean_C, inverse_C, weight_C, bias_C, relu)
    _launch_tiles(_normalize_kernel, x_NC, *vectors, out_NC, *x_NC.shape, *flags, *_tiles())


def sums(
    d_y_NC: Tensor,
    x_NC: Tensor,
    mean_C: Tensor,
    inverse_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    relu: bool,
) -> Tensor:
    """As in projector_passes.py."""
    N, C = x_NC.shape
    total_2C = mean_C.new_zeros(2, C)
    if N == 0:
        return total_2C
    slab, slabs = _slabs(N)
    partial_S2C = mean_C.new_empty(slabs, 2, C)
    vectors, flags = _vectors(mean_C, inverse_C, weight_C, bias_C, relu)
    with _on(x_NC):
        _launch(
            _sums_kernel, (triton.cdiv(C, CONFIG.columns), slabs), d_y_NC, x_NC, *vectors, partial_S2C, N, C, slab,
            *flags, *_tiles(), **_built(),
        )  # fmt: skip
        _launch(
            _total_kernel, (triton.cdiv(2 * C, CONFIG.columns),), partial_S2C, total_2C, slabs, 2 * C, CONFIG.slabs,
            CONFIG.columns, **_built(),
        )  # fmt: skip
    return total_2C


def input_gradient(
    d_y_NC: Tensor,
    x_NC: Tensor,
    mean_C: Tensor,
    inverse_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    relu: bool,
    means_2C: Tensor,
    out_NC: Tensor,
) -> None:
    """As in projector_passes.py."""
    vectors, flags = _vectors(mean_C, inverse_C, weight_C, bias_C, relu)
    _launch_tiles(
        _input_kernel, x_NC, *vectors, means_2C.contiguous(), out_NC, *x_NC.shape, *flags, *_tiles(), gradient=d_y_NC
    )


def _launch_tiles(kernel: Any, x_NC: Tensor, *arguments: Any, gradient: Tensor | None = None) -> None:
    """A program for every tile of x."""
    (N, C), leading = x_NC.shape, () if gradient is None else (gradient,)
    if N == 0:
        return
    grid = triton.cdiv(C, CONFIG.columns), triton.cdiv(N, CONFIG.rows)
    with _on(x_NC):
        _launch(kernel, grid, *leading, x_NC, *arguments, **_built())


def _slabs(N: int) -> tuple[int, int]:
    """Rows of a slab, a multiple of a tile's, and how many slabs there are."""
    tiles = triton.cdiv(N, CONFIG.rows)
    slab = triton.cdiv(tiles, CONFIG.slabs) * CONFIG.rows
    return slab, triton.cdiv(N, slab)


def _vectors(
    mean_C: Tensor, inverse_C: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, relu: bool
) -> tuple[tuple[Tensor, ...], tuple[bool, ...]]:
    """Pointers, something in the place of what is not there, and flags RELU, WEIGHT, BIAS."""
    given = [mean_C if vector is None else vector.contiguous() for vector in (weight_C, bias_C)]
    return (mean_C, inverse_C, *given), (relu, weight_C is not None, bias_C is not None)


def _tiles() -> tuple[int, int]:
    return CONFIG.rows, CONFIG.columns


def _built() -> dict[str, int]:
    return {"num_warps": CONFIG.warps, "num_stages": 2}
