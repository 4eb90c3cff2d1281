"""The contrastive operations in plain torch, tile by tile: CPU and CUDA, any dtype, O(N + M) numbers kept.

Shapes: A image views of N images, B text views of M texts, D embedding width; every image view meets every text view.
For views a and b, ``S = scale[a, b] * X_a Y_b^T``. A tile is a block of S of at most ``TILE`` entries; two of them
exist at a time. Row i's positive is column ``i + row_offset``; of the P matched pairs the first is row
``max(0, -row_offset)`` with column ``max(0, row_offset)``.

InfoNCE takes one product per tile forward and three backward: four of size N x M x D in all, the least there can be
without keeping S. Everything after a product is elementwise on a tile still in the cache. Sums run in a fixed order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows x columns of a tile. Measured on two cores (N = 8192, D = 512, float32): 512 x 512 to 2048 x 2048 are within 8%
# of each other; larger ones leave the cache, smaller ones starve the product.
TILE = (1024, 2048)

# How far apart (nats) rows' and columns' references may lie to share exponentials. At 16 the exponents' rounding adds
# 1e-6 to a column's probabilities, a fraction of what the logits' own does where they spread as far; float32's range
# would allow 60.
SPREAD = 16

# Up to so many logits a second exponential costs no more than doing without, and is a digit's fraction more exact.
SMALL = 512 * 512

# Rows taken together where the diagonal crosses a tile, where rows are multiplied one by one, where they are summed.
CORNER, ROWS, SUM_ROWS = 128, 1024, 64

# torch.nn.functional.normalize's lower bound of a norm.
EPS = 1e-12


@dataclass(frozen=True)
class Positives:
    """Where the matched pairs of an N x M problem are."""

    offset: int
    first_row: int
    first_column: int
    count: int

    @staticmethod
    def of(rows: int, columns: int, row_offset: int) -> Positives:
        first_row, first_column = max(0, -row_offset), max(0, row_offset)
        return Positives(row_offset, first_row, first_column, min(rows - first_row, columns - first_column))

    def per_row(self, x: Tensor) -> Tensor:
        """The part of ``x`` (..., N) that has positives."""
        return x if self.count == x.shape[-1] else x.narrow(-1, self.first_row, self.count)

    def per_column(self, x: Tensor) -> Tensor:
        """The part of ``x`` (..., M) that has positives."""
        return x if self.count == x.shape[-1] else x.narrow(-1, self.first_column, self.count)

    def masks(self, like_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Columns and rows of ones, zero where there is no positive: (N, 1) and (M,)."""
        (rows, columns), ones_P = like_NM.shape, like_NM.new_ones(self.count)
        row_N = F.pad(ones_P, (self.first_row, rows - self.first_row - self.count))
        column_M = F.pad(ones_P, (self.first_column, columns - self.first_column - self.count))
        return row_N[:, None], column_M

    def weights(self, losses_AB2: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Every row's and every column's share (A, B, N) and (A, B, M) of its direction's, or none."""
        share_AB2 = losses_AB2 / self.count
        sides = ((share_AB2[..., :1], self.first_row, rows), (share_AB2[..., 1:], self.first_column, columns))
        image_ABN, text_ABM = (
            side.expand(*side.shape[:2], size)
            if self.count == size
            else F.pad(side.expand(*side.shape[:2], self.count), (first, size - first - self.count))
            for side, first, size in sides
        )
        return image_ABN, text_ABM


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64: what statistics, products and results are made in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def norms(x: Tensor) -> Tensor:
    """Norms of the last dimension, at least 1e-12."""
    return x.norm(dim=-1).clamp_min(EPS)


def prepared(x: Tensor, normalize: bool) -> Tensor:
    """In the precision computed with, rows of unit length if asked; the tensor itself where nothing is to be done."""
    dtype = compute_dtype(x)
    x = x if x.dtype == dtype else x.to(dtype)
    return x / norms(x)[..., None] if normalize else x


class Tiles:
    """The tiles of an N x M problem and the two buffers they are made in."""

    def __init__(self, rows: int, columns: int, like: Tensor, workspace: int) -> None:
        entries = max(1, workspace // (2 * like.element_size()))
        width = min(columns, TILE[1], entries)
        self.rows, self.columns = rows, columns
        self.shape = (min(rows, TILE[0], max(1, entries // width)), width)
        self._logits = self._scratch = like.new_empty(0)

    def row_slices(self) -> Iterator[slice]:
        return (slice(start, min(start + self.shape[0], self.rows)) for start in range(0, self.rows, self.shape[0]))

    def column_slices(self) -> Iterator[slice]:
        return (
            slice(start, min(start + self.shape[1], self.columns)) for start in range(0, self.columns, self.shape[1])
        )

    def logits(self, rows_ND: Tensor, columns_MD: Tensor) -> Tensor:
        """Products of rows and columns, in the one buffer that there is for them."""
        if not len(self._logits):
            self._logits = rows_ND.new_empty(self.shape[0] * self.shape[1])
        tile_NM = self._logits[: len(rows_ND) * len(columns_MD)].view(len(rows_ND), len(columns_MD))
        return torch.mm(rows_ND, columns_MD.T, out=tile_NM)

    def scratch(self, logits_NM: Tensor) -> Tensor:
        """A second matrix of a tile's size; its contents are whatever was there."""
        if not len(self._scratch):
            self._scratch = torch.empty_like(self._logits)
        return self._scratch[: logits_NM.numel()].view_as(logits_NM)


# --- forward: log-sum-exps, and what the diagonal tells ---------------------------------------------------------------


def contrastive_forward(
    image_AND: Tensor,
    text_BMD: Tensor,
    scale_AB: Tensor,
    *,
    smoothing: Sequence[float],
    row_offset: int,
    diagonal: bool,
    normalize: bool,
    workspace: int,
) -> tuple[Tensor, ...]:
    """Log-sum-exps of rows (A, B, N) and columns (A, B, M), their maxima; and what the positives tell.

    That is: whether a column's positive is its pick (A, B, M), empty without ``diagonal``; losses and accuracies
    (A, B, 2), rows' and columns'. Of equal logits the first is the pick.

    Log-sum-exps are float64 whatever the rest is: rounding one of a hundred to float32 would put the same error, 4e-6,
    on all probabilities of its row.
    """
    x_AND, y_BMD = prepared(image_AND, normalize), prepared(text_BMD, normalize)
    tiles = Tiles(x_AND.shape[1], y_BMD.shape[1], x_AND, workspace)
    per_pair = []
    for index, (x_ND, y_MD, scale) in enumerate(_pairs(x_AND, y_BMD, scale_AB)):
        statistics = _Statistics.of(x_ND, y_MD, scale, smoothing[index], row_offset if diagonal else None)
        for row in tiles.row_slices():
            scaled_ND = x_ND[row] * scale
            for column in tiles.column_slices():
                statistics.add(row, column, tiles.logits(scaled_ND, y_MD[column]), tiles)
        per_pair.append(statistics.results())
    return _stacked(per_pair, scale_AB)


def contrastive_forward_backward(
    image_AND: Tensor,
    text_BMD: Tensor,
    scale_AB: Tensor,
    *,
    smoothing: Sequence[float],
    row_offset: int,
    normalize: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses and accuracies (A, B, 2), and gradients (A, N, D), (B, M, D), (A, B) of the sum of all pairs' losses.

    For pairs that fit into memory twice: their softmaxes are still there when the sums are known, so that the gradients
    take two products more, not three. They are in the precision computed with, and empty without ``need_grad``.
    """
    x_AND, y_BMD = prepared(image_AND, normalize), prepared(text_BMD, normalize)
    where = Positives.of(x_AND.shape[1], y_BMD.shape[1], row_offset)
    logits_NM, scratch_NM = (x_AND.new_empty(x_AND.shape[1], y_BMD.shape[1]) for _ in range(2))
    d_x_AND, d_y_BMD = (torch.empty_like(x) if need_grad else x for x in (x_AND, y_BMD))
    d_scales, terms, scales = [], [], scale_AB.flatten().tolist()
    for index, scale in enumerate(scales):
        a, b = divmod(index, y_BMD.shape[0])
        x_ND, d_x_ND = x_AND[a], d_x_AND[a]
        options: dict[str, Any] = {"smoothing": smoothing[index], "where": where}
        pair = _WholePair(x_ND, y_BMD[b], scale, logits_NM=logits_NM, scratch_NM=scratch_NM, **options)
        terms.append((pair.losses_2, pair.accuracies_2))
        if not need_grad:
            continue
        d_row_ND = d_x_ND if b == 0 else torch.empty_like(x_ND)
        pair.differentiate(d_row_ND, d_y_BMD[b], first=a == 0)
        d_scales.append(row_products(x_ND, d_row_ND).sum(dtype=torch.float64))
        d_x_ND.mul_(scale) if b == 0 else d_x_ND.add_(d_row_ND, alpha=scale)
    losses_AB2, accuracies_AB2 = _stacked(terms, scale_AB)
    if not need_grad:
        return losses_AB2, accuracies_AB2, x_AND.new_empty(0), x_AND.new_empty(0), x_AND.new_empty(0)
    d_scale_AB = torch.stack(d_scales).view_as(scale_AB).to(scale_AB.dtype)
    d_image_AND = through_normalization(image_AND, x_AND, d_x_AND, normalize)
    d_text_BMD = through_normalization(text_BMD, y_BMD, d_y_BMD, normalize)
    return losses_AB2, accuracies_AB2, d_image_AND, d_text_BMD, d_scale_AB


def _pairs(x_AND: Tensor, y_BMD: Tensor, scale_AB: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return ((x_ND, y_MD, scale_AB[a, b]) for a, x_ND in enumerate(x_AND) for b, y_MD in enumerate(y_BMD))


def _stacked(per_pair: Sequence[tuple[Tensor, ...]], scale_AB: Tensor) -> tuple[Tensor, ...]:
    """Every result of all pairs, (A, B, its size)."""
    return tuple(
        (torch.stack(part) if len(part) > 1 else part[0]).view(*scale_AB.shape, -1) if part[0].shape[0] else part[0]
        for part in zip(*per_pair, strict=True)
    )


class _Online:
    """Running maximum and sum of exponentials: ``log sum exp`` in one pass, with true maxima."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.maximum = self.total = torch.empty(0)

    def add(self, at: slice, maximum: Tensor, total: Tensor) -> None:
        """Take in ``sum exp(x - maximum) = total`` of more entries of the rows (columns) ``at``."""
        if not len(self.maximum):
            if len(maximum) == self.size:
                self.maximum, self.total = maximum, total
                return
            self.maximum, self.total = maximum.new_full((self.size,), -torch.inf), total.new_zeros(self.size)
        before = self.maximum[at]
        joint = torch.maximum(before, maximum)
        self.total[at] = self.total[at] * (before - joint).exp() + total * (maximum - joint).exp()
        self.maximum[at] = joint

    def log_sum_exp(self) -> Tensor:
        """In float64, see ``contrastive_forward``."""
        return self.maximum.double() + self.total.log().double()


class _Largest:
    """Running maximum."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.value = torch.empty(0)

    def add(self, at: slice, value: Tensor) -> None:
        """Take in the maxima of more entries of the rows (columns) ``at``."""
        if not len(self.value):
            if len(value) == self.size:
                self.value = value
                return
            self.value = value.new_full((self.size,), -torch.inf)
        self.value[at] = torch.maximum(self.value[at], value)


class _Statistics:
    """What one pass over the tiles of one pair of views collects."""

    def __init__(
        self, rows: int, columns: int, row_offset: int | None, smoothing: float, mean_logits: Tensor | None
    ) -> None:
        self.row, self.column = _Online(rows), _Online(columns)
        self.row_offset, self.smoothing, self.mean_logits = row_offset, smoothing, mean_logits
        self.positive: list[Tensor] = []
        # The largest logit before the positive in its row and in its column: of equal logits the first one is the top
        # one, as torch.argmax has it, so that collapsed embeddings do not count as right.
        self.row_before, self.column_before = _Largest(rows), _Largest(columns)

    @staticmethod
    def of(x_ND: Tensor, y_MD: Tensor, scale: Tensor, smoothing: float, row_offset: int | None) -> _Statistics:
        """Of nothing yet; ``row_offset`` None: there are no positives."""
        mean_logits = None
        if row_offset is not None and smoothing:
            mean_logits = _mean_logits(x_ND, y_MD, scale, row_offset)
        return _Statistics(len(x_ND), len(y_MD), row_offset, smoothing, mean_logits)

    def add(self, row: slice, column: slice, logits_NM: Tensor, tiles: Tiles) -> None:
        """Take in a tile of logits, which is overwritten."""
        if self.row_offset is None:
            row_max, column_max = logits_NM.amax(1), logits_NM.amax(0)
        else:
            row_max, column_max = self._add_positives(row, column, logits_NM)
        largest = row_max.max()
        one_exponential = _near(largest, column_max)
        if not one_exponential:
            scratch_NM = exp_(torch.sub(logits_NM, column_max, out=tiles.scratch(logits_NM)))
            self.column.add(column, column_max, scratch_NM.sum(0))
        exp_(logits_NM.sub_(row_max[:, None]))
        if one_exponential:
            total = _weighted_column_sums(logits_NM, (row_max - largest).exp())
            self.column.add(column, column_max, total * (largest - column_max).exp())
        self.row.add(row, row_max, logits_NM.sum(1))

    def _add_positives(self, row: slice, column: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the tile's positives and what comes before them; gives the maxima of its rows and columns."""
        assert self.row_offset is not None
        offset = row.start + self.row_offset - column.start  # within the tile, row i's positive is column i + offset
        diagonal_P = _diagonal(logits, offset)
        # Tiles come row by row, and a row's positives from left to right: in the order of the pairs.
        positive_P = diagonal_P.clone()
        self.positive.append(positive_P)
        diagonal_P.fill_(-torch.inf)
        row_max, column_max = logits.amax(1), logits.amax(0)
        diagonal_P.copy_(positive_P)
        own_row = row_max.narrow(0, max(0, -offset) if len(positive_P) else 0, len(positive_P))
        own_column = column_max.narrow(0, max(0, offset) if len(positive_P) else 0, len(positive_P))
        # Ties are rare, and looking for the first of equals costs; only the CPU can tell without waiting.
        tied = logits.device.type != "cpu" or bool(((own_row == positive_P) | (own_column == positive_P)).any())
        torch.maximum(own_row, positive_P, out=own_row)
        torch.maximum(own_column, positive_P, out=own_column)
        if tied or logits.shape != (self.row.size, self.column.size):
            self.row_before.add(row, _before_diagonal(logits, offset, row_max, tied))
            self.column_before.add(column, _before_diagonal(logits.T, -offset, column_max, tied))
        return row_max, column_max

    def results(self) -> tuple[Tensor, ...]:
        """What ``contrastive_forward`` returns, of this pair."""
        lse_N, lse_M = self.row.log_sum_exp(), self.column.log_sum_exp()
        if self.row_offset is None:
            new = self.row.total.new_zeros
            terms = new(0, dtype=torch.bool), new(2), new(2)
        else:
            terms = self._terms(lse_N, lse_M, self.row_offset)
        return lse_N, lse_M, self.row.maximum, self.column.maximum, *terms

    def _terms(self, lse_N: Tensor, lse_M: Tensor, row_offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """Whether a text's pick is right, losses image to text and text to image, and the picks' accuracies."""
        where = Positives.of(self.row.size, self.column.size, row_offset)
        positive_P = torch.cat(self.positive) if len(self.positive) > 1 else self.positive[0]

        def both(row: Tensor, column: Tensor) -> Tensor:
            return torch.stack([where.per_row(row), where.per_column(column)])

        losses_2 = both(lse_N, lse_M).sub_(positive_P, alpha=1 - self.smoothing).mean(1)
        losses_2 = losses_2.to(positive_P.dtype)
        if self.mean_logits is not None:
            losses_2 -= self.smoothing * self.mean_logits
        right_2P = both(self.row.maximum, self.column.maximum) == positive_P
        if len(self.row_before.value):
            right_2P &= both(self.row_before.value, self.column_before.value) < positive_P
        right_M = right_2P[1]
        if where.count < self.column.size:
            right_M = F.pad(right_M, (where.first_column, self.column.size - where.first_column - where.count))
        return right_M, losses_2, right_2P.sum(1, dtype=losses_2.dtype) * (100 / where.count)


def exp_(x: Tensor) -> Tensor:
    """``exp`` in place, of exponents up to about 0; what no sum would notice is zero, see ``_negligible``."""
    floor = math.log(_negligible(x.dtype))
    if x.device.type == "cpu" and x.amin().item() < floor:
        torch.threshold_(x, floor, -torch.inf)
    return x.exp_()


def _drop_negligible_(softmax: Tensor) -> None:
    """What no sum would notice becomes zero, see ``_negligible``."""
    floor = _negligible(softmax.dtype)
    if softmax.device.type == "cpu" and softmax.amin().item() < floor:
        torch.threshold_(softmax, floor, 0)


def _negligible(dtype: torch.dtype) -> float:
    """Exponentials below this count as nothing: with room for the weights, 1 / N, that they are multiplied by.

    Below the normal numbers' range the CPU computes five to ten times as slowly, and so do the products that follow.
    """
    return torch.finfo(dtype).tiny * 2.0**17


def _near(largest: Tensor, low: Tensor) -> bool:
    """Whether exponentials relative to rows' references, of which ``largest`` is the largest, serve the columns too.

    ``exp(x - low) = exp(x - high) exp(high - low)``, but rounded exponents cost digits in proportion to their size:
    else an exponential each is taken. To know it, the CPU only looks; another device would have to wait.
    """
    return low.device.type == "cpu" and (largest - low.min()).item() < SPREAD


@functools.cache
def _upper_triangle(device: torch.device) -> Tensor:
    """True on and above the diagonal of a corner."""
    return torch.ones(CORNER, CORNER, dtype=torch.bool, device=device).triu()


def _before_diagonal(logits: Tensor, offset: int, row_max: Tensor, tied: bool) -> Tensor:
    """Per row i, the largest entry in columns below ``i + offset``; ``row_max`` is that of all columns.

    Where no entry equals its row's positive, rows with the positive in the tile need no answer (-inf): if it is not the
    largest, they are wrong anyway. Else whole blocks up to the diagonal, then the corner that a block of rows leaves.
    """
    rows, columns = logits.shape
    best = torch.full_like(row_max, -torch.inf)
    first, last = (min(max(row, 0), rows) for row in (-offset, columns - offset))  # the diagonal crosses these
    best[last:] = row_max[last:]
    if not tied:
        return best
    not_before = _upper_triangle(logits.device)
    for start in range(first, last, CORNER):
        stop = min(start + CORNER, last)
        corner = logits[start:stop, start + offset : stop + offset]
        found = corner.masked_fill(not_before[: stop - start, : stop - start], -torch.inf).amax(1)
        if start + offset > 0:
            found = torch.maximum(found, logits[start:stop, : start + offset].amax(1))
        best[start:stop] = found
    return best


def _mean_logits(x_ND: Tensor, y_MD: Tensor, scale: Tensor | float, row_offset: int) -> Tensor:
    """Mean logit over (rows with a positive) x (all columns), and over (all rows) x (columns with a positive): (2,).

    A sum of products is a product of sums: no N x M work.
    """
    where = Positives.of(len(x_ND), len(y_MD), row_offset)
    x_DP, y_DP = where.per_row(x_ND.T), where.per_column(y_MD.T)
    return scale * torch.stack([x_DP.mean(1) @ y_MD.mean(0), x_ND.mean(0) @ y_DP.mean(1)])


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
    smoothing: Sequence[float],
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
    x_AND, y_BMD = prepared(image_AND, normalize), prepared(text_BMD, normalize)
    tiles = Tiles(x_AND.shape[1], y_BMD.shape[1], x_AND, workspace)
    gradients = _Gradients(x_AND, y_BMD, scale_AB, need_text=need_text)
    for index, (x_ND, y_MD, scale) in enumerate(_pairs(x_AND, y_BMD, scale_AB)):
        a, b = divmod(index, len(y_BMD))
        pair = _TiledPair(
            x_ND,
            y_MD,
            scale,
            weight_image_ABN[a, b],
            weight_text_ABM[a, b],
            lse_image_ABN[a, b],
            lse_text_ABM[a, b],
            smoothing=smoothing[index] if diagonal else 0.0,
            row_offset=row_offset if diagonal else None,
            tiles=tiles,
        )
        gradients.add(a, b, pair)
    d_image, d_text, d_scale_AB = gradients.finish(image_AND, text_BMD, normalize)
    return d_image.to(image_AND.dtype) if need_image else image_AND.new_empty(0), d_text.to(text_BMD.dtype), d_scale_AB


class _Gradients:
    """The gradients of both sides and of the scales, summed over the pairs of views."""

    def __init__(self, x_AND: Tensor, y_BMD: Tensor, scale_AB: Tensor, *, need_text: bool = True) -> None:
        self.x_AND, self.y_BMD, self.scale_AB = x_AND, y_BMD, scale_AB
        self.alone = len(y_BMD) == 1  # the one text view's part is all of an image view's gradient
        self.d_x_AND = torch.empty_like(x_AND) if self.alone else torch.zeros_like(x_AND)
        self.d_y_BMD = torch.zeros_like(y_BMD) if need_text else None
        self.d_scale_AB = torch.zeros_like(scale_AB)

    def add(self, a: int, b: int, pair: _TiledPair) -> None:
        """Take in the pair of views a and b."""
        scale = self.scale_AB[a, b]
        d_row_ND = self.d_x_AND[a] if self.alone else torch.empty_like(pair.x_ND)  # to the scaled rows
        pair.differentiate(d_row_ND, None if self.d_y_BMD is None else self.d_y_BMD[b])
        self.d_scale_AB[a, b] = row_products(pair.x_ND, d_row_ND).sum(dtype=torch.float64)
        if self.alone:
            d_row_ND.mul_(scale)
        else:
            self.d_x_AND[a].addcmul_(d_row_ND, scale)

    def finish(self, image_AND: Tensor, text_BMD: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
        """In the precision computed with, to the rows as given; the texts' is empty where not needed."""
        d_image = through_normalization(image_AND, self.x_AND, self.d_x_AND, normalize)
        if self.d_y_BMD is None:
            return d_image, text_BMD.new_empty(0), self.d_scale_AB
        return d_image, through_normalization(text_BMD, self.y_BMD, self.d_y_BMD, normalize), self.d_scale_AB


class _WholePair:
    """A pair that the workspace holds twice: its softmaxes are kept from the statistics, not made once more.

    Written for few calls: of a small problem's time they are the most.
    """

    def __init__(
        self,
        x_ND: Tensor,
        y_MD: Tensor,
        scale: float,
        *,
        smoothing: float,
        where: Positives,
        logits_NM: Tensor,
        scratch_NM: Tensor,
    ) -> None:
        self.x_ND, self.y_MD, self.scale, self.smoothing, self.where = x_ND, y_MD, scale, smoothing, where
        self.scaled_ND = x_ND * scale  # before the product: rounded once less than logits are
        torch.mm(self.scaled_ND, y_MD.T, out=logits_NM)
        positive_P, row_top_N, column_top_M = self._take_picks(logits_NM)
        loss_2P = self._both(row_top_N, column_top_M).sub_(positive_P)
        self.softmax_NM, *excesses = self._to_softmaxes(logits_NM, scratch_NM, row_top_N, column_top_M)
        self.losses_2 = loss_2P.add_(self._both(*excesses)).mean(1)
        _diagonal(self.softmax_NM, where.offset).sub_(2 * (1 - smoothing))
        if smoothing:
            mean_logits_2 = _mean_logits(x_ND, y_MD, scale, where.offset)
            self.losses_2.add_(positive_P.mean() - mean_logits_2, alpha=smoothing)

    def _both(self, row_N: Tensor, column_M: Tensor) -> Tensor:
        """What belongs to the positives, (2, P)."""
        return torch.stack([self.where.per_row(row_N), self.where.per_column(column_M)])

    def _take_picks(self, logits_NM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Accuracies; gives the positives and the maxima of rows and columns."""
        diagonal_P = _diagonal(logits_NM, self.where.offset)
        positive_P = diagonal_P.clone()
        diagonal_P.fill_(-torch.inf)
        row_top_N, column_top_M = logits_NM.amax(1), logits_NM.amax(0)
        diagonal_P.copy_(positive_P)
        others_2P = self._both(row_top_N, column_top_M)
        right_2P = positive_P > others_2P
        for own_P in (self.where.per_row(row_top_N), self.where.per_column(column_top_M)):
            torch.maximum(own_P, positive_P, out=own_P)
        if (others_2P == positive_P).any():  # of equal logits the first is the pick
            before_N = _before_diagonal(logits_NM, self.where.offset, row_top_N, tied=True)
            before_M = _before_diagonal(logits_NM.T, -self.where.offset, column_top_M, tied=True)
            right_2P = (positive_P >= others_2P) & (positive_P > self._both(before_N, before_M))
        self.accuracies_2 = right_2P.sum(1, dtype=positive_P.dtype).mul_(100 / self.where.count)
        return positive_P, row_top_N, column_top_M

    def _to_softmaxes(
        self, logits_NM: Tensor, scratch_NM: Tensor, row_top_N: Tensor, column_top_M: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the softmaxes of rows and of columns with positives; by how much log-sum-exps exceed the maxima.

        The logits are overwritten.
        """
        softmax_NM = torch.ops.aten._softmax.out(logits_NM, 1, False, out=scratch_NM)
        row_share_N = softmax_NM.amax(1)  # of the maximum: 1 / sum exp(S - maximum)
        _drop_negligible_(softmax_NM)
        weight_N, weight_M = self.where.masks(logits_NM)
        largest = row_top_N.max()
        if logits_NM.numel() > SMALL and _near(largest, column_top_M):
            # exp(S - largest) = softmax exp(maximum - largest) / share: every column's sum, and its softmax, is made of
            # the rows' softmaxes and a number for each row.
            relative_N = (row_top_N - largest).exp_().div_(row_share_N)
            total_M = _weighted_column_sums(softmax_NM, relative_N)
            per_row_N2 = torch.stack([weight_N[:, 0], relative_N], dim=1)
            per_column_2M = torch.stack([torch.ones_like(total_M), weight_M / total_M])
            softmax_NM.mul_(torch.mm(per_row_N2, per_column_2M, out=logits_NM))
            column_excess_M = total_M.log_().add_(largest - column_top_M)
        else:
            total_M = exp_(logits_NM.sub_(column_top_M)).sum(0)
            softmax_NM.mul_(weight_N).addcmul_(logits_NM, weight_M / total_M)
            column_excess_M = total_M.log_()
        return softmax_NM, row_share_N.log_().neg_(), column_excess_M

    def differentiate(self, d_row_ND: Tensor, d_text_MD: Tensor, *, first: bool) -> None:
        """``d_row_ND = G Y`` (without the scale) and ``d_text_MD += scale * G^T X``; = if it is the ``first`` part."""
        share, beta = 1 / self.where.count, 0 if first else 1
        torch.addmm(d_row_ND, self.softmax_NM, self.y_MD, beta=0, alpha=share, out=d_row_ND)
        torch.addmm(d_text_MD, self.softmax_NM.T, self.scaled_ND, beta=beta, alpha=share, out=d_text_MD)
        if self.smoothing:
            weight_N, weight_M = (share * weight.flatten() for weight in self.where.masks(self.softmax_NM))
            sides = (self.x_ND, self.y_MD, self.scale)
            _smooth(*sides, self.smoothing, weight_N, weight_M, d_row_ND, d_text_MD)


class _TiledPair:
    """A pair whose logits are made once more, tile by tile: ``G = w_i (softmax_row - target) + w_j (softmax_column -
    target)``, where ``weight_N``, ``weight_M`` are how much each row's and each column's loss weighs.

    Exponentials are taken relative to rounded log-sum-exps; how far these are from the exact ones goes into factors of
    the weights.
    """

    def __init__(
        self,
        x_ND: Tensor,
        y_MD: Tensor,
        scale: Tensor,
        weight_N: Tensor,
        weight_M: Tensor,
        lse_N: Tensor,
        lse_M: Tensor,
        *,
        smoothing: float,
        row_offset: int | None,
        tiles: Tiles,
    ) -> None:
        self.x_ND, self.y_MD, self.scale, self.tiles = x_ND, y_MD, scale, tiles
        self.weight_N, self.weight_M = weight_N, weight_M
        self.smoothing, self.row_offset = smoothing, row_offset
        self.reference_N, self.reference_M = lse_N.to(x_ND.dtype), lse_M.to(x_ND.dtype)
        self.factor_N = weight_N * (self.reference_N - lse_N).exp().to(weight_N.dtype)
        self.factor_M = weight_M * (self.reference_M - lse_M).exp().to(weight_M.dtype)
        self.largest = self.reference_N.max()
        self.one_exponential = _near(self.largest, self.reference_M)

    def differentiate(self, d_row_ND: Tensor, d_text_MD: Tensor | None) -> None:
        """``d_row_ND = G Y`` (without the scale) and ``d_text_MD += scale * G^T X``."""
        for row in self.tiles.row_slices():
            scaled_ND = self.x_ND[row] * self.scale
            for column in self.tiles.column_slices():
                tile_NM = self.tiles.logits(scaled_ND, self.y_MD[column])
                self._to_gradient(row, column, tile_NM, self.tiles.scratch(tile_NM))
                d_row_ND[row].addmm_(tile_NM, self.y_MD[column], beta=float(column.start > 0))
                if d_text_MD is not None:
                    d_text_MD[column].addmm_(tile_NM.T, scaled_ND)
        if self.smoothing:
            weights = (self.weight_N, self.weight_M)
            _smooth(self.x_ND, self.y_MD, self.scale, self.smoothing, *weights, d_row_ND, d_text_MD)

    def _to_gradient(self, row: slice, column: slice, logits_NM: Tensor, scratch_NM: Tensor) -> None:
        """Turn a tile of logits into that of their gradients, but for smoothing's constants."""
        weight_row, weight_column = self.weight_N[row], self.weight_M[column]
        factor_row, factor_column = self.factor_N[row], self.factor_M[column]
        reference_row, reference_column = self.reference_N[row], self.reference_M[column]
        if self.one_exponential:
            # exp(S - c) = exp(S - r) exp(r - c), and the second factor is a product of a row's and a column's number.
            torch.mm(
                torch.stack([factor_row, (reference_row - self.largest).exp()], dim=1),
                torch.stack([torch.ones_like(factor_column), factor_column * (self.largest - reference_column).exp()]),
                out=scratch_NM,
            )
            exp_(logits_NM.sub_(reference_row[:, None])).mul_(scratch_NM)
        else:
            exp_(torch.sub(logits_NM, reference_column, out=scratch_NM))
            exp_(logits_NM.sub_(reference_row[:, None]))
            logits_NM.mul_(factor_row[:, None]).addcmul_(scratch_NM, factor_column)
        if self.row_offset is None:
            return
        offset = row.start + self.row_offset - column.start
        positive_P = _diagonal(logits_NM, offset)
        if count := positive_P.shape[0]:
            both_P = weight_row.narrow(0, max(0, -offset), count) + weight_column.narrow(0, max(0, offset), count)
            positive_P.sub_(both_P, alpha=1 - self.smoothing)


def _smooth(
    x_ND: Tensor,
    y_MD: Tensor,
    scale: Tensor | float,
    smoothing: float,
    weight_N: Tensor,
    weight_M: Tensor,
    d_row_ND: Tensor,
    d_text_MD: Tensor | None,
) -> None:
    """Label smoothing takes ``w_i e / M + w_j e / N`` from every entry of G: two matrices of rank one."""
    per_row_N, per_column_M = weight_N * (smoothing / y_MD.shape[0]), weight_M * (smoothing / x_ND.shape[0])
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
    x_ND, y_MD = prepared(image_ND, normalize), prepared(text_MD, normalize)
    tiles = Tiles(len(x_ND), len(y_MD), x_ND, workspace)
    d_row_ND, d_y_MD = (torch.zeros_like(t) if need_grad else t.new_empty(0) for t in (x_ND, y_MD))
    # N x M positive terms: sums over tiles are kept in float64.
    loss, d_bias = (scale.new_zeros((), dtype=torch.float64) for _ in range(2))
    for row in tiles.row_slices():
        scaled_ND = x_ND[row] * scale
        for column in tiles.column_slices():
            logits_NM = tiles.logits(scaled_ND, y_MD[column]).add_(bias)
            positive = _diagonal(logits_NM, row.start + row_offset - column.start)
            positive.neg_()  # -z_ij (S_ij + bias): no difference of large numbers where a positive is sure
            loss += _softplus_sum(logits_NM, tiles.scratch(logits_NM))
            if need_grad:
                logits_NM.sigmoid_()
                positive.neg_()
                d_bias += _sum(logits_NM)
                d_row_ND[row].addmm_(logits_NM, y_MD[column])
                d_y_MD[column].addmm_(logits_NM.T, scaled_ND)
    share = 1 / len(x_ND)
    d_scale = torch.zeros_like(scale)
    if need_grad:
        d_scale = row_products(x_ND, d_row_ND).sum() * share
        d_row_ND = through_normalization(image_ND, x_ND, d_row_ND.mul_(scale * share), normalize)
        d_y_MD = through_normalization(text_MD, y_MD, d_y_MD.mul_(share), normalize)
    return (loss * share).to(scale.dtype), d_row_ND, d_y_MD, d_scale, (d_bias * share).to(scale.dtype)


def _softplus_sum(x: Tensor, scratch: Tensor) -> Tensor:
    """Sum of ``log(1 + exp(x))`` in float64; ``scratch`` is overwritten."""
    # Above 40 it is x to float64's last digit.
    return _sum(torch.ops.aten.softplus.out(x, 1, 40, out=scratch))


def _weighted_column_sums(x_NM: Tensor, weight_N: Tensor) -> Tensor:
    """``weight x``, (M,), block by block of rows.

    A product with a vector adds row after row: beside one large term, all small ones that follow are rounded away. At
    N = 900 the sums were too small by 8e-7, all of them, and with them the scale's gradient.
    """
    blocks = list(zip(x_NM.split(SUM_ROWS), weight_N.split(SUM_ROWS), strict=True))
    sums = [torch.mv(x_RM.T, weight_R) for x_RM, weight_R in blocks]
    return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]


def _sum(x_NM: Tensor) -> Tensor:
    """Rows in their own precision, the rows' sums in float64: as good as all in float64, and several times as fast."""
    return x_NM.sum(1).sum(dtype=torch.float64)


# --- shared -----------------------------------------------------------------------------------------------------------


def row_products(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """``x_i . y_i``, (N,), without an N x D array in between."""
    parts = zip(x_ND.split(ROWS), y_ND.split(ROWS), strict=True)
    products = [torch.linalg.vecdot(x_RD, y_RD) for x_RD, y_RD in parts]
    return torch.cat(products) if len(products) > 1 else products[0]


def _diagonal(tile_NM: Tensor, offset: int) -> Tensor:
    """The positives of a tile, entries (i, i + offset), as a view; empty where the diagonal does not cross the tile."""
    rows, columns = tile_NM.shape
    return tile_NM.diagonal(min(max(offset, -rows), columns))


def through_normalization(raw: Tensor, unit: Tensor, gradient: Tensor, normalize: bool) -> Tensor:
    """Gradient to the rows before they were scaled to ``unit`` length; overwrites ``gradient``."""
    if not normalize:
        return gradient
    along = row_products(unit.flatten(0, -2), gradient.flatten(0, -2)).view(*unit.shape[:-1], 1)
    return gradient.addcmul_(unit, along, value=-1).div_(norms(raw.to(unit.dtype))[..., None])
