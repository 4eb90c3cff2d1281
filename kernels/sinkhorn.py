"""SwALIP without matrices of similarities: Sinkhorn's labels and cross-entropies with them, a block of rows at a time.

Shapes: A image views and B text views of N samples, D embedding width; or scores of N samples against P prototypes. Of
a matrix of scores S, N x M, ``L = S / epsilon`` is what is worked on, some whole rows of it at a time, and Q balanced
assignments are made of it: with columns scaled first, labels for its rows; with rows scaled first, labels for its
columns. All that is kept of an assignment is a number for each row and each column:

    ``label_ij = exp(L_ij - row_i - column_j)``

A row's number needs nothing but that row and the columns' numbers, so that one pass over L finds all rows' numbers and
adds up the columns' next ones. Sinkhorn's n iterations are n passes; the last rows' numbers, the labels, the
cross-entropies and their gradients come out of one more. Where the workspace holds the matrices, L is multiplied once,
else n + 1 times; the gradient takes two products. There is no pass backward: gradients are made with the value.

Nothing overflows. If scores are known to be small (cosines over 0.05 are at most 20), exponentials are taken as they
are and each pass is one exponential and two products with vectors; if not, log-sum-exps with true maxima are taken.
Tiles are torch's, products in float32 (16-bit inputs are converted). Of embeddings, Triton kernels (triton_sinkhorn.py)
take all of this on where they run. Scores against prototypes stay with torch there too, which passes over them about
eight times an iteration: those kernels make what they read, and balance two assignments where one is wanted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rocket_fast.errors import require
from rocket_fast.kernels.checks import require_integer, require_scalar, require_views
from rocket_fast.kernels.contrastive import as_number, side_by_side, wanted, workspace_bytes
from rocket_fast.kernels.dispatch import triton_kernels, without_autocast
from rocket_fast.kernels.reference import require_weak
from rocket_fast.kernels.reference import (
    sinkhorn as sinkhorn,
)  # the package exports it from here: one name, one meaning
from rocket_fast.kernels.sigmoid import scaled_gradient
from rocket_fast.kernels.tiled import compute_dtype, exp_, norms, prepared, row_products, through_normalization

# Exponents no larger than this are raised without looking for their maximum: sums of products of two exponentials and
# a thousand million terms stay within float32.
LIMIT = 40.0

# Entries of a block that stays in a CPU core's cache, and rows below which a product starves. Measured on one core
# (N = 2048): 2^17 entries are passed over twice as fast as 2^19; products of 128 rows run at 95% of a whole's speed.
BLOCK, ROWS = 2**17, 128

# From the columns' log-sum-exps over this process's rows to those over all rows, in whichever process they are.
Combine = Callable[[Tensor], Tensor]


def of_one_process(lse_KM: Tensor) -> Tensor:
    """All rows are here."""
    return lse_KM


# --- labels -----------------------------------------------------------------------------------------------------------


class _Factors:
    """Assignments of one matrix whose exponentials are harmless: ``row_i exp(L_ij) column_j``, all by products."""

    def __init__(self, rows: int, columns: int, like: Tensor, count: int) -> None:
        self.row_QN, self.column_QM = like.new_ones(count, rows), like.new_ones(count, columns)
        self.total_QM = like.new_zeros(count, columns, dtype=torch.float64)

    def sweep(self, at: slice, tile: Tensor, scratch: Tensor, *, first: bool) -> None:
        """Scale these rows, and add up what that makes of the columns."""
        torch.exp(tile, out=scratch)
        row_QR = (self.column_QM @ scratch.T).reciprocal_()
        if first:
            row_QR[0] = 1  # labels of rows begin with the columns
        self.row_QN[:, at] = row_QR
        self.total_QM += row_QR @ scratch

    def column_sums(self) -> Tensor:
        """Their logarithms (Q, M), over the rows swept."""
        lse_QM = self.total_QM.log()
        self.total_QM.zero_()
        return lse_QM

    def scale_columns(self, lse_QM: Tensor) -> None:
        self.column_QM = lse_QM.neg().exp().to(self.column_QM.dtype)

    def put(self, out: Tensor, at: slice, tile: Tensor, scratch: Tensor, share: float) -> None:
        """``share`` times the labels of these rows, of all assignments together."""
        torch.exp(tile, out=scratch)
        row_QR = self.row_QN[:, at].clone()
        row_QR[0] = (self.column_QM[0] @ scratch.T).reciprocal_()
        torch.mm(row_QR.mul_(share).T, self.column_QM, out=out).mul_(scratch)


class _Logarithms:
    """The same of scores of any size, by log-sum-exps."""

    def __init__(self, rows: int, columns: int, like: Tensor, count: int) -> None:
        self.row_QN, self.column_QM = like.new_zeros(count, rows), like.new_zeros(count, columns)
        self.total_QM = like.new_full((count, columns), -math.inf, dtype=torch.float64)

    def sweep(self, at: slice, tile: Tensor, scratch: Tensor, *, first: bool) -> None:
        for number in range(len(self.row_QN)):
            if not (first and number == 0):
                self.row_QN[number, at] = self._row_sums(number, tile, scratch)
            lse_M = torch.sub(tile, self.row_QN[number, at, None], out=scratch).logsumexp(0)
            self.total_QM[number] = torch.logaddexp(self.total_QM[number], lse_M.double())

    def _row_sums(self, number: int, tile: Tensor, scratch: Tensor) -> Tensor:
        return torch.sub(tile, self.column_QM[number], out=scratch).logsumexp(1)

    def column_sums(self) -> Tensor:
        lse_QM = self.total_QM.clone()
        self.total_QM.fill_(-math.inf)
        return lse_QM

    def scale_columns(self, lse_QM: Tensor) -> None:
        self.column_QM = lse_QM.to(self.column_QM.dtype)

    def put(self, out: Tensor, at: slice, tile: Tensor, scratch: Tensor, share: float) -> None:
        self.row_QN[0, at] = self._row_sums(0, tile, scratch)
        out.zero_()
        for row_N, column_M in zip(self.row_QN, self.column_QM, strict=True):
            torch.sub(tile, column_M, out=scratch).sub_(row_N[at, None])
            out.add_(exp_(scratch), alpha=share)


# --- predictions ------------------------------------------------------------------------------------------------------


class _Softmax:
    """Predictions made of one matrix: softmaxes over its rows and, if ``both``, over its columns, of ``factor * L``."""

    def __init__(self, columns: int, factor: Tensor, *, both: bool, bounded: bool) -> None:
        self.factor, self.both, self.bounded = factor, both, bounded
        start = 0.0 if bounded else -math.inf
        self.total_M = factor.new_full((columns,), start, dtype=torch.float64)
        self.lse_M = self.inverse_M = self.total_M

    def sweep(self, tile: Tensor, scratch: Tensor) -> None:
        """Add up the columns of exponentials."""
        torch.mul(tile, self.factor, out=scratch)
        if self.bounded:
            self.total_M += scratch.exp_().sum(0)
        else:
            self.total_M = torch.logaddexp(self.total_M, scratch.logsumexp(0).double())

    def column_sums(self) -> Tensor:
        """Logarithms (M,), over the rows swept."""
        return self.total_M.log() if self.bounded else self.total_M

    def take_columns(self, lse_M: Tensor) -> None:
        """The same over all rows."""
        self.lse_M, self.inverse_M = lse_M, lse_M.neg().exp_().to(self.factor.dtype)

    def row_sums(self, tile: Tensor) -> Tensor:
        """Log-sum-exps (R,) of the rows of a tile, which becomes ``exp(factor * L)``, or its logarithm if unbounded."""
        tile.mul_(self.factor)
        return tile.exp_().sum(1).log_() if self.bounded else tile.logsumexp(1)

    def differentiate(self, tile: Tensor, lse_R: Tensor, against: Tensor, scratch: Tensor) -> None:
        """What ``row_sums`` left becomes the softmaxes, plus ``against``."""
        if self.bounded:
            row_R1 = lse_R.neg().exp_()[:, None]
            if not self.both:
                torch.addcmul(against, tile, row_R1, out=tile)
                return
            torch.add(row_R1, self.inverse_M, out=scratch)
            torch.addcmul(against, tile, scratch, out=tile)
            return
        if self.both:
            against.add_(exp_(torch.sub(tile, self.lse_M.to(tile.dtype), out=scratch)))
        exp_(tile.sub_(lse_R[:, None])).add_(against)


# --- matrices of scores -----------------------------------------------------------------------------------------------


class _Products:
    """Similarities of rows X and Y: multiplied once into ``kept``, or block by block in a buffer."""

    def __init__(
        self, x_ND: Tensor, y_MD: Tensor, epsilon: float, gradients: tuple[Tensor, Tensor] | None, *, keep: bool
    ) -> None:
        self.x_ND, self.y_MD, self.epsilon, self.gradients = x_ND, y_MD, epsilon, gradients
        self.kept = torch.mm(x_ND / epsilon, y_MD.T) if keep else None

    def tile(self, at: slice, buffer: Tensor) -> Tensor:
        """L's rows; what is written to them is forgotten by the next call, unless they are kept."""
        if self.kept is not None:
            return self.kept[at]
        return torch.mm(self.x_ND[at] / self.epsilon, self.y_MD.T, out=buffer)

    def take_gradient(self, at: slice, gradient: Tensor) -> None:
        """To the logits of these rows, where L was."""
        if self.kept is None:
            self._add_products(self.x_ND[at], gradient, at)

    def finish(self) -> None:
        """All rows' gradients are there."""
        if self.kept is not None and self.gradients is not None:
            self._add_products(self.x_ND, self.kept, slice(None))

    def _add_products(self, x_RD: Tensor, gradient: Tensor, at: slice) -> None:
        assert self.gradients is not None
        d_x_ND, d_y_MD = self.gradients
        d_x_ND[at].addmm_(gradient, self.y_MD)
        d_y_MD.addmm_(gradient.T, x_RD)


class _Given:
    """Scores that exist: L is made where their gradient is to lie, if there is to be one."""

    def __init__(self, scores_NP: Tensor, epsilon: float, d_scores_NP: Tensor | None) -> None:
        self.scores_NP, self.epsilon, self.d_scores_NP = scores_NP, epsilon, d_scores_NP
        self.d_scale = scores_NP.new_zeros((), dtype=torch.float64)

    def tile(self, at: slice, buffer: Tensor) -> Tensor:
        place = buffer if self.d_scores_NP is None else self.d_scores_NP[at]
        return place.copy_(self.scores_NP[at]).div_(self.epsilon)

    def take_gradient(self, at: slice, gradient: Tensor) -> None:
        self.d_scale += row_products(gradient, self.scores_NP[at].to(gradient.dtype)).sum(dtype=torch.float64)

    def finish(self) -> None:
        pass


class _Blocks:
    """Rows taken together, and buffers of their size."""

    def __init__(self, rows: int, columns: int, like: Tensor, *, buffers: int, room: int, multiplied: bool) -> None:
        most = max(1, room // (buffers * columns * like.element_size()))
        if like.device.type == "cpu":
            most = min(most, max(ROWS if multiplied else 1, BLOCK // columns))
        self.rows, self.columns, self.step = rows, columns, min(rows, most)
        self.flat = like.new_empty(buffers, self.step * columns)

    def slices(self) -> Iterator[slice]:
        return (slice(start, min(start + self.step, self.rows)) for start in range(0, self.rows, self.step))

    def buffers(self, at: slice) -> list[Tensor]:
        """As many rows in each as the slice has; contents are whatever was there."""
        count = at.stop - at.start
        return [flat[: count * self.columns].view(count, self.columns) for flat in self.flat]


@dataclass
class _Matrix:
    """One matrix: where its scores come from, the labels made of it, the predictions, and who labels those."""

    scores: _Products | _Given
    labels: _Factors | _Logarithms
    softmax: _Softmax
    teachers: tuple[int, ...]


def _cross_entropy(
    matrices: Sequence[_Matrix], blocks: _Blocks, iterations: int, combine: Combine, *, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Sums, float64, over all matrices: of what these rows, and of what all columns cost.

    Every matrix's rows (and columns, if its softmax has both) are predictions, and the mean of its teachers' labels is
    what they should be. The gradients to the logits go to the matrices' scores.
    """
    for turn in range(iterations):
        for matrix in matrices:
            for at in blocks.slices():
                buffer, scratch, *_ = blocks.buffers(at)
                tile = matrix.scores.tile(at, buffer)
                matrix.labels.sweep(at, tile, scratch, first=turn == 0)
                if turn == 0 and matrix.softmax.both:
                    matrix.softmax.sweep(tile, scratch)
        _share_columns(matrices, combine, first=turn == 0)
    own = blocks.flat.new_zeros((), dtype=torch.float64)
    for at in blocks.slices():
        own += _last_pass(matrices, at, blocks.buffers(at), need_grad=need_grad)
    for matrix in matrices:
        matrix.scores.finish()
    columns = [matrix.softmax.lse_M.sum() for matrix in matrices if matrix.softmax.both]
    return own, torch.stack(columns).sum() if columns else torch.zeros_like(own)


def _share_columns(matrices: Sequence[_Matrix], combine: Combine, *, first: bool) -> None:
    """All columns' sums over all rows, taken together; those of the predictions after the first pass."""
    parts = [matrix.labels.column_sums() for matrix in matrices]
    if first:
        parts += [matrix.softmax.column_sums()[None] for matrix in matrices if matrix.softmax.both]
    lse = combine(torch.cat(parts)).split([len(part) for part in parts])
    for matrix, lse_QM in zip(matrices, lse, strict=False):
        matrix.labels.scale_columns(lse_QM)
    if first:
        predicted = [matrix.softmax for matrix in matrices if matrix.softmax.both]
        for softmax, lse_1M in zip(predicted, lse[len(matrices) :], strict=True):
            softmax.take_columns(lse_1M[0])


def _last_pass(matrices: Sequence[_Matrix], at: slice, buffers: list[Tensor], *, need_grad: bool) -> Tensor:
    """What these rows cost, and the gradient to their logits."""
    count = len(matrices)
    labels, total, scratch = buffers[:count], buffers[count], buffers[count + 1]
    spare = buffers[count + 2 :] or [scratch] * count  # not used where scores have a place of their own
    tiles = [matrix.scores.tile(at, buffer) for matrix, buffer in zip(matrices, spare, strict=True)]
    for matrix, tile, out in zip(matrices, tiles, labels, strict=True):
        # As many predictions are labelled by a matrix as label it.
        matrix.labels.put(out, at, tile, scratch, share=-1 / len(matrix.teachers))
    cost = scratch.new_zeros((), dtype=torch.float64)
    for matrix, tile in zip(matrices, tiles, strict=True):
        against = labels[matrix.teachers[0]]  # if it is the only teacher, this is its only pupil
        if len(matrix.teachers) > 1:
            against = total.copy_(against)
            for teacher in matrix.teachers[1:]:
                total.add_(labels[teacher])
        cost += torch.linalg.vecdot(against, tile).sum(dtype=torch.float64) * matrix.softmax.factor
        lse_R = matrix.softmax.row_sums(tile)
        cost += lse_R.sum(dtype=torch.float64)
        if need_grad:
            matrix.softmax.differentiate(tile, lse_R, against, scratch)
            matrix.scores.take_gradient(at, tile)
    return cost


# --- SwALIP -----------------------------------------------------------------------------------------------------------


def pupils_and_teachers(views: int) -> list[list[tuple[int, int]]]:
    """The pairs of views in groups that label each other: (i, j) is labelled by all (k, l) with k != i and l != j."""
    if views == 2:
        return [[(0, 0), (1, 1)], [(0, 1), (1, 0)]]
    return [list(itertools.product(range(views), range(views)))]


def swalip_of_rows(
    image_AND: Tensor,
    text_AMD: Tensor,
    scale: Tensor,
    *,
    samples: int,
    epsilon: float,
    iterations: int,
    normalize: bool,
    need_grad: bool,
    workspace: int,
    combine: Combine = of_one_process,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What some rows (images) against all columns (texts) add to the loss of so many ``samples``, and what all columns
    add; the gradients of the loss as far as these rows make them: images' in full, texts' and the scale's in part.

    Everything in the precision computed with; gradients to embeddings are empty without ``need_grad``.
    """
    if (triton := triton_kernels("triton_sinkhorn", image_AND)) is not None:
        return triton.swalip_of_rows(
            image_AND,
            text_AMD,
            scale,
            samples=samples,
            epsilon=epsilon,
            iterations=iterations,
            normalize=normalize,
            need_grad=need_grad,
            workspace=workspace,
            combine=combine,
        )
    x_AND, y_AMD = prepared(image_AND, normalize), prepared(text_AMD, normalize)
    d_x_AND, d_y_AMD = (torch.zeros_like(x) if need_grad else x.new_empty(0) for x in (x_AND, y_AMD))
    bound = _largest_product(x_AND, y_AMD, normalize)
    views = len(x_AND)

    def of_group(pairs: list[tuple[int, int]]) -> Tensor:
        """What rows and what columns cost, (2,); matrices and buffers are gone before the next group's are made."""
        rows, columns = x_AND.shape[1], y_AMD.shape[1]
        whole = len(pairs) * rows * columns * x_AND.element_size()
        keep = 4 * whole <= 3 * workspace
        blocks = _Blocks(
            rows,
            columns,
            x_AND,
            buffers=(1 if keep else 2) * len(pairs) + 2,
            room=workspace - whole if keep else workspace,
            multiplied=not keep,
        )
        matrices = []
        for i, j in pairs:
            gradients = (d_x_AND[i], d_y_AMD[j]) if need_grad else None
            scores = _Products(x_AND[i], y_AMD[j], epsilon, gradients, keep=keep)
            teachers = tuple(index for index, (k, l) in enumerate(pairs) if k != i and l != j)  # noqa: E741
            matrices.append(_matrix(scores, blocks, bound, scale, epsilon, teachers, both=True))
        return torch.stack(_cross_entropy(matrices, blocks, iterations, combine, need_grad=need_grad))

    totals = [of_group(pairs) for pairs in pupils_and_teachers(views)]
    weight = 1 / (2 * samples * views**2)
    own, of_columns = (torch.stack(totals).sum(0) * weight).to(scale.dtype)
    d_scale = torch.zeros_like(scale)
    if need_grad:
        d_scale = sum(
            (row_products(x, d_x).sum(dtype=torch.float64) for x, d_x in zip(x_AND, d_x_AND, strict=True)),
            scale.new_zeros((), dtype=torch.float64),
        ).mul(weight).to(scale.dtype)  # fmt: skip
        d_x_AND = through_normalization(image_AND, x_AND, d_x_AND.mul_(scale * weight), normalize)
        d_y_AMD = through_normalization(text_AMD, y_AMD, d_y_AMD.mul_(scale * weight), normalize)
    return own, of_columns, d_x_AND, d_y_AMD, d_scale


def _matrix(
    scores: _Products | _Given,
    blocks: _Blocks,
    bound: float,
    scale: Tensor,
    epsilon: float,
    teachers: tuple[int, ...],
    *,
    both: bool,
) -> _Matrix:
    """``bound``: what no score exceeds; ``both``: rows and columns are predicted and labelled, else rows alone."""
    labels = _Factors if bound / epsilon <= LIMIT else _Logarithms
    bounded = bound * _magnitude(scale) <= LIMIT
    return _Matrix(
        scores,
        labels(blocks.rows, blocks.columns, blocks.flat, 2 if both else 1),
        _Softmax(blocks.columns, scale * epsilon, both=both, bounded=bounded),
        teachers,
    )


def _magnitude(x: Tensor) -> float:
    """The largest, where it can be seen without waiting for a device; else infinity."""
    return x.abs().max().item() if x.device.type == "cpu" else math.inf


def _largest_product(x_AND: Tensor, y_AMD: Tensor, normalize: bool) -> float:
    return 1.0 if normalize else _magnitude(norms(x_AND)) * _magnitude(norms(y_AMD))


@torch.library.custom_op("rocket_fast::swalip_forward_backward", mutates_args=())
def _swalip(
    image_AND: Tensor,
    text_AND: Tensor,
    scale: Tensor,
    epsilon: float,
    iterations: int,
    normalize: bool,
    need_grad: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss () and its gradients to both sides (empty if not needed) and the scale, in what is computed with."""
    with without_autocast(image_AND.device.type):
        own, columns, *gradients = swalip_of_rows(
            image_AND,
            text_AND,
            scale,
            samples=image_AND.shape[1],
            epsilon=epsilon,
            iterations=iterations,
            normalize=normalize,
            need_grad=need_grad,
            workspace=workspace,
        )
        d_image_AND, d_text_AND, d_scale = gradients
        return own + columns, d_image_AND, d_text_AND, d_scale


# --- prototypes -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("rocket_fast::swalip_prototypes_forward_backward", mutates_args=())
def _prototypes(
    image_ANP: Tensor,
    text_ANP: Tensor,
    scale: Tensor,
    epsilon: float,
    iterations: int,
    need_grad: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``_swalip``, of scores against prototypes."""
    with without_autocast(image_ANP.device.type):
        return prototypes_of_rows(
            image_ANP,
            text_ANP,
            scale,
            samples=image_ANP.shape[1],
            epsilon=epsilon,
            iterations=iterations,
            need_grad=need_grad,
            workspace=workspace,
        )


def prototypes_of_rows(
    image_ANP: Tensor,
    text_ANP: Tensor,
    scale: Tensor,
    *,
    samples: int,
    epsilon: float,
    iterations: int,
    need_grad: bool,
    workspace: int,
    combine: Combine = of_one_process,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What some rows add to the loss of so many ``samples``, and its gradients: to the scores, in full (empty without
    ``need_grad``), and the scale's, in part; in the precision computed with."""
    (views, rows, columns), dtype = image_ANP.shape, compute_dtype(image_ANP)
    d_image_ANP, d_text_ANP = (
        scores.new_empty(scores.shape if need_grad else (0,), dtype=dtype) for scores in (image_ANP, text_ANP)
    )
    bound = max(_magnitude(image_ANP), _magnitude(text_ANP))

    def of_group(first: int, last: int) -> Tensor:
        """What the predictions of these views cost, and its gradient to the scale, (2,)."""
        count = last - first
        weight = count / (2 * samples * (1 + (views - 1) ** 2))  # each is labelled by the mean of so many
        buffers = 2 * count + 2 + (0 if need_grad else 2 * count)
        blocks = _Blocks(rows, columns, d_image_ANP, buffers=buffers, room=workspace, multiplied=False)
        given = [
            _Given(side[view], epsilon, d_side[view] if need_grad else None)
            for side, d_side in ((image_ANP, d_image_ANP), (text_ANP, d_text_ANP))
            for view in range(first, last)
        ]
        sides = (tuple(range(count)), tuple(range(count, 2 * count)))
        matrices = [
            _matrix(scores, blocks, bound, scale, epsilon, sides[index < count], both=False)
            for index, scores in enumerate(given)
        ]
        own, _ = _cross_entropy(matrices, blocks, iterations, combine, need_grad=need_grad)
        if need_grad:
            for d_side in (d_image_ANP, d_text_ANP):
                d_side[first:last].mul_(scale * weight)
        return weight * torch.stack([own, torch.stack([scores.d_scale for scores in given]).sum()])

    terms_2 = of_group(0, 1)  # the weak pair
    if views > 1:
        terms_2 += of_group(1, views)
    loss, d_scale = terms_2.to(scale.dtype).unbind()
    return loss.clone(), d_image_ANP, d_text_ANP, d_scale.clone()


# --- shapes for tracing, derivatives ----------------------------------------------------------------------------------


@_swalip.register_fake
def _(
    image_AND: Tensor,
    text_AND: Tensor,
    scale: Tensor,
    epsilon: float,
    iterations: int,
    normalize: bool,
    need_grad: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like_outputs(image_AND, text_AND, scale, need_grad)


@_prototypes.register_fake
def _(
    image_ANP: Tensor,
    text_ANP: Tensor,
    scale: Tensor,
    epsilon: float,
    iterations: int,
    need_grad: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like_outputs(image_ANP, text_ANP, scale, need_grad)


def _like_outputs(image: Tensor, text: Tensor, scale: Tensor, need_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_image, d_text = (
        side.new_empty(side.shape if need_grad else (0,), dtype=compute_dtype(side)) for side in (image, text)
    )
    return scale.new_empty(()), d_image, d_text, scale.new_empty(())


def _keep_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes, ctx.others = [x.dtype for x in inputs[:3]], len(inputs) - 3
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _hand_out(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * (3 + ctx.others)
    gradients = ctx.saved_tensors  # once: checkpointing recomputes what it unpacks
    own = (
        scaled_gradient(gradient, d_loss, dtype) if needed else None
        for needed, gradient, dtype in zip(ctx.needs_input_grad[:3], gradients, ctx.dtypes, strict=True)
    )
    return *own, *(None,) * ctx.others


_swalip.register_autograd(_hand_out, setup_context=_keep_gradients)
_prototypes.register_autograd(_hand_out, setup_context=_keep_gradients)


# --- public functions -------------------------------------------------------------------------------------------------


def swalip_loss(
    image_h: Sequence[Tensor],
    text_h: Sequence[Tensor],
    h_logit_scale: Tensor | float,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    normalize: bool = True,
    workspace_mib: float = 64,
) -> Tensor:
    """SwALIP: the similarities of one strong pair are labelled by those of another, balanced by Sinkhorn-Knopp.

    The pair (i, j) of image view i and text view j learns from every pair (k, l) with k != i and l != j: cross-entropy
    between ``softmax(h_logit_scale * S_ij)`` and ``sinkhorn(S_kl)``, S being cosines, image to text and text to image.
    The loss is the mean over all of these and both directions. With K = 2, the usual case, (i, j) has one teacher.
    No N x N matrix exists beyond the workspace. Equal calls give equal bits. First derivatives only.

    Args:
        image_h, text_h: K >= 2 tensors (N, D) each, strong views through head h.
        h_logit_scale: inverse temperature of the predictions, after exp; a number or a one-value tensor.
        epsilon, iterations: of ``sinkhorn``, which sees the cosines without the inverse temperature.
        normalize: scale every row to unit length first; False takes rows that are so already.
        workspace_mib: MiB of scratch memory. Where three quarters of it hold a group of pairs that label each other
            (for K = 2 two matrices N x N, else K * K) these are kept, and multiplied once; else a row of each pair at
            least is held, four times. Triton's kernels keep nothing: parts of sums and pieces of a gradient lie there.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs), in nats. No gradient flows through the labels.

    Raises:
        ValueError: shapes, dtypes or devices that differ, unequal numbers of views or fewer than 2, no samples, a
            scale that is not one finite number, ``epsilon`` or ``iterations`` out of range.

    Source: Fini et al. 2023 (SwALIP); Sinkhorn's iteration: SwAV (Caron et al. 2020, section 3.1), Cuturi 2013.
    """
    require(len(image_h) >= 2, "len(image_h)", len(image_h), "at least 2 strong views")
    require_views("image_h", image_h, "text_h", text_h)
    require_scalar("h_logit_scale", h_logit_scale, image_h[0].device)
    require_sinkhorn(epsilon, iterations)
    inputs = side_by_side(image_h), side_by_side(text_h), as_number(h_logit_scale, image_h[0])
    options = (float(epsilon), int(iterations), bool(normalize), wanted(*inputs), workspace_bytes(workspace_mib))
    return _swalip(*inputs, *options)[0]


def require_sinkhorn(epsilon: float, iterations: int) -> None:
    """The two settings of Sinkhorn-Knopp."""
    require(epsilon > 0, "epsilon", epsilon, "a number > 0")
    require_integer("iterations", iterations)
    require(iterations >= 1, "iterations", iterations, "a number >= 1")


def swalip_prototypes_loss(
    image_p: Sequence[Tensor],
    text_p: Sequence[Tensor],
    logit_scale: Tensor | float,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    workspace_mib: float = 64,
) -> Tensor:
    """SwALIP with prototypes: each side predicts the other's balanced assignment to P prototypes.

    A pair of an image and a text view costs the mean of both directions of the cross-entropy between
    ``softmax(logit_scale * scores)`` and ``sinkhorn`` of the other side's scores; the loss is the mean over the weak
    pair and the K x K strong ones (the original has the weak pair only, K = 0). Memory beyond inputs and gradients is
    the workspace and, with strong views, a copy of the scores. Equal calls give equal bits. First derivatives only.

    Args:
        image_p, text_p: scores against P prototypes, used as they are, 1 + K tensors (N, P) each, the weak view first.
        logit_scale: inverse temperature of the predictions, after exp; a number or a one-value tensor.
        epsilon, iterations: of ``sinkhorn``, which sees the scores without the inverse temperature.
        workspace_mib: MiB of scratch memory; rows of all scores are held in it, two at least.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs), in nats. No gradient flows through the assignments.

    Raises:
        ValueError: shapes, dtypes or devices that differ, unequal numbers of views, no views or no samples, a scale
            that is not one finite number, ``epsilon`` or ``iterations`` out of range.

    Source: SwAV (Caron et al. 2020, eq. 1-2) between modalities; Fini et al. 2023 (SwALIP).
    """
    require_weak("image_p", image_p)
    require_views("image_p", image_p, "text_p", text_p)
    require_scalar("logit_scale", logit_scale, image_p[0].device)
    require_sinkhorn(epsilon, iterations)
    inputs = side_by_side(image_p), side_by_side(text_p), as_number(logit_scale, image_p[0])
    options = (float(epsilon), int(iterations), wanted(*inputs), workspace_bytes(workspace_mib))
    return _prototypes(*inputs, *options)[0]
