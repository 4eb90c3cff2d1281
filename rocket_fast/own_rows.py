"""BarLIP and SwALIP over ranks: every rank multiplies its own samples' rows only, and all get the same exact loss.

W ranks, N samples on one of them, M on all. What a rank receives, multiplies and reduces, beside losses:

====================  =================================  =====================  ===================================
loss                  gathers                            products               all-reduces
====================  =================================  =====================  ===================================
BarLIP                projections; nothing backward      4 of N x M x P a pair  1 + P numbers a pair
SwALIP                texts, which CL2L has already;     6 of N x M x D a pair  log-sum-exps of M columns: of both
                      their gradients backward                                  assignments in every iteration, of
                                                                                the predictions once
SwALIP, prototypes    nothing                            none                   log-sum-exps of the prototypes'
                                                                                scores, in every iteration
====================  =================================  =====================  ===================================

A row's part needs no other row's: Barlow's sum of squares is a sum over rows of two Gram matrices; Sinkhorn's row
scalings are a row's own affair and its column scalings are sums over rows. Gradients are made with the value, and are
W times the loss's, as rocket_fast/distributed.py has it. Where a rank has no samples, all ranks do everything. Triton's
kernels for SwALIP multiply 2 n + 5 times for n iterations, and reduce the two assignments' columns in turns: as many
numbers in twice as many all-reduces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rocket_fast.distributed import AllRanks, gather_together, world_size
from rocket_fast.errors import require
from rocket_fast.kernels import barlip_loss, swalip_loss, swalip_prototypes_loss
from rocket_fast.kernels.barlow import barlow_of_rows
from rocket_fast.kernels.checks import require_scalar, require_views
from rocket_fast.kernels.contrastive import as_number, side_by_side, wanted, workspace_bytes
from rocket_fast.kernels.reference import mean_over_pairs, require_weak
from rocket_fast.kernels.sinkhorn import prototypes_of_rows, require_sinkhorn, swalip_of_rows

WORKSPACE_MIB = 64.0  # scratch memory of the losses


def barlip_over_ranks(
    image_v: Sequence[Tensor], text_v: Sequence[Tensor], ranks: AllRanks, *, lambda_: float, scale: float
) -> Tensor:
    """``rocket_fast.kernels.barlip_loss`` of all ranks' samples; every rank must call it."""
    require_weak("image_v", image_v)
    if not _shared(ranks) or 4 * max(ranks.counts) >= 3 * image_v[0].shape[1]:  # there C takes fewer products
        all_image_v, all_text_v = ranks.gather(image_v, text_v)
        return barlip_loss(all_image_v, all_text_v, lambda_=lambda_, scale=scale, workspace_mib=WORKSPACE_MIB)
    require_views("image_v", image_v, "text_v", text_v)
    everyone = gather_together([view.detach() for view in (*image_v, *text_v)], ranks.counts)
    workspace = workspace_bytes(WORKSPACE_MIB)

    def pair(image: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor]) -> Tensor:
        own, whole = zip(image, text, strict=True)
        options: dict[str, Any] = {"lambda_": lambda_, "scale": scale, "need_grad": wanted(*own)}
        with torch.no_grad():
            loss, gradients = barlow_of_rows(own, whole, workspace=workspace, total=_total, **options)
        return _WithGradients.apply(loss, gradients, *own)

    views = len(image_v)
    images, texts = zip(image_v, everyone[:views], strict=True), zip(text_v, everyone[views:], strict=True)
    return mean_over_pairs(pair, list(images), list(texts))


def swalip_over_ranks(
    image_h: Sequence[Tensor],
    text_h: Sequence[Tensor],
    h_logit_scale: Tensor,
    ranks: AllRanks,
    *,
    epsilon: float,
    iterations: int,
) -> Tensor:
    """``rocket_fast.kernels.swalip_loss`` of all ranks' samples; every rank must call it."""
    require(len(image_h) >= 2, "len(image_h)", len(image_h), "at least 2 strong views")
    require_scalar("h_logit_scale", h_logit_scale, image_h[0].device)
    require_sinkhorn(epsilon, iterations)
    options: dict[str, Any] = {"epsilon": epsilon, "iterations": iterations}
    if not _shared(ranks):
        images, texts = ranks.gather(image_h, text_h)
        return swalip_loss(images, texts, h_logit_scale, workspace_mib=WORKSPACE_MIB, **options)
    require_views("image_h", image_h, "text_h", text_h)
    (all_text_h,) = ranks.gather(text_h)
    inputs = side_by_side(image_h), side_by_side(all_text_h), as_number(h_logit_scale, image_h[0])
    needed = wanted(*inputs)
    with torch.no_grad():
        own, of_columns, *gradients = swalip_of_rows(
            *inputs,
            samples=ranks.samples,
            normalize=True,
            need_grad=needed,
            workspace=workspace_bytes(WORKSPACE_MIB),
            combine=_log_total,
            **options,
        )
    return _WithGradients.apply(_total(own) + of_columns, gradients, *inputs)


def swalip_prototypes_over_ranks(
    image_p: Sequence[Tensor],
    text_p: Sequence[Tensor],
    logit_scale: Tensor,
    ranks: AllRanks,
    *,
    epsilon: float,
    iterations: int,
) -> Tensor:
    """``rocket_fast.kernels.swalip_prototypes_loss`` of all ranks' samples; every rank must call it."""
    require_weak("image_p", image_p)
    require_scalar("logit_scale", logit_scale, image_p[0].device)
    require_sinkhorn(epsilon, iterations)
    options: dict[str, Any] = {"epsilon": epsilon, "iterations": iterations}
    if not _shared(ranks):
        images, texts = ranks.gather(image_p, text_p)
        return swalip_prototypes_loss(images, texts, logit_scale, workspace_mib=WORKSPACE_MIB, **options)
    require_views("image_p", image_p, "text_p", text_p)
    inputs = side_by_side(image_p), side_by_side(text_p), as_number(logit_scale, image_p[0])
    needed = wanted(*inputs)
    with torch.no_grad():
        own, *gradients = prototypes_of_rows(
            *inputs,
            samples=ranks.samples,
            need_grad=needed,
            workspace=workspace_bytes(WORKSPACE_MIB),
            combine=_log_total,
            **options,
        )
    return _WithGradients.apply(_total(own), gradients, *inputs)


# --- collectives ------------------------------------------------------------------------------------------------------


def _shared(ranks: AllRanks) -> bool:
    """Whether there is anything to share out; all ranks find the same."""
    return world_size() > 1 and min(ranks.counts) > 0


def _total(own: Tensor) -> Tensor:
    """The sum over ranks, which is not differentiated."""
    total = own.clone()
    dist.all_reduce(total)
    return total


def _log_total(lse: Tensor) -> Tensor:
    """Log-sum-exps over all ranks' rows from those over each one's."""
    highest = lse.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return highest + _total((lse - highest).exp()).log()


class _WithGradients(torch.autograd.Function):
    """A loss of all ranks' samples whose gradients to this rank's inputs are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor] | None, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*(gradients or ()))
        ctx.dtypes = [x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved, factor = ctx.saved_tensors, world_size() * d_loss
        needed = ctx.needs_input_grad[2:]
        own = (
            (gradient * factor).to(dtype) if need else None
            for gradient, dtype, need in zip(saved, ctx.dtypes, needed, strict=True)
        )
        return None, None, *own
