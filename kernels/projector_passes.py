"""The passes of batch normalisation in plain torch, on any device: a block of rows at a time.

Common to all implementations: ``x`` and the gradients are contiguous (N, C), vectors (C,), weight and bias may be None;
``out`` is written, and may be the gradient itself. See projector.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rocket_fast.kernels.tiled import compute_dtype

BLOCK = 256
"""Rows at a time."""


def moments(x_NC: Tensor) -> Tensor:
    """(2, C): means and sums of squares about them; a block's are about its own mean, then moved to the common one."""
    found_2C = x_NC.new_zeros(2, x_NC.shape[1], dtype=torch.float64)
    mean_C, squares_C = found_2C
    for rows in _blocks(x_NC):
        part = x_NC[rows].to(compute_dtype(x_NC))
        about = part.mean(0)
        part = part - about
        off_C, count = part.sum(0).double(), rows.stop - rows.start  # about is rounded
        apart_C, share = about + off_C / count - mean_C, count / rows.stop
        squares_C += part.square_().sum(0).double() - off_C.square() / count + apart_C.square() * (rows.start * share)
        mean_C += apart_C * share
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
    """``relu((x - mean) * inverse * weight + bias)`` into ``out``."""
    scale_C, shift_C = affine(inverse_C, weight_C, bias_C)
    for rows in _blocks(x_NC):
        y = (x_NC[rows].to(mean_C.dtype) - mean_C).mul_(scale_C).add_(shift_C)
        out_NC[rows] = y.relu_() if relu else y


def sums(
    d_y_NC: Tensor,
    x_NC: Tensor,
    mean_C: Tensor,
    inverse_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    relu: bool,
) -> Tensor:
    """(2, C): sums of the gradient where the ReLU lets it pass, and of it times the normalised x."""
    affines = affine(inverse_C, weight_C, bias_C)
    total_2C = x_NC.new_zeros(2, x_NC.shape[1], dtype=torch.float64)
    for rows in _blocks(x_NC):
        centred, d = _passed(d_y_NC[rows], x_NC[rows], mean_C, affines, relu)
        total_2C[0] += d.sum(0)
        total_2C[1] += (d * centred).sum(0)
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
    """``weight * inverse * (d - mean(d) - normalised x * mean(d * normalised x))`` into ``out``."""
    affines = affine(inverse_C, weight_C, bias_C)
    slope_C = inverse_C * means_2C[1]
    for rows in _blocks(x_NC):
        centred, d = _passed(d_y_NC[rows], x_NC[rows], mean_C, affines, relu)
        out_NC[rows] = (d - means_2C[0]).sub_(centred.mul_(slope_C)).mul_(affines[0])


def affine(inverse_C: Tensor, weight_C: Tensor | None, bias_C: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a centred x is multiplied with, and what is added then, in the precision computed with."""
    scale_C = inverse_C if weight_C is None else inverse_C * weight_C.to(inverse_C.dtype)
    return scale_C, torch.zeros_like(inverse_C) if bias_C is None else bias_C.to(inverse_C.dtype)


def _passed(
    d_y: Tensor, x: Tensor, mean_C: Tensor, affines: tuple[Tensor, Tensor], relu: bool
) -> tuple[Tensor, Tensor]:
    """x less its mean, and the gradient where the ReLU lets it pass; both anew."""
    centred, d = x.to(mean_C.dtype) - mean_C, d_y.to(mean_C.dtype)
    if relu:
        d = d.masked_fill((centred * affines[0]).add_(affines[1]) <= 0, 0.0)
    return centred, d


def _blocks(x_NC: Tensor) -> Iterator[slice]:
    rows = x_NC.shape[0]
    return (slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK))
