"""The passes of batch normalisation on the CPU (numba, the GIL released), as projector_passes.py describes them.

Sums go by columns, everything else by rows, on as many threads as torch uses; a column's sums do not depend on which.
Rows are added up in blocks, in the precision computed with, and the blocks in float64. 16-bit numbers become float32 a
block at a time.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rocket_fast.errors import optional_import
from rocket_fast.kernels.projector_passes import affine
from rocket_fast.kernels.tiled import compute_dtype

numba = optional_import("numba", "train")

BLOCK = 32
"""Rows that are added up before float64: those of a tile stay in the cache."""
WIDTH = 1024
"""Columns of a tile."""
ROWS = 128
"""Rows of 16-bit numbers that are converted at a time; a multiple of BLOCK."""
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


# --- threads ----------------------------------------------------------------------------------------------------------


def _spread(kernel: Callable[..., None], size: int, numbers: int, *arguments: Any) -> None:
    """``kernel(first, last, ...)`` of [0, size) in as many parts as torch has threads, this thread's among them."""
    threads = min(torch.get_num_threads(), max(1, numbers // SMALL))
    step = -(-size // threads)
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
    found_2C = torch.zeros(2, x_NC.shape[1], dtype=torch.float64)
    for rows, (part,) in _parts(x_NC):
        _by_columns(_moments, part, part, rows.start, *found_2C.numpy())
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
    vectors = _numpy(mean_C, *affine(inverse_C, weight_C, bias_C))
    for rows, (part,) in _parts(x_NC):
        with _Target(out_NC[rows], part) as out:
            _by_rows(_normalize, part, part, *vectors, relu, out)


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
    vectors = _numpy(mean_C, *affine(inverse_C, weight_C, bias_C))
    total_2C = torch.zeros(2, x_NC.shape[1], dtype=torch.float64)
    for _, (d_y, part) in _parts(d_y_NC, x_NC):
        _by_columns(_sums, part, d_y, part, *vectors, relu, total_2C.numpy())
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
    vectors = _numpy(mean_C, *affine(inverse_C, weight_C, bias_C))
    tilt = _numpy(means_2C[0].contiguous(), inverse_C * means_2C[1])
    for rows, (d_y, part) in _parts(d_y_NC, x_NC):
        with _Target(out_NC[rows], part) as out:
            _by_rows(_input_gradient, part, d_y, part, *vectors, relu, *tilt, out)


def _numpy(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]


def _parts(*tensors: Tensor) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """All rows as they are, or some at a time, as they have to be converted."""
    rows = tensors[0].shape[0]
    dtype = compute_dtype(tensors[-1])
    step = rows if all(tensor.dtype == dtype for tensor in tensors) else ROWS
    for start in range(0, rows, max(step, 1)):
        part = slice(start, min(start + step, rows))
        yield part, _numpy(*(tensor[part].to(dtype) for tensor in tensors))


class _Target:
    """Rows to be written: themselves, or, of another dtype, what is copied there at the end."""

    def __init__(self, rows: Tensor, like: np.ndarray) -> None:
        self.rows = rows.detach()
        self.own = self.rows.dtype in (torch.float32, torch.float64) and self.rows.numpy().dtype == like.dtype
        self.array = self.rows.numpy() if self.own else np.empty(like.shape, like.dtype)

    def __enter__(self) -> np.ndarray:
        return self.array

    def __exit__(self, *error: object) -> None:
        if not self.own:
            self.rows.copy_(torch.from_numpy(self.array))
