"""The contrastive operations in plain torch, tile by tile: any device, any dtype, O(N + M) numbers kept.

Shapes: A image views of N images, B text views of M texts, D embedding width; every image view meets every text view.
For views a and b, ``S = scale[a, b] * X_a Y_b^T``. A tile is a block of S of at most ``TILE`` entries; two of them
exist at a time. Row i's positive is column ``i + row_offset``; of the P matched pairs the first is row
``max(0, -row_offset)`` with column ``max(0, row_offset)``.

InfoNCE takes one product per tile forward and three backward: four of size N x M x D in all, the least there can be
without keeping S. Everything after a product is elementwise on a tile still in the cache. Sums run in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows x columns of a tile. Measured on two cores (N = 8192, D = 512, float32): 512 x 512 to 2048 x 2048 are within 8%
# of each other; larger ones leave the cache, smaller ones starve the product.
TILE = (1024, 2048)

# How far below the rows' largest logits the columns' may lie before exponentials made for the rows underflow for them:
# what is lost of a column's sum is below exp(-27) of it.
MARGIN = 27

# Rows taken together where the diagonal crosses a tile.
CORNER = 128

# torch.nn.functional.normalize's lower bound of a norm.
EPS = 1e-12


@dataclass(frozen=True)
class Positives:
    """Where the matched pairs of an N x M problem are."""

    first_row: int
    first_column: int
    count: int

    @staticmethod
    def of(rows: int, columns: int, row_offset: int) -> Positives:
        first_row, first_column = max(0, -row_offset), max(0, row_offset)
        return Positives(first_row, first_column, min(rows - first_row, columns - first_column))

    def per_row(self, x: Tensor) -> Tensor:
        """The part of ``x`` (..., N) that has positives."""
        return x.narrow(-1, self.first_row, self.count)

    def per_column(self, x: Tensor) -> Tensor:
        """The part of ``x`` (..., M) that has positives."""
        return x.narrow(-1, self.first_column, self.count)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64: what statistics, products and results are made in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def inverse_norms(x: Tensor) -> Tensor:
    """``1 / max(norm, 1e-12)`` of the last dimension."""
    return 1 / x.norm(dim=-1).clamp_min(EPS)


def _prepared(x: Tensor, normalize: bool) -> Tensor:
    """In the precision computed with, rows of unit length if asked; the tensor itself where nothing is to be done."""
    x = x.detach().to(compute_dtype(x))
    return x * inverse_norms(x)[..., None] if normalize else x


class Tiles:
    """The tiles of an N x M problem and the two buffers they are made in."""

    def __init__(self, rows: int, columns: int, like: Tensor, workspace: int) -> None:
        entries = max(1, workspace // (2 * like.element_size()))
        width = min(columns, TILE[1], entries)
        self.rows, self.columns = rows, columns
        self.shape = (min(rows, TILE[0], max(1, entries // width)), width)
        self._buffers = [like.new_empty(self.shape[0] * width) for _ in range(2)]

    def row_slices(self) -> Iterator[slice]:
        return (slice(start, min(start + self.shape[0], self.rows)) for start in range(0, self.rows, self.shape[0]))

    def column_slices(self) -> Iterator[slice]:
        return (
            slice(start, min(start + self.shape[1], self.columns)) for start in range(0, self.columns, self.shape[1])
        )

    def buffers(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Two contiguous matrices of the tile's size; their contents are whatever was there."""
        size = (rows.stop - rows.start, columns.stop - columns.start)
        first, second = (buffer[: size[0] * size[1]].view(size) for buffer in self._buffers)
        return first, second


# --- forward: log-sum-exps, and what the diagonal tells ---------------------------------------------------------------


def contrastive_forward(
    image_AND: Tensor,
    text_BMD: Tensor,
    scale_AB: Tensor,
    *,
    smoothing: list[float],
    row_offset: int,
    diagonal: bool,
    normalize: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exps of rows (A, B, N) and columns (A, B, M), their maxima, terms (A, B, 4): see ``_pair_terms``."""
    x_AND, y_BMD = _prepared(image_AND, normalize), _prepared(text_BMD, normalize)
    (views, rows, _), (text_views, columns, _) = x_AND.shape, y_BMD.shape
    tiles = Tiles(rows, columns, x_AND, workspace)
    lse_image_ABN, top_image_ABN = (x_AND.new_empty(views, text_views, rows) for _ in range(2))
    lse_text_ABM, top_text_ABM = (x_AND.new_empty(views, text_views, columns) for _ in range(2))
    terms_AB4 = x_AND.new_zeros(views, text_views, 4)
    for a in range(views):
        for b in range(text_views):
            statistics = _Statistics(rows, columns, x_AND, row_offset if diagonal else None)
            for row in tiles.row_slices():
                scaled_ND = x_AND[a, row] * scale_AB[a, b]
                for column in tiles.column_slices():
                    logits_NM, scratch_NM = tiles.buffers(row, column)
                    torch.mm(scaled_ND, y_BMD[b, column].T, out=logits_NM)
                    statistics.add(row, column, logits_NM, scratch_NM)
            lse_image_ABN[a, b] = statistics.row.log_sum_exp()
            lse_text_ABM[a, b] = statistics.column.log_sum_exp()
            top_image_ABN[a, b], top_text_ABM[a, b] = statistics.row.maximum, statistics.column.maximum
            if diagonal:
                e = smoothing[a * text_views + b]
                means = _mean_logits(x_AND[a], y_BMD[b], scale_AB[a, b], row_offset) if e else (0.0, 0.0)
                _pair_terms(statistics, lse_image_ABN[a, b], lse_text_ABM[a, b], means, e, terms_AB4[a, b])
    return lse_image_ABN, lse_text_ABM, top_image_ABN, top_text_ABM, terms_AB4


class _Online:
    """Running maximum and sum of exponentials: ``log sum exp`` in one pass, with true maxima."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.maximum = like.new_full((size,), -torch.inf)
        self.total = like.new_zeros(size)

    def add(self, at: slice, maximum: Tensor, total: Tensor) -> None:
        """Take in ``sum exp(x - maximum) = total`` of more entries of the rows (columns) ``at``."""
        before = self.maximum[at]
        joint = torch.maximum(before, maximum)
        self.total[at] = self.total[at] * (before - joint).exp() + total * (maximum - joint).exp()
        self.maximum[at] = joint

    def log_sum_exp(self) -> Tensor:
        return self.maximum + self.total.log()


class _Statistics:
    """What one pass over the tiles of one pair of views collects."""

    def __init__(self, rows: int, columns: int, like: Tensor, row_offset: int | None) -> None:
        self.row, self.column = _Online(rows, like), _Online(columns, like)
        self.row_offset = row_offset
        if row_offset is not None:
            self.where = Positives.of(rows, columns, row_offset)
            self.positive = like.new_full((rows,), -torch.inf)
            # The largest logit before the positive in its row and in its column: with equal logits the first one is the
            # top one, as torch.argmax has it, so that collapsed embeddings do not count as right.
            self.row_before, self.column_before = (like.new_full((size,), -torch.inf) for size in (rows, columns))

    def add(self, row: slice, column: slice, logits_NM: Tensor, scratch_NM: Tensor) -> None:
        row_max, column_max = logits_NM.amax(1), logits_NM.amax(0)
        if self.row_offset is not None:
            self._add_positives(row, column, logits_NM, row_max, column_max)
        one_exponential = _near(row_max, column_max)
        if not one_exponential:
            torch.sub(logits_NM, column_max, out=scratch_NM).exp_()
            self.column.add(column, column_max, scratch_NM.sum(0))
        logits_NM.sub_(row_max[:, None]).exp_()
        self.row.add(row, row_max, logits_NM.sum(1))
        if one_exponential:
            largest = row_max.max()
            total = (row_max - largest).exp() @ logits_NM
            self.column.add(column, column_max, total * (largest - column_max).exp())

    def _add_positives(self, row: slice, column: slice, logits: Tensor, row_max: Tensor, column_max: Tensor) -> None:
        assert self.row_offset is not None
        offset = row.start + self.row_offset - column.start  # within the tile, row i's positive is column i + offset
        here = self.row_before[row]
        torch.maximum(here, _before_diagonal(logits, offset, row_max), out=here)
        here = self.column_before[column]
        torch.maximum(here, _before_diagonal(logits.T, -offset, column_max), out=here)
        found = _diagonal(logits, offset)
        start = row.start + max(0, -offset)
        self.positive[start : start + found.shape[0]] = found


def _near(high: Tensor, low: Tensor) -> bool:
    """Whether ``exp(x - high)``, times ``exp(high - low)``, is as good as ``exp(x - low)`` for all given values.

    It is, unless the range of the type is left; then an exponential each is taken. To know it, the CPU only looks;
    on another device it would have to wait.
    """
    limit = -math.log(torch.finfo(high.dtype).tiny) - MARGIN
    return high.device.type == "cpu" and bool(high.max() - low.min() < limit)


def _before_diagonal(logits: Tensor, offset: int, row_max: Tensor) -> Tensor:
    """Per row i, the largest entry in columns below ``i + offset``; ``row_max`` is that of all columns.

    Whole blocks up to the diagonal, then the triangle's corner that a block of rows leaves.
    """
    rows, columns = logits.shape
    best = torch.full_like(row_max, -torch.inf)
    first, last = (min(max(row, 0), rows) for row in (-offset, columns - offset))  # the diagonal crosses these
    best[last:] = row_max[last:]
    not_before = torch.ones(CORNER, CORNER, dtype=torch.bool, device=logits.device).triu()
    for start in range(first, last, CORNER):
        stop = min(start + CORNER, last)
        corner = logits[start:stop, start + offset : stop + offset]
        found = corner.masked_fill(not_before[: stop - start, : stop - start], -torch.inf).amax(1)
        if start + offset > 0:
            found = torch.maximum(found, logits[start:stop, : start + offset].amax(1))
        best[start:stop] = found
    return best


def _mean_logits(x_ND: Tensor, y_MD: Tensor, scale: Tensor, row_offset: int) -> tuple[Tensor, Tensor]:
    """Mean logit over (rows with a positive) x (all columns), and over (all rows) x (columns with a positive).

    A sum of products is a product of sums: no N x M work.
    """
    where = Positives.of(len(x_ND), len(y_MD), row_offset)
    x_DP, y_DP = where.per_row(x_ND.T), where.per_column(y_MD.T)
    return scale * x_DP.mean(1) @ y_MD.mean(0), scale * x_ND.mean(0) @ y_DP.mean(1)


def _pair_terms(
    statistics: _Statistics,
    lse_N: Tensor,
    lse_M: Tensor,
    means: tuple[Tensor | float, Tensor | float],
    smoothing: float,
    out_4: Tensor,
) -> None:
    """Loss image to text, loss text to image, and the accuracies (percent) of both."""
    where = statistics.where
    positive_P = where.per_row(statistics.positive)
    directions = (
        (where.per_row(lse_N), where.per_row(statistics.row.maximum), where.per_row(statistics.row_before)),
        (
            where.per_column(lse_M),
            where.per_column(statistics.column.maximum),
            where.per_column(statistics.column_before),
        ),
    )
    for index, (lse_P, maximum_P, before_P) in enumerate(directions):
        out_4[index] = (lse_P - (1 - smoothing) * positive_P).mean() - smoothing * means[index]
        right_P = (positive_P == maximum_P) & (positive_P > before_P)
        out_4[2 + index] = 100 * right_P.to(out_4.dtype).mean()


# --- backward: the logits once more, their gradient in place, two products --------------------------------------------


def contrastive_backward(
    image_AND: Tensor,
    text_BMD: Tensor,
    scale_AB: Tensor,
    lse_image_ABN: Tensor,
    lse_text_ABM: Tensor,
    weight_image_ABN: Tensor,
    weight_text_ABM: Tensor,
    *,
    smoothing: list[float],
    row_offset: int,
    diagonal: bool,
    normalize: bool,
    need_image: bool,
    need_text: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both sides, in their dtype (empty where not needed), and of the scales (A, B).

    ``weight_image_ABN``, ``weight_text_ABM``: the loss's gradient to each row's and column's log-sum-exp (with
    ``diagonal``: to its cross-entropy).
    """
    x_AND, y_BMD = _prepared(image_AND, normalize), _prepared(text_BMD, normalize)
    tiles = Tiles(x_AND.shape[1], y_BMD.shape[1], x_AND, workspace)
    views, text_views = scale_AB.shape
    d_x_AND = torch.empty_like(x_AND) if text_views == 1 else torch.zeros_like(x_AND)
    d_y_BMD = torch.zeros_like(y_BMD) if need_text else None
    d_scale_AB = torch.zeros_like(scale_AB)
    for a in range(views):
        for b in range(text_views):
            pair = _PairGradient(
                lse_image_ABN[a, b],
                lse_text_ABM[a, b],
                weight_image_ABN[a, b],
                weight_text_ABM[a, b],
                smoothing=smoothing[a * text_views + b] if diagonal else 0.0,
                row_offset=row_offset if diagonal else None,
            )
            # Gradient to the unscaled rows; with one text view it is all there is and is made where it stays.
            d_row_ND = d_x_AND[a] if text_views == 1 else torch.empty_like(x_AND[a])
            d_text_MD = None if d_y_BMD is None else d_y_BMD[b]
            pair.accumulate(x_AND[a], y_BMD[b], scale_AB[a, b], d_row_ND, d_text_MD, tiles)
            d_scale_AB[a, b] = torch.linalg.vecdot(x_AND[a], d_row_ND).sum()
            if text_views == 1:
                d_row_ND.mul_(scale_AB[a, b])
            else:
                d_x_AND[a].addcmul_(d_row_ND, scale_AB[a, b])
    d_image, d_text = image_AND.new_empty(0), text_BMD.new_empty(0)
    if need_image:
        d_image = _through_normalization(image_AND, x_AND, d_x_AND, normalize).to(image_AND.dtype)
    if d_y_BMD is not None:
        d_text = _through_normalization(text_BMD, y_BMD, d_y_BMD, normalize).to(text_BMD.dtype)
    return d_image, d_text, d_scale_AB


class _PairGradient:
    """The gradient of one pair of views: ``G = w_i (softmax_row - target) + w_j (softmax_column - target)``."""

    def __init__(
        self,
        lse_N: Tensor,
        lse_M: Tensor,
        weight_N: Tensor,
        weight_M: Tensor,
        *,
        smoothing: float,
        row_offset: int | None,
    ) -> None:
        self.lse_N, self.lse_M, self.weight_N, self.weight_M = lse_N, lse_M, weight_N, weight_M
        self.smoothing, self.row_offset = smoothing, row_offset
        self.one_exponential = _near(lse_N, lse_M) and _near(lse_M, lse_N)
        self.middle = lse_N.mean()

    def accumulate(
        self, x_ND: Tensor, y_MD: Tensor, scale: Tensor, d_row_ND: Tensor, d_text_MD: Tensor | None, tiles: Tiles
    ) -> None:
        """``d_row_ND = G Y`` (without the scale) and ``d_text_MD += scale * G^T X``."""
        for row in tiles.row_slices():
            scaled_ND = x_ND[row] * scale
            for column in tiles.column_slices():
                logits_NM, scratch_NM = tiles.buffers(row, column)
                torch.mm(scaled_ND, y_MD[column].T, out=logits_NM)
                self._to_gradient(row, column, logits_NM, scratch_NM)
                d_row_ND[row].addmm_(logits_NM, y_MD[column], beta=float(column.start > 0))
                if d_text_MD is not None:
                    d_text_MD[column].addmm_(logits_NM.T, scaled_ND)
        if self.smoothing:
            self._smooth(x_ND, y_MD, scale, d_row_ND, d_text_MD)

    def _to_gradient(self, row: slice, column: slice, logits_NM: Tensor, scratch_NM: Tensor) -> None:
        """Turn a tile of logits into the tile of their gradients, in place, but for label smoothing's constants."""
        weight_row, weight_column = self.weight_N[row], self.weight_M[column]
        lse_row, lse_column = self.lse_N[row], self.lse_M[column]
        if self.one_exponential:
            # exp(S - c) = exp(S - r) exp(r - c), and the second factor is a product of a row's and a column's number.
            torch.mm(
                torch.stack([weight_row, (lse_row - self.middle).exp()], dim=1),
                torch.stack([torch.ones_like(weight_column), weight_column * (self.middle - lse_column).exp()]),
                out=scratch_NM,
            )
            logits_NM.sub_(lse_row[:, None]).exp_().mul_(scratch_NM)
        else:
            torch.sub(logits_NM, lse_column, out=scratch_NM).exp_()
            logits_NM.sub_(lse_row[:, None]).exp_().mul_(weight_row[:, None]).addcmul_(scratch_NM, weight_column)
        if self.row_offset is None:
            return
        offset = row.start + self.row_offset - column.start
        positive = _diagonal(logits_NM, offset)
        if count := positive.shape[0]:
            both = weight_row.narrow(0, max(0, -offset), count) + weight_column.narrow(0, max(0, offset), count)
            positive.sub_(both, alpha=1 - self.smoothing)

    def _smooth(self, x_ND: Tensor, y_MD: Tensor, scale: Tensor, d_row_ND: Tensor, d_text_MD: Tensor | None) -> None:
        """Label smoothing takes ``w_i e / M + w_j e / N`` from every entry of G: two matrices of rank one."""
        per_row_N = self.weight_N * (self.smoothing / len(y_MD))
        per_column_M = self.weight_M * (self.smoothing / len(x_ND))
        d_row_ND.addr_(per_row_N, y_MD.sum(0), alpha=-1).sub_(per_column_M @ y_MD)
        if d_text_MD is not None:
            d_text_MD.addr_(per_column_M, scale * x_ND.sum(0), alpha=-1).sub_(scale * (per_row_N @ x_ND))


# --- pairwise sigmoid: loss and gradients in one pass -----------------------------------------------------------------


def sigmoid_forward_backward(
    image_ND: Tensor,
    text_MD: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    row_offset: int,
    normalize: bool,
    need_grad: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``sum_ij softplus(-z_ij (S_ij + bias)) / N``, z = 1 for positives, else -1, and its gradients to all four inputs.

    A sigmoid needs no other logit, so the gradients come with the value: three products. All are in the dtype computed
    with; those of the embeddings are empty without ``need_grad``.
    """
    x_ND, y_MD = _prepared(image_ND, normalize), _prepared(text_MD, normalize)
    tiles = Tiles(len(x_ND), len(y_MD), x_ND, workspace)
    d_row_ND, d_y_MD = (torch.zeros_like(t) if need_grad else t.new_empty(0) for t in (x_ND, y_MD))
    # N x M positive terms: sums over tiles are kept in float64.
    loss, d_bias = (scale.new_zeros((), dtype=torch.float64) for _ in range(2))
    for row in tiles.row_slices():
        scaled_ND = x_ND[row] * scale
        for column in tiles.column_slices():
            logits_NM, scratch_NM = tiles.buffers(row, column)
            torch.mm(scaled_ND, y_MD[column].T, out=logits_NM).add_(bias)
            positive = _diagonal(logits_NM, row.start + row_offset - column.start)
            loss += _softplus_sum(logits_NM, scratch_NM) - positive.sum(dtype=torch.float64)
            if need_grad:
                logits_NM.sigmoid_()
                positive.sub_(1)
                d_bias += logits_NM.sum(dtype=torch.float64)
                d_row_ND[row].addmm_(logits_NM, y_MD[column])
                d_y_MD[column].addmm_(logits_NM.T, scaled_ND)
    share = 1 / len(x_ND)
    d_scale = torch.zeros_like(scale)
    if need_grad:
        d_scale = torch.linalg.vecdot(x_ND, d_row_ND).sum() * share
        d_row_ND = _through_normalization(image_ND, x_ND, d_row_ND.mul_(scale * share), normalize)
        d_y_MD = _through_normalization(text_MD, y_MD, d_y_MD.mul_(share), normalize)
    return (loss * share).to(scale.dtype), d_row_ND, d_y_MD, d_scale, (d_bias * share).to(scale.dtype)


def _softplus_sum(x: Tensor, scratch: Tensor) -> Tensor:
    """Sum of ``log(1 + exp(x))``, to full precision at both ends, in float64; ``scratch`` is overwritten."""
    small = torch.abs(x, out=scratch).neg_().exp_().log1p_().sum(dtype=torch.float64)
    return small + torch.clamp_min(x, 0, out=scratch).sum(dtype=torch.float64)


# --- shared -----------------------------------------------------------------------------------------------------------


def _diagonal(tile_NM: Tensor, offset: int) -> Tensor:
    """The positives of a tile, entries (i, i + offset), as a view; empty where the diagonal does not cross the tile."""
    rows, columns = tile_NM.shape
    return tile_NM.diagonal(min(max(offset, -rows), columns))


def _through_normalization(raw: Tensor, unit: Tensor, gradient: Tensor, normalize: bool) -> Tensor:
    """Gradient to the rows before they were scaled to ``unit`` length; overwrites ``gradient``."""
    if not normalize:
        return gradient
    along = torch.linalg.vecdot(unit, gradient)[..., None]
    return gradient.addcmul_(unit, along, value=-1).mul_(inverse_norms(raw.to(unit.dtype))[..., None])
