"""The negative cosines of cosine.py as Triton kernels: all sides, pairs of views and norms in one launch each way.

A program has some whole rows of one side, and of all its views: it adds up the unit targets, then takes every
prediction against the sum. Every number is read once, and the sums' parts, one a program, are added in a fixed order.
Memory is what limits it: three views a side of 4096 x 128 bfloat16, predictions and targets, are 12 MiB.

Importing this file needs triton; with ``TRITON_INTERPRET=1`` set before, everything here runs on CPU tensors.
"""

from __future__ import annotations

import typing as t  # kernels find names in modules only
from typing import Any

import torch
from torch import Tensor

from rocket_fast.errors import optional_import
from rocket_fast.kernels.cosine import pair_weight
from rocket_fast.kernels.launch import launch as _launch
from rocket_fast.kernels.launch import on_device_of as _on

triton: Any = optional_import("triton", "gpu")
tl: Any = optional_import("triton.language", "gpu")

SMALLEST_NORM = tl.constexpr(1e-12)  # as in torch.nn.functional.normalize
MOST = 8192  # features; a row of each of three tensors is in a program's registers
ENTRIES = 1024  # of a program's rows together, if one row has no more

# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _rows(ptr: t.Any, view: t.Any, N: t.Any, P: t.Any, offset: t.Any, ok: t.Any) -> Any:
    """These rows of one view, in float32."""
    return tl.load(ptr + tl.cast(view, tl.int64) * N * P + offset, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _measured(rows: t.Any, norm_ptrs: t.Any, ok: t.Any) -> Any:
    """Norms, stored."""
    norm = tl.maximum(tl.sqrt(tl.sum(rows * rows, 1)), SMALLEST_NORM)
    tl.store(norm_ptrs, norm, mask=ok)
    return norm


@triton.jit(do_not_specialize=["N"])
def _cosine_forward_kernel(
    prediction_ptr: t.Any,  # (S, VIEWS, N, P)
    target_ptr: t.Any,  # (S, VIEWS, N, P)
    norm_p_ptr: t.Any,  # (S, VIEWS, N)
    norm_t_ptr: t.Any,  # (S, VIEWS, N)
    part_ptr: t.Any,  # (S, blocks): sums of cosines
    N: t.Any,
    P: t.Any,
    VIEWS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Norms, and the cosines' sum over the rows of a block and all pairs of one side."""
    block, first_view = tl.program_id(0), tl.program_id(1) * VIEWS
    row, k = block * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    row_ok = row < N
    ok, offset = row_ok[:, None] & (k < P)[None, :], row.to(tl.int64)[:, None] * P + k[None, :]
    total = tl.zeros((ROWS,), tl.float32)
    for strong in tl.static_range(2):
        begin, end = first_view + strong, first_view + (VIEWS if strong else 1)
        goal = tl.zeros((ROWS, WIDTH), tl.float32)
        for view in range(begin, end):
            target = _rows(target_ptr, view, N, P, offset, ok)
            norm = _measured(target, norm_t_ptr + tl.cast(view, tl.int64) * N + row, row_ok)
            goal += target / norm[:, None]
        for view in range(begin, end):
            prediction = _rows(prediction_ptr, view, N, P, offset, ok)
            norm = _measured(prediction, norm_p_ptr + tl.cast(view, tl.int64) * N + row, row_ok)
            total += tl.sum(prediction * goal, 1) / norm
    tl.store(part_ptr + tl.program_id(1) * tl.num_programs(0) + block, tl.sum(tl.where(row_ok, total, 0.0), 0))


@triton.jit(do_not_specialize=["N"])
def _cosine_backward_kernel(
    d_loss_ptr: t.Any,  # (1)
    prediction_ptr: t.Any,  # (S, VIEWS, N, P)
    target_ptr: t.Any,  # (S, VIEWS, N, P)
    norm_p_ptr: t.Any,  # (S, VIEWS, N)
    norm_t_ptr: t.Any,  # (S, VIEWS, N)
    d_prediction_ptr: t.Any,  # (S, VIEWS, N, P)
    weight: t.Any,  # of a cosine in the loss
    N: t.Any,
    P: t.Any,
    VIEWS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """The gradient to the predictions of a block's rows, of one side."""
    block, first_view = tl.program_id(0), tl.program_id(1) * VIEWS
    row, k = block * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    row_ok = row < N
    ok, offset = row_ok[:, None] & (k < P)[None, :], row.to(tl.int64)[:, None] * P + k[None, :]
    factor = weight * tl.load(d_loss_ptr)
    for strong in tl.static_range(2):
        begin, end = first_view + strong, first_view + (VIEWS if strong else 1)
        goal = tl.zeros((ROWS, WIDTH), tl.float32)
        for view in range(begin, end):
            norm = tl.load(norm_t_ptr + tl.cast(view, tl.int64) * N + row, mask=row_ok, other=1.0)
            goal += _rows(target_ptr, view, N, P, offset, ok) / norm[:, None]
        for view in range(begin, end):
            norm = tl.load(norm_p_ptr + tl.cast(view, tl.int64) * N + row, mask=row_ok, other=1.0)[:, None]
            unit = _rows(prediction_ptr, view, N, P, offset, ok) / norm
            gradient = (goal - tl.sum(unit * goal, 1)[:, None] * unit) * (factor / norm)
            ptrs = d_prediction_ptr + tl.cast(view, tl.int64) * N * P + offset
            tl.store(ptrs, gradient.to(d_prediction_ptr.dtype.element_ty), mask=ok)


# --- launchers --------------------------------------------------------------------------------------------------------


def _layout(shape: torch.Size) -> tuple[tuple[int, int], dict[str, int], tuple[int, int, int, int, int]]:
    """Grid; options; the kernels' last arguments: N, P, views, rows and columns of a program."""
    sides, views, samples, features = shape
    width = triton.next_power_of_2(features)
    rows = max(1, ENTRIES // width)
    warps = 4 if rows * width <= ENTRIES else 8
    return (triton.cdiv(samples, rows), sides), {"num_warps": warps}, (samples, features, views, rows, width)


def cosine_forward(prediction_SVNP: Tensor, target_SVNP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As in cosine.py."""
    p_SVNP, t_SVNP = prediction_SVNP.contiguous(), target_SVNP.contiguous()
    grid, options, layout = _layout(p_SVNP.shape)
    norm_p_SVN, norm_t_SVN = (p_SVNP.new_empty(p_SVNP.shape[:-1], dtype=torch.float32) for _ in range(2))
    parts = p_SVNP.new_empty(grid[1] * grid[0], dtype=torch.float32)
    with _on(p_SVNP):
        _launch(_cosine_forward_kernel, grid, p_SVNP, t_SVNP, norm_p_SVN, norm_t_SVN, parts, *layout, **options)
    loss = 2 - 2 * pair_weight(p_SVNP.shape) * parts.sum(dtype=torch.float64)
    return loss.to(torch.float32), norm_p_SVN, norm_t_SVN


def cosine_backward(
    d_loss: Tensor, prediction_SVNP: Tensor, target_SVNP: Tensor, norm_p_SVN: Tensor, norm_t_SVN: Tensor
) -> Tensor:
    """As in cosine.py."""
    p_SVNP, t_SVNP = prediction_SVNP.contiguous(), target_SVNP.contiguous()
    grid, options, layout = _layout(p_SVNP.shape)
    out_SVNP, weight = torch.empty_like(p_SVNP), -2 * pair_weight(p_SVNP.shape)
    inputs = (d_loss, p_SVNP, t_SVNP, norm_p_SVN, norm_t_SVN)
    with _on(p_SVNP):
        _launch(_cosine_backward_kernel, grid, *inputs, out_SVNP, weight, *layout, **options)
    return out_SVNP
