"""Symmetric InfoNCE without the N x M matrix of similarities: CLIP's loss and CL2L's, exact, for any trainer.

Shapes: A image views of N images, B text views of M texts, D embedding width, P matched pairs. For views a and b,
``S = scale[a, b] * X_a Y_b^T``; row i's positive is column ``i + row_offset``.

Two operations do all the work, as Triton kernels on CUDA (triton_contrastive.py) and as tiles of torch elsewhere
(tiled.py). Forward, one product: log-sum-exps of rows and columns, and from them losses and accuracies. Backward, three
products: S once more, turned into its gradient where it lies, then the gradients of both sides. Neither keeps anything
of size N x M, and both repeat to the bit.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor

from rocket_fast.errors import require
from rocket_fast.kernels import tiled
from rocket_fast.kernels.checks import (
    require_finite,
    require_integer,
    require_same_rows,
    require_same_width,
    require_scalar,
    require_scale,
    require_smoothing,
    require_views,
)
from rocket_fast.kernels.dispatch import autocast_on, implementation, without_autocast
from rocket_fast.kernels.positives import Pairs, soft_terms
from rocket_fast.kernels.reference import ClipTerms, MultiviewClipTerms, Reduction
from rocket_fast.kernels.tiled import Positives, compute_dtype

# --- operations, their shapes for tracing, their derivatives ----------------------------------------------------------


@torch.library.custom_op("rocket_fast::contrastive_forward", mutates_args=())
def forward_operation(
    image_AND: Tensor,
    text_BMD: Tensor,
    scale_AB: Tensor,
    smoothing: Sequence[float],
    row_offset: int,
    diagonal: bool,
    normalize: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exps of rows (A, B, N) and columns (A, B, M), float64; maxima; what the diagonal's positives tell.

    That is: whether a column's positive is its pick (A, B, M), losses and accuracies (A, B, 2) each; empty and zero
    where ``diagonal`` is False.
    """
    with without_autocast(image_AND.device.type):
        return implementation(image_AND).contrastive_forward(
            image_AND,
            text_BMD,
            scale_AB,
            smoothing=smoothing,
            row_offset=row_offset,
            diagonal=diagonal,
            normalize=normalize,
            workspace=workspace,
        )


@forward_operation.register_fake
def _(
    image_AND: Tensor,
    text_BMD: Tensor,
    scale_AB: Tensor,
    smoothing: Sequence[float],
    row_offset: int,
    diagonal: bool,
    normalize: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, rows, columns = compute_dtype(image_AND), image_AND.shape[1], text_BMD.shape[1]

    def of(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return image_AND.new_empty(size, dtype=dtype)

    pairs = scale_AB.shape
    lse = of(*pairs, rows, dtype=torch.float64), of(*pairs, columns, dtype=torch.float64)
    right = of(*(*pairs, columns) if diagonal else (0,), dtype=torch.bool)
    return *lse, of(*pairs, rows), of(*pairs, columns), right, of(*pairs, 2), of(*pairs, 2)


@torch.library.custom_op("rocket_fast::contrastive_backward", mutates_args=())
def backward_operation(
    image_AND: Tensor,
    text_BMD: Tensor,
    scale_AB: Tensor,
    lse_image_ABN: Tensor,
    lse_text_ABM: Tensor,
    weight_image_ABN: Tensor,
    weight_text_ABM: Tensor,
    smoothing: Sequence[float],
    row_offset: int,
    diagonal: bool,
    normalize: bool,
    need_image: bool,
    need_text: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both sides (empty where not needed) and the scales, from those of the rows' and columns' losses."""
    with without_autocast(image_AND.device.type):
        return implementation(image_AND).contrastive_backward(
            image_AND,
            text_BMD,
            scale_AB,
            lse_image_ABN,
            lse_text_ABM,
            weight_image_ABN,
            weight_text_ABM,
            smoothing=smoothing,
            row_offset=row_offset,
            diagonal=diagonal,
            normalize=normalize,
            need_image=need_image,
            need_text=need_text,
            workspace=workspace,
        )


@backward_operation.register_fake
def _(
    image_AND: Tensor,
    text_BMD: Tensor,
    scale_AB: Tensor,
    lse_image_ABN: Tensor,
    lse_text_ABM: Tensor,
    weight_image_ABN: Tensor,
    weight_text_ABM: Tensor,
    smoothing: Sequence[float],
    row_offset: int,
    diagonal: bool,
    normalize: bool,
    need_image: bool,
    need_text: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    d_image = image_AND.new_empty(image_AND.shape if need_image else (0,))
    d_text = text_BMD.new_empty(text_BMD.shape if need_text else (0,))
    return d_image, d_text, torch.empty_like(scale_AB)


@torch.library.custom_op("rocket_fast::contrastive_whole", mutates_args=())
def _whole_operation(
    image_AND: Tensor,
    text_BMD: Tensor,
    scale_AB: Tensor,
    smoothing: Sequence[float],
    row_offset: int,
    normalize: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses and accuracies (A, B, 2), and the gradients of the sum of all losses to both sides and to the scales.

    For pairs that the workspace holds twice: there the gradients come cheaper with the value than after it. Without
    ``need_grad`` they are empty.
    """
    with without_autocast(image_AND.device.type):
        return tiled.contrastive_forward_backward(
            image_AND,
            text_BMD,
            scale_AB,
            smoothing=smoothing,
            row_offset=row_offset,
            normalize=normalize,
            need_grad=need_grad,
        )


@_whole_operation.register_fake
def _(
    image_AND: Tensor,
    text_BMD: Tensor,
    scale_AB: Tensor,
    smoothing: Sequence[float],
    row_offset: int,
    normalize: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    losses, accuracies = (scale_AB.new_empty(*scale_AB.shape, 2) for _ in range(2))
    inputs = (image_AND, text_BMD, scale_AB)
    gradients = (x.new_empty(x.shape if need_grad else (0,), dtype=compute_dtype(x)) for x in inputs)
    d_image, d_text, d_scale = gradients
    return losses, accuracies, d_image, d_text, d_scale


@torch.library.custom_op("rocket_fast::contrastive_rescale", mutates_args=())
def _rescale(
    d_losses_AB2: Tensor,
    d_image_AND: Tensor,
    d_text_BMD: Tensor,
    d_scale_AB: Tensor,
    image_AND: Tensor,
    text_BMD: Tensor,
    scale_AB: Tensor,
    smoothing: Sequence[float],
    row_offset: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients made with the value, times what the sum of losses is differentiated with.

    Where that differs between directions or pairs, which a sum does not tell apart, they are made anew.
    """
    factor = d_losses_AB2[0, 0, 0]
    with without_autocast(image_AND.device.type):
        if (d_losses_AB2 == factor).all():
            made = ((d_image_AND, image_AND), (d_text_BMD, text_BMD), (d_scale_AB, scale_AB))
            d_image, d_text, d_scale = ((gradient * factor).to(like.dtype) for gradient, like in made)
            return d_image, d_text, d_scale
        # Differentiated unequally, it is done again, tile by tile in as much memory as the whole takes.
        workspace = 2 * image_AND.shape[1] * text_BMD.shape[1] * compute_dtype(image_AND).itemsize
        options: dict[str, Any] = {
            "smoothing": smoothing,
            "row_offset": row_offset,
            "normalize": normalize,
            "workspace": workspace,
        }
        inputs = (image_AND, text_BMD, scale_AB)
        lse_image, lse_text, *_ = tiled.contrastive_forward(*inputs, diagonal=False, **options)
        weights = _weights(d_losses_AB2, image_AND, text_BMD, row_offset)
        options |= {"need_image": True, "need_text": True}
        return tiled.contrastive_backward(*inputs, lse_image, lse_text, *weights, diagonal=True, **options)


@_rescale.register_fake
def _(
    d_losses_AB2: Tensor,
    d_image_AND: Tensor,
    d_text_BMD: Tensor,
    d_scale_AB: Tensor,
    image_AND: Tensor,
    text_BMD: Tensor,
    scale_AB: Tensor,
    *options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return image_AND.new_empty(image_AND.shape), text_BMD.new_empty(text_BMD.shape), torch.empty_like(scale_AB)


def _weights(d_losses_AB2: Tensor, image_AND: Tensor, text_BMD: Tensor, row_offset: int) -> tuple[Tensor, Tensor]:
    rows, columns = image_AND.shape[1], text_BMD.shape[1]
    return Positives.of(rows, columns, row_offset).weights(d_losses_AB2, rows, columns)


def _keep_statistics(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    image_AND, text_BMD, scale_AB, ctx.smoothing, ctx.row_offset, ctx.diagonal, ctx.normalize, ctx.workspace = inputs
    lse_image_ABN, lse_text_ABM, *picks, losses_AB2, accuracies_AB2 = output
    ctx.save_for_backward(image_AND, text_BMD, scale_AB, lse_image_ABN, lse_text_ABM)
    ctx.set_materialize_grads(False)
    # With targets on the diagonal the losses are differentiated, without them the log-sum-exps; never both.
    constant = (lse_image_ABN, lse_text_ABM) if ctx.diagonal else (losses_AB2,)
    ctx.mark_non_differentiable(*picks, *constant, accuracies_AB2)


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(gradient is None for gradient in gradients):
        return (None,) * 8
    saved = ctx.saved_tensors  # once: checkpointing recomputes what it unpacks
    needs = ctx.needs_input_grad[:3]
    d_lse_image_ABN, d_lse_text_ABM, *_, d_losses_AB2, _ = gradients
    if ctx.diagonal:
        assert d_losses_AB2 is not None
        weights = _weights(d_losses_AB2, saved[0], saved[1], ctx.row_offset)
    else:
        zero = saved[2].new_zeros(1, 1, 1)
        weights = (
            zero.expand_as(saved[3]) if d_lse_image_ABN is None else d_lse_image_ABN.to(zero.dtype),
            zero.expand_as(saved[4]) if d_lse_text_ABM is None else d_lse_text_ABM.to(zero.dtype),
        )
    options = (ctx.smoothing, ctx.row_offset, ctx.diagonal, ctx.normalize, *needs[:2], ctx.workspace)
    found = backward_operation(*saved, *weights, *options)
    return *(gradient if needed else None for gradient, needed in zip(found, needs, strict=True)), *(None,) * 5


def _keep_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    image_AND, text_BMD, scale_AB, *ctx.options, _ = inputs
    _, accuracies_AB2, *gradients = output
    ctx.save_for_backward(*gradients, image_AND, text_BMD, scale_AB)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(accuracies_AB2, *gradients)


def _hand_out(ctx: Any, d_losses_AB2: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_losses_AB2 is None:
        return (None,) * 7
    found, needs = _rescale(d_losses_AB2, *ctx.saved_tensors, *ctx.options), ctx.needs_input_grad[:3]
    return *(gradient if needed else None for gradient, needed in zip(found, needs, strict=True)), *(None,) * 4


def refuse_second_derivative(ctx: Any, *gradients: Tensor) -> NoReturn:
    """What differentiating a gradient of a fused operation ends in."""
    raise NotImplementedError(
        "fused operations have first derivatives only; for second derivatives (create_graph=True, gradient penalties) "
        "use plain torch, for losses the dense rocket_fast.kernels.reference"
    )


def _keep_nothing(ctx: Any, inputs: tuple, output: object) -> None:
    pass


forward_operation.register_autograd(_differentiate, setup_context=_keep_statistics)
_whole_operation.register_autograd(_hand_out, setup_context=_keep_gradients)
backward_operation.register_autograd(refuse_second_derivative, setup_context=_keep_nothing)
_rescale.register_autograd(refuse_second_derivative, setup_context=_keep_nothing)


# --- preparation shared by the public functions -----------------------------------------------------------------------


def as_factors(first_name: str, first: Tensor, second_name: str, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in one dtype: autocast's where it is on, as for any matrix product; else theirs, which must agree."""
    device_type = first.device.type
    if autocast_on(device_type):
        dtype = torch.promote_types(first.dtype, second.dtype)
        dtype = torch.get_autocast_dtype(device_type) if dtype != torch.float64 else dtype
        return first.to(dtype), second.to(dtype)
    expected = f"the dtype of {first_name}, {first.dtype} (outside autocast)"
    require(second.dtype == first.dtype, second_name, second.dtype, expected)
    return first, second


def wanted(*inputs: Tensor) -> bool:
    """Whether anybody will ask for gradients to these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def as_number(value: Tensor | float, like: Tensor) -> Tensor:
    """A one-value tensor () in the precision that ``like`` is computed with."""
    dtype = compute_dtype(like)
    if isinstance(value, Tensor):
        return value.reshape(()).to(dtype)
    return torch.full((), value, dtype=dtype, device=like.device)


def side_by_side(views: Sequence[Tensor]) -> Tensor:
    """All views in one tensor (V, ...), in their own dtype; of a single one no copy is made."""
    if len(views) == 1:
        return views[0][None]
    with without_autocast(views[0].device.type):  # which takes no float16 on the CPU
        return torch.stack(tuple(views))


def workspace_bytes(workspace_mib: float) -> int:
    """The scratch memory's size. Very little makes tiny tiles, and many of them."""
    number = isinstance(workspace_mib, numbers.Real)
    require(number and 0 < workspace_mib < float("inf"), "workspace_mib", workspace_mib, "a finite number of MiB > 0")
    return max(1, int(workspace_mib * 2**20))


# --- public functions -------------------------------------------------------------------------------------------------


def log_sum_exp(
    image_ND: Tensor,
    text_MD: Tensor,
    logit_scale: Tensor | float,
    *,
    normalize: bool = False,
    workspace_mib: float = 64,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of the rows and of the columns of ``S = logit_scale * image text^T``, differentiable, S never kept.

    What InfoNCE of any form is made of: subtract the positives' logits, weigh, add; over ranks, combine the columns.

    Args:
        image_ND: (N, D) floating point.
        text_MD: (M, D), on the same device and, outside autocast, of the same dtype.
        logit_scale: a number or a one-value tensor.
        normalize: scale every row of both to unit length first.
        workspace_mib: MiB of scratch memory.

    Returns:
        (N,) and (M,), float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or devices that do not fit, a scale that is not one finite number.
    """
    require_same_width("image_ND", image_ND, "text_MD", text_MD)
    require_scalar("logit_scale", logit_scale, image_ND.device)
    image, text = as_factors("image_ND", image_ND, "text_MD", text_MD)
    scale = as_number(logit_scale, image)
    (lse_N, lse_M), _ = _statistics(image, text, scale, normalize, workspace_bytes(workspace_mib))
    return lse_N.to(scale.dtype), lse_M.to(scale.dtype)


def clip_terms(
    image_ND: Tensor,
    text_MD: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    row_offset: int = 0,
    targets: Tensor | None = None,
    normalize: bool = False,
    workspace_mib: float = 64,
) -> ClipTerms:
    """Both directions of symmetric InfoNCE, with accuracies. Arguments and errors as in ``clip_loss``.

    The accuracies cost no pass of their own. With ``targets`` a row is right if one of its positives reaches the
    largest logit (to rounding); without, if its positive is the first that does.
    """
    losses_2, accuracies_2 = _clip_parts(
        image_ND, text_MD, logit_scale, logit_bias, label_smoothing, row_offset, targets, normalize, workspace_mib
    )
    return _clip_terms(losses_2, accuracies_2)


def clip_loss(
    image_ND: Tensor,
    text_MD: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    row_offset: int = 0,
    targets: Tensor | None = None,
    normalize: bool = False,
    reduction: Reduction = "avg",
    workspace_mib: float = 64,
) -> Tensor:
    """Symmetric InfoNCE: image i belongs to text ``i + row_offset``, all other texts are its negatives, and vice versa.

    Computed without the N x M matrix: memory beyond inputs and gradients is the workspace and O(N + M); on the CPU, and
    with ``targets`` everywhere, also a float32 copy of either side where it is 16-bit or to be normalised, and of its
    gradient. Exact: float32 inputs are multiplied in float32, 16-bit ones with float32 sums; maxima are true, so no
    scale overflows. Equal calls give equal bits. First derivatives only.

    Args:
        image_ND: (N, D) floating point, image embeddings.
        text_MD: (M, D), text embeddings, on the same device. Under autocast both are taken in its dtype, as by any
            matrix product; otherwise their dtypes must agree.
        logit_scale: inverse temperature, after exp (CLIP starts at 1 / 0.07); a number or a one-value tensor.
        logit_bias: added to every logit, which a softmax does not see: the value is the same and its gradient is zero.
            Taken for trainers that pass one.
        label_smoothing: in [0, 1): the part of the target spread evenly over all candidates, the right ones included.
        row_offset: which column row 0 belongs to, where the images are a part of the batch that the texts are all of.
            Rows and columns without a partner are negatives only; the losses are means over those with one.
        targets: positives other than by position: int (N,), every image's text; int (N, K), several, -1 for none; or a
            sparse COO or CSR tensor (N, M) of weights >= 0, around which torch.compile breaks its graph. Rows count as
            distributions over their texts, columns over their images; rows and columns without any are negatives only.
        normalize: scale every row to unit length first; its derivative is part of the operation.
        reduction: "avg" is the mean of the two directions, "sum" their sum.
        workspace_mib: MiB of scratch memory.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a scale or bias that is not one finite number, a
            negative scale, a bad smoothing, offset, target or reduction. What only a device knows (a scale's value, a
            target's) is checked on the CPU alone, and not in compiled code.

    Source: CLIP (Radford et al. 2021, fig. 3).
    """
    _require_reduction(reduction)
    losses_2, _ = _clip_parts(
        image_ND, text_MD, logit_scale, logit_bias, label_smoothing, row_offset, targets, normalize, workspace_mib
    )
    return losses_2.sum() if reduction == "sum" else losses_2.mean()


def multiview_clip_terms(
    image_z: Tensor,
    text_z: Tensor,
    logit_scale: Tensor | float,
    image_h: Sequence[Tensor] = (),
    text_h: Sequence[Tensor] = (),
    h_logit_scale: Tensor | float | None = None,
    *,
    label_smoothing: float | Sequence[Sequence[float]] = 0.0,
    weak_label_smoothing: float = 0.0,
    normalize: bool = False,
    workspace_mib: float = 64,
) -> MultiviewClipTerms:
    """The parts of CL2L, with accuracies. Arguments and errors as in ``multiview_clip_loss``."""
    scales = (logit_scale, h_logit_scale)
    smoothing = (weak_label_smoothing, label_smoothing)
    weak, strong = _multiview_parts((image_z, text_z), (image_h, text_h), scales, smoothing, normalize, workspace_mib)
    weak_terms = _clip_terms(*weak)
    if strong is None:
        both = {"loss_image": weak_terms.loss_image, "loss_text": weak_terms.loss_text}
        return MultiviewClipTerms(weak=weak_terms, strong=None, **both)
    losses_2 = of_all_views(weak[0], strong[0], len(image_h))
    strong_terms = _clip_terms(strong[0], strong[1].mean((0, 1)))
    return MultiviewClipTerms(weak=weak_terms, strong=strong_terms, loss_image=losses_2[0], loss_text=losses_2[1])


def multiview_clip_loss(
    image_z: Tensor,
    text_z: Tensor,
    logit_scale: Tensor | float,
    image_h: Sequence[Tensor] = (),
    text_h: Sequence[Tensor] = (),
    h_logit_scale: Tensor | float | None = None,
    *,
    label_smoothing: float | Sequence[Sequence[float]] = 0.0,
    weak_label_smoothing: float = 0.0,
    reduction: Reduction = "avg",
    normalize: bool = False,
    workspace_mib: float = 64,
) -> Tensor:
    """CL2L: ``(L_weak + K * mean over the K x K strong pairs of L_ij) / (1 + K)``, each L a symmetric InfoNCE.

    Every strong image view meets every strong text view; weak and strong views never meet. The strong pairs are blocks
    of one stacked problem: as many kernel launches for any K.

    Args:
        image_z: (N, D) floating point, weak image view through head z.
        text_z: (N, D), weak text view through head z.
        logit_scale: inverse temperature of the weak pair, after exp; a number or a one-value tensor.
        image_h: K tensors (N, E), strong image views through head h; K may be 0, which leaves plain CLIP.
        text_h: K tensors (N, E), strong text views through head h.
        h_logit_scale: inverse temperature of the strong pairs, after exp; needed where K > 0. One value, or a tensor
            (K, K) with one for every pair of an image and a text view.
        label_smoothing: in [0, 1), of the strong pairs; one number, or K x K of them.
        weak_label_smoothing: in [0, 1), of the weak pair.
        reduction: "avg" means over the two directions, "sum" adds them (twice the value).
        normalize: scale every row to unit length first.
        workspace_mib: MiB of scratch memory.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, unequal numbers of views or samples, no samples, a
            missing scale or one that is not finite, bad smoothing or reduction.

    Source: "Improved baselines for vision-language pre-training" (Fini et al. 2023).
    """
    _require_reduction(reduction)
    scales = (logit_scale, h_logit_scale)
    smoothing = (weak_label_smoothing, label_smoothing)
    weak, strong = _multiview_parts((image_z, text_z), (image_h, text_h), scales, smoothing, normalize, workspace_mib)
    losses_2 = weak[0] if strong is None else of_all_views(weak[0], strong[0], len(image_h))
    return losses_2.sum() if reduction == "sum" else losses_2.mean()


# --- details of the public functions ----------------------------------------------------------------------------------


def _require_reduction(reduction: str) -> None:
    require(reduction in get_args(Reduction), "reduction", reduction, f"one of {get_args(Reduction)}")


def _require_offset(row_offset: int, rows: int, columns: int) -> None:
    require_integer("row_offset", row_offset)
    require(
        -rows < row_offset < columns,
        "row_offset",
        row_offset,
        lambda: (
            f"{1 - rows} to {columns - 1}, so that at least one of {rows} rows has its partner among {columns} columns"
        ),
    )


def _losses(
    image_AND: Tensor,
    text_BMD: Tensor,
    scale_AB: Tensor,
    smoothing: list[float],
    row_offset: int,
    normalize: bool,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    """Losses and accuracies (A, B, 2) of the diagonal's positives, by whichever operation takes less time."""
    size = 2 * image_AND.shape[1] * text_BMD.shape[1] * compute_dtype(image_AND).itemsize
    if size <= workspace and image_AND.device.type == "cpu" and implementation(image_AND) is tiled:
        need_grad = wanted(image_AND, text_BMD, scale_AB)
        return _whole_operation(image_AND, text_BMD, scale_AB, smoothing, row_offset, normalize, need_grad)[:2]
    return forward_operation(image_AND, text_BMD, scale_AB, smoothing, row_offset, True, normalize, workspace)[-2:]


def _statistics(
    image_ND: Tensor, text_MD: Tensor, scale: Tensor, normalize: bool, workspace: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Log-sum-exps of rows (N,) and columns (M,), float64, and their maxima."""
    options = ([0.0], 0, False, normalize, workspace)
    lse_N, lse_M, top_N, top_M, *_ = forward_operation(image_ND[None], text_MD[None], scale.reshape(1, 1), *options)
    return (lse_N[0, 0], lse_M[0, 0]), (top_N[0, 0], top_M[0, 0])


def _clip_parts(
    image_ND: Tensor,
    text_MD: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    label_smoothing: float,
    row_offset: int,
    targets: Tensor | None,
    normalize: bool,
    workspace_mib: float,
    names: tuple[str, str, str] = ("image_ND", "text_MD", "label_smoothing"),
) -> tuple[Tensor, Tensor]:
    """Losses (2,) image to text and text to image, and their accuracies; arguments of ``clip_loss``.

    ``names``: how errors call the sides and the smoothing.
    """
    require_same_width(names[0], image_ND, names[1], text_MD)
    require_scale("logit_scale", logit_scale, image_ND.device)
    require_smoothing(label_smoothing, names[2])
    image, text = as_factors(names[0], image_ND, names[1], text_MD)
    scale = as_number(logit_scale, image)
    workspace = workspace_bytes(workspace_mib)
    if targets is None:
        _require_offset(row_offset, len(image_ND), len(text_MD))
        stacked = image[None], text[None], scale.reshape(1, 1)
        losses, accuracies = _losses(*stacked, [float(label_smoothing)], row_offset, normalize, workspace)
        losses, accuracies = losses.reshape(2), accuracies.reshape(2)
    else:
        expected = "0 beside targets, which say themselves what belongs together"
        require(row_offset == 0, "row_offset", row_offset, expected)
        pairs = Pairs.of(targets, len(image_ND), len(text_MD), image)
        options: dict[str, Any] = {"normalize": normalize, "workspace": workspace}
        with without_autocast(image.device.type):
            lse_and_top = _statistics(image, text, scale, **options)
            losses, accuracies = soft_terms(
                pairs, image, text, scale, *lse_and_top, label_smoothing=label_smoothing, **options
            )
    return with_bias(losses, logit_bias, image), accuracies


def _multiview_parts(
    z: tuple[Tensor, Tensor],
    h: tuple[Sequence[Tensor], Sequence[Tensor]],
    scales: tuple[Tensor | float, Tensor | float | None],
    label_smoothing: tuple[float, float | Sequence[Sequence[float]]],
    normalize: bool,
    workspace_mib: float,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Losses (2,) and accuracies of the weak pair; the strong pairs' mean losses (2,) and all accuracies (K, K, 2)."""
    require_same_rows("image_z", z[0], "text_z", z[1])
    names = ("image_z", "text_z", "weak_label_smoothing")
    weak = _clip_parts(*z, scales[0], None, label_smoothing[0], 0, None, normalize, workspace_mib, names)
    require_views("image_h", h[0], "text_h", h[1], one_dtype=False)
    views, samples = len(h[0]), len(z[0])
    smoothing = _pair_smoothing(label_smoothing[1], views)
    if not views:
        return weak, None
    shape = tuple(h[0][0].shape)
    require(shape[0] == samples, "image_h[0]", shape, lambda: f"a shape ({samples}, D), as many samples as image_z has")
    with without_autocast(h[0][0].device.type):  # which knows no float16 on the CPU
        image_KND, text_KND = (torch.stack(tuple(side)) for side in h)
    image_KND, text_KND = as_factors("image_h", image_KND, "text_h", text_KND)
    scale_KK = _pair_scales(scales[1], views, image_KND)
    options = (smoothing, 0, normalize, workspace_bytes(workspace_mib))
    losses_KK2, accuracies_KK2 = _losses(image_KND, text_KND, scale_KK, *options)
    return weak, (losses_KK2.mean((0, 1)), accuracies_KK2)


def of_all_views(weak: Tensor, strong: Tensor, views: int) -> Tensor:
    """``(weak + K * strong) / (1 + K)``."""
    return (weak + views * strong) / (1 + views)


def _clip_terms(losses_2: Tensor, accuracies_2: Tensor) -> ClipTerms:
    losses_2, accuracies_2 = losses_2.clone(), accuracies_2.detach()  # an operation's own results stay as they are
    return ClipTerms(
        loss_image=losses_2[0],  # not unbind, whose results must not be changed in place
        loss_text=losses_2[1],
        accuracy_image=accuracies_2[0],
        accuracy_text=accuracies_2[1],
    )


def with_bias(losses_2: Tensor, logit_bias: Tensor | float | None, like: Tensor) -> Tensor:
    """A constant added to all logits changes no softmax; a bias that is trained gets its gradient, zero."""
    if logit_bias is None:
        return losses_2
    require_scalar("logit_bias", logit_bias, like.device)
    if not (isinstance(logit_bias, Tensor) and logit_bias.requires_grad):
        return losses_2
    return losses_2 + 0 * as_number(logit_bias, like)


def _pair_scales(scale: Tensor | float | None, views: int, like: Tensor) -> Tensor:
    """Inverse temperatures (K, K) of the strong pairs."""
    require(scale is not None, "h_logit_scale", None, "a scale, since there are strong views")
    assert scale is not None
    if isinstance(scale, Tensor) and scale.numel() > 1:
        shape = tuple(scale.shape)
        require(
            shape == (views, views), "h_logit_scale", f"a tensor of shape {shape}", f"one value or {(views, views)}"
        )
        require(scale.device == like.device, "h_logit_scale", scale.device, f"the embeddings' device, {like.device}")
        require_finite("h_logit_scale", scale)
        return scale.to(compute_dtype(like))
    require_scale("h_logit_scale", scale, like.device)
    return as_number(scale, like).expand(views, views)


def _pair_smoothing(label_smoothing: float | Sequence[Sequence[float]], views: int) -> list[float]:
    """Label smoothing of the K x K strong pairs, image view by image view."""
    if not isinstance(label_smoothing, Sequence):
        require_smoothing(label_smoothing)
        return [float(label_smoothing)] * (views * views)
    fits = len(label_smoothing) == views and all(len(row) == views for row in label_smoothing)
    require(fits, "label_smoothing", label_smoothing, f"a number or {views} x {views} of them")
    flat = [float(value) for row in label_smoothing for value in row]
    for value in flat:
        require_smoothing(value)
    return flat
