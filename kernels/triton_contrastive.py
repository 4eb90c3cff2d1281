"""The contrastive operations as Triton kernels, for NVIDIA (tables for sm_80, sm_90, sm_100) and, untuned, for ROCm.

Shapes: A image views of N images, B text views of M texts, D embedding width; the A * B pairs of views are blocks of
one problem and share every launch. For views a and b, ``S = scale[a, b] * X_a Y_b^T``. Row i's positive is column
``i + row_offset``; P rows (and columns) have one.

Forward. A program owns a square of tiles of S ("super-tile"): row statistics stay in its registers while it walks along
a row of tiles, column statistics in a slice of global memory that no other program touches. Partial statistics are thus
(super-columns, N) and (super-rows, M), some MB at any size, and a second kernel joins them. Backward. One kernel writes
a chunk of G, the gradient to ``X_a Y_b^T``, no larger than the workspace, and two library products turn it into
gradients. No atomics, every sum in a fixed order: results repeat to the bit.

What it costs (a 128 x 128 tile, D = 512, on one sm_90 multiprocessor): products 16.8 MFLOP, 4096 cycles at the peak;
operands 256 KiB, from L2; 16,384 exponentials, 1024 cycles (one each: rows and columns share it wherever their maxima
are near enough, which is checked tile by tile); about ten other instructions an entry, 1300 cycles. With two programs
on a multiprocessor one's exponentials hide behind the other's products.

Importing this file needs triton; with ``TRITON_INTERPRET=1`` set before, everything here runs on CPU tensors.
"""

from __future__ import annotations

import math
import typing as t  # kernels find names in modules only
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rocket_fast.errors import optional_import
from rocket_fast.kernels.launch import INTERPRETED
from rocket_fast.kernels.launch import architecture as _architecture
from rocket_fast.kernels.launch import launch as _launch
from rocket_fast.kernels.launch import on_device_of as _on

triton: Any = optional_import("triton", "gpu")
tl: Any = optional_import("triton.language", "gpu")

WIDEN = tl.constexpr(INTERPRETED)  # the interpreter multiplies bfloat16 numbers as if their bits were integers
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)  # below every logit, and finite: its difference from itself is zero
SMALLEST_NORM = tl.constexpr(1e-12)  # as in torch.nn.functional.normalize

# Rows and columns of a tile share one exponential, taken relative to one number, while their references are no further
# apart than this (nats): exponents are rounded in proportion to their size. The range of float32 would allow 60.
SPREAD = tl.constexpr(16.0)

# --- kernels: shared parts --------------------------------------------------------------------------------------------


@triton.jit
def tile_products(
    x_ptr: t.Any,
    y_ptr: t.Any,
    first_row: t.Any,
    first_column: t.Any,
    end_row: t.Any,
    end_column: t.Any,
    D: t.Any,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> Any:
    """A (ROWS, COLUMNS) tile of ``X Y^T`` in float32, zeros outside; float32 inputs are multiplied as they are."""
    row, column, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    x_ptrs = x_ptr + tl.cast(first_row, tl.int64) * D + (row[:, None] * D + k[None, :])
    y_ptrs = y_ptr + tl.cast(first_column, tl.int64) * D + (column[None, :] * D + k[:, None])
    row_ok, column_ok = (first_row + row < end_row)[:, None], (first_column + column < end_column)[None, :]
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, WIDTH):
        x = tl.load(x_ptrs + start, mask=row_ok & (k[None, :] < D - start), other=0.0)
        y = tl.load(y_ptrs + start, mask=column_ok & (k[:, None] < D - start), other=0.0)
        if WIDEN:
            x, y = x.to(tl.float32), y.to(tl.float32)
        products = tl.dot(x, y, products, input_precision="ieee")
    return products


@triton.jit
def _halves(tile: t.Any, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> Any:
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def in_slabs(tile: t.Any, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLABS: tl.constexpr) -> Any:
    """A tile in 1, 2, 4 or 8 slabs of columns, which renames registers and moves nothing.

    What belongs to a column (its maximum, its log-sum-exp) takes a register for each column a thread sees: a whole
    tile's would push the tile itself out of the registers.
    """
    slabs: t.Any = (tile,)
    if SLABS >= 2:
        slabs = _halves(tile, ROWS, COLUMNS)
    if SLABS >= 4:
        slabs = _halves(slabs[0], ROWS, COLUMNS // 2) + _halves(slabs[1], ROWS, COLUMNS // 2)
    if SLABS >= 8:
        left = _halves(slabs[0], ROWS, COLUMNS // 4) + _halves(slabs[1], ROWS, COLUMNS // 4)
        slabs = left + _halves(slabs[2], ROWS, COLUMNS // 4) + _halves(slabs[3], ROWS, COLUMNS // 4)
    return slabs


@triton.jit
def grouped(index: t.Any, rows: t.Any, columns: t.Any, GROUP: tl.constexpr) -> Any:
    """Row and column of the ``index``-th tile, GROUP rows of tiles at a time: neighbours share operands in L2."""
    band = index // (GROUP * columns)
    height = min(rows - band * GROUP, GROUP)
    within = index % (GROUP * columns)
    return band * GROUP + within % height, within // height


@triton.jit
def _join(reference: t.Any, total: t.Any, other_reference: t.Any, other_total: t.Any) -> Any:
    """Two parts of a log-sum-exp in one: ``sum exp(x - reference) = total``, references finite."""
    joint = tl.maximum(reference, other_reference)
    scaled = total * tl.exp2((reference - joint) * LOG2E)
    return joint, scaled + other_total * tl.exp2((other_reference - joint) * LOG2E)


# --- kernels: forward -------------------------------------------------------------------------------------------------
#
# Statistics of a row or column, in parts: a reference and the sum of exp(logit - reference); the maximum; and, of use
# with a diagonal only, the largest rival, which the positive must exceed to be the pick, from tiles that the diagonal
# does not cross. Of a column there are two parts a program: one of its last row of tiles, one of all rows before. The
# older one takes in the last one when the next row comes by: what a program reads was written a whole tile ago, in the
# layout it is read in.


@triton.jit
def _load_part(ptrs: t.Any, stride: t.Any, mask: t.Any, RIVAL: tl.constexpr) -> Any:
    reference = tl.load(ptrs, mask=mask, other=LOWEST)
    total = tl.load(ptrs + stride, mask=mask, other=0.0)
    maximum = tl.load(ptrs + 2 * stride, mask=mask, other=LOWEST)
    rival = maximum
    if RIVAL:
        rival = tl.load(ptrs + 3 * stride, mask=mask, other=LOWEST)
    return reference, total, maximum, rival


@triton.jit
def _store_part(
    ptrs: t.Any, stride: t.Any, mask: t.Any, reference: t.Any, total: t.Any, maximum: t.Any, rival: t.Any
) -> None:
    tl.store(ptrs, reference, mask=mask)
    tl.store(ptrs + stride, total, mask=mask)
    tl.store(ptrs + 2 * stride, maximum, mask=mask)
    tl.store(ptrs + 3 * stride, rival, mask=mask)


@triton.jit
def _just_below(x: t.Any) -> Any:
    """The next smaller number (of 0, one that no device rounds to it): of equal logits the first is the pick, so that a
    positive exceeds a rival after it if it exceeds this."""
    bits = x.to(tl.int32, bitcast=True)
    below = tl.where(x > 0.0, bits - 1, bits + 1).to(tl.float32, bitcast=True)
    return tl.where(x == 0.0, -1e-37, below)


@triton.jit
def _sums(
    logits: t.Any, row_max: t.Any, top: t.Any, near: t.Any, column_ok: t.Any, part_ptrs: t.Any, stride: t.Any
) -> Any:
    """Sums of exponentials: per row relative to ``top`` if ``near``, else to its maximum; likewise per column, stored.

    One exponential an entry if ``near``, else two.
    """
    if near:
        exponentials = tl.exp2((logits - top) * LOG2E)
        tl.store(part_ptrs, tl.where(column_ok, top, 0.0), mask=column_ok)
        tl.store(part_ptrs + stride, tl.sum(exponentials, 0), mask=column_ok)
        row_sum = tl.sum(exponentials, 1)
    else:
        column_max = tl.max(logits, 0)
        tl.store(part_ptrs, column_max, mask=column_ok)
        column_sum = tl.sum(tl.exp2((logits - column_max[None, :]) * LOG2E), 0)
        tl.store(part_ptrs + stride, column_sum, mask=column_ok)
        row_sum = tl.sum(tl.exp2((logits - row_max[:, None]) * LOG2E), 1)
    return row_sum


@triton.jit(do_not_specialize=["N", "M", "text_views", "row_offset", "super_rows", "super_columns"])
def _forward_kernel(
    x_ptr: t.Any,  # (A, N, D)
    y_ptr: t.Any,  # (B, M, D)
    inverse_x_ptr: t.Any,  # (A, N), read if NORMALIZE
    inverse_y_ptr: t.Any,  # (B, M)
    scale_ptr: t.Any,  # (A, B)
    row_part_ptr: t.Any,  # (statistics, A * B, super-columns, N)
    column_part_ptr: t.Any,  # (statistics, A * B, super-rows * 2, M)
    N: t.Any,
    M: t.Any,
    D: t.Any,
    text_views: t.Any,
    row_offset: t.Any,
    super_rows: t.Any,  # height of a super-tile, in tiles
    super_columns: t.Any,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLABS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Partial statistics of rows and columns of one super-tile of one pair."""
    SLAB: tl.constexpr = COLUMNS // SLABS
    pair, pairs = tl.program_id(1), tl.num_programs(1)
    image, text = pair // text_views, pair % text_views
    x_ptr += image.to(tl.int64) * N * D
    y_ptr += text.to(tl.int64) * M * D
    row_blocks, column_blocks = tl.cdiv(N, ROWS), tl.cdiv(M, COLUMNS)
    high, wide = tl.cdiv(row_blocks, super_rows), tl.cdiv(column_blocks, super_columns)
    super_row, super_column = grouped(tl.program_id(0), high, wide, GROUP)
    row_part_ptr += (pair * wide + super_column).to(tl.int64) * N
    column_part_ptr += (pair * high + super_row).to(tl.int64) * 2 * M
    row_stride, column_stride = (pairs * wide).to(tl.int64) * N, (pairs * high).to(tl.int64) * 2 * M
    scale = tl.load(scale_ptr + pair)
    row_block, column_block = super_row * super_rows, super_column * super_columns

    for block_row in range(row_block, min(row_block + super_rows, row_blocks)):
        first_row = block_row * ROWS
        rows = first_row + tl.arange(0, ROWS)
        row_ok = rows < N
        reference = tl.full((ROWS,), LOWEST, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        maximum, rival = reference, reference
        for block_column in range(column_block, min(column_block + super_columns, column_blocks)):
            first_column = block_column * COLUMNS
            all_columns = first_column + tl.arange(0, COLUMNS)
            all_ok = all_columns < M
            tl.debug_barrier()  # other threads of this program stored what is loaded next
            old, old_sum, old_max, old_rival = _load_part(
                column_part_ptr + all_columns, column_stride, all_ok & (block_row > row_block + 1), True
            )
            last, last_sum, last_max, last_rival = _load_part(
                column_part_ptr + M + all_columns, column_stride, all_ok & (block_row > row_block), True
            )

            products = tile_products(x_ptr, y_ptr, first_row, first_column, N, M, D, ROWS, COLUMNS, WIDTH)

            old, old_sum = _join(old, old_sum, last, last_sum)
            old_max, old_rival = tl.maximum(old_max, last_max), tl.maximum(old_rival, last_rival)
            _store_part(column_part_ptr + all_columns, column_stride, all_ok, old, old_sum, old_max, old_rival)
            factor = tl.zeros((ROWS,), tl.float32) + scale
            if NORMALIZE:
                factor *= tl.load(inverse_x_ptr + image * N + rows, mask=row_ok, other=0.0)
            below = first_column + COLUMNS - 1 < first_row + row_offset  # every entry lies before its row's positive
            above = first_column > first_row + ROWS - 1 + row_offset  # every entry lies before its column's positive
            row_max = tl.full((ROWS,), LOWEST, tl.float32)
            bottom = float("inf")
            slabs = in_slabs(products, ROWS, COLUMNS, SLABS)
            scaled: t.Any = ()
            for slab in tl.static_range(SLABS):
                columns = first_column + slab * SLAB + tl.arange(0, SLAB)
                column_ok = columns < M
                logits = slabs[slab] * factor[:, None]
                if NORMALIZE:
                    logits *= tl.load(inverse_y_ptr + text * M + columns, mask=column_ok, other=0.0)[None, :]
                if (first_row + ROWS > N) | (first_column + COLUMNS > M):
                    logits = tl.where(row_ok[:, None] & column_ok[None, :], logits, LOWEST)
                column_max = tl.max(logits, 0)
                bottom = tl.minimum(bottom, tl.min(tl.where(column_ok, column_max, float("inf")), 0))
                last_ptrs = column_part_ptr + M + columns
                tl.store(last_ptrs + 2 * column_stride, column_max, mask=column_ok)
                column_rival = tl.where(below, _just_below(column_max), LOWEST)
                column_rival = tl.where(above, column_max, column_rival)
                tl.store(last_ptrs + 3 * column_stride, column_rival, mask=column_ok)
                row_max = tl.maximum(row_max, tl.max(logits, 1))
                scaled = scaled + (logits,)  # noqa: RUF005  (kernels know no starred expressions)

            top = tl.max(row_max, 0)
            near = top - tl.minimum(bottom, tl.min(tl.where(row_ok, row_max, top), 0)) <= SPREAD
            row_sum = tl.zeros((ROWS,), tl.float32)
            for slab in tl.static_range(SLABS):
                columns = first_column + slab * SLAB + tl.arange(0, SLAB)
                row_sum += _sums(
                    scaled[slab], row_max, top, near, columns < M, column_part_ptr + M + columns, column_stride
                )
            reference, total = _join(reference, total, tl.where(near, top, row_max), row_sum)
            maximum = tl.maximum(maximum, row_max)
            row_rival = tl.where(above, _just_below(row_max), LOWEST)
            rival = tl.maximum(rival, tl.where(below, row_max, row_rival))
        _store_part(row_part_ptr + rows, row_stride, row_ok, reference, total, maximum, rival)


@triton.jit(do_not_specialize=["N", "M", "text_views", "row_offset", "first_tile"])
def _diagonal_kernel(
    x_ptr: t.Any,  # (A, N, D)
    y_ptr: t.Any,  # (B, M, D)
    inverse_x_ptr: t.Any,  # (A, N), read if NORMALIZE
    inverse_y_ptr: t.Any,  # (B, M)
    scale_ptr: t.Any,  # (A, B)
    positive_ptr: t.Any,  # (A * B, N)
    row_rival_ptr: t.Any,  # (A * B, tiles crossed, N)
    column_rival_ptr: t.Any,  # (A * B, tiles crossed, M)
    N: t.Any,
    M: t.Any,
    D: t.Any,
    text_views: t.Any,
    row_offset: t.Any,
    first_tile: t.Any,  # the first column of tiles that the diagonal crosses in the first row of tiles; may be negative
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLABS: tl.constexpr,
) -> None:
    """Positives, and their largest rivals, of a tile that the diagonal crosses.

    The same products in the same order as in ``_forward_kernel``: logits are equal to the bit.
    """
    SLAB: tl.constexpr = COLUMNS // SLABS
    block_row, crossed, crossings = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    pair = tl.program_id(2)
    image, text = pair // text_views, pair % text_views
    first_row, first_column = block_row * ROWS, (block_row + first_tile + crossed) * COLUMNS
    rows = first_row + tl.arange(0, ROWS)
    row_ok, labels = rows < N, rows + row_offset
    positive = tl.full((ROWS,), LOWEST, tl.float32)
    before, after = positive, positive
    if (first_column >= 0) & (first_column < M):
        products = tile_products(
            x_ptr + image.to(tl.int64) * N * D, y_ptr + text.to(tl.int64) * M * D, first_row, first_column, N, M, D,
            ROWS, COLUMNS, WIDTH,
        )  # fmt: skip
        factor = tl.zeros((ROWS,), tl.float32) + tl.load(scale_ptr + pair)
        if NORMALIZE:
            factor *= tl.load(inverse_x_ptr + image * N + rows, mask=row_ok, other=0.0)
        slabs = in_slabs(products, ROWS, COLUMNS, SLABS)
        for slab in tl.static_range(SLABS):
            columns = first_column + slab * SLAB + tl.arange(0, SLAB)
            column_ok = columns < M
            logits = slabs[slab] * factor[:, None]
            if NORMALIZE:
                logits *= tl.load(inverse_y_ptr + text * M + columns, mask=column_ok, other=0.0)[None, :]
            logits = tl.where(row_ok[:, None] & column_ok[None, :], logits, LOWEST)
            left = tl.where(columns[None, :] < labels[:, None], logits, LOWEST)
            right = tl.where(columns[None, :] > labels[:, None], logits, LOWEST)
            here = tl.where(columns[None, :] == labels[:, None], logits, LOWEST)
            positive = tl.maximum(positive, tl.max(here, 1))
            before, after = tl.maximum(before, tl.max(left, 1)), tl.maximum(after, tl.max(right, 1))
            rival = tl.maximum(tl.max(right, 0), _just_below(tl.max(left, 0)))
            tl.store(column_rival_ptr + (pair * crossings + crossed).to(tl.int64) * M + columns, rival, mask=column_ok)
    here = row_ok & (labels >= first_column) & (labels < first_column + COLUMNS) & (labels < M)
    tl.store(positive_ptr + pair.to(tl.int64) * N + rows, positive, mask=here)
    rival = tl.maximum(before, _just_below(after))
    tl.store(row_rival_ptr + (pair * crossings + crossed).to(tl.int64) * N + rows, rival, mask=row_ok)


@triton.jit
def _join_side(
    part_ptr: t.Any, lse_ptr: t.Any, top_ptr: t.Any, right_ptr: t.Any, positive_ptr: t.Any, rival_ptr: t.Any,
    term_ptr: t.Any, smoothing_ptr: t.Any, pair: t.Any, pairs: t.Any, first: t.Any, parts: t.Any, size: t.Any,
    other_size: t.Any, offset: t.Any, first_tile: t.Any, crossings: t.Any,
    BY_ROW: tl.constexpr, DIAGONAL: tl.constexpr, SMOOTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Log-sum-exps of a block of rows (or columns) from their parts; the block's share of loss and accuracy."""
    index = first + tl.arange(0, BLOCK)
    ok = index < size
    ptrs = part_ptr + (pair * parts).to(tl.int64) * size + index
    stride = (pairs * parts).to(tl.int64) * size
    reference, total, maximum, rival = _load_part(ptrs, stride, ok, DIAGONAL)
    for _ in range(1, parts):
        ptrs += size
        part, part_sum, part_max, part_rival = _load_part(ptrs, stride, ok, DIAGONAL)
        reference, total = _join(reference, total, part, part_sum)
        maximum, rival = tl.maximum(maximum, part_max), tl.maximum(rival, part_rival)
    excess = tl.log(tl.where(ok, total, 1.0))
    tl.store(lse_ptr + pair.to(tl.int64) * size + index, reference.to(tl.float64) + excess.to(tl.float64), mask=ok)
    tl.store(top_ptr + pair.to(tl.int64) * size + index, maximum, mask=ok)
    if DIAGONAL:
        partner = index + offset
        matched = ok & (partner >= 0) & (partner < other_size)
        if BY_ROW:
            positive = tl.load(positive_ptr + pair.to(tl.int64) * size + index, mask=matched, other=0.0)
        else:
            positive = tl.load(positive_ptr + pair.to(tl.int64) * other_size + partner, mask=matched, other=0.0)
        for crossed in range(crossings):
            known = ok
            if not BY_ROW:  # only where there is such a row of tiles
                row_tile = index // TILE - first_tile - crossed
                known = ok & (row_tile >= 0) & (row_tile < tl.cdiv(other_size, TILE))
            ptrs = rival_ptr + (pair * crossings + crossed).to(tl.int64) * size + index
            rival = tl.maximum(rival, tl.load(ptrs, mask=known, other=LOWEST))
        loss = (reference - positive) + excess
        if SMOOTH:
            loss += tl.load(smoothing_ptr + pair) * positive
        right = matched & (positive > rival)
        if not BY_ROW:
            tl.store(right_ptr + pair.to(tl.int64) * size + index, right.to(tl.int8), mask=ok)
        tl.store(term_ptr, tl.sum(tl.where(matched, loss, 0.0), 0))
        tl.store(term_ptr + 1, tl.sum(right.to(tl.float32), 0))


@triton.jit(do_not_specialize=["N", "M", "row_offset", "row_parts", "column_parts", "first_tile", "crossings"])
def _join_kernel(
    row_part_ptr: t.Any,  # of _forward_kernel
    column_part_ptr: t.Any,
    positive_ptr: t.Any,  # of _diagonal_kernel, read if DIAGONAL
    row_rival_ptr: t.Any,
    column_rival_ptr: t.Any,
    lse_image_ptr: t.Any,  # (A * B, N), float64
    lse_text_ptr: t.Any,  # (A * B, M), float64
    top_image_ptr: t.Any,  # (A * B, N): maxima
    top_text_ptr: t.Any,  # (A * B, M)
    right_text_ptr: t.Any,  # (A * B, M), int8, written if DIAGONAL: whether a column's positive is its pick
    term_ptr: t.Any,  # (A * B, blocks of rows then of columns, 2), written if DIAGONAL: loss, number of right picks
    smoothing_ptr: t.Any,  # (A * B), read if SMOOTH
    N: t.Any,
    M: t.Any,
    row_offset: t.Any,
    row_parts: t.Any,
    column_parts: t.Any,
    first_tile: t.Any,
    crossings: t.Any,
    DIAGONAL: tl.constexpr,
    SMOOTH: tl.constexpr,
    TILE: tl.constexpr,  # rows, and columns, of a tile
    BLOCK: tl.constexpr,
) -> None:
    """Partial statistics to log-sum-exps, rows and columns in one launch."""
    block, pair, pairs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row_blocks = tl.cdiv(N, BLOCK)
    term_ptr += 2 * (pair * tl.num_programs(0) + block)
    if block < row_blocks:
        _join_side(
            row_part_ptr, lse_image_ptr, top_image_ptr, right_text_ptr, positive_ptr, row_rival_ptr, term_ptr,
            smoothing_ptr, pair, pairs, block * BLOCK, row_parts, N, M, row_offset, first_tile, crossings, True,
            DIAGONAL, SMOOTH, TILE, BLOCK,
        )  # fmt: skip
    else:
        _join_side(
            column_part_ptr, lse_text_ptr, top_text_ptr, right_text_ptr, positive_ptr, column_rival_ptr, term_ptr,
            smoothing_ptr, pair, pairs, (block - row_blocks) * BLOCK, column_parts, M, N, -row_offset, first_tile,
            crossings, False, DIAGONAL, SMOOTH, TILE, BLOCK,
        )  # fmt: skip


@triton.jit
def _total(ptr: t.Any, count: t.Any, stride: t.Any, BLOCK: tl.constexpr) -> Any:
    """The sum of ``count`` numbers ``stride`` apart, always in the same order."""
    index = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        sums += tl.load(ptr + (start + index) * stride, mask=start + index < count, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def _vector(ptr: t.Any, parts: t.Any, D: t.Any, start: t.Any, WIDTH: tl.constexpr) -> Any:
    """A piece of a sum of rows (D), of which ``parts`` parts lie 2 D apart."""
    k = start + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for part in range(parts):
        total += tl.load(ptr + tl.cast(part, tl.int64) * 2 * D + k, mask=k < D, other=0.0)
    return total


@triton.jit(
    do_not_specialize=["N", "M", "text_views", "positives", "row_blocks", "column_blocks", "x_parts", "y_parts"]
)
def _terms_kernel(
    term_ptr: t.Any,  # of _join_kernel
    x_sum_ptr: t.Any,  # (A, x_parts, 2, D), of _rows_kernel, read if SMOOTH
    y_sum_ptr: t.Any,  # (B, y_parts, 2, D)
    scale_ptr: t.Any,  # (A, B)
    smoothing_ptr: t.Any,  # (A * B)
    loss_ptr: t.Any,  # (A * B, 2): of images, of texts
    accuracy_ptr: t.Any,  # (A * B, 2)
    N: t.Any,
    M: t.Any,
    D: t.Any,
    text_views: t.Any,
    positives: t.Any,
    row_blocks: t.Any,
    column_blocks: t.Any,
    x_parts: t.Any,
    y_parts: t.Any,
    SMOOTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Means over the positives of one pair; a sum over logits is a product of sums."""
    pair = tl.program_id(0)
    image_ptr = term_ptr + 2 * pair * (row_blocks + column_blocks)
    text_ptr = image_ptr + 2 * row_blocks
    image, text = _total(image_ptr, row_blocks, 2, BLOCK), _total(text_ptr, column_blocks, 2, BLOCK)
    if SMOOTH:
        x_sum_ptr += (pair // text_views * x_parts).to(tl.int64) * 2 * D
        y_sum_ptr += (pair % text_views * y_parts).to(tl.int64) * 2 * D
        by_row, by_column = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
        for start in range(0, D, WIDTH):
            by_row += _vector(x_sum_ptr + D, x_parts, D, start, WIDTH) * _vector(y_sum_ptr, y_parts, D, start, WIDTH)
            by_column += _vector(x_sum_ptr, x_parts, D, start, WIDTH) * _vector(y_sum_ptr + D, y_parts, D, start, WIDTH)
        factor = tl.load(smoothing_ptr + pair) * tl.load(scale_ptr + pair)
        image -= factor * (tl.sum(by_row, 0) / M)
        text -= factor * (tl.sum(by_column, 0) / N)
    tl.store(loss_ptr + 2 * pair, image / positives)
    tl.store(loss_ptr + 2 * pair + 1, text / positives)
    tl.store(accuracy_ptr + 2 * pair, 100.0 * _total(image_ptr + 1, row_blocks, 2, BLOCK) / positives)
    tl.store(accuracy_ptr + 2 * pair + 1, 100.0 * _total(text_ptr + 1, column_blocks, 2, BLOCK) / positives)


# --- kernels: gradient ------------------------------------------------------------------------------------------------


@triton.jit
def _largest(
    ptr: t.Any, text_views: t.Any, pairs: t.Any, size: t.Any, s_a: t.Any, s_b: t.Any, s_n: t.Any, BLOCK: tl.constexpr
) -> Any:
    """The largest magnitude in a strided (A, B, size) array."""
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, pairs * size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        pair = index // size
        at = (pair // text_views).to(tl.int64) * s_a + (pair % text_views).to(tl.int64) * s_b
        at += (index % size).to(tl.int64) * s_n
        most = tl.maximum(most, tl.abs(tl.load(ptr + at, mask=index < pairs * size, other=0.0)))
    return tl.max(most, 0)


@triton.jit
def _exponent(x: t.Any) -> Any:
    """The least integer e with ``x <= 2^e``, as near as a logarithm in float32 tells; 0 for 0, infinity and NaN."""
    usable = (x > 0.0) & (x < float("inf"))
    return tl.where(usable, tl.ceil(tl.log2(tl.where(usable, x, 1.0))), 0.0)


@triton.jit(do_not_specialize=["text_views", "pairs", "N", "M", "ia", "ib", "i_n", "ta", "tb", "tm"])
def _unit_kernel(
    scale_ptr: t.Any,  # (A, B)
    weight_image_ptr: t.Any,  # (A, B, N) with strides ia, ib, i_n, read if WEIGHTS
    weight_text_ptr: t.Any,  # (A, B, M) with strides ta, tb, tm
    unit_ptr: t.Any,  # (2): what G is multiplied with before it is rounded, and the inverse
    text_views: t.Any,
    pairs: t.Any,
    N: t.Any,
    M: t.Any,
    ia: t.Any,
    ib: t.Any,
    i_n: t.Any,
    ta: t.Any,
    tb: t.Any,
    tm: t.Any,
    HEADROOM: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A power of two that brings scale * G to at most 2^(1 + HEADROOM), however small or large the weights are."""
    exponent = _exponent(_largest(scale_ptr, 1, pairs, 1, 1, 1, 1, BLOCK)) - HEADROOM
    if WEIGHTS:
        image = _largest(weight_image_ptr, text_views, pairs, N, ia, ib, i_n, BLOCK)
        text = _largest(weight_text_ptr, text_views, pairs, M, ta, tb, tm, BLOCK)
        exponent += _exponent(tl.maximum(image, text))
    exponent = tl.minimum(tl.maximum(exponent, -120.0), 120.0)
    tl.store(unit_ptr, tl.exp2(-exponent))
    tl.store(unit_ptr + 1, tl.exp2(exponent))


@triton.jit
def softmax_gradient(
    logits: t.Any, lse_row: t.Any, lse_column: t.Any, factor_row: t.Any, factor_column: t.Any, least: t.Any, near: t.Any
) -> Any:
    """``f_i exp(S_ij - r_i) + f_j exp(S_ij - c_j)``; one exponential an entry if all r and c are near ``least``."""
    if near:
        by_row = factor_row * tl.exp2((least - lse_row) * LOG2E)
        by_column = factor_column * tl.exp2((least - lse_column) * LOG2E)
        gradient = tl.exp2((logits - least) * LOG2E) * (by_row[:, None] + by_column[None, :])
    else:
        gradient = factor_row[:, None] * tl.exp2((logits - lse_row[:, None]) * LOG2E)
        gradient += factor_column[None, :] * tl.exp2((logits - lse_column[None, :]) * LOG2E)
    return gradient


@triton.jit
def load_lse(ptrs: t.Any, mask: t.Any) -> Any:
    """A log-sum-exp rounded to float32, and ``exp`` of what rounding it took."""
    exact = tl.load(ptrs, mask=mask, other=0.0)
    rounded = exact.to(tl.float32)
    return rounded, tl.exp2((rounded.to(tl.float64) - exact).to(tl.float32) * LOG2E)


@triton.jit
def _log1p(x: t.Any) -> Any:
    """``log(1 + x)`` for x in [0, 1], exact to float32's precision relative to the result."""
    series = x * (1.0 - x * (0.5 - x * (1 / 3 - x * (0.25 - x * (0.2 - x * (1 / 6))))))
    return tl.where(x < 0.0625, series, tl.log(1.0 + x))


@triton.jit(
    do_not_specialize=[
        "N", "M", "text_views", "row_offset", "ia", "ib", "i_n", "ta", "tb", "tm", "first_view", "views", "first_row",
        "chunk_rows", "first_text_view", "chunk_text_views", "first_column", "chunk_columns", "pairs", "slots",
        "first_slot",
    ]
)  # fmt: skip
def _gradient_kernel(
    x_ptr: t.Any,  # (A, N, D)
    y_ptr: t.Any,  # (B, M, D)
    inverse_x_ptr: t.Any,  # (A, N), read if NORMALIZE
    inverse_y_ptr: t.Any,  # (B, M)
    scale_ptr: t.Any,  # (A, B)
    bias_ptr: t.Any,  # (1), read if SIGMOID
    lse_image_ptr: t.Any,  # (A, B, N), float64, read unless SIGMOID
    lse_text_ptr: t.Any,  # (A, B, M), float64
    weight_image_ptr: t.Any,  # (A, B, N) with strides ia, ib, i_n
    weight_text_ptr: t.Any,  # (A, B, M) with strides ta, tb, tm
    smoothing_ptr: t.Any,  # (A * B), read if SMOOTH
    unit_ptr: t.Any,  # (2), of _unit_kernel
    chunk_ptr: t.Any,  # (views * chunk_rows, chunk_stride), written if STORE
    part_ptr: t.Any,  # (1 or, if SIGMOID, 3; A * B; slots)
    N: t.Any,
    M: t.Any,
    D: t.Any,
    text_views: t.Any,
    row_offset: t.Any,
    ia: t.Any,
    ib: t.Any,
    i_n: t.Any,
    ta: t.Any,
    tb: t.Any,
    tm: t.Any,
    first_view: t.Any,
    views: t.Any,
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
    DIAGONAL: tl.constexpr,
    SMOOTH: tl.constexpr,
    SIGMOID: tl.constexpr,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLABS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """One tile of the chunk, and its sums: of G * S / scale; if SIGMOID, also of G and of the loss.

    The chunk holds ``unit * scale * G``, with NORMALIZE also times both inverse norms.
    """
    SLAB: tl.constexpr = COLUMNS // SLABS
    row_blocks, column_blocks = tl.cdiv(chunk_rows, ROWS), tl.cdiv(chunk_columns, COLUMNS)
    row_tile, column_tile = grouped(tl.program_id(0), views * row_blocks, chunk_text_views * column_blocks, GROUP)
    image, text = first_view + row_tile // row_blocks, first_text_view + column_tile // column_blocks
    block_row, block_column = row_tile % row_blocks, column_tile % column_blocks
    pair = image * text_views + text
    start_row, start_column = first_row + block_row * ROWS, first_column + block_column * COLUMNS
    rows = start_row + tl.arange(0, ROWS)
    row_ok = rows < first_row + chunk_rows

    products = tile_products(
        x_ptr + image.to(tl.int64) * N * D, y_ptr + text.to(tl.int64) * M * D, start_row, start_column,
        first_row + chunk_rows, first_column + chunk_columns, D, ROWS, COLUMNS, WIDTH,
    )  # fmt: skip
    scale = tl.load(scale_ptr + pair)
    unit = tl.load(unit_ptr)
    inverse_x = tl.full((ROWS,), 1.0, tl.float32)
    if NORMALIZE:
        inverse_x = tl.load(inverse_x_ptr + image * N + rows, mask=row_ok, other=0.0)
        inverse_y_ptr += text * M
    if SIGMOID:
        bias = tl.load(bias_ptr)
        to_chunk = inverse_x * (scale * unit)
    else:
        lse_row, correction_row = load_lse(lse_image_ptr + pair.to(tl.int64) * N + rows, row_ok)
        least_row = tl.min(tl.where(row_ok, lse_row, float("inf")), 0)
        most_row = tl.max(tl.where(row_ok, lse_row, -float("inf")), 0)
        lse_text_ptr += pair.to(tl.int64) * M
        weight_image_ptr += image.to(tl.int64) * ia + text.to(tl.int64) * ib
        weight_text_ptr += image.to(tl.int64) * ta + text.to(tl.int64) * tb
        weight_row = unit * tl.load(weight_image_ptr + rows.to(tl.int64) * i_n, mask=row_ok, other=0.0)
        smoothing = 0.0
        if SMOOTH:
            smoothing = tl.load(smoothing_ptr + pair)
        to_chunk = inverse_x * scale
    # Sums of whole slabs: triton 3.6's compiler fails on row sums here, on sm_100.
    loss_sum, gradient_sum, scale_sum = 0.0, 0.0, 0.0
    chunk_ptr += ((row_tile // row_blocks) * chunk_rows + block_row * ROWS).to(tl.int64) * chunk_stride
    chunk_ptr += (column_tile // column_blocks) * view_stride + block_column * COLUMNS

    slabs = in_slabs(products, ROWS, COLUMNS, SLABS)
    for slab in tl.static_range(SLABS):
        first = start_column + slab * SLAB
        columns = first + tl.arange(0, SLAB)
        column_ok = columns < first_column + chunk_columns
        crossing = (first + SLAB - 1 >= start_row + row_offset) & (first <= start_row + ROWS - 1 + row_offset)
        edge = (start_row + ROWS > first_row + chunk_rows) | (first + SLAB > first_column + chunk_columns)
        cosines = slabs[slab]
        if NORMALIZE:
            inverse_y = tl.load(inverse_y_ptr + columns, mask=column_ok, other=0.0)
            cosines *= inverse_x[:, None]
            cosines *= inverse_y[None, :]
        if SIGMOID:
            # With q = -z (S + b), z the entry's sign, the loss is softplus(q) and its gradient -z sigmoid(q).
            logits = cosines * scale + bias
            if crossing:
                logits = tl.where(columns[None, :] == (rows + row_offset)[:, None], -logits, logits)
            exponentials = tl.exp2(-tl.abs(logits) * LOG2E)
            gradient = tl.where(logits >= 0.0, 1.0, exponentials) / (1.0 + exponentials)
            if crossing:
                gradient = tl.where(columns[None, :] == (rows + row_offset)[:, None], -gradient, gradient)
            loss = tl.maximum(logits, 0.0) + _log1p(exponentials)
            if edge:
                inside = row_ok[:, None] & column_ok[None, :]
                gradient, loss = tl.where(inside, gradient, 0.0), tl.where(inside, loss, 0.0)
            loss_sum += tl.sum(loss)
            gradient_sum += tl.sum(gradient)
        else:
            lse_column, correction_column = load_lse(lse_text_ptr + columns, column_ok)
            weight_column = unit * tl.load(weight_text_ptr + columns.to(tl.int64) * tm, mask=column_ok, other=0.0)
            least = tl.minimum(least_row, tl.min(tl.where(column_ok, lse_column, float("inf")), 0))
            most = tl.maximum(most_row, tl.max(tl.where(column_ok, lse_column, -float("inf")), 0))
            gradient = softmax_gradient(
                cosines * scale, lse_row, lse_column, weight_row * correction_row, weight_column * correction_column,
                least, most - least <= SPREAD,
            )  # fmt: skip
            if SMOOTH:
                gradient -= (weight_row * (smoothing / M))[:, None] + (weight_column * (smoothing / N))[None, :]
            if DIAGONAL and crossing:
                target = (1.0 - smoothing) * (weight_row[:, None] + weight_column[None, :])
                positive = columns[None, :] == (rows + row_offset)[:, None]
                gradient = tl.where(positive, gradient - target, gradient)
            if edge:
                gradient = tl.where(row_ok[:, None] & column_ok[None, :], gradient, 0.0)
        scale_sum += tl.sum(gradient * cosines)
        if STORE:
            gradient *= to_chunk[:, None]
            if NORMALIZE:
                gradient *= inverse_y[None, :]
            chunk_row, chunk_column = tl.arange(0, ROWS), slab * SLAB + tl.arange(0, SLAB)
            ptrs = chunk_ptr + (chunk_row[:, None] * chunk_stride + chunk_column[None, :])
            height, width = chunk_rows - block_row * ROWS, store_columns - block_column * COLUMNS
            inside = (chunk_row < height)[:, None] & (chunk_column < width)[None, :]
            tl.store(ptrs, gradient.to(chunk_ptr.dtype.element_ty), mask=inside)

    at = part_ptr + pair.to(tl.int64) * slots + first_slot + block_row * column_blocks + block_column
    stride = pairs.to(tl.int64) * slots
    if SIGMOID:
        tl.store(at + stride, gradient_sum)
        tl.store(at + 2 * stride, loss_sum)
    tl.store(at, scale_sum)


# --- kernels: rows ----------------------------------------------------------------------------------------------------


@triton.jit
def _rows_side(
    x_ptr: t.Any, inverse_ptr: t.Any, unit_ptr: t.Any, sum_ptr: t.Any, program: t.Any, parts: t.Any, count: t.Any,
    D: t.Any, first_matched: t.Any, positives: t.Any,
    NORMALIZE: tl.constexpr, WRITE: tl.constexpr, SUMS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """CHUNK rows of one view: inverse norms; rows of unit length; sums over all of them and over the matched ones."""
    view, part = program // parts, program % parts
    row, k = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = row[:, None] * D + k[None, :]
    start = (view.to(tl.int64) * count + part * CHUNK) * D
    x_ptr += start
    unit_ptr += start
    inverse_ptr += view * count + part * CHUNK
    rows_here = tl.minimum(count - part * CHUNK, CHUNK)
    if NORMALIZE:
        for first in range(0, rows_here, ROWS):
            squares = tl.zeros((ROWS,), tl.float32)
            for column in range(0, D, WIDTH):
                inside = (first + row < rows_here)[:, None] & (column + k < D)[None, :]
                x = tl.load(x_ptr + first * D + column + at, mask=inside, other=0.0).to(tl.float32)
                squares += tl.sum(x * x, 1)
            inverse = 1.0 / tl.maximum(tl.sqrt(squares), SMALLEST_NORM)
            tl.store(inverse_ptr + first + row, inverse, mask=first + row < rows_here)
        tl.debug_barrier()  # inverse norms are read again below
    if WRITE or SUMS:
        for column in range(0, D, WIDTH):
            total, matched_total = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
            for first in range(0, rows_here, ROWS):
                ok = first + row < rows_here
                inside = ok[:, None] & (column + k < D)[None, :]
                x = tl.load(x_ptr + first * D + column + at, mask=inside, other=0.0).to(tl.float32)
                if NORMALIZE:
                    x *= tl.load(inverse_ptr + first + row, mask=ok, other=0.0)[:, None]
                if WRITE:
                    x = x.to(unit_ptr.dtype.element_ty)
                    tl.store(unit_ptr + first * D + column + at, x, mask=inside)
                    x = x.to(tl.float32)
                if SUMS:
                    index = part * CHUNK + first + row
                    matched = (index >= first_matched) & (index < first_matched + positives)
                    total += tl.sum(x, 0)
                    matched_total += tl.sum(tl.where(matched[:, None], x, 0.0), 0)
            if SUMS:
                ptrs = sum_ptr + program.to(tl.int64) * 2 * D + column + k
                tl.store(ptrs, total, mask=column + k < D)
                tl.store(ptrs + D, matched_total, mask=column + k < D)


@triton.jit(do_not_specialize=["views", "text_views", "N", "M", "first_row", "first_column", "positives"])
def _rows_kernel(
    x_ptr: t.Any,  # (A, N, D)
    y_ptr: t.Any,  # (B, M, D)
    inverse_x_ptr: t.Any,  # (A, N), written if NORMALIZE
    inverse_y_ptr: t.Any,  # (B, M)
    unit_x_ptr: t.Any,  # (A, N, D), written if WRITE
    unit_y_ptr: t.Any,  # (B, M, D)
    x_sum_ptr: t.Any,  # (A, parts, 2, D), written if SUMS: sums of all rows and of those with a positive
    y_sum_ptr: t.Any,  # (B, parts, 2, D)
    views: t.Any,
    N: t.Any,
    M: t.Any,
    D: t.Any,
    first_row: t.Any,  # that has a positive
    first_column: t.Any,
    positives: t.Any,
    NORMALIZE: tl.constexpr,
    WRITE: tl.constexpr,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """What both operations need to know of the rows of both sides."""
    program = tl.program_id(0)
    x_parts, y_parts = tl.cdiv(N, CHUNK), tl.cdiv(M, CHUNK)
    if program < views * x_parts:
        _rows_side(
            x_ptr, inverse_x_ptr, unit_x_ptr, x_sum_ptr, program, x_parts, N, D, first_row, positives,
            NORMALIZE, WRITE, SUMS, CHUNK, ROWS, WIDTH,
        )  # fmt: skip
    else:
        _rows_side(
            y_ptr, inverse_y_ptr, unit_y_ptr, y_sum_ptr, program - views * x_parts, y_parts, M, D, first_column,
            positives, NORMALIZE, WRITE, SUMS, CHUNK, ROWS, WIDTH,
        )  # fmt: skip


@triton.jit
def _finish_rows(
    sum_ptr: t.Any, x_ptr: t.Any, inverse_ptr: t.Any, out_ptr: t.Any, factor: t.Any, block: t.Any, count: t.Any,
    D: t.Any, NORMALIZE: tl.constexpr, FOLDED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    row, k = block * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    ok = row < count
    at = row.to(tl.int64)[:, None] * D + k[None, :]
    along = tl.zeros((ROWS,), tl.float32)
    inverse = tl.full((ROWS,), 1.0, tl.float32)
    if NORMALIZE:
        inverse = tl.load(inverse_ptr + row, mask=ok, other=0.0)
        for start in range(0, D, WIDTH):
            inside = ok[:, None] & (k[None, :] < D - start)
            gradient = tl.load(sum_ptr + at + start, mask=inside, other=0.0)
            along += tl.sum(gradient * tl.load(x_ptr + at + start, mask=inside, other=0.0).to(tl.float32), 1)
        # A norm at its lower bound is a constant.
        along = tl.where(inverse * SMALLEST_NORM < 0.9999, along * inverse * inverse, 0.0)
        if not FOLDED:
            factor = factor * inverse
        else:
            factor = factor + tl.zeros((ROWS,), tl.float32)
    else:
        factor = factor + tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, WIDTH):
        inside = ok[:, None] & (k[None, :] < D - start)
        gradient = tl.load(sum_ptr + at + start, mask=inside, other=0.0)
        if NORMALIZE:
            x = tl.load(x_ptr + at + start, mask=inside, other=0.0).to(tl.float32)
            gradient -= x * along[:, None]
        gradient *= factor[:, None]
        tl.store(out_ptr + at + start, gradient.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["factor", "x_rows", "y_rows"])
def _finish_kernel(
    x_sum_ptr: t.Any,  # (x_rows, D), float32: unit * gradient to the unit rows, if FOLDED times their inverse norms
    y_sum_ptr: t.Any,  # (y_rows, D)
    x_ptr: t.Any,  # (x_rows, D), read if NORMALIZE: the rows as given
    y_ptr: t.Any,  # (y_rows, D)
    inverse_x_ptr: t.Any,  # (x_rows)
    inverse_y_ptr: t.Any,  # (y_rows)
    d_x_ptr: t.Any,  # (x_rows, D); may be x_sum_ptr
    d_y_ptr: t.Any,  # (y_rows, D); may be y_sum_ptr
    unit_ptr: t.Any,  # (2), of _unit_kernel
    factor: t.Any,
    x_rows: t.Any,
    y_rows: t.Any,
    D: t.Any,
    NORMALIZE: tl.constexpr,
    FOLDED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Both sides' gradients: through the normalisation, ``factor / unit`` taken in, rounded once."""
    block, x_blocks = tl.program_id(0), tl.cdiv(x_rows, ROWS)
    factor = factor * tl.load(unit_ptr + 1)
    if block < x_blocks:
        _finish_rows(x_sum_ptr, x_ptr, inverse_x_ptr, d_x_ptr, factor, block, x_rows, D, NORMALIZE, FOLDED, ROWS, WIDTH)
    else:
        _finish_rows(
            y_sum_ptr, y_ptr, inverse_y_ptr, d_y_ptr, factor, block - x_blocks, y_rows, D,
            NORMALIZE, FOLDED, ROWS, WIDTH,
        )  # fmt: skip


@triton.jit(do_not_specialize=["slots", "factor"])
def _sums_kernel(
    part_ptr: t.Any,  # (programs, slots), as _gradient_kernel wrote them
    unit_ptr: t.Any,  # (2), of _unit_kernel
    out_ptr: t.Any,  # (programs)
    slots: t.Any,
    factor: t.Any,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """``factor`` times the sum of each row of partial sums, the unit taken out if UNIT."""
    row = tl.program_id(0)
    total = factor * _total(part_ptr + row.to(tl.int64) * slots, slots, 1, BLOCK)
    if UNIT:
        total *= tl.load(unit_ptr + 1)
    tl.store(out_ptr + row, total)


# --- configurations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """How one kernel is built: the tile of S, the part of D a step takes, the slabs its entries are looked at in, warps
    and pipeline stages of a program."""

    rows: int
    columns: int
    width: int
    slabs: int
    warps: int
    stages: int

    @property
    def tile(self) -> tuple[int, int, int, int]:
        return self.rows, self.columns, self.width, self.slabs

    @property
    def built(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Configs:
    """One problem's configurations, one a kernel; ``forward`` and ``diagonal`` make the same products."""

    forward: Config
    diagonal: Config
    gradient: Config
    sigmoid: Config  # the gradient's kernel for the sigmoid loss


Size = Literal["small", "large"]

_FP32: dict[Size, Configs] = {
    "large": Configs(*[Config(64, 64, 16, slabs=2, warps=8, stages=3)] * 4),
    "small": Configs(*[Config(32, 32, 32, slabs=1, warps=8, stages=3)] * 4),
}
_SMALL = Config(64, 64, 64, slabs=2, warps=4, stages=3)

# By architecture (compute capability; 0 is every other device), bytes of an input number and size class: "large" where
# large tiles give every multiprocessor work. Pinned: nothing is tuned at run time. compile_check.py reports registers
# and shared memory of each; none uses the stack. On sm_90, at 4 warps and at most 255 registers a thread, two programs
# share a multiprocessor in forward and backward.
CONFIGS: dict[tuple[int, int, Size], Configs] = {
    (80, 2, "large"): Configs(
        forward=Config(128, 128, 32, slabs=4, warps=8, stages=3),
        diagonal=Config(128, 128, 32, slabs=4, warps=8, stages=3),
        gradient=Config(128, 128, 32, slabs=4, warps=4, stages=3),
        sigmoid=Config(128, 128, 32, slabs=8, warps=8, stages=3),
    ),
    (90, 2, "large"): Configs(
        forward=Config(128, 128, 32, slabs=4, warps=4, stages=5),
        diagonal=Config(128, 128, 32, slabs=8, warps=8, stages=5),
        gradient=Config(128, 128, 64, slabs=4, warps=4, stages=3),
        sigmoid=Config(128, 128, 64, slabs=8, warps=8, stages=3),
    ),
    (100, 2, "large"): Configs(
        forward=Config(128, 128, 64, slabs=2, warps=8, stages=3),
        diagonal=Config(128, 128, 64, slabs=4, warps=8, stages=3),
        gradient=Config(128, 128, 64, slabs=4, warps=8, stages=3),
        sigmoid=Config(128, 128, 64, slabs=4, warps=8, stages=3),
    ),
    (0, 2, "large"): Configs(*[Config(64, 64, 32, slabs=2, warps=4, stages=2)] * 4),
    (80, 2, "small"): Configs(_SMALL, _SMALL, _SMALL, _SMALL),
    (90, 2, "small"): Configs(_SMALL, _SMALL, _SMALL, _SMALL),
    (100, 2, "small"): Configs(Config(64, 64, 64, slabs=4, warps=4, stages=3), _SMALL, _SMALL, _SMALL),
    (0, 2, "small"): Configs(*[Config(32, 32, 32, slabs=1, warps=4, stages=2)] * 4),
    **{(arch, 4, size): configs for arch in (0, 80, 90, 100) for size, configs in _FP32.items()},
}
LARGE_FROM = 128  # tiles of the "large" configuration; about one for each multiprocessor

GROUP = 8  # rows of tiles walked together
PROGRAMS = 1024  # of the forward kernel, at least, where there are as many tiles: some waves of a large device
CHUNK = 128  # rows of one program of _rows_kernel
ROW_BLOCK, ROW_WIDTH, ROW_WARPS = 8, 256, 4  # kernels that go along rows
VECTOR_BLOCK, VECTOR_WARPS = 256, 4  # _join_kernel
SUM_BLOCK, SUM_WARPS = 4096, 8  # kernels of a single program, or one a pair
FP16_HEADROOM = 13  # G up to 2^14: most of float16's range, for entries far below the largest


def available() -> bool:
    """Whether this process can run the kernels: a CUDA or ROCm device, or the interpreter (which takes CPU tensors)."""
    return INTERPRETED or torch.cuda.is_available()


def _configs(problem: Problem) -> Configs:
    arch, size = _architecture(problem.x.device), problem.x.element_size()
    large = CONFIGS[arch, size, "large"]
    tiles = ceil(problem.N, large.forward.rows) * ceil(problem.M, large.forward.columns) * problem.pairs
    return large if tiles >= LARGE_FROM else CONFIGS[arch, size, "small"]


# --- launchers --------------------------------------------------------------------------------------------------------


def ceil(size: int, block: int) -> int:
    return -(-size // block)


def _aligned(x: Tensor) -> Tensor:
    """``x`` or a copy: contiguous, at a multiple of 16 bytes, rows filled up with zeros to multiples of 16 numbers.

    Kernels then load 16 bytes at once, ahead of use. (With D = 100 as it is they take 1376 bytes of stack a thread.)
    """
    missing = -x.shape[-1] % 16
    x = F.pad(x.detach(), (0, missing)) if missing else x.detach().contiguous()
    return x.clone() if x.data_ptr() % 16 else x


class Problem:
    """Both sides as the kernels read them.

    ``x``, ``y`` are (A, N, D) and (B, M, D), contiguous. Rows still to be normalised come with their inverse norms,
    which the kernels take in (``folded``). float16 cannot hold products with two inverse norms: there ``x``, ``y`` are
    copies of unit length. ``sums``: also make the sums of rows that label smoothing needs.
    """

    def __init__(
        self,
        image_AND: Tensor,
        text_BMD: Tensor,
        scale_AB: Tensor,
        row_offset: int,
        normalize: bool,
        sums: bool = False,
    ) -> None:
        self.width = image_AND.shape[-1]  # D before it was filled up
        self.raw_x, self.raw_y = _aligned(image_AND), _aligned(text_BMD)
        self.scale = scale_AB.detach().float().contiguous()
        (self.A, self.N, self.D), (self.B, self.M, _) = self.raw_x.shape, self.raw_y.shape
        self.pairs = self.A * self.B
        self.row_offset = row_offset
        self.positives = min(self.N - max(0, -row_offset), self.M - max(0, row_offset))
        self.normalize = normalize
        self.x, self.y, self.inverse_x, self.inverse_y = self.raw_x, self.raw_y, self.scale, self.scale
        self.x_sums, self.y_sums = self.scale, self.scale
        if normalize or sums:
            self._launch_rows(sums)
        self.folded = normalize and self.x is self.raw_x

    def _launch_rows(self, sums: bool) -> None:
        x_parts, y_parts = ceil(self.N, CHUNK), ceil(self.M, CHUNK)
        if self.normalize:
            self.inverse_x = self.scale.new_empty(self.A * self.N)
            self.inverse_y = self.scale.new_empty(self.B * self.M)
        copies = self.normalize and self.x.dtype == torch.float16
        if copies:
            self.x, self.y = torch.empty_like(self.raw_x), torch.empty_like(self.raw_y)
        if sums:
            self.x_sums = self.scale.new_empty(self.A, x_parts, 2, self.D)
            self.y_sums = self.scale.new_empty(self.B, y_parts, 2, self.D)
        _launch(
            _rows_kernel, (self.A * x_parts + self.B * y_parts,), self.raw_x, self.raw_y, self.inverse_x,
            self.inverse_y, self.x, self.y, self.x_sums, self.y_sums, self.A, self.N, self.M, self.D,
            max(0, -self.row_offset), max(0, self.row_offset), self.positives, self.normalize, copies, sums,
            CHUNK, ROW_BLOCK, ROW_WIDTH, num_warps=ROW_WARPS,
        )  # fmt: skip

    def smoothing(self, values: Sequence[float]) -> Tensor:
        """(A * B) on the device, filled there: nothing is copied from the host."""
        if len(set(values)) == 1:
            return self.scale.new_full((self.pairs,), values[0])
        smoothing = self.scale.new_empty(self.pairs)
        for index, value in enumerate(values):
            smoothing[index].fill_(value)
        return smoothing


def _super_tile(problem: Problem, config: Config, workspace: int) -> tuple[int, int]:
    """Height and width of a super-tile, in tiles: about ``PROGRAMS`` of them, their statistics in ``workspace``."""
    row_blocks, column_blocks = ceil(problem.N, config.rows), ceil(problem.M, config.columns)
    # Twice as high as wide: a column has two parts a program, a row one.
    columns = max(1, math.isqrt(row_blocks * column_blocks * problem.pairs // (2 * PROGRAMS)))
    rows, columns = min(2 * columns, row_blocks), min(columns, column_blocks)
    while True:
        row_numbers = problem.N * ceil(column_blocks, columns)
        column_numbers = 2 * problem.M * ceil(row_blocks, rows)
        fits = 16 * problem.pairs * (row_numbers + column_numbers) <= workspace
        if fits or (rows == row_blocks and columns == column_blocks):
            return rows, columns
        if columns < column_blocks and (row_numbers >= column_numbers or rows == row_blocks):
            columns = min(columns + 1 + columns // 8, column_blocks)
        else:
            rows = min(rows + 1 + rows // 8, row_blocks)


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
    """Log-sum-exps and maxima of rows and columns of every pair, losses and accuracies; at most 6 launches.

    Args:
        image_AND, text_BMD: of one dtype, float32, bfloat16 or float16; any strides.
        scale_AB: float32.
        smoothing: label smoothing of each pair, row-major.
        row_offset: row i's positive is column ``i + row_offset``.
        diagonal: whether there are positives; without, no smoothing either, and what they would tell is empty or zero.
        normalize: scale every row to unit length first, as ``torch.nn.functional.normalize`` does.
        workspace: bytes that partial statistics may take (16 a row, 32 a column and pair they always take).

    Returns:
        Log-sum-exps (A, B, N) and (A, B, M) in float64 (their rounding would be an error of every probability); maxima
        (A, B, N) and (A, B, M); whether a column's positive is its pick (A, B, M); losses (A, B, 2) of rows and of
        columns, means over those with a positive; and their accuracies (A, B, 2) in percent: of equal logits the first
        is the pick.
    """
    smooth = diagonal and any(smoothing)
    with _on(image_AND):
        problem = Problem(image_AND, text_BMD, scale_AB, row_offset, normalize, sums=smooth)
        per_pair = problem.smoothing(smoothing) if smooth else problem.scale
        statistics = Statistics(problem, diagonal, workspace)
        statistics.launch()
        return statistics.join(per_pair, smooth)


class Statistics:
    """Partial statistics of rows and columns (``row_part``, ``column_part``) and what the diagonal's tiles tell."""

    def __init__(self, problem: Problem, diagonal: bool, workspace: int) -> None:
        self.problem, self.diagonal, self.config = problem, diagonal, _configs(problem).forward
        assert self.config.rows == self.config.columns, "the diagonal crosses a row of tiles in two of them at most"
        self.super_tile = _super_tile(problem, self.config, workspace)
        tile, pairs, new = self.config.rows, problem.pairs, problem.scale.new_empty
        self.high = ceil(ceil(problem.N, tile), self.super_tile[0])
        self.wide = ceil(ceil(problem.M, tile), self.super_tile[1])
        self.row_part = new(4, pairs, self.wide, problem.N)
        self.column_part = new(4, pairs, 2 * self.high, problem.M)
        self.first_tile, remainder = divmod(problem.row_offset, tile)
        self.crossings = 2 if remainder else 1
        self.positive = new(pairs, problem.N if diagonal else 0)
        self.row_rival = new(pairs, self.crossings, problem.N if diagonal else 0)
        self.column_rival = new(pairs, self.crossings, problem.M if diagonal else 0)

    def launch(self) -> None:
        problem, config = self.problem, self.config
        inputs = problem.x, problem.y, problem.inverse_x, problem.inverse_y, problem.scale
        sizes = problem.N, problem.M, problem.D, problem.B, problem.row_offset
        _launch(
            _forward_kernel, (self.high * self.wide, problem.pairs), *inputs, self.row_part, self.column_part, *sizes,
            *self.super_tile, problem.folded, *config.tile, GROUP, **config.built,
        )  # fmt: skip
        if self.diagonal:
            config = _configs(problem).diagonal
            grid = ceil(problem.N, config.rows), self.crossings, problem.pairs
            _launch(
                _diagonal_kernel, grid, *inputs, self.positive, self.row_rival, self.column_rival, *sizes,
                self.first_tile, problem.folded, *config.tile, **config.built,
            )  # fmt: skip

    def join(self, smoothing: Tensor, smooth: bool) -> tuple[Tensor, ...]:
        """What ``contrastive_forward`` returns."""
        problem = self.problem
        A, B, N, M = problem.A, problem.B, problem.N, problem.M
        new = problem.scale.new_empty
        lse = new(A, B, N, dtype=torch.float64), new(A, B, M, dtype=torch.float64)
        top = new(A, B, N), new(A, B, M)
        right = new((A, B, M) if self.diagonal else 0, dtype=torch.int8)
        row_blocks, column_blocks = ceil(N, VECTOR_BLOCK), ceil(M, VECTOR_BLOCK)
        term = new(problem.pairs, row_blocks + column_blocks, 2)
        _launch(
            _join_kernel, (row_blocks + column_blocks, problem.pairs), self.row_part, self.column_part, self.positive,
            self.row_rival, self.column_rival, *lse, *top, right, term, smoothing, N, M, problem.row_offset, self.wide,
            2 * self.high, self.first_tile, self.crossings, self.diagonal, smooth, self.config.rows, VECTOR_BLOCK,
            num_warps=VECTOR_WARPS,
        )  # fmt: skip
        if not self.diagonal:
            return *lse, *top, right.view(torch.bool), *(problem.scale.new_zeros(A, B, 2) for _ in range(2))
        losses, accuracies = new(A, B, 2), new(A, B, 2)
        _launch(
            _terms_kernel, (problem.pairs,), term, problem.x_sums, problem.y_sums, problem.scale, smoothing, losses,
            accuracies, N, M, problem.D, B, problem.positives, row_blocks, column_blocks, ceil(N, CHUNK),
            ceil(M, CHUNK), smooth, ROW_WIDTH, VECTOR_BLOCK, num_warps=VECTOR_WARPS,
        )  # fmt: skip
        return *lse, *top, right.view(torch.bool), losses, accuracies


@dataclass(frozen=True)
class Chunk:
    """A part of G: rows of some image views against columns of some text views; several views are whole views."""

    first_view: int
    views: int
    first_row: int
    rows: int
    first_text_view: int
    text_views: int
    first_column: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.views * self.rows, self.text_views * self.columns

    @property
    def store(self) -> tuple[int, int]:
        """Where the next text view's columns start, and how many may be written; multiples of 16 give wide stores."""
        return (0, _padded(self.columns)) if self.text_views == 1 else (self.columns, self.columns)


def _chunks(problem: Problem, workspace: int) -> Iterator[Chunk]:
    """All of G at once where it fits the workspace, else pair by pair, in nearly square pieces.

    Square, because every piece reads and writes its part of both gradients; powers of two, because the library's
    products have whole tiles then.
    """
    A, B, N, M = problem.A, problem.B, problem.N, problem.M
    entries = max(1, workspace // problem.x.element_size())
    if A * N * _padded(B * M) <= entries:
        yield Chunk(0, A, 0, N, 0, B, 0, M)
        return
    columns = min(M, 1 << (math.isqrt(entries).bit_length() - 1))
    rows = min(N, max(1, entries // _padded(columns)))
    columns = min(M, max(columns, _unpadded(entries // rows)))
    for a in range(A):
        for row in range(0, N, rows):
            for b in range(B):
                for column in range(0, M, columns):
                    yield Chunk(a, 1, row, min(rows, N - row), b, 1, column, min(columns, M - column))


def _padded(columns: int) -> int:
    """A chunk's row length in memory: whole 32-byte pieces, for wide stores and the products' alignment."""
    return ceil(columns, 16) * 16


def _unpadded(length: int) -> int:
    return length // 16 * 16


def _product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out (+)= a @ b`` in float32; 16-bit factors are not widened first where the library can do so itself.

    float32 factors follow ``torch.backends.cuda.matmul``, which multiplies them as they are unless told otherwise.
    """
    if a.dtype == torch.float32 or not a.is_cuda:
        out.addmm_(a.float(), b.float(), beta=float(accumulate))
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


@dataclass
class Weights:
    """What makes a problem's G: the log-sum-exps and weights of a softmax, or the bias of a sigmoid."""

    diagonal: bool
    smoothing: Tensor | None = None
    lse: tuple[Tensor, Tensor] | None = None
    weight: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None


class Gradient:
    """Sums over G, made chunk by chunk: 3 launches a chunk where both sides are wanted. Subclasses launch a chunk.

    Args:
        problem: both sides.
        config: of the kernel that makes a chunk.
        statistics: numbers a tile leaves in ``parts``.
        need_image, need_text: the gradients that ``finish`` gives.
        workspace: bytes that a chunk may take.
        weight: gradients to the rows' and columns' terms, any strides: ``unit`` then brings ``scale * weight * G`` into
            range, else ``scale * G``.
    """

    def __init__(
        self,
        problem: Problem,
        config: Config,
        statistics: int,
        need_image: bool,
        need_text: bool,
        workspace: int,
        weight: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.problem, self.config, self.weight = problem, config, weight
        self.d_x = problem.x.new_empty(problem.x.shape if need_image else 0, dtype=torch.float32)
        self.d_y = problem.x.new_empty(problem.y.shape if need_text else 0, dtype=torch.float32)
        self.store = need_image or need_text
        self.chunks = list(_chunks(problem, workspace)) if self.store else [_whole(problem)]
        self.slots = sum(self._tiles(chunk) for chunk in self.chunks if chunk.first_view == chunk.first_text_view == 0)
        self.unit = problem.scale.new_empty(2)
        self.parts = problem.scale.new_empty(statistics, problem.pairs, self.slots)

    def _tiles(self, chunk: Chunk) -> int:
        """Of one pair."""
        return ceil(chunk.rows, self.config.rows) * ceil(chunk.columns, self.config.columns)

    def run(self) -> None:
        """Fill ``unit``, ``parts`` and, before ``finish``, the sums of products."""
        self._launch_unit()
        buffer = self.problem.x.new_empty(
            max(chunk.shape[0] * _padded(chunk.shape[1]) for chunk in self.chunks) if self.store else 0
        )
        slot = dict.fromkeys(((c.first_view, c.first_text_view) for c in self.chunks), 0)
        for chunk in self.chunks:
            height, width = chunk.shape
            stride = _padded(width)
            pair = chunk.first_view, chunk.first_text_view
            tiles = chunk.views * chunk.text_views * self._tiles(chunk)
            self.launch_chunk(chunk, tiles, buffer, stride, slot[pair])
            slot[pair] += self._tiles(chunk)
            if self.store:
                self._multiply(chunk, buffer[: height * stride].view(height, stride)[:, :width])

    def launch_chunk(self, chunk: Chunk, tiles: int, buffer: Tensor, stride: int, slot: int) -> None:
        """A program for each of ``tiles``: rows to ``buffer``, ``stride`` apart, a pair's parts from ``slot`` on."""
        raise NotImplementedError

    def _multiply(self, chunk: Chunk, chunk_RC: Tensor) -> None:
        problem, (height, width) = self.problem, chunk.shape
        row = chunk.first_view * problem.N + chunk.first_row
        column = chunk.first_text_view * problem.M + chunk.first_column
        rows, columns = slice(row, row + height), slice(column, column + width)
        if self.d_x.numel():
            _product(chunk_RC, problem.y.flatten(0, 1)[columns], self.d_x.flatten(0, 1)[rows], column > 0)
        if self.d_y.numel():
            _product(chunk_RC.T, problem.x.flatten(0, 1)[rows], self.d_y.flatten(0, 1)[columns], row > 0)

    def strides(self) -> tuple[int, ...]:
        """Of both weights."""
        if self.weight is None:
            return (0,) * 6
        image, text = self.weight
        return *image.stride(), *text.stride()

    def _launch_unit(self) -> None:
        problem = self.problem
        image, text = self.weight or (problem.scale, problem.scale)
        strides = self.strides()
        N, M = problem.N if strides[2] else 1, problem.M if strides[5] else 1  # an expanded weight is looked at once
        headroom = FP16_HEADROOM if problem.x.dtype == torch.float16 else 0
        _launch(
            _unit_kernel, (1,), problem.scale, image, text, self.unit, problem.B, problem.pairs, N, M, *strides,
            headroom, self.weight is not None, SUM_BLOCK, num_warps=SUM_WARPS,
        )  # fmt: skip

    def finish(self, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Gradients of both sides, ``factor`` times the sums; where not wanted, empty."""
        problem = self.problem
        out = [d if d.dtype == dtype else torch.empty_like(d, dtype=dtype) for d in (self.d_x, self.d_y)]
        x_rows, y_rows = (math.prod(d.shape[:-1]) if d.numel() else 0 for d in out)
        if x_rows + y_rows:
            _launch(
                _finish_kernel, (ceil(x_rows, ROW_BLOCK) + ceil(y_rows, ROW_BLOCK),), self.d_x, self.d_y,
                problem.raw_x, problem.raw_y, problem.inverse_x, problem.inverse_y, *out, self.unit, factor,
                x_rows, y_rows, problem.D, problem.normalize, problem.folded, ROW_BLOCK, ROW_WIDTH,
                num_warps=ROW_WARPS,
            )  # fmt: skip
        d_x, d_y = (d[..., : problem.width].contiguous() if d.numel() else d for d in out)
        return d_x, d_y

    def sums(self, factor: float = 1.0) -> Tensor:
        """``factor`` times the sums over all tiles, (statistics, A * B)."""
        sums = self.parts.new_empty(self.parts.shape[:2])
        _launch(
            _sums_kernel, (sums.numel(),), self.parts, self.unit, sums, self.slots, factor, self.weight is not None,
            SUM_BLOCK, num_warps=SUM_WARPS,
        )  # fmt: skip
        return sums


class ContrastiveGradient(Gradient):
    """Of a softmax or, with a bias, of a sigmoid."""

    def __init__(self, problem: Problem, weights: Weights, need_image: bool, need_text: bool, workspace: int) -> None:
        self.weights, self.sigmoid = weights, weights.bias is not None
        configs, statistics = _configs(problem), 3 if self.sigmoid else 1
        config = configs.sigmoid if self.sigmoid else configs.gradient
        super().__init__(problem, config, statistics, need_image, need_text, workspace, weights.weight)

    def launch_chunk(self, chunk: Chunk, tiles: int, buffer: Tensor, stride: int, slot: int) -> None:
        problem, weights, config = self.problem, self.weights, self.config
        nothing = problem.scale
        lse_image, lse_text = weights.lse or (nothing, nothing)
        image, text = weights.weight or (nothing, nothing)
        _launch(
            _gradient_kernel, (tiles,), problem.x, problem.y, problem.inverse_x, problem.inverse_y, problem.scale,
            nothing if weights.bias is None else weights.bias, lse_image, lse_text, image, text,
            nothing if weights.smoothing is None else weights.smoothing, self.unit, buffer, self.parts,
            problem.N, problem.M, problem.D, problem.B, problem.row_offset, *self.strides(),
            chunk.first_view, chunk.views, chunk.first_row, chunk.rows, chunk.first_text_view, chunk.text_views,
            chunk.first_column, chunk.columns, stride, *chunk.store, problem.pairs, self.slots, slot,
            problem.folded, weights.diagonal, weights.smoothing is not None, self.sigmoid, self.store,
            *config.tile, GROUP, **config.built,
        )  # fmt: skip


def _whole(problem: Problem) -> Chunk:
    return Chunk(0, problem.A, 0, problem.N, 0, problem.B, 0, problem.M)


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
    """Gradients of both sides and of the scales; at most 8 launches, and 3 for every chunk of G after the first.

    Args: as ``contrastive_forward``'s, and
        lse_image_ABN, lse_text_ABM: its results.
        weight_image_ABN, weight_text_ABM: float32, any strides: the gradient to each row's and column's log-sum-exp
            (with ``diagonal``: to its cross-entropy).
        workspace: bytes that a chunk of G may take.

    Returns:
        (A, N, D) and (B, M, D) in the inputs' dtype, of shape (0,) where not needed, and (A, B) in float32.
    """
    with _on(image_AND):
        problem = Problem(image_AND, text_BMD, scale_AB, row_offset, normalize)
        weights = Weights(
            diagonal,
            smoothing=problem.smoothing(smoothing) if diagonal and any(smoothing) else None,
            lse=(lse_image_ABN.contiguous(), lse_text_ABM.contiguous()),
            weight=(weight_image_ABN, weight_text_ABM),
        )
        gradient = ContrastiveGradient(problem, weights, need_image, need_text, workspace)
        gradient.run()
        d_image, d_text = gradient.finish(image_AND.dtype)
        return d_image, d_text, gradient.sums().view(problem.A, problem.B)


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
    """SigLIP's loss, ``sum softplus(-z_ij (scale x_i . y_j + bias)) / N``, z = 1 at positives, else -1, with gradients.

    One product for the value, three with gradients: they are formed in the same pass. At most 7 launches (4 without
    gradients), and 3 for every chunk of G after the first. Arguments as ``contrastive_backward``'s; ``scale`` and
    ``bias`` hold one float32 number each.

    Returns:
        Loss (), gradients (N, D) and (M, D) in float32 (of shape (0,) without ``need_grad``), of scale () and bias ().
    """
    with _on(image_ND):
        problem = Problem(image_ND[None], text_MD[None], scale.reshape(1, 1), row_offset, normalize)
        weights = Weights(diagonal=True, bias=bias.detach().float().reshape(1))
        gradient = ContrastiveGradient(problem, weights, need_grad, need_grad, workspace)
        gradient.run()
        d_image, d_text = gradient.finish(torch.float32, 1 / problem.N)
        d_scale, d_bias, loss = gradient.sums(1 / problem.N).view(3).unbind()
        if need_grad:
            d_image, d_text = d_image[0], d_text[0]
        return loss, d_image, d_text, d_scale, d_bias
