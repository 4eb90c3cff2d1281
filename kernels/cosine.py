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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rocket_fast.kernels.checks import require_pair, require_views
from rocket_fast.kernels.contrastive import refuse_second_derivative, side_by_side
from rocket_fast.kernels.dispatch import triton_kernels, without_autocast
from rocket_fast.kernels.reference import require_weak
from rocket_fast.kernels.tiled import compute_dtype, norms

# --- torch ------------------------------------------------------------------------------------------------------------


def pair_weight(shape: torch.Size) -> float:
    """What one pair's ``2 - 2 cos`` of one sample counts in the mean over sides, pairs and samples."""
    sides, views, samples, _ = shape
    return 1 / (sides * (1 + (views - 1) ** 2) * samples)


def _goals(target_SVNP: Tensor, norm_SVN: Tensor) -> Tensor:
    """Sums of the unit targets that a prediction meets, (S, 1 or 2, N, P): a weak one's, a strong one's."""
    unit_SVNP = target_SVNP / norm_SVN[..., None]
    if unit_SVNP.shape[1] <= 2:
        return unit_SVNP
    return torch.cat([unit_SVNP[:, :1], unit_SVNP[:, 1:].sum(1, keepdim=True)], 1)


def _met(goals: Tensor, views: int) -> Tensor:
    """The goal of each view, (S, V, ...)."""
    if goals.shape[1] == views:
        return goals
    sides, _, *rest = goals.shape
    return torch.cat([goals[:, :1], goals[:, 1:].expand(sides, views - 1, *rest)], 1)


def _torch_forward(prediction_SVNP: Tensor, target_SVNP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, shape = compute_dtype(prediction_SVNP), prediction_SVNP.shape
    p_SVNP, t_SVNP = prediction_SVNP.to(dtype), target_SVNP.to(dtype)
    norm_p_SVN, norm_t_SVN = norms(p_SVNP), norms(t_SVNP)
    goals = _goals(t_SVNP, norm_t_SVN)
    along_S1N = torch.linalg.vecdot(p_SVNP[:, :1], goals[:, :1]) / norm_p_SVN[:, :1]
    total = along_S1N.sum(dtype=torch.float64)
    if shape[1] > 1:
        along_SKN = torch.linalg.vecdot(p_SVNP[:, 1:], goals[:, 1:]) / norm_p_SVN[:, 1:]
        total = total + along_SKN.sum(dtype=torch.float64)
    return (2 - 2 * pair_weight(shape) * total).to(dtype), norm_p_SVN, norm_t_SVN


def _torch_backward(
    d_loss: Tensor, prediction_SVNP: Tensor, target_SVNP: Tensor, norm_p_SVN: Tensor, norm_t_SVN: Tensor
) -> Tensor:
    unit_SVNP = prediction_SVNP / norm_p_SVN[..., None]
    goal_SVNP = _met(_goals(target_SVNP, norm_t_SVN), prediction_SVNP.shape[1])
    along_SVN = torch.linalg.vecdot(unit_SVNP, goal_SVNP)
    factor_SVN = d_loss * (-2 * pair_weight(prediction_SVNP.shape)) / norm_p_SVN
    across_SVNP = torch.addcmul(goal_SVNP, unit_SVNP, along_SVN[..., None], value=-1)
    return across_SVNP.mul_(factor_SVN[..., None]).to(prediction_SVNP.dtype)


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
