"""Positives other than by position: several captions an image, duplicate captions, soft targets; all of size O(pairs).

Shapes: E pairs of a row (image) and a column (text), ordered by row; N rows, M columns, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rocket_fast.errors import require
from rocket_fast.kernels.checks import values_visible
from rocket_fast.kernels.dispatch import without_autocast
from rocket_fast.kernels.tiled import compute_dtype

# --- the dot products of chosen pairs ---------------------------------------------------------------------------------


@torch.library.custom_op("rocket_fast::pair_products", mutates_args=())
def pair_products(x_ND: Tensor, y_MD: Tensor, row_E: Tensor, column_E: Tensor, workspace: int) -> Tensor:
    """``x[row] . y[column]`` of E pairs, (E,); ``row_E`` in ascending order. Scratch memory: ``workspace`` bytes.

    Neither direction adds with atomics or keeps anything of size E x D: the gradients are weighted sums of rows, pair
    by pair in a fixed order.
    """
    step = max(1, workspace // (2 * x_ND.shape[1] * x_ND.element_size()))
    parts = [
        torch.linalg.vecdot(x_ND.index_select(0, row_S), y_MD.index_select(0, column_S))
        for row_S, column_S in zip(row_E.split(step), column_E.split(step), strict=True)
    ]
    return torch.cat(parts) if parts else x_ND.new_empty(0)


@pair_products.register_fake
def _(x_ND: Tensor, y_MD: Tensor, row_E: Tensor, column_E: Tensor, workspace: int) -> Tensor:
    return x_ND.new_empty(row_E.shape[0])


def _keep_pairs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _differentiate(ctx: Any, d_product_E: Tensor) -> tuple[Tensor | None, ...]:
    x_ND, y_MD, row_E, column_E = ctx.saved_tensors
    with without_autocast(x_ND.device.type):  # a backward pass under autocast is not advised, but seen
        return *_differentiate_pairs(ctx.needs_input_grad, x_ND, y_MD, row_E, column_E, d_product_E), *(None,) * 3


def _differentiate_pairs(
    needs: Sequence[bool], x_ND: Tensor, y_MD: Tensor, row_E: Tensor, column_E: Tensor, d_product_E: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    d_x_ND, d_y_MD = None, None
    if needs[0]:
        d_x_ND = sum_rows(y_MD, column_E, row_E, x_ND.shape[0], d_product_E)
    if needs[1]:
        by_column_E = column_E.argsort(stable=True)
        row_E, column_E, d_product_E = (t.index_select(0, by_column_E) for t in (row_E, column_E, d_product_E))
        d_y_MD = sum_rows(x_ND, row_E, column_E, y_MD.shape[0], d_product_E)
    return d_x_ND, d_y_MD


pair_products.register_autograd(_differentiate, setup_context=_keep_pairs)


def sum_rows(x_ND: Tensor, from_E: Tensor, to_E: Tensor, count: int, weight_E: Tensor) -> Tensor:
    """``out[to] += weight * x[from]``, (count, D), in the order of the pairs; ``to_E`` ascending."""
    start = torch.searchsorted(to_E, torch.arange(count, device=to_E.device))
    return F.embedding_bag(from_E, x_ND, start, mode="sum", per_sample_weights=weight_E)


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """The positives of a batch.

    ``row_E``, ``column_E``: int64, rows ascending. ``to_text_E``: a pair's share of its row's target distribution;
    ``to_image_E``: of its column's. ``has_text_N``, ``has_image_M``: 1 for rows and columns with positives, else 0.
    """

    row_E: Tensor
    column_E: Tensor
    to_text_E: Tensor
    to_image_E: Tensor
    has_text_N: Tensor
    has_image_M: Tensor

    @staticmethod
    def of(targets: Tensor, rows: int, columns: int, like: Tensor) -> Pairs:
        """Read targets in any of the forms of ``clip_loss``; weights in the precision ``like`` is computed with."""
        require(isinstance(targets, Tensor), "targets", type(targets), "a tensor")
        require(targets.device == like.device, "targets", targets.device, f"the embeddings' device, {like.device}")
        read = _from_indices if targets.layout == torch.strided else _from_sparse
        row_E, column_E, weight_E = read(targets, rows, columns, compute_dtype(like))
        by_column_E = column_E.argsort(stable=True)
        ones_E1 = torch.ones_like(weight_E)[:, None]
        each_E = torch.arange(row_E.shape[0], device=row_E.device)
        row_total_N = sum_rows(ones_E1, each_E, row_E, rows, weight_E)[:, 0]
        column_total_M = sum_rows(
            ones_E1, each_E, column_E.index_select(0, by_column_E), columns, weight_E.index_select(0, by_column_E)
        )[:, 0]
        return Pairs(
            row_E=row_E,
            column_E=column_E,
            to_text_E=_share(weight_E, row_total_N, row_E),
            to_image_E=_share(weight_E, column_total_M, column_E),
            has_text_N=(row_total_N > 0).to(weight_E.dtype),
            has_image_M=(column_total_M > 0).to(weight_E.dtype),
        )


def _share(weight_E: Tensor, total: Tensor, at_E: Tensor) -> Tensor:
    return weight_E / torch.where(total > 0, total, 1).index_select(0, at_E)


def _from_indices(targets: Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of int (N,) or (N, K); those with -1, which stands for none, stay with weight 0: shapes are fixed."""
    shape = tuple(targets.shape)
    integral = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    require(integral, "targets", targets.dtype, "integers, or a sparse tensor of weights")
    fits = targets.ndim in (1, 2) and shape[0] == rows
    require(fits, "targets", shape, lambda: f"a shape ({rows},) or ({rows}, K)")
    require(targets.numel() > 0, "targets", shape, lambda: f"a shape ({rows}, K) with K >= 1")
    targets = targets.to(torch.int64)
    if shape[1:] == (columns,) and columns > 2:
        # No row lists all texts. What is as wide as there are texts is a matrix of 0 and 1, whose meaning is another.
        matrix = columns > 8 or (values_visible(targets) and bool(((targets == 0) | (targets == 1)).all()))
        expected = "texts' numbers, -1 for none; a matrix of 0 and 1 is given as targets.to_sparse()"
        require(not matrix, "targets", f"a shape {shape}, as many columns as texts", expected)
    if values_visible(targets):
        smallest, largest = int(targets.min()), int(targets.max())
        require(smallest >= -1, "targets", f"{smallest} among its values", "texts' numbers >= 0, or -1 for none")
        require(largest < columns, "targets", f"{largest} among its values", lambda: f"texts' numbers below {columns}")
        require(largest >= 0, "targets", "-1 only", "at least one positive")
    column_E = targets.reshape(-1)
    row_E = torch.arange(rows, device=targets.device).repeat_interleave(1 if targets.ndim == 1 else shape[1])
    return row_E, column_E.clamp_min(0), (column_E >= 0).to(dtype)


def _from_sparse(targets: Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a sparse (N, M) of weights."""
    forms = "an integer tensor or a sparse COO or CSR tensor (N, M)"
    require(targets.layout in (torch.sparse_coo, torch.sparse_csr), "targets", targets.layout, forms)
    shape = tuple(targets.shape)
    require(shape == (rows, columns), "targets", shape, lambda: f"a sparse tensor of shape ({rows}, {columns})")
    matrix = targets.detach().to_sparse_coo().coalesce()
    # Copies: torch.compile trips over tensors that are views of a sparse one.
    (row_E, column_E), weight_E = matrix.indices().clone(), matrix.values().to(dtype, copy=True)
    if values_visible(weight_E):
        fine = bool((weight_E.isfinite() & (weight_E >= 0)).all())
        require(fine, "targets", weight_E, "finite weights >= 0")
        require(bool((weight_E > 0).any()), "targets", "no weight > 0", "at least one positive")
    return row_E.contiguous(), column_E.contiguous(), weight_E


# --- the loss with them -----------------------------------------------------------------------------------------------


def soft_terms(
    pairs: Pairs,
    image_ND: Tensor,
    text_MD: Tensor,
    scale: Tensor,
    lse: tuple[Tensor, Tensor],
    top: tuple[Tensor, Tensor],
    *,
    label_smoothing: float,
    normalize: bool,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    """Losses (2,) image to text and text to image, and the accuracies (2,) of both in percent; not under autocast.

    ``lse``, ``top``: log-sum-exps (float64) and maxima of the logits' rows (N,) and columns (M,).
    """
    x_ND, y_MD = (side.to(compute_dtype(side)) for side in (image_ND, text_MD))
    if normalize:
        x_ND, y_MD = F.normalize(x_ND, dim=1), F.normalize(y_MD, dim=1)
    logit_E = scale * pair_products(x_ND, y_MD, pairs.row_E, pairs.column_E, workspace)
    losses, accuracies = [], []
    directions = (
        (pairs.to_text_E, pairs.has_text_N, pairs.row_E, lse[0], top[0], x_ND, y_MD),
        (pairs.to_image_E, pairs.has_image_M, pairs.column_E, lse[1], top[1], y_MD, x_ND),
    )
    for share_E, has, at_E, lse_own, top_own, own, other in directions:
        count = has.sum()
        # lse and logits are large and close to each other: their difference is taken in lse's float64.
        logit = (logit_E.double() @ share_E.double()) * (1 - label_smoothing)
        if label_smoothing:
            logit = logit + label_smoothing * scale * ((has @ own) @ other.mean(0))
        losses.append(((lse_own @ has.double() - logit) / count).to(has.dtype))
        best = logit_E.detach().masked_fill(share_E <= 0, -torch.inf)
        best = torch.full_like(top_own, -torch.inf).scatter_reduce(0, at_E, best, "amax")
        # The pair's product and the tile's differ in the last bits.
        slack = 16 * torch.finfo(top_own.dtype).eps * (scale.detach().abs() + top_own.abs())
        accuracies.append(100 * (has * (best >= top_own - slack)).sum() / count)
    return torch.stack(losses), torch.stack(accuracies)
