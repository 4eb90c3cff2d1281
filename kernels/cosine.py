"""Negative cosines between predictions and targets of all pairs of views: SiamLIP's and BYOLIP's loss in one operation.

Shapes: S sides that predict, V = 1 + K views of each, the weak one first, N samples, P features. A side's weak
prediction meets its weak target, and every strong prediction every strong target: 1 + K * K pairs. Of K targets that a
prediction meets only the sum of the unit vectors matters,

    ``sum_j cos(p_i, t_j) = (p_i / |p_i|) . goal`` with ``goal = sum_j t_j / |t_j|``

so that each row is read once and nothing of size pairs x N x P exists. Targets get no gradient. Backward makes goals
anew from the inputs and their norms, which are all that is kept. On CUDA one launch each way (triton_cosine.py) and the
sum of its programs' parts; elsewhere torch on all sides and views at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rocket_fast.kernels.checks import require_pair, require_views
from rocket_fast.kernels.contrastive import refuse_second_derivative, side_by_side
from rocket_fast.kernels.dispatch import triton_kernels, without_autocast
from rocket_fast.kernels.reference import require_weak
from rocket_fast.kernels.tiled import compute_dtype, norms

# Numbers of a block of rows, of all sides and views; measured at 4096 x 128 and three views.
BLOCK = 2**17

# --- torch ------------------------------------------------------------------------------------------------------------


def pair_weight(shape: torch.Size) -> float:
    """What one pair's ``2 - 2 cos`` of one sample counts in the mean over sides, pairs and samples."""
    sides, views, samples, _ = shape
    return 1 / (sides * (1 + (views - 1) ** 2) * samples)


def _blocks(like_SVNP: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Views that meet each other (the weak one; the strong ones) and rows of them: on the CPU, as its cache holds."""
    sides, views, samples, features = like_SVNP.shape
    step = max(1, BLOCK // (sides * views * features)) if like_SVNP.device.type == "cpu" else samples
    for start in range(0, samples, step):
        for first, last in ((0, 1), (1, views)):
            if first < last:
                yield slice(None), slice(first, last), slice(start, start + step)


def _goal(target_SKRP: Tensor, norm_SKR: Tensor) -> Tensor:
    """The sum of unit targets, (S, 1, R, P)."""
    return (target_SKRP / norm_SKR[..., None]).sum(1, keepdim=True)


def _torch_forward(prediction_SVNP: Tensor, target_SVNP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, shape = compute_dtype(prediction_SVNP), prediction_SVNP.shape
    norm_p_SVN, norm_t_SVN = (prediction_SVNP.new_empty(shape[:-1], dtype=dtype) for _ in range(2))
    total = prediction_SVNP.new_zeros((), dtype=torch.float64)
    for at in _blocks(prediction_SVNP):
        p_SKRP, t_SKRP = prediction_SVNP[at].to(dtype), target_SVNP[at].to(dtype)
        norm_p_SKR, norm_t_SKR = norms(p_SKRP), norms(t_SKRP)
        along_SKR = torch.linalg.vecdot(p_SKRP, _goal(t_SKRP, norm_t_SKR))
        total += (along_SKR / norm_p_SKR).sum(dtype=torch.float64)
        norm_p_SVN[at], norm_t_SVN[at] = norm_p_SKR, norm_t_SKR
    return (2 - 2 * pair_weight(shape) * total).to(dtype), norm_p_SVN, norm_t_SVN


def _torch_backward(
    d_loss: Tensor, prediction_SVNP: Tensor, target_SVNP: Tensor, norm_p_SVN: Tensor, norm_t_SVN: Tensor
) -> Tensor:
    out_SVNP = torch.empty_like(prediction_SVNP, memory_format=torch.contiguous_format)
    factor = d_loss * (-2 * pair_weight(prediction_SVNP.shape))
    for at in _blocks(prediction_SVNP):
        norm_SKR1 = norm_p_SVN[at][..., None]
        unit_SKRP, goal_S1RP = prediction_SVNP[at] / norm_SKR1, _goal(target_SVNP[at], norm_t_SVN[at])
        along_SKR1 = torch.linalg.vecdot(unit_SKRP, goal_S1RP)[..., None]
        out_SVNP[at] = torch.addcmul(goal_S1RP, unit_SKRP, along_SKR1, value=-1).mul_(factor / norm_SKR1)
    return out_SVNP


# --- operations -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("rocket_fast::cosine_forward", mutates_args=())
def _forward(prediction_SVNP: Tensor, target_SVNP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (), and the norms (S, V, N) of predictions and of targets, at least 1e-12."""
    with without_autocast(prediction_SVNP.device.type):
        kernels = triton_kernels("triton_cosine", prediction_SVNP)
        if kernels is not None and prediction_SVNP.shape[-1] <= kernels.MOST:
            return kernels.cosine_forward(prediction_SVNP, target_SVNP)
        return _torch_forward(prediction_SVNP, target_SVNP)


@torch.library.custom_op("rocket_fast::cosine_backward", mutates_args=())
def _backward(
    d_loss: Tensor, prediction_SVNP: Tensor, target_SVNP: Tensor, norm_p_SVN: Tensor, norm_t_SVN: Tensor
) -> Tensor:
    """The predictions' gradient, in their dtype."""
    inputs = (d_loss, prediction_SVNP, target_SVNP, norm_p_SVN, norm_t_SVN)
    with without_autocast(prediction_SVNP.device.type):
        kernels = triton_kernels("triton_cosine", prediction_SVNP)
        if kernels is not None and prediction_SVNP.shape[-1] <= kernels.MOST:
            return kernels.cosine_backward(*inputs)
        return _torch_backward(*inputs)


@_forward.register_fake
def _(prediction_SVNP: Tensor, target_SVNP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(prediction_SVNP)
    norm_p_SVN, norm_t_SVN = (prediction_SVNP.new_empty(prediction_SVNP.shape[:-1], dtype=dtype) for _ in range(2))
    return prediction_SVNP.new_empty((), dtype=dtype), norm_p_SVN, norm_t_SVN


@_backward.register_fake
def _(d_loss: Tensor, prediction_SVNP: Tensor, target_SVNP: Tensor, norm_p_SVN: Tensor, norm_t_SVN: Tensor) -> Tensor:
    return prediction_SVNP.new_empty(prediction_SVNP.shape)


def _keep_norms(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None]:
    if d_loss is None or not ctx.needs_input_grad[0]:
        return None, None
    return _backward(d_loss, *ctx.saved_tensors), None


def _keep_nothing(ctx: Any, inputs: tuple, output: Tensor) -> None:
    pass


_forward.register_autograd(_differentiate, setup_context=_keep_norms)
_backward.register_autograd(refuse_second_derivative, setup_context=_keep_nothing)


# --- public functions -------------------------------------------------------------------------------------------------


def negative_cosine_loss(prediction_NP: Tensor, target_NP: Tensor) -> Tensor:
    """``2 - 2 cos(prediction, target)``, mean over samples, in [0, 4]; no gradient flows to the target.

    Equal calls give equal bits. First derivatives only.

    Args:
        prediction_NP: (N, P) floating point, a predictor's outputs.
        target_NP: (N, P), projections of the other side, of the same shape, dtype and device.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that differ, or no samples.

    Source: BYOL (Grill et al. 2020, eq. 2), SimSiam (Chen and He 2021, eq. 1, times 2 plus 2).
    """
    require_pair("prediction_NP", prediction_NP, "target_NP", target_NP)
    return _forward(prediction_NP[None, None], target_NP.detach()[None, None])[0]


def siamlip_loss(
    image_p: Sequence[Tensor], text_p: Sequence[Tensor], image_v: Sequence[Tensor], text_v: Sequence[Tensor]
) -> Tensor:
    """SiamLIP: each side predicts the other's projection; BYOLIP, where the projections are an averaged encoder's.

    A pair (i, j) of an image and a text view costs the mean of ``negative_cosine_loss(image_p[i], text_v[j])`` and
    ``negative_cosine_loss(text_p[j], image_v[i])``; the loss is the mean over the weak pair and the K x K strong ones.
    Equal calls give equal bits. First derivatives only.

    Args:
        image_p, text_p: predictor outputs, 1 + K tensors (N, P) each, the weak view first.
        image_v, text_v: projections (the targets, no gradient), 1 + K tensors (N, P) each, the weak view first.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs), in [0, 4].

    Raises:
        ValueError: shapes, dtypes or devices that differ, unequal numbers of views, no views or no samples.

    Source: Fini et al. 2023 (SiamLIP, BYOLIP).
    """
    require_weak("image_p", image_p)
    for name, views in (("text_p", text_p), ("image_v", image_v), ("text_v", text_v)):
        require_views("image_p", image_p, name, views)
    sides = (len(image_p), *image_p[0].shape)
    prediction_SVNP = side_by_side([*image_p, *text_p]).view(2, *sides)
    target_SVNP = side_by_side([view.detach() for view in (*text_v, *image_v)]).view(2, *sides)
    return _forward(prediction_SVNP, target_SVNP)[0]
