"""SigLIP's pairwise sigmoid loss without the N x M matrix of similarities: exact gradients, O(N D) memory.

Shapes: N images, M texts, D embedding width. ``S = logit_scale * X Y^T + logit_bias``; row i's positive is column
``i + row_offset``. Every entry's loss stands alone, so one pass over the tiles gives the value and, where one is
wanted, all gradients with it: three products of size N x M x D in all, as many as a dense loss takes that stores S.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rocket_fast.kernels.checks import require_integer, require_same_width, require_scalar, require_scale
from rocket_fast.kernels.contrastive import (
    as_factors,
    as_number,
    refuse_second_derivative,
    wanted,
    workspace_bytes,
)
from rocket_fast.kernels.dispatch import implementation, without_autocast
from rocket_fast.kernels.tiled import compute_dtype

# --- operations -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("rocket_fast::sigmoid_forward_backward", mutates_args=())
def _forward_backward(
    image_ND: Tensor,
    text_MD: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_offset: int,
    normalize: bool,
    need_grad: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss (); its gradients to scale and bias (2,), and those to images and texts (empty if not needed)."""
    with without_autocast(image_ND.device.type):
        loss, d_image, d_text, d_scale, d_bias = implementation(image_ND).sigmoid_forward_backward(
            image_ND,
            text_MD,
            scale,
            bias,
            row_offset=row_offset,
            normalize=normalize,
            need_grad=need_grad,
            workspace=workspace,
        )
        return loss, torch.stack([d_scale, d_bias]), d_image, d_text


@_forward_backward.register_fake
def _(
    image_ND: Tensor,
    text_MD: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_offset: int,
    normalize: bool,
    need_grad: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(image_ND)
    d_image, d_text = (side.new_empty(side.shape if need_grad else (0,), dtype=dtype) for side in (image_ND, text_MD))
    return scale.new_empty(()), scale.new_empty(2), d_image, d_text


@torch.library.custom_op("rocket_fast::scaled_gradient", mutates_args=())
def _scaled_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor * gradient`` in a dtype."""
    return (gradient * factor).to(dtype)


@_scaled_gradient.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def scaled_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor * gradient`` in a dtype, where gradients were made with the value: in a backward, ``factor`` being its.

    A backward that makes a graph (create_graph=True) gets one that refuses to be gone through: nothing else would tell
    that the gradient depends on inputs which nobody kept. ``autograd.grad`` towards inputs alone does not go there: it
    says that they are not used, or, where they are in another way as well, gives that way's part.
    """
    if torch.is_grad_enabled() and not factor.requires_grad:
        factor = factor.detach().requires_grad_()
    return _scaled_gradient(gradient, factor, dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, d_numbers_2, d_image, d_text = output
    ctx.save_for_backward(d_numbers_2, d_image, d_text)
    ctx.dtypes = [x.dtype for x in inputs[:4]]
    ctx.mark_non_differentiable(d_numbers_2, d_image, d_text)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * 8
    d_numbers_2, d_image, d_text = ctx.saved_tensors  # once: checkpointing recomputes what it unpacks
    gradients = (d_image, d_text, d_numbers_2[0], d_numbers_2[1])
    own = (
        scaled_gradient(gradient, d_loss, dtype) if needed else None
        for needed, gradient, dtype in zip(ctx.needs_input_grad[:4], gradients, ctx.dtypes, strict=True)
    )
    return (*own, *(None,) * 4)


def _keep_nothing(ctx: Any, inputs: tuple, output: Tensor) -> None:
    pass


_forward_backward.register_autograd(_differentiate, setup_context=_setup_context)
_scaled_gradient.register_autograd(refuse_second_derivative, setup_context=_keep_nothing)


# --- public function --------------------------------------------------------------------------------------------------


def siglip_loss(
    image_ND: Tensor,
    text_MD: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    row_offset: int = 0,
    normalize: bool = False,
    workspace_mib: float = 64,
) -> Tensor:
    """SigLIP: every image-text pair is a binary decision, ``sum_ij -log sigmoid(z_ij (s x_i . y_j + b)) / N``.

    z is 1 for image i and text ``i + row_offset``, else -1. Memory beyond inputs and gradients is the workspace, and on
    the CPU a float32 copy of either side where it is 16-bit or to be normalised, and of its gradient. Equal calls give
    equal bits. First derivatives only.

    Args:
        image_ND: (N, D) floating point, image embeddings; the sum is divided by their number.
        text_MD: (M, D), text embeddings, on the same device. Under autocast both are taken in its dtype, as by any
            matrix product; otherwise their dtypes must agree.
        logit_scale: s, after exp (SigLIP starts at 10); a number or a one-value tensor.
        logit_bias: b (SigLIP starts at -10); a number or a one-value tensor.
        row_offset: which text image 0 belongs to, where the images are a part of the batch that the texts are all of.
            May leave no image with a text: then all pairs are negatives.
        normalize: scale every row to unit length first; its derivative is part of the operation.
        workspace_mib: MiB of scratch memory.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: shapes or devices that do not fit, a scale or bias that is not one finite number, a negative scale.

    Source: "Sigmoid Loss for Language Image Pre-Training" (Zhai et al. 2023, eq. 2 and algorithm 1).
    """
    require_same_width("image_ND", image_ND, "text_MD", text_MD)
    require_scale("logit_scale", logit_scale, image_ND.device)
    require_scalar("logit_bias", logit_bias, image_ND.device)
    image, text = as_factors("image_ND", image_ND, "text_MD", text_MD)
    scale, bias = as_number(logit_scale, image), as_number(logit_bias, image)
    require_integer("row_offset", row_offset)
    options = (int(row_offset), normalize, wanted(image, text, scale, bias), workspace_bytes(workspace_mib))
    return _forward_backward(image, text, scale, bias, *options)[0]
