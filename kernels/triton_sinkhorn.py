"""SwALIP of sinkhorn.py as Triton kernels: every similarity is multiplied anew from embeddings, none is kept.

Shapes: A views of N images and as many of M texts, D embedding width, their A * A pairs in every launch. Of one pair,
``L = X Y^T / epsilon``. Sinkhorn's two assignments, one that begins with columns and one that begins with rows, take
turns: while rows of one are scaled, columns of the other are, by the same tiles of L. A sweep goes from scalings
(``row``, ``column``) to

    ``row'_i = log sum_j exp(L_ij - column_j)``      ``column'_j = log sum_i exp(L_ij - row_i)``

and so n iterations of both are 2n sweeps from zero. With those of the last sweep and of the one before it,

    ``label_ij = exp(L_ij - row'_i - column_j) + exp(L_ij - row_i - column'_j)``

is the sum of a row's labels and a column's. Log-sum-exps are taken about true maxima; the rounding of scalings, in
float32, is an error of the size of a logit's own.

A sweep's program takes a row of tiles along a strip of columns: what belongs to rows stays in its registers, what
belongs to columns is a part for each row of tiles; a second kernel joins parts. Rows are taken in as many bands as keep
the parts within the workspace. The last kernel multiplies a tile once as the pupil and once for every teacher, adds up
the cross-entropy and writes a chunk of G; products and normalisation are triton_contrastive.py's, as are the
log-sum-exps of the predictions. No atomics, every sum in a fixed order.

================  ==========================  =======================================  ===================
launch            products, of N M D a pair   memory read and written, bytes a pair    launches
================  ==========================  =======================================  ===================
predictions       1                           (N + M) D b                              2, normalisation +1
2n sweeps         2n                          (N + M) D b, and parts: 16 a row and     2 a band and sweep
                                              strip, 16 a column and row of tiles
chunks of G       1 + (A - 1)^2, and 2 in     (N + M) D (b + 12); G: N M b written,    3 a chunk, and 3
                  the library                 2 N M b read, in pieces
================  ==========================  =======================================  ===================

Importing this file needs triton; with ``TRITON_INTERPRET=1`` set before, everything here runs on CPU tensors.
"""

from __future__ import annotations

import typing as t  # kernels find names in modules only
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rocket_fast.errors import optional_import
from rocket_fast.kernels.launch import architecture as _architecture
from rocket_fast.kernels.launch import launch as _launch
from rocket_fast.kernels.launch import on_device_of as _on
from rocket_fast.kernels.sinkhorn import Combine, of_one_process
from rocket_fast.kernels.triton_contrastive import (
    GROUP,
    LOG2E,
    LOWEST,
    PROGRAMS,
    VECTOR_BLOCK,
    VECTOR_WARPS,
    Chunk,
    Config,
    Gradient,
    Problem,
    Size,
    Statistics,
    ceil,
    grouped,
    in_slabs,
    load_lse,
    softmax_gradient,
    tile_products,
)

triton: Any = optional_import("triton", "gpu")
tl: Any = optional_import("triton.language", "gpu")

HIGHEST = tl.constexpr(1e38)  # a scaling of rows and columns that do not exist: what it is taken off vanishes

# --- kernels: sweeps --------------------------------------------------------------------------------------------------
#
# Logits, maxima and parts are in bits here, logarithms to the base 2: an exponential is an instruction then.


@triton.jit
def _scaling(ptrs: t.Any, ok: t.Any) -> Any:
    """In bits."""
    return tl.load(ptrs, mask=ok, other=HIGHEST) * LOG2E


@triton.jit
def _join(reference: t.Any, total: t.Any, other_reference: t.Any, other_total: t.Any) -> Any:
    """Two parts of a sum of powers of two in one: ``sum 2^(x - reference) = total``, references finite."""
    joint = tl.maximum(reference, other_reference)
    return joint, total * tl.exp2(reference - joint) + other_total * tl.exp2(other_reference - joint)


@triton.jit(do_not_specialize=["N", "M", "views", "first", "last", "strip"])
def _sweep_kernel(
    x_ptr: t.Any,  # (A, N, D)
    y_ptr: t.Any,  # (A, M, D)
    inverse_x_ptr: t.Any,  # (A, N), read if NORMALIZE
    inverse_y_ptr: t.Any,  # (A, M)
    row_ptr: t.Any,  # (A * A, N): scalings
    column_ptr: t.Any,  # (A * A, M)
    row_part_ptr: t.Any,  # (2, A * A, strips, rows of the band): maxima, and sums relative to them
    column_part_ptr: t.Any,  # (2, A * A, rows of tiles, M)
    factor: t.Any,  # from products to bits
    N: t.Any,
    M: t.Any,
    D: t.Any,
    views: t.Any,
    first: t.Any,  # rows of the band
    last: t.Any,
    strip: t.Any,  # its width in tiles
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLABS: tl.constexpr,
) -> None:
    """Parts of the next scalings of a row of tiles, along a strip."""
    SLAB: tl.constexpr = COLUMNS // SLABS
    block, pair = tl.program_id(0), tl.program_id(2)
    blocks, strips, pairs = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    image, text = pair // views, pair % views
    x_ptr += image.to(tl.int64) * N * D
    y_ptr += text.to(tl.int64) * M * D
    column_ptr += pair.to(tl.int64) * M
    column_part_ptr += (pair * blocks + block).to(tl.int64) * M
    column_stride = (pairs * blocks).to(tl.int64) * M
    first_row = first + block * ROWS
    rows = first_row + tl.arange(0, ROWS)
    row_ok = rows < last
    row = _scaling(row_ptr + pair.to(tl.int64) * N + rows, row_ok)
    scale = tl.zeros((ROWS,), tl.float32) + factor
    if NORMALIZE:
        scale *= tl.load(inverse_x_ptr + image * N + rows, mask=row_ok, other=0.0)
    reference = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    first_tile = tl.program_id(1) * strip
    for tile in range(first_tile, min(first_tile + strip, tl.cdiv(M, COLUMNS))):
        products = tile_products(x_ptr, y_ptr, first_row, tile * COLUMNS, last, M, D, ROWS, COLUMNS, WIDTH)
        slabs = in_slabs(products, ROWS, COLUMNS, SLABS)
        for slab in tl.static_range(SLABS):
            columns = tile * COLUMNS + slab * SLAB + tl.arange(0, SLAB)
            column_ok = columns < M
            logits = slabs[slab] * scale[:, None]
            if NORMALIZE:
                logits *= tl.load(inverse_y_ptr + text * M + columns, mask=column_ok, other=0.0)[None, :]
            of_rows = logits - _scaling(column_ptr + columns, column_ok)[None, :]
            row_max = tl.max(of_rows, 1)
            reference, total = _join(reference, total, row_max, tl.sum(tl.exp2(of_rows - row_max[:, None]), 1))
            of_columns = logits - row[:, None]
            column_max = tl.max(of_columns, 0)
            tl.store(column_part_ptr + columns, column_max, mask=column_ok)
            column_sum = tl.sum(tl.exp2(of_columns - column_max[None, :]), 0)
            tl.store(column_part_ptr + column_stride + columns, column_sum, mask=column_ok)
    height = last - first
    row_part_ptr += (pair * strips + tl.program_id(1)).to(tl.int64) * height + (rows - first)
    tl.store(row_part_ptr, reference, mask=row_ok)
    tl.store(row_part_ptr + (pairs * strips).to(tl.int64) * height, total, mask=row_ok)


@triton.jit
def _joined(part_ptr: t.Any, pair: t.Any, pairs: t.Any, parts: t.Any, size: t.Any, index: t.Any) -> Any:
    """Reference and sum of all ``parts`` of a block of rows or columns."""
    ptrs = part_ptr + (pair * parts).to(tl.int64) * size + index
    stride = (pairs * parts).to(tl.int64) * size
    reference = tl.load(ptrs, mask=index < size, other=LOWEST)
    total = tl.load(ptrs + stride, mask=index < size, other=1.0)
    for _ in range(1, parts):
        ptrs += size
        part = tl.load(ptrs, mask=index < size, other=LOWEST)
        reference, total = _join(reference, total, part, tl.load(ptrs + stride, mask=index < size, other=0.0))
    return reference, total


@triton.jit
def _store_scaling(ptrs: t.Any, reference: t.Any, total: t.Any, ok: t.Any) -> None:
    """In nats."""
    tl.store(ptrs, (reference + tl.log2(total)) / LOG2E, mask=ok)


@triton.jit(do_not_specialize=["N", "M", "first", "last", "strips", "blocks"])
def _scalings_kernel(
    row_part_ptr: t.Any,  # of _sweep_kernel
    column_part_ptr: t.Any,
    row_ptr: t.Any,  # (A * A, N)
    column_ptr: t.Any,  # (A * A, M), read unless the band is the first
    N: t.Any,
    M: t.Any,
    first: t.Any,
    last: t.Any,
    strips: t.Any,
    blocks: t.Any,
    BLOCK: tl.constexpr,
) -> None:
    """Scalings of a band's rows, and of columns over this band and those before it."""
    block, pair, pairs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row_blocks = tl.cdiv(last - first, BLOCK)
    if block < row_blocks:
        index = block * BLOCK + tl.arange(0, BLOCK)
        reference, total = _joined(row_part_ptr, pair, pairs, strips, last - first, index)
        _store_scaling(row_ptr + pair.to(tl.int64) * N + first + index, reference, total, index < last - first)
    else:
        index = (block - row_blocks) * BLOCK + tl.arange(0, BLOCK)
        reference, total = _joined(column_part_ptr, pair, pairs, blocks, M, index)
        ptrs = column_ptr + pair.to(tl.int64) * M + index
        if first > 0:
            before = tl.load(ptrs, mask=index < M, other=0.0) * LOG2E
            reference, total = _join(reference, total, before, tl.full((BLOCK,), 1.0, tl.float32))
        _store_scaling(ptrs, reference, total, index < M)


# --- kernels: labels --------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        "N", "M", "views", "first_view", "chunk_views", "first_row", "chunk_rows", "first_text_view",
        "chunk_text_views", "first_column", "chunk_columns", "pairs", "slots", "first_slot",
    ]
)  # fmt: skip
def _labels_kernel(
    x_ptr: t.Any,  # (A, N, D)
    y_ptr: t.Any,  # (A, M, D)
    inverse_x_ptr: t.Any,  # (A, N), read if NORMALIZE
    inverse_y_ptr: t.Any,  # (A, M)
    scale_ptr: t.Any,  # (A * A), of the predictions
    lse_image_ptr: t.Any,  # (A * A, N), float64, of the predictions, read if STORE
    lse_text_ptr: t.Any,  # (A * A, M)
    row_ptr: t.Any,  # (A * A, N): scalings of the last sweep
    column_ptr: t.Any,  # (A * A, M)
    row_before_ptr: t.Any,  # of the one before it
    column_before_ptr: t.Any,
    unit_ptr: t.Any,  # (2), of _unit_kernel
    chunk_ptr: t.Any,  # (chunk_views * chunk_rows, chunk_stride), written if STORE
    part_ptr: t.Any,  # (2; A * A; slots)
    factor: t.Any,  # from products to bits
    N: t.Any,
    M: t.Any,
    D: t.Any,
    views: t.Any,
    first_view: t.Any,
    chunk_views: t.Any,
    first_row: t.Any,
    chunk_rows: t.Any,  # a view's
    first_text_view: t.Any,
    chunk_text_views: t.Any,
    first_column: t.Any,
    chunk_columns: t.Any,
    chunk_stride: t.Any,
    view_stride: t.Any,  # from one text view's columns to the next one's
    store_columns: t.Any,  # a view's that may be written: zeros follow its own
    pairs: t.Any,
    slots: t.Any,
    first_slot: t.Any,
    NORMALIZE: tl.constexpr,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """One tile of the chunk, and its sums: of labels * logits / scale and, if STORE, of G * cosines.

    G is the predictions' softmaxes less their labels, of rows and columns. The chunk holds ``unit * scale * G``, with
    NORMALIZE also times both inverse norms.
    """
    row_blocks, column_blocks = tl.cdiv(chunk_rows, ROWS), tl.cdiv(chunk_columns, COLUMNS)
    row_tile, column_tile = grouped(
        tl.program_id(0), chunk_views * row_blocks, chunk_text_views * column_blocks, GROUP
    )  # fmt: skip
    image, text = first_view + row_tile // row_blocks, first_text_view + column_tile // column_blocks
    block_row, block_column = row_tile % row_blocks, column_tile % column_blocks
    pair = image * views + text
    start_row, start_column = first_row + block_row * ROWS, first_column + block_column * COLUMNS
    end_row, end_column = first_row + chunk_rows, first_column + chunk_columns
    rows, columns = start_row + tl.arange(0, ROWS), start_column + tl.arange(0, COLUMNS)
    row_ok, column_ok = rows < end_row, columns < end_column

    labels = tl.zeros((ROWS, COLUMNS), tl.float32)
    for teacher in range((views - 1) * (views - 1)):
        other, other_text = teacher // (views - 1), teacher % (views - 1)
        other += (other >= image).to(tl.int32)
        other_text += (other_text >= text).to(tl.int32)
        logits = tile_products(
            x_ptr + other.to(tl.int64) * N * D, y_ptr + other_text.to(tl.int64) * M * D, start_row, start_column,
            end_row, end_column, D, ROWS, COLUMNS, WIDTH,
        )  # fmt: skip
        logits *= factor
        if NORMALIZE:
            logits *= tl.load(inverse_x_ptr + other * N + rows, mask=row_ok, other=0.0)[:, None]
            logits *= tl.load(inverse_y_ptr + other_text * M + columns, mask=column_ok, other=0.0)[None, :]
        row_at = (other * views + other_text).to(tl.int64) * N
        column_at = (other * views + other_text).to(tl.int64) * M
        row = _scaling(row_ptr + row_at + rows, row_ok)
        column = _scaling(column_before_ptr + column_at + columns, column_ok)
        labels += tl.exp2(logits - row[:, None] - column[None, :])
        row = _scaling(row_before_ptr + row_at + rows, row_ok)
        column = _scaling(column_ptr + column_at + columns, column_ok)
        labels += tl.exp2(logits - row[:, None] - column[None, :])
    labels *= 1.0 / ((views - 1) * (views - 1)).to(tl.float32)

    cosines = tile_products(
        x_ptr + image.to(tl.int64) * N * D, y_ptr + text.to(tl.int64) * M * D, start_row, start_column, end_row,
        end_column, D, ROWS, COLUMNS, WIDTH,
    )  # fmt: skip
    inverse_x = tl.full((ROWS,), 1.0, tl.float32)
    inverse_y = tl.full((COLUMNS,), 1.0, tl.float32)
    if NORMALIZE:
        inverse_x = tl.load(inverse_x_ptr + image * N + rows, mask=row_ok, other=0.0)
        inverse_y = tl.load(inverse_y_ptr + text * M + columns, mask=column_ok, other=0.0)
        cosines *= inverse_x[:, None]
        cosines *= inverse_y[None, :]
    at = part_ptr + pair.to(tl.int64) * slots + first_slot + block_row * column_blocks + block_column
    tl.store(at, tl.sum(labels * cosines))
    if STORE:
        scale = tl.load(scale_ptr + pair)
        lse_row, correction_row = load_lse(lse_image_ptr + pair.to(tl.int64) * N + rows, row_ok)
        lse_column, correction_column = load_lse(lse_text_ptr + pair.to(tl.int64) * M + columns, column_ok)
        gradient = softmax_gradient(cosines * scale, lse_row, lse_column, correction_row, correction_column, 0.0, False)
        gradient = tl.where(row_ok[:, None] & column_ok[None, :], gradient - labels, 0.0)
        tl.store(at + pairs.to(tl.int64) * slots, tl.sum(gradient * cosines))
        gradient *= (inverse_x * (scale * tl.load(unit_ptr)))[:, None]
        gradient *= inverse_y[None, :]
        row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        chunk_ptr += (row_tile // row_blocks * chunk_rows + block_row * ROWS).to(tl.int64) * chunk_stride
        chunk_ptr += column_tile // column_blocks * view_stride + block_column * COLUMNS
        height, width = chunk_rows - block_row * ROWS, store_columns - block_column * COLUMNS
        ptrs = chunk_ptr + (row[:, None] * chunk_stride + column[None, :])
        tl.store(
            ptrs, gradient.to(chunk_ptr.dtype.element_ty), mask=(row < height)[:, None] & (column < width)[None, :]
        )


# --- configurations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configs:
    """One problem's configurations, one a kernel that multiplies."""

    sweep: Config
    labels: Config


_FP32: dict[Size, Configs] = {
    "large": Configs(Config(64, 64, 16, slabs=2, warps=8, stages=3), Config(64, 64, 16, slabs=1, warps=8, stages=3)),
    "small": Configs(Config(32, 32, 16, slabs=1, warps=4, stages=3), Config(32, 32, 32, slabs=1, warps=4, stages=3)),
}
_LABELS = Config(64, 64, 64, slabs=1, warps=8, stages=3)  # two tiles at once are in the registers
_SMALL = Configs(Config(64, 64, 64, slabs=4, warps=4, stages=3), _LABELS)

# As in triton_contrastive.py: by architecture, bytes of an input number and size class; none uses the stack.
CONFIGS: dict[tuple[int, int, Size], Configs] = {
    (80, 2, "large"): Configs(
        Config(128, 128, 32, slabs=4, warps=8, stages=3), Config(128, 64, 32, slabs=1, warps=8, stages=3)
    ),
    (90, 2, "large"): Configs(Config(128, 128, 64, slabs=8, warps=8, stages=3), _LABELS),
    (100, 2, "large"): Configs(Config(128, 128, 64, slabs=4, warps=8, stages=3), _LABELS),
    (0, 2, "large"): Configs(
        Config(64, 64, 32, slabs=2, warps=4, stages=2), Config(64, 64, 32, slabs=1, warps=8, stages=2)
    ),
    **{(arch, 2, "small"): _SMALL for arch in (80, 90, 100)},
    (0, 2, "small"): Configs(*[Config(32, 32, 32, slabs=1, warps=4, stages=2)] * 2),
    **{(arch, 4, size): configs for arch in (0, 80, 90, 100) for size, configs in _FP32.items()},
}
LARGE_FROM = 128  # tiles of the "large" sweep; about one for each multiprocessor


def _configs(problem: Problem) -> Configs:
    arch, size = _architecture(problem.x.device), problem.x.element_size()
    large = CONFIGS[arch, size, "large"]
    tiles = ceil(problem.N, large.sweep.rows) * ceil(problem.M, large.sweep.columns) * problem.pairs
    return large if tiles >= LARGE_FROM else CONFIGS[arch, size, "small"]


# --- launchers --------------------------------------------------------------------------------------------------------


class _Assignments:
    """Both balanced assignments of every pair: scalings after the last sweep, and before it."""

    def __init__(self, problem: Problem, epsilon: float, workspace: int) -> None:
        self.problem, self.config, self.factor = problem, _configs(problem).sweep, LOG2E.value / epsilon
        pairs, new = problem.pairs, problem.scale.new_empty
        self.row, self.column = (problem.scale.new_zeros(pairs, n) for n in (problem.N, problem.M))
        self.row_before, self.column_before = torch.empty_like(self.row), torch.empty_like(self.column)
        tiles = ceil(problem.M, self.config.columns)
        blocks = ceil(problem.N, self.config.rows)
        self.strip = max(1, tiles * blocks * pairs // PROGRAMS)
        self.strips = ceil(tiles, self.strip)
        bytes_a_block = 8 * pairs * (problem.M + self.config.rows * self.strips)
        self.blocks = min(blocks, max(1, workspace // bytes_a_block))
        self.row_part = new(2 * pairs * self.strips * min(problem.N, self.blocks * self.config.rows))
        self.column_part = new(2 * pairs * self.blocks * problem.M)

    def sweep(self) -> None:
        """Scalings from the ones before: rows' in full, columns' over these rows."""
        self.row, self.row_before = self.row_before, self.row
        self.column, self.column_before = self.column_before, self.column
        problem, band = self.problem, self.blocks * self.config.rows
        for first in range(0, problem.N, band):
            self._launch_band(first, min(first + band, problem.N))

    def _launch_band(self, first: int, last: int) -> None:
        problem, config = self.problem, self.config
        blocks, N, M = ceil(last - first, config.rows), problem.N, problem.M
        _launch(
            _sweep_kernel, (blocks, self.strips, problem.pairs), problem.x, problem.y, problem.inverse_x,
            problem.inverse_y, self.row_before, self.column_before, self.row_part, self.column_part, self.factor,
            N, M, problem.D, problem.B, first, last, self.strip, problem.folded, *config.tile, **config.built,
        )  # fmt: skip
        grid = ceil(last - first, VECTOR_BLOCK) + ceil(M, VECTOR_BLOCK), problem.pairs
        _launch(
            _scalings_kernel, grid, self.row_part, self.column_part, self.row, self.column, N, M, first, last,
            self.strips, blocks, VECTOR_BLOCK, num_warps=VECTOR_WARPS,
        )  # fmt: skip


class _LabelledGradient(Gradient):
    """Of the cross-entropies with an assignment's labels."""

    def __init__(
        self, problem: Problem, lse: tuple[Tensor, Tensor], teachers: _Assignments, need_grad: bool, workspace: int
    ) -> None:
        self.lse, self.teachers = lse, teachers
        super().__init__(problem, _configs(problem).labels, 2 if need_grad else 1, need_grad, need_grad, workspace)

    def launch_chunk(self, chunk: Chunk, tiles: int, buffer: Tensor, stride: int, slot: int) -> None:
        problem, config, teachers = self.problem, self.config, self.teachers
        _launch(
            _labels_kernel, (tiles,), problem.x, problem.y, problem.inverse_x, problem.inverse_y, problem.scale,
            *self.lse, teachers.row, teachers.column, teachers.row_before, teachers.column_before, self.unit, buffer,
            self.parts, teachers.factor, problem.N, problem.M, problem.D, problem.B,
            chunk.first_view, chunk.views, chunk.first_row, chunk.rows, chunk.first_text_view, chunk.text_views,
            chunk.first_column, chunk.columns, stride, *chunk.store, problem.pairs, self.slots, slot,
            problem.folded, self.store, *config.tile[:3], GROUP, **config.built,
        )  # fmt: skip


def _predictions(problem: Problem, workspace: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exps (A, A, N) and, over these rows, (A, A, M), float64."""
    statistics = Statistics(problem, diagonal=False, workspace=workspace)
    statistics.launch()
    lse_image, lse_text, *_ = statistics.join(problem.scale, smooth=False)
    return lse_image, lse_text


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
    """As in sinkhorn.py; columns are combined after each of ``2 * iterations`` sweeps."""
    views = len(image_AND)
    with _on(image_AND):
        problem = Problem(image_AND, text_AMD, scale.expand(views, views), 0, normalize)
        lse_image, lse_text = _predictions(problem, workspace)
        teachers = _Assignments(problem, epsilon, workspace)
        for turn in range(2 * iterations):
            teachers.sweep()
            if turn == 0:
                column, lse_text = combine(torch.cat([teachers.column, lse_text.flatten(0, 1)])).split(problem.pairs)
                teachers.column = column.float()
            else:
                teachers.column = combine(teachers.column)
        gradient = _LabelledGradient(problem, (lse_image, lse_text), teachers, need_grad, workspace)
        gradient.run()
        weight = 1 / (2 * samples * views**2)
        d_image, d_text = gradient.finish(torch.float32, weight)
        of_labels, *of_scale = gradient.parts.sum((1, 2), dtype=torch.float64).mul_(weight).unbind()
        own = lse_image.sum() * weight - scale.double() * of_labels
        d_scale = of_scale[0] if need_grad else torch.zeros_like(own)
        return own.float(), (lse_text.sum() * weight).float(), d_image, d_text, d_scale.float()
