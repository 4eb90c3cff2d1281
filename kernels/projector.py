"""Batch normalisation over a batch of vectors with ReLU and the linear layers about it: what projectors are made of.

Shapes: N samples, C features, M outputs. ``mean`` and ``inverse`` (1 / standard deviation) are a training batch's, over
all ranks where asked. ``y = relu((x - mean) * inverse * weight + bias)``.

Forward, one pass over x for the statistics (means and sums of squares of blocks of rows, combined as Chan et al. 1979
do, so that large means cost no digits) and one to normalise. Backward, one pass for the two sums that every row's
gradient depends on and one for the gradient; both make the pre-activation anew from x. So x, two vectors and the
parameters are all that is kept: no pre-activation, no mask, and, where the next linear layer is part of it, not what
comes out of the ReLU either: backward makes it anew for that layer's weights, where its gradient is put next. Forward
on the CPU makes it in pieces, never as a whole.

The passes are Triton kernels on CUDA (triton_projector.py), numba's on the CPU (numba_projector.py) where it is
installed, and plain torch (projector_passes.py) elsewhere. All sums have a fixed order: equal calls give equal bits.
Ranks exchange what they have to outside the operations, in float64.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rocket_fast.errors import require
from rocket_fast.kernels import projector_passes
from rocket_fast.kernels.checks import values_visible
from rocket_fast.kernels.contrastive import refuse_second_derivative
from rocket_fast.kernels.dispatch import autocast_on, triton_kernels, without_autocast
from rocket_fast.kernels.tiled import compute_dtype

Group = Any
"""A process group."""

PIECE_BYTES = 2**25
"""Activations made at a time on the CPU: with more, the system's fresh memory costs more than making them; with fewer,
matrix products are slower."""


def _passes(x_NC: Tensor) -> ModuleType:
    """The module whose passes serve ``x``."""
    if (triton := triton_kernels("triton_projector", x_NC)) is not None:
        return triton
    return (_numba() if x_NC.device.type == "cpu" else None) or projector_passes


@functools.cache
def _numba() -> ModuleType | None:
    if importlib.util.find_spec("numba") is None:
        return None
    from rocket_fast.kernels import numba_projector

    return numba_projector


def _rows_at_a_time(x_NC: Tensor) -> int:
    """How many are activated at a time: all but on the CPU."""
    if x_NC.device.type != "cpu":
        return max(1, x_NC.shape[0])
    return max(256, PIECE_BYTES // (x_NC.shape[1] * compute_dtype(x_NC).itemsize))


_KEPT = threading.local()


def _room(rows: int, x_NC: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, C) to be overwritten; on the CPU a thread's own, kept for the next call: see ``PIECE_BYTES``."""
    width = x_NC.shape[1]
    size = rows * width * dtype.itemsize
    if x_NC.device.type != "cpu" or size > PIECE_BYTES:
        return x_NC.new_empty(rows, width, dtype=dtype)
    kept: Tensor | None = getattr(_KEPT, "bytes", None)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):
            kept = _KEPT.bytes = torch.empty(size, dtype=torch.uint8)
    return kept[:size].view(dtype).view(rows, width)


# --- operations and their shapes for tracing --------------------------------------------------------------------------


@torch.library.custom_op("rocket_fast::batch_norm_moments", mutates_args=())
def _moments(x_NC: Tensor) -> Tensor:
    """(2, C): means and sums of squares about them, in the precision computed with; zeros of no rows."""
    return _passes(x_NC).moments(x_NC.contiguous())


@_moments.register_fake
def _(x_NC: Tensor) -> Tensor:
    return x_NC.new_empty(2, x_NC.shape[1], dtype=compute_dtype(x_NC))


@torch.library.custom_op("rocket_fast::batch_norm_normalize", mutates_args=())
def _normalize(
    x_NC: Tensor, mean_C: Tensor, inverse_C: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, relu: bool
) -> Tensor:
    """(N, C): normalised and rectified, like ``x``."""
    out_NC = torch.empty_like(x_NC, memory_format=torch.contiguous_format)
    _passes(x_NC).normalize(x_NC.contiguous(), mean_C, inverse_C, weight_C, bias_C, relu, out_NC)
    return out_NC


@_normalize.register_fake
def _(x_NC: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_NC, memory_format=torch.contiguous_format)


@torch.library.custom_op("rocket_fast::batch_norm_linear", mutates_args=())
def _normalize_linear(
    x_NC: Tensor,
    mean_C: Tensor,
    inverse_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    relu: bool,
    matrix_MC: Tensor,
    vector_M: Tensor | None,
) -> Tensor:
    """(N, M): normalised, rectified and multiplied, like ``matrix``."""
    passes, x_NC = _passes(x_NC), x_NC.contiguous()
    out_NM, step = matrix_MC.new_empty(x_NC.shape[0], matrix_MC.shape[0]), _rows_at_a_time(x_NC)
    room = _room(min(step, x_NC.shape[0]), x_NC, matrix_MC.dtype)
    with without_autocast(x_NC.device.type):
        for x, out in zip(x_NC.split(step), out_NM.split(step), strict=True):
            y = room[: len(x)]
            passes.normalize(x, mean_C, inverse_C, weight_C, bias_C, relu, y)
            if vector_M is None:
                torch.mm(y, matrix_MC.T, out=out)
            else:
                torch.addmm(vector_M, y, matrix_MC.T, out=out)
    return out_NM


@_normalize_linear.register_fake
def _(
    x_NC: Tensor,
    mean_C: Tensor,
    inverse_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    relu: bool,
    matrix_MC: Tensor,
    vector_M: Tensor | None,
) -> Tensor:
    return matrix_MC.new_empty(x_NC.shape[0], matrix_MC.shape[0])


@torch.library.custom_op("rocket_fast::batch_norm_sums", mutates_args=())
def _sums(
    d_y_NC: Tensor,
    x_NC: Tensor,
    mean_C: Tensor,
    inverse_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    relu: bool,
) -> Tensor:
    """(2, C): sums over rows of the gradient past the ReLU, and of it times the normalised x."""
    inputs = d_y_NC.contiguous(), x_NC.contiguous()
    return _passes(x_NC).sums(*inputs, mean_C, inverse_C, weight_C, bias_C, relu)


@_sums.register_fake
def _(d_y_NC: Tensor, x_NC: Tensor, mean_C: Tensor, *_: Any) -> Tensor:
    return mean_C.new_empty(2, x_NC.shape[1])


@torch.library.custom_op("rocket_fast::batch_norm_linear_backward", mutates_args=())
def _linear_backward(
    d_z_NM: Tensor,
    x_NC: Tensor,
    mean_C: Tensor,
    inverse_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    relu: bool,
    matrix_MC: Tensor,
    need_matrix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of what comes out of the ReLU (N, C), its sums (2, C) as ``_sums``, and the matrix's (or (0,))."""
    passes, x_NC = _passes(x_NC), x_NC.contiguous()
    d_y_NC = torch.empty_like(x_NC, dtype=matrix_MC.dtype)
    d_matrix = matrix_MC.new_empty(matrix_MC.shape if need_matrix else (0,))
    with without_autocast(x_NC.device.type):
        if need_matrix:  # what came out of the ReLU lies where its gradient will
            passes.normalize(x_NC, mean_C, inverse_C, weight_C, bias_C, relu, d_y_NC)
            torch.mm(d_z_NM.T, d_y_NC, out=d_matrix)
        torch.mm(d_z_NM, matrix_MC, out=d_y_NC)
    sums_2C = passes.sums(d_y_NC, x_NC, mean_C, inverse_C, weight_C, bias_C, relu)
    return d_y_NC, sums_2C, d_matrix


@_linear_backward.register_fake
def _(
    d_z_NM: Tensor,
    x_NC: Tensor,
    mean_C: Tensor,
    inverse_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    relu: bool,
    matrix_MC: Tensor,
    need_matrix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_y_NC = torch.empty_like(x_NC, dtype=matrix_MC.dtype, memory_format=torch.contiguous_format)
    d_matrix = matrix_MC.new_empty(matrix_MC.shape if need_matrix else (0,))
    return d_y_NC, mean_C.new_empty(2, x_NC.shape[1]), d_matrix


@torch.library.custom_op("rocket_fast::batch_norm_input", mutates_args=())
def _input_gradient(
    d_y_NC: Tensor,
    x_NC: Tensor,
    mean_C: Tensor,
    inverse_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    relu: bool,
    means_2C: Tensor,
) -> Tensor:
    """(N, C): the gradient of ``x``, from ``_sums`` of the whole batch divided by its size."""
    out_NC = torch.empty_like(x_NC, memory_format=torch.contiguous_format)
    inputs = d_y_NC.contiguous(), x_NC.contiguous()
    _passes(x_NC).input_gradient(*inputs, mean_C, inverse_C, weight_C, bias_C, relu, means_2C, out_NC)
    return out_NC


@_input_gradient.register_fake
def _(d_y_NC: Tensor, x_NC: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_NC, memory_format=torch.contiguous_format)


@torch.library.custom_op("rocket_fast::batch_norm_input_", mutates_args=("d_NC",))
def _input_gradient_(
    d_NC: Tensor,
    x_NC: Tensor,
    mean_C: Tensor,
    inverse_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    relu: bool,
    means_2C: Tensor,
) -> None:
    """The same in the place of the gradient that ``_linear_backward`` made."""
    _passes(x_NC).input_gradient(
        d_NC, x_NC.contiguous(), mean_C, inverse_C, weight_C, bias_C, relu, means_2C, d_NC
    )  # fmt: skip


@_input_gradient_.register_fake
def _(*_: Any) -> None:
    return None


# --- over ranks -------------------------------------------------------------------------------------------------------


def _over_ranks(mean_C: Tensor, squares_C: Tensor, rows: int, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Means, sums of squares about them and number of rows () of all ranks together; float64, in one collective.

    Every rank's squares are moved to zero and back to the common mean. That costs ``2^-53 mean^2 / variance`` of the
    variance: nothing beside what float32 means have lost, but it is there in float64 (1e-6 at 30,000 deviations).
    """
    mean, width = mean_C.double(), mean_C.shape[0]
    parts = torch.cat([mean * rows, squares_C + rows * mean.square(), mean.new_full((1,), rows)])
    dist.all_reduce(parts, group=group)
    sums, squares, count = parts[:width], parts[width:-1], parts[-1]
    mean = sums / count
    return mean, (squares - sums * mean).clamp_(min=0), count


def _sums_over_ranks(sums_2C: Tensor, group: Group) -> Tensor:
    total = sums_2C.to(torch.float64, copy=True)
    dist.all_reduce(total, group=group)
    return total


# --- derivative -------------------------------------------------------------------------------------------------------


class _BatchNorm(torch.autograd.Function):
    """The output (N, C) or, with a matrix, (N, M), and the batch's mean and unbiased variance, which are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        linear_bias_C: Tensor | None,
        matrix_MC: Tensor | None,
        vector_M: Tensor | None,
        out_dtype: torch.dtype,
        eps: float,
        relu: bool,
        group: Group,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, squares = _moments(x_NC).unbind()
        count: Any = x_NC.shape[0]
        if group is not None:
            mean, squares, count = _over_ranks(mean, squares, count, group)
            visible = values_visible(count)
            require(not visible or int(count) > 1, "x_NC", f"{int(count) if visible else 0} rows on all ranks", _ROWS)
        dtype = compute_dtype(x_NC)
        inverse_C = torch.rsqrt(squares / count + eps).to(dtype)
        mean_C, variance_C = mean.to(dtype), (squares / (count - 1)).to(dtype)
        known = mean_C, inverse_C, weight_C, bias_C, relu
        if matrix_MC is None:
            out = _normalize(x_NC, *known)
        else:
            cast = None if vector_M is None else vector_M.to(out_dtype)
            out = _normalize_linear(x_NC, *known, matrix_MC.to(out_dtype), cast)
        ctx.save_for_backward(x_NC, mean_C, inverse_C, weight_C, bias_C, matrix_MC)
        ctx.relu, ctx.group, ctx.count, ctx.out_dtype = relu, group, count, out_dtype
        ctx.mark_non_differentiable(mean_C, variance_C)
        ctx.set_materialize_grads(False)
        return out, mean_C, variance_C

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out = gradients[0]
        if d_out is None:
            return (None,) * 10
        x_NC, mean_C, inverse_C, weight_C, bias_C, matrix_MC = ctx.saved_tensors
        needs, known = ctx.needs_input_grad, (x_NC, mean_C, inverse_C, weight_C, bias_C, ctx.relu)
        d_x = d_matrix = d_vector = None
        if matrix_MC is None:
            d_y, sums_2C = d_out, _sums(d_out, *known)
        else:
            d_y, sums_2C, d_matrix = _linear_backward(d_out, *known, matrix_MC.to(ctx.out_dtype), needs[4])
            d_vector = d_out.sum(0) if needs[5] else None
        if needs[0]:
            total = sums_2C if ctx.group is None else _sums_over_ranks(sums_2C, ctx.group)
            means_2C = (total / ctx.count).to(sums_2C.dtype)
            # In place of a gradient of our own, unless torch is to remember how it was made.
            if matrix_MC is None or d_y.dtype != x_NC.dtype or torch.is_grad_enabled():
                d_x = _input_gradient(d_y, *known, means_2C)
            else:
                _input_gradient_(d_y, *known, means_2C)
                d_x = d_y
        d_bias, d_weight = sums_2C.unbind()
        d_linear_bias = torch.zeros_like(mean_C) if needs[3] else None  # it has moved the mean, and that is all
        return (
            d_x,
            d_weight if needs[1] else None,
            d_bias if needs[2] else None,
            d_linear_bias,
            d_matrix if needs[4] else None,
            d_vector,
            *(None,) * 4,
        )


def _keep_nothing(ctx: Any, inputs: tuple, output: object) -> None:
    pass


for _operation in (_sums, _linear_backward, _input_gradient):
    _operation.register_autograd(refuse_second_derivative, setup_context=_keep_nothing)

# --- public functions -------------------------------------------------------------------------------------------------

_ROWS = "at least 2 rows in training: one has no variance"


def batch_norm_relu(
    x_NC: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool = True,
    group: Group = None,
) -> Tensor:
    """``relu(batch_norm(x + linear_bias))``, as ``nn.BatchNorm1d`` and ``nn.ReLU`` do it: values, gradients, buffers.

    In training the batch's own statistics normalise, so that a bias added to x cancels: it moves ``running_mean`` and
    its gradient is exactly zero (torch gives it one of rounding errors, which Adam then scales up). First derivatives
    only, then; with running statistics, plain torch does everything.

    Args:
        x_NC: (N, C) floating point; 16-bit x is summed in float32. N >= 2 in training, over all ranks of ``group``.
        weight, bias: (C,) or None, of the norm.
        running_mean, running_var: (C,), moved in training by ``momentum`` towards the batch's mean and unbiased
            variance, or None for both: then the batch's statistics are used in evaluation as well.
        linear_bias: (C,) or None, the bias of the linear layer that x came from, if it was left out there.
        training: normalise with the batch's statistics.
        momentum: in [0, 1].
        eps: > 0, added to the variance.
        relu: rectify.
        group: processes that share their statistics, every one of which must call this, forward and backward, with any
            number of rows. Gradients are a rank's own, for DistributedDataParallel to average, as of nn.SyncBatchNorm.

    Returns:
        (N, C), of x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit; fewer than 2 rows in training.
    """
    return _apply(
        x_NC, weight, bias, running_mean, running_var, linear_bias, None, None, training, momentum, eps, relu, group
    )  # fmt: skip


def batch_norm_relu_linear(
    x_NC: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    matrix_MC: Tensor,
    vector_M: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool = True,
    group: Group = None,
) -> Tensor:
    """``batch_norm_relu`` and the linear layer after it, which keeps no copy of its input: half the memory of both.

    Args:
        matrix_MC: (M, C), the linear layer's weights, of x's dtype; under autocast of any, as for every linear layer.
        vector_M: (M,) or None, its bias.
        others: as in ``batch_norm_relu``.

    Returns:
        (N, M), of the matrix's dtype; under autocast of autocast's.

    Raises:
        ValueError: as ``batch_norm_relu``.
    """
    shape, width = tuple(matrix_MC.shape), x_NC.shape[-1]
    require(matrix_MC.ndim == 2 and shape[1] == width, "matrix_MC", shape, lambda: f"a shape (M, {width})")
    if vector_M is not None:
        rows = shape[0]
        require(tuple(vector_M.shape) == (rows,), "vector_M", tuple(vector_M.shape), lambda: f"a shape ({rows},)")
    autocast = autocast_on(x_NC.device.type) and x_NC.dtype != torch.float64
    fits = autocast or matrix_MC.dtype == x_NC.dtype
    require(fits, "matrix_MC", matrix_MC.dtype, f"the dtype of x_NC, {x_NC.dtype} (outside autocast)")
    return _apply(
        x_NC, weight, bias, running_mean, running_var, linear_bias, matrix_MC, vector_M, training, momentum, eps, relu,
        group,
    )  # fmt: skip


def _apply(
    x_NC: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    linear_bias: Tensor | None,
    matrix_MC: Tensor | None,
    vector_M: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
    group: Group,
) -> Tensor:
    vectors = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
        "linear_bias": linear_bias,
    }
    _check(x_NC, vectors, momentum, eps)
    if not training and running_mean is not None:
        x_NC = x_NC if linear_bias is None else x_NC + linear_bias.to(x_NC.dtype)
        y_NC = F.batch_norm(x_NC, running_mean, running_var, weight, bias, False, momentum, eps)
        y_NC = F.relu(y_NC) if relu else y_NC
        return y_NC if matrix_MC is None else F.linear(y_NC, matrix_MC, vector_M)
    require(group is not None or x_NC.shape[0] > 1, "x_NC", f"a shape {tuple(x_NC.shape)}", _ROWS)
    autocast = autocast_on(x_NC.device.type) and x_NC.dtype != torch.float64
    # The matrix is converted within, so that its copy is not kept.
    out_dtype = torch.get_autocast_dtype(x_NC.device.type) if autocast and matrix_MC is not None else x_NC.dtype
    out, mean_C, variance_C = _BatchNorm.apply(
        x_NC, weight, bias, linear_bias, matrix_MC, vector_M, out_dtype, float(eps), relu, group
    )
    if training and running_mean is not None and running_var is not None:
        _move(running_mean, running_var, mean_C, variance_C, linear_bias, momentum)
    return out


@torch.no_grad()
def _move(
    running_mean: Tensor,
    running_var: Tensor,
    mean_C: Tensor,
    variance_C: Tensor,
    linear_bias: Tensor | None,
    momentum: float,
) -> None:
    """The running statistics towards the batch's."""
    mean_C = mean_C if linear_bias is None else mean_C + linear_bias
    for running, new in ((running_mean, mean_C), (running_var, variance_C)):
        running.mul_(1 - momentum).add_(new.to(running.dtype), alpha=momentum)


def _check(x_NC: Tensor, vectors: dict[str, Tensor | None], momentum: float, eps: float) -> None:
    shape = tuple(x_NC.shape)
    require(x_NC.ndim == 2 and shape[1] > 0, "x_NC", shape, "a shape (N, C) with C >= 1")
    require(x_NC.is_floating_point(), "x_NC", x_NC.dtype, "a floating point dtype")
    width = shape[1]
    for name, vector in vectors.items():
        if vector is not None:
            require(tuple(vector.shape) == (width,), name, tuple(vector.shape), lambda: f"a shape ({width},)")
            require(vector.device == x_NC.device, name, vector.device, f"the device of x_NC, {x_NC.device}")
    both = (vectors["running_mean"] is None) == (vectors["running_var"] is None)
    require(both, "running_var", type(vectors["running_var"]), "a tensor where running_mean is one, else None")
    require(0 <= momentum <= 1, "momentum", momentum, "a number in [0, 1]")
    require(eps > 0, "eps", eps, "a number > 0")
