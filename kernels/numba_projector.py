"""The passes of batch normalisation on the CPU (numba, the GIL released), as projector_passes.py describes them.

Sums go by columns, everything else by rows, on as many threads as torch uses; a column's sums do not depend on which.
Rows are added up in blocks, in the precision computed with, and the blocks in float64. bfloat16, of which numpy knows
only the bits, becomes float32 some rows at a time. Other types, and mixed ones, are left to plain torch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rocket_fast.errors import optional_import
from rocket_fast.kernels import projector_passes
from rocket_fast.kernels.projector_passes import affine
from rocket_fast.kernels.tiled import compute_dtype

numba = optional_import("numba", "train")

BLOCK = 64
"""Rows that are added up before float64: those of a tile stay in the cache."""
WIDTH = 2048
"""Columns of a tile."""
ROWS = 64
"""Rows of bfloat16 that are converted at a time; a multiple of BLOCK."""
SMALL = 2**15
"""Numbers that are not worth a thread."""


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba.njit without the GIL, cached on disk; compiled anew in every process where no folder can be written."""
    options = {"nogil": True, "fastmath": {"contract"}}  # NaNs stay NaNs
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba: "no locator available": neither __pycache__ nor the user's cache folder is writable
        return numba.njit(**options)(function)


# --- kernels ----------------------------------------------------------------------------------------------------------


@_jit
def _moments(first: int, last: int, x: np.ndarray, before: int, mean: np.ndarray, squares: np.ndarray) -> None:
    """Columns ``first`` to ``last`` of some rows, ``before`` of which are in mean and squares already."""
    for start in range(first, last, WIDTH):
        stop = min(start + WIDTH, last)
        width = stop - start
        about, off, square = np.empty(width, x.dtype), np.empty(width, x.dtype), np.empty(width, x.dtype)
        means, total = mean[start:stop], squares[start:stop]
        for row in range(0, x.shape[0], BLOCK):
            end = min(row + BLOCK, x.shape[0])
            count = end - row
            for c in range(width):
                about[c] = 0
                off[c] = 0
                square[c] = 0
            for r in range(row, end):
                part = x[r, start:stop]
                for c in range(width):
                    about[c] += part[c]
            part_of = x.dtype.type(1.0 / count)
            for c in range(width):
                about[c] *= part_of
            for r in range(row, end):
                part = x[r, start:stop]
                for c in range(width):
                    d = part[c] - about[c]
                    off[c] += d
                    square[c] += d * d
            share = count / (before + end)
            weight = (before + row) * share
            for c in range(width):
                apart = about[c] + off[c] / np.float64(count) - means[c]
                total[c] += square[c] - np.float64(off[c]) * off[c] / count + apart * apart * weight
                means[c] += apart * share


@_jit
def _normalize(
    first: int,
    last: int,
    x: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    relu: bool,
    out: np.ndarray,
) -> None:
    zero = x.dtype.type(0)
    for r in range(first, last):
        part, to = x[r], out[r]
        if relu:
            for c in range(part.size):
                y = (part[c] - mean[c]) * scale[c] + shift[c]
                to[c] = zero if y < zero else y
        else:
            for c in range(part.size):
                to[c] = (part[c] - mean[c]) * scale[c] + shift[c]


@_jit
def _sums(
    first: int,
    last: int,
    d_y: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    relu: bool,
    totals: np.ndarray,
) -> None:
    """The second sum is left to be multiplied by the inverse deviation."""
    zero = x.dtype.type(0)
    for start in range(first, last, WIDTH):
        stop = min(start + WIDTH, last)
        width = stop - start
        one, other = np.empty(width, x.dtype), np.empty(width, x.dtype)
        means, scales, shifts = mean[start:stop], scale[start:stop], shift[start:stop]
        for row in range(0, x.shape[0], BLOCK):
            for c in range(width):
                one[c] = 0
                other[c] = 0
            for r in range(row, min(row + BLOCK, x.shape[0])):
                part, gradient = x[r, start:stop], d_y[r, start:stop]
                if relu:
                    for c in range(width):
                        centred = part[c] - means[c]
                        d = zero if centred * scales[c] + shifts[c] <= zero else gradient[c]
                        one[c] += d
                        other[c] += d * centred
                else:
                    for c in range(width):
                        one[c] += gradient[c]
                        other[c] += gradient[c] * (part[c] - means[c])
            for c in range(width):
                totals[0, start + c] += one[c]
                totals[1, start + c] += other[c]


@_jit
def _input_gradient(
    first: int,
    last: int,
    d_y: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    relu: bool,
    level: np.ndarray,
    slope: np.ndarray,
    out: np.ndarray,
) -> None:
    zero = x.dtype.type(0)
    line = np.empty(x.shape[1], x.dtype)  # vector instructions want to know that what is written is not read
    for r in range(first, last):
        part, gradient, to = x[r], d_y[r], out[r]
        if relu:
            for c in range(part.size):
                centred = part[c] - mean[c]
                d = zero if centred * scale[c] + shift[c] <= zero else gradient[c]
                line[c] = scale[c] * (d - level[c] - centred * slope[c])
        else:
            for c in range(part.size):
                line[c] = scale[c] * (gradient[c] - level[c] - (part[c] - mean[c]) * slope[c])
        for c in range(part.size):
            to[c] = line[c]


# --- the same of bfloat16 ---------------------------------------------------------------------------------------------


@_jit
def _widen(bits: np.ndarray, row: int, end: int, first: int, last: int, out: np.ndarray) -> None:
    """Some rows and columns as float32, whose upper half they are."""
    for r in range(row, end):
        part, to = bits[r, first:last], out[r - row].view(np.uint32)
        for c in range(last - first):
            to[c] = np.uint32(part[c]) << np.uint32(16)


@_jit
def _narrow(line: np.ndarray, to: np.ndarray) -> None:
    """float32 rounded to the nearest, to the even one of two."""
    bits = line.view(np.uint32)
    for c in range(line.size):
        rounded = (bits[c] + np.uint32(0x7FFF) + ((bits[c] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        to[c] = np.uint16(rounded) if line[c] == line[c] else np.uint16(0x7FC0)


@_jit
def _moments_16(first: int, last: int, x: np.ndarray, mean: np.ndarray, squares: np.ndarray) -> None:
    room = np.empty((ROWS, last - first), np.float32)
    for row in range(0, x.shape[0], ROWS):
        end = min(row + ROWS, x.shape[0])
        _widen(x, row, end, first, last, room)
        _moments(0, last - first, room[: end - row], row, mean[first:last], squares[first:last])


@_jit
def _normalize_16(
    first: int,
    last: int,
    x: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    relu: bool,
    out: np.ndarray,
) -> None:
    room, made = np.empty((1, x.shape[1]), np.float32), np.empty((1, x.shape[1]), np.float32)
    for r in range(first, last):
        _widen(x, r, r + 1, 0, x.shape[1], room)
        _normalize(0, 1, room, mean, scale, shift, relu, made)
        _narrow(made[0], out[r])


@_jit
def _sums_16(
    first: int,
    last: int,
    d_y: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    relu: bool,
    totals: np.ndarray,
) -> None:
    room, gradient = np.empty((ROWS, last - first), np.float32), np.empty((ROWS, last - first), np.float32)
    means, scales, shifts = mean[first:last], scale[first:last], shift[first:last]
    own = np.zeros((2, last - first))
    for row in range(0, x.shape[0], ROWS):
        end = min(row + ROWS, x.shape[0])
        _widen(x, row, end, first, last, room)
        _widen(d_y, row, end, first, last, gradient)
        _sums(0, last - first, gradient[: end - row], room[: end - row], means, scales, shifts, relu, own)
    totals[:, first:last] = own


@_jit
def _input_gradient_16(
    first: int,
    last: int,
    d_y: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    relu: bool,
    level: np.ndarray,
    slope: np.ndarray,
    out: np.ndarray,
) -> None:
    room, gradient = np.empty((1, x.shape[1]), np.float32), np.empty((1, x.shape[1]), np.float32)
    for r in range(first, last):
        _widen(x, r, r + 1, 0, x.shape[1], room)
        _widen(d_y, r, r + 1, 0, x.shape[1], gradient)
        _input_gradient(0, 1, gradient, room, mean, scale, shift, relu, level, slope, gradient)
        _narrow(gradient[0], out[r])


# --- threads ----------------------------------------------------------------------------------------------------------


def _spread(kernel: Callable[..., None], size: int, numbers: int, *arguments: Any) -> None:
    """``kernel(first, last, ...)`` of [0, size) in as many parts as torch has threads, this thread's among them."""
    threads = min(torch.get_num_threads(), max(1, numbers // SMALL))
    step = max(1, -(-size // threads))
    step = -(-step // 16) * 16 if size >= 16 * threads else step  # threads share no cache line of the results
    later = [
        _pool(os.getpid()).submit(kernel, first, min(first + step, size), *arguments)
        for first in range(step, size, step)
    ]
    kernel(0, min(step, size), *arguments)
    for part in later:
        part.result()


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process; a fork has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="batch_norm")


def _by_rows(kernel: Callable[..., None], x: np.ndarray, *arguments: Any) -> None:
    _spread(kernel, x.shape[0], x.size, *arguments)


def _by_columns(kernel: Callable[..., None], x: np.ndarray, *arguments: Any) -> None:
    _spread(kernel, x.shape[1], x.size, *arguments)


# --- passes -----------------------------------------------------------------------------------------------------------


def moments(x_NC: Tensor) -> Tensor:
    """As in projector_passes.py."""
    if not _served(x_NC):
        return projector_passes.moments(x_NC)
    found_2C = torch.zeros(2, x_NC.shape[1], dtype=torch.float64)
    (x,) = _numpy(x_NC)
    if x_NC.dtype == torch.bfloat16:
        _by_columns(_moments_16, x, x, *found_2C.numpy())
    else:
        _by_columns(_moments, x, x, 0, *found_2C.numpy())
    return found_2C.to(compute_dtype(x_NC))


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
    if not _served(x_NC, out_NC):
        return projector_passes.normalize(x_NC, mean_C, inverse_C, weight_C, bias_C, relu, out_NC)
    vectors, (x, out) = _copies(mean_C, *affine(inverse_C, weight_C, bias_C)), _numpy(x_NC, out_NC)
    kernel = _normalize_16 if x_NC.dtype == torch.bfloat16 else _normalize
    return _by_rows(kernel, x, x, *vectors, relu, out)


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
    if not _served(x_NC, d_y_NC):
        return projector_passes.sums(d_y_NC, x_NC, mean_C, inverse_C, weight_C, bias_C, relu)
    vectors, (d_y, x) = _copies(mean_C, *affine(inverse_C, weight_C, bias_C)), _numpy(d_y_NC, x_NC)
    total_2C = torch.zeros(2, x_NC.shape[1], dtype=torch.float64)
    kernel = _sums_16 if x_NC.dtype == torch.bfloat16 else _sums
    _by_columns(kernel, x, d_y, x, *vectors, relu, total_2C.numpy())
    total_2C[1] *= inverse_C
    return total_2C.to(mean_C.dtype)


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
    known = mean_C, inverse_C, weight_C, bias_C, relu
    if not _served(x_NC, d_y_NC, out_NC):
        return projector_passes.input_gradient(d_y_NC, x_NC, *known, means_2C, out_NC)
    vectors = _copies(mean_C, *affine(inverse_C, weight_C, bias_C))
    tilt = _numpy(means_2C[0], inverse_C * means_2C[1])
    d_y, x, out = _numpy(d_y_NC, x_NC, out_NC)
    kernel = _input_gradient_16 if x_NC.dtype == torch.bfloat16 else _input_gradient
    return _by_rows(kernel, x, d_y, x, *vectors, relu, *tilt, out)


def _served(x_NC: Tensor, *others: Tensor) -> bool:
    """Whether there are kernels for these types."""
    known = x_NC.dtype in (torch.float32, torch.float64, torch.bfloat16)
    return known and all(other.dtype == x_NC.dtype for other in others)


def _numpy(*tensors: Tensor) -> list[np.ndarray]:
    """The tensors themselves; of bfloat16 its bits."""
    narrow = torch.bfloat16
    return [(x.detach().view(torch.uint16) if x.dtype == narrow else x.detach()).numpy() for x in tensors]


def _copies(*vectors_C: Tensor) -> list[np.ndarray]:
    """Parameters must not be lent to numpy, which fixes the size of their storage: FSDP frees and refills it."""
    return _numpy(*(vector.clone() for vector in vectors_C))
