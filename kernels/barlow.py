"""Barlow Twins' cross-correlation loss without a P x P matrix: exact gradients, O(N P) memory.

Shapes: N samples, P features; ``C = X^T Y / N``. The loss needs the sum of C's squares and its diagonal. That sum is

    ``sum_ij C_ij^2 = trace(X^T Y Y^T X) / N^2 = sum_nm (X X^T)_nm (Y Y^T)_nm / N^2``

so that with fewer samples than features (N = 4096 and P = 8192 in the recipe) two N x N Gram matrices take C's place:
``4 N^2 P`` multiply-adds with all gradients, where C takes ``3 N P^2``. With more samples C itself is taken, some of
its rows at a time. Either way the loss is quadratic in what a tile holds, so a tile's part of the gradients comes with
its part of the value, in one pass, and no tile is made twice. Tiles are torch's matrix products on any device: what is
left besides is one multiplication and one sum an entry.

No kernel of our own, on CUDA either. Of 16-bit inputs an entry of both Gram matrices costs, in bytes: 8 written by the
products, 8 read for the sum, 8 read and 4 written to make factors of them, 4 read by the next products. A kernel that
sums and narrows at once would save the second reading, 8 N^2: at N = 4096 and P = 8192, 134 MB or 0.03 to 0.04 ms at
3.4 to 4.8 TB/s, where the four products, 8 N^2 P = 1.1 TFLOP, take 1.6 ms at 700 TFLOP/s: 2%. Five launches a tile
would be two, behind products of 0.1 ms and more. Of C it would save 4 P^2 bytes beside 6 N P^2 FLOP: below 1%. A pass
over a whole gradient costs more, 8 N P bytes, 268 MB a side: products of whole rows are written where they belong.
(Estimates, not measured.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rocket_fast.errors import require
from rocket_fast.kernels.checks import require_pair, require_views
from rocket_fast.kernels.contrastive import wanted, workspace_bytes
from rocket_fast.kernels.dispatch import without_autocast
from rocket_fast.kernels.reference import mean_over_pairs, require_weak
from rocket_fast.kernels.sigmoid import scaled_gradient
from rocket_fast.kernels.tiled import ROWS, compute_dtype, row_products

# --- products ---------------------------------------------------------------------------------------------------------


class _Sides:
    """Both matrices as they are multiplied: 16-bit ones as they are on CUDA, with float32 sums; else in float32."""

    def __init__(self, x_NP: Tensor, y_NP: Tensor) -> None:
        self.dtype = compute_dtype(x_NP)
        self.narrow = x_NP.is_cuda and x_NP.dtype in (torch.bfloat16, torch.float16)
        self.x_NP, self.y_NP = (x_NP, y_NP) if self.narrow else (x_NP.to(self.dtype), y_NP.to(self.dtype))

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``a b`` in the precision computed with."""
        return torch.mm(a, b, out_dtype=self.dtype) if self.narrow else torch.mm(a, b)

    def put(self, out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
        """``out = a b`` or, to ``add``, ``out += a b``."""
        if self.narrow and not add and out.is_contiguous():
            torch.mm(a, b, out_dtype=self.dtype, out=out)
        elif self.narrow:
            out.add_(self.product(a, b)) if add else out.copy_(self.product(a, b))
        else:
            out.addmm_(a, b, beta=float(add))

    def diagonal(self) -> Tensor:
        """``N C_ii``, (P,), float64, without an N x P array in between."""
        parts = zip(self.x_NP.split(ROWS), self.y_NP.split(ROWS), strict=True)
        return sum(
            ((x.to(self.dtype) * y).sum(0, dtype=torch.float64) for x, y in parts),
            self.x_NP.new_zeros((), dtype=torch.float64),
        )

    def factor(self, tile: Tensor) -> Tensor:
        """A tile as a factor of another product."""
        return tile.to(self.x_NP.dtype) if self.narrow else tile


def _by_samples(own: _Sides, everyone: _Sides, gradients: tuple[Tensor, Tensor] | None, tile: int) -> Tensor:
    """``own``'s rows' part of ``sum C^2 N^2``, float64, and half its gradients to them, from Gram matrices.

    ``tile`` rows of those at a time; ``everyone`` has all samples, and is ``own`` itself in one process.
    """
    total = own.x_NP.new_zeros((), dtype=torch.float64)
    for start in range(0, own.x_NP.shape[0], tile):
        rows = slice(start, start + tile)
        gram_x = own.product(own.x_NP[rows], everyone.x_NP.T)
        gram_y = own.product(own.y_NP[rows], everyone.y_NP.T)
        total += row_products(gram_x, gram_y).sum(dtype=torch.float64)
        if gradients is not None:
            own.put(gradients[0][rows], own.factor(gram_y), everyone.x_NP)
            own.put(gradients[1][rows], own.factor(gram_x), everyone.y_NP)
    return total


def _by_features(sides: _Sides, gradients: tuple[Tensor, Tensor] | None, tile: int) -> Tensor:
    """The same from ``N C``, ``tile`` of its rows at a time."""
    x_NP, y_NP = sides.x_NP, sides.y_NP
    total = x_NP.new_zeros((), dtype=torch.float64)
    for start in range(0, x_NP.shape[1], tile):
        features = slice(start, start + tile)
        part = sides.product(x_NP[:, features].T, y_NP)
        total += row_products(part, part).sum(dtype=torch.float64)
        if gradients is not None:
            factor = sides.factor(part)
            sides.put(gradients[0][:, features], y_NP, factor.T)
            sides.put(gradients[1], x_NP[:, features], factor, add=True)
    return total


# --- operation --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("rocket_fast::barlow_forward_backward", mutates_args=())
def _forward_backward(
    x_NP: Tensor, y_NP: Tensor, lambda_: float, scale: float, need_grad: bool, workspace: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss () and its gradients to both sides, in the precision computed with (empty if not needed)."""
    with without_autocast(x_NP.device.type):
        (samples, features), sides = x_NP.shape, _Sides(x_NP, y_NP)
        gradients = _room_for_gradients(x_NP, need_grad)
        if by_samples(samples, features):
            total = _by_samples(sides, sides, gradients, _gram_rows(sides, samples, workspace))
        else:
            total = _by_features(sides, gradients, max(1, workspace // (2 * features * sides.dtype.itemsize)))
        loss = _finish(sides, sides.diagonal(), total, gradients, samples, lambda_, scale)
        empty = x_NP.new_empty(0, dtype=sides.dtype)
        return loss, *(gradients or (empty, empty.clone()))


def by_samples(samples: int, features: int) -> bool:
    """Whether Gram matrices take fewer products than C."""
    return 4 * samples < 3 * features


def _gram_rows(sides: _Sides, samples: int, workspace: int) -> int:
    """Both Gram matrices' rows, and as much again where rows are multiplied one by one."""
    return max(1, workspace // (3 * samples * sides.dtype.itemsize))


def _room_for_gradients(x_NP: Tensor, need_grad: bool) -> tuple[Tensor, Tensor] | None:
    if not need_grad:
        return None
    d_x_NP, d_y_NP = (x_NP.new_zeros(x_NP.shape, dtype=compute_dtype(x_NP)) for _ in range(2))
    return d_x_NP, d_y_NP


def _finish(
    sides: _Sides,
    diagonal_P: Tensor,
    total: Tensor,
    gradients: tuple[Tensor, Tensor] | None,
    samples: int,
    lambda_: float,
    scale: float,
) -> Tensor:
    """The loss, of ``N C``'s diagonal and the sum of its squares; gradients become those to ``sides``' rows."""
    diagonal_P = diagonal_P / samples
    squares = diagonal_P.square().sum()
    if gradients is not None:
        # To C's diagonal; its squares are in the total, too.
        own_P = (scale / samples * (-2 * (1 - diagonal_P) - 2 * lambda_ * diagonal_P)).to(sides.dtype)
        for gradient, other in zip(gradients, (sides.y_NP, sides.x_NP), strict=True):
            gradient.mul_(2 * lambda_ * scale / samples**2).addcmul_(other.to(sides.dtype), own_P)
    loss = scale * ((1 - diagonal_P).square().sum() + lambda_ * (total / samples**2 - squares))
    return loss.to(sides.dtype)


def barlow_of_rows(
    own: tuple[Tensor, Tensor],
    everyone: tuple[Tensor, Tensor],
    *,
    lambda_: float,
    scale: float,
    need_grad: bool,
    workspace: int,
    total: Callable[[Tensor], Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The loss of all samples, of which some are ``own`` (x, y), and its gradients to those: what a rank has to do.

    ``total``: from float64 numbers (1 + P) of this process to their sum over all processes.
    """
    sides, all_sides = _Sides(*own), _Sides(*everyone)
    samples, gradients = len(all_sides.x_NP), _room_for_gradients(own[0], need_grad)
    part = _by_samples(sides, all_sides, gradients, _gram_rows(sides, samples, workspace))
    sums = total(torch.cat([part[None], sides.diagonal()]))
    return _finish(sides, sums[1:], sums[0], gradients, samples, lambda_, scale), gradients


@_forward_backward.register_fake
def _(
    x_NP: Tensor, y_NP: Tensor, lambda_: float, scale: float, need_grad: bool, workspace: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x_NP)
    d_x_NP, d_y_NP = (x.new_empty(x.shape if need_grad else (0,), dtype=dtype) for x in (x_NP, y_NP))
    return x_NP.new_empty((), dtype=dtype), d_x_NP, d_y_NP


def _keep_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype for x in inputs[:2]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _hand_out(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * 6
    parts = zip(ctx.needs_input_grad[:2], ctx.saved_tensors, ctx.dtypes, strict=True)
    own = (scaled_gradient(gradient, d_loss, dtype) if needed else None for needed, gradient, dtype in parts)
    return *own, *(None,) * 4


_forward_backward.register_autograd(_hand_out, setup_context=_keep_gradients)


# --- public function --------------------------------------------------------------------------------------------------


def barlow_loss(
    image_NP: Tensor, text_NP: Tensor, *, lambda_: float = 5e-3, scale: float = 0.025, workspace_mib: float = 64
) -> Tensor:
    """``scale * (sum_i (1 - C_ii)^2 + lambda_ * sum_{i != j} C_ij^2)`` with ``C = image^T text / N``, C never made.

    Memory beyond inputs and gradients is the workspace, and a float32 copy of 16-bit inputs on the CPU. Equal calls
    give equal bits. First derivatives only.

    Args:
        image_NP: (N, P) floating point, projections used as they are: a batch norm at the end of the projector is what
            gives their columns mean 0 and variance 1.
        text_NP: (N, P), likewise, of the same shape, dtype and device.
        lambda_: >= 0, weight of the off-diagonal terms.
        scale: > 0, weight of the whole.
        workspace_mib: MiB of scratch memory.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that differ, no samples, ``lambda_`` or ``scale`` out of range.

    Source: Barlow Twins (Zbontar et al. 2021, eq. 1); Fini et al. 2023 (BarLIP).
    """
    require_pair("image_NP", image_NP, "text_NP", text_NP)
    require(lambda_ >= 0, "lambda_", lambda_, "a number >= 0")
    require(scale > 0, "scale", scale, "a number > 0")
    options = (float(lambda_), float(scale), wanted(image_NP, text_NP), workspace_bytes(workspace_mib))
    return _forward_backward(image_NP, text_NP, *options)[0]


def barlip_loss(
    image_v: Sequence[Tensor],
    text_v: Sequence[Tensor],
    *,
    lambda_: float = 5e-3,
    scale: float = 0.025,
    workspace_mib: float = 64,
) -> Tensor:
    """BarLIP: the mean of ``barlow_loss`` over the weak pair and the K x K strong pairs.

    Args:
        image_v, text_v: projections, as in ``barlow_loss``, 1 + K tensors (N, P) each, the weak view first.
        lambda_, scale, workspace_mib: as in ``barlow_loss``.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that differ, unequal numbers of views, no views or no samples,
            ``lambda_`` or ``scale`` out of range.

    Source: Fini et al. 2023 (BarLIP).
    """
    require_weak("image_v", image_v)
    require_views("image_v", image_v, "text_v", text_v)
    options = {"lambda_": lambda_, "scale": scale, "workspace_mib": workspace_mib}
    return mean_over_pairs(lambda one, other: barlow_loss(one, other, **options), image_v, text_v)
