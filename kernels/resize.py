"""Pillow's antialiased bicubic resize of 8-bit pictures, on the CPU (numba), in integer vector instructions.

Shape legend: H, W source height and width; h, w view height and width; T taps a column's filter, P pairs of rows a
row's; lanes in brackets. Columns first, rounded and clipped to 8 bits as Pillow does between its passes, then rows.

Both passes are written for ``pmaddwd``, which multiplies 16 pairs of int16 and adds each pair. Four neighbouring pixels
of two source rows are 32 bytes, which two byte shuffles turn into pairs of neighbours, colour by colour; the first pass
leaves its two rows interleaved, as pairs for the second. Two rows at a time go into a ring of as many as a row of the
view needs, which stays in the first cache: no picture is turned, nothing becomes float. LLVM's vectoriser finds none of
this, so the inner loops are written in its vector language, for any processor; only ``pmaddwd`` is called by name,
where there is AVX2. A view of 224 from 430 x 325 pixels takes 0.15 ms, where float sums over a turned picture took
0.37 (benchmarks/results/loaders.md).

Weights are int16 with as many bits as the largest leaves room for, each taking up the rounding error of the one before:
results differ from Pillow's (22 bits) where a sum is within hundredths of a grey level of a tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rocket_fast.errors import optional_import

numba = optional_import("numba", "train")
cgutils = optional_import("numba.core.cgutils", "train")
extending = optional_import("numba.extending", "train")
ir = optional_import("llvmlite.ir", "train")

BLOCK = 32  # columns that are made of rows at once; a view is as many wide, or a multiple
_GROUP, _TAPS = 8, 4  # columns that the first pass makes at once, from so many pixels at once
ROUNDING = 1e-6  # of a source pixel: what a window may be off by
_SLACK = 4  # bytes that the first pass may read beyond the last pixel it needs
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba.njit without the GIL, cached on disk; compiled anew in every process where no folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True, fastmath=True)(function)
    except RuntimeError:  # numba: "no locator available": neither __pycache__ nor the user's cache folder is writable
        return numba.njit(nogil=True, fastmath=True)(function)


def resize(
    source: np.ndarray, window: tuple[float, float, float, float], bounded: bool, flip: bool, view: np.ndarray
) -> None:
    """The window (top, left, height, width) of ``source`` (uint8 (H, W, 3), contiguous) into ``view`` (3, h, w).

    ``view`` is contiguous uint8, or float32, which is clipped to [0, 255] but not rounded. ``bounded``, ``flip``: as in
    ``image_augment.ViewParams``. Releases the GIL.
    """
    _, h, w = view.shape
    wide = view if w % BLOCK == 0 else np.empty((3, h, -(-w // BLOCK) * BLOCK), view.dtype)
    _resize(source, *window, bounded, flip, w, wide)
    if wide is not view:
        view[...] = wide[..., :w]


# The vector code. Addresses are integers; ``b`` is llvmlite's IRBuilder. ----------------------------------------------


def _vector(element: Any, values: Sequence[int]) -> Any:
    return ir.Constant(ir.VectorType(element, len(values)), list(values))


def _splat(b: Any, value: Any, size: int) -> Any:
    blank = ir.Constant(ir.VectorType(value.type, size), ir.Undefined)
    return b.shuffle_vector(b.insert_element(blank, value, _I32(0)), blank, _vector(_I32, [0] * size))


def _load(b: Any, address: Any, kind: Any) -> Any:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def _store(b: Any, value: Any, address: Any) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def _opaque(b: Any, value: Any) -> Any:
    """``value``, unknown to LLVM, which otherwise keeps every address made of it: more than it has registers for."""
    return b.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], side_effect=False)


def _bounded(b: Any, value: Any, high: float) -> Any:
    """``value``, at least 0 and at most ``high``."""
    compare = b.fcmp_ordered if value.type.element == _F32 else b.icmp_signed
    low, top = (ir.Constant(value.type, [bound] * value.type.count) for bound in (0, high))
    value = b.select(compare(">", value, low), value, low)
    return b.select(compare("<", value, top), value, top)


def _dot(b: Any, has_avx2: bool, x: Any, y: Any) -> Any:
    """int32 [8] of int16 [16]: the products of two pairs, added."""
    if has_avx2:
        kind = ir.FunctionType(ir.VectorType(_I32, 8), [x.type, y.type])
        return b.call(b.module.declare_intrinsic("llvm.x86.avx2.pmadd.wd", (), kind), [x, y])
    products = []
    for side in (0, 1):
        of_pairs = _vector(_I32, range(side, 16, 2))
        halves = (b.sext(b.shuffle_vector(v, v, of_pairs), ir.VectorType(_I32, 8)) for v in (x, y))
        products.append(b.mul(*halves))
    return b.add(*products)


def _has_avx2(context: Any) -> bool:
    return "+avx2" in context.codegen().magic_tuple()[2].split(",")


def _pairs_of_pixels(p: int) -> Any:
    """Of bytes [16] of one row and [16] of another, zeros behind them: pixels p and p + 1 as pairs of int16."""
    zero = 32
    lane = [byte for c in range(3) for at in (p, p + 1) for byte in (3 * at + c, zero)] + [zero] * 4
    return _vector(_I32, [*lane, *(byte if byte == zero else 16 + byte for byte in lane)])


@extending.intrinsic
def _two_rows(
    typing: Any, row: Any, stride: Any, first: Any, weights: Any, steps: Any, bits: Any, width: Any, out: Any
) -> Any:
    """Columns of two rows, into ``out``: int16 [3][width][2].

    Addresses: ``row`` of the first row's pixel 0 (the second is ``stride`` bytes away), ``first`` of int64 [width], in
    bytes from pixel 0, ``weights`` of int16 [width / 8][steps][8][4]; ``steps`` = T / 4.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        row, stride, first, weights, steps, bits, width, out = args
        has_avx2, ints = _has_avx2(context), ir.VectorType(_I32, 8)
        bits = b.trunc(bits, _I32)
        half, shift = _splat(b, b.shl(_I32(1), b.sub(bits, _I32(1))), 8), _splat(b, bits, 16)
        sums = [cgutils.alloca_once(b, ints) for _ in range(_GROUP)]
        with cgutils.for_range(b, b.udiv(width, _I64(_GROUP)), intp=_I64) as groups:
            x = b.mul(groups.index, _I64(_GROUP))
            pixels = []
            for j in range(_GROUP):
                b.store(half, sums[j])
                pixels.append(b.add(row, _load(b, b.add(first, b.mul(b.add(x, _I64(j)), _I64(8))), _I64)))
            filters = b.add(weights, b.mul(b.mul(x, steps), _I64(2 * _TAPS)))
            with cgutils.for_range(b, steps, intp=_I64) as taps:
                near = _opaque(b, b.mul(taps.index, _I64(3 * _TAPS)))
                far = b.add(near, stride)
                at = b.add(filters, b.mul(taps.index, _I64(2 * _TAPS * _GROUP)))
                for j in range(_GROUP):
                    rows = (_load(b, b.add(pixels[j], offset), ir.VectorType(_I8, 16)) for offset in (near, far))
                    both, total = b.shuffle_vector(*rows, _vector(_I32, range(32))), b.load(sums[j])
                    for side in (0, 1):
                        pairs = b.shuffle_vector(both, _vector(_I8, [0] * 32), _pairs_of_pixels(2 * side))
                        weight = _load(b, b.add(at, _I64(2 * _TAPS * j + 4 * side)), _I32)
                        kind = ir.VectorType(_I16, 16)
                        pair_weights = b.bitcast(_splat(b, weight, 8), kind)
                        total = b.add(total, _dot(b, has_avx2, b.bitcast(pairs, kind), pair_weights))
                    b.store(total, sums[j])
            totals = [b.load(total) for total in sums]
            for c, colour in enumerate(_by_colour(b, totals)):
                value = _bounded(b, b.ashr(colour, shift), 255)
                _store(
                    b,
                    b.trunc(value, ir.VectorType(_I16, 16)),
                    b.add(out, b.mul(b.add(b.mul(width, _I64(c)), x), _I64(4))),
                )
        return context.get_dummy_value()

    return numba.void(*(numba.int64,) * 8), codegen


def _by_colour(b: Any, totals: list[Any]) -> list[Any]:
    """Eight columns, each (r g b -) of two rows, as three colours of eight columns, two rows beside each other."""

    def halves(x: Any, y: Any, at: int) -> Any:
        return b.shuffle_vector(x, y, _vector(_I32, [at, at + 8, at + 1, at + 9, at + 4, at + 12, at + 5, at + 13]))

    def quarters(x: Any, y: Any, at: int) -> Any:
        return b.shuffle_vector(x, y, _vector(_I32, [at, at + 1, at + 8, at + 9, at + 4, at + 5, at + 12, at + 13]))

    colours = []
    for c in range(3):
        fours = []
        for four in (totals[:4], totals[4:]):
            left, right = (halves(four[i], four[i + 1], c // 2 * 2) for i in (0, 2))
            fours.append(quarters(left, right, c % 2 * 2))
        order = [half + row + i for half in (0, 8) for i in range(4) for row in (0, 4)]
        colours.append(b.shuffle_vector(*fours, _vector(_I32, order)))
    return colours


@extending.intrinsic
def _one_row(
    typing: Any, lines: Any, count: Any, weights: Any, bits: Any, width: Any, out: Any, plane: Any, view: Any
) -> Any:
    """A view's row of pairs of rows, into ``out`` and ``plane`` and twice ``plane`` bytes behind it.

    Addresses: ``lines`` of ``count`` addresses, each of int16 [3][width][2]; ``weights`` of int16 [count][2].
    Values are of ``view``'s type, float32 or uint8.
    """
    to_float = view.dtype == numba.float32

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        lines, count, weights, bits, width, out, plane, _ = args
        has_avx2, ints = _has_avx2(context), ir.VectorType(_I32, 8)
        bits = b.trunc(bits, _I32)
        one = b.shl(_I32(1), bits)
        start = _vector(_I32, [0] * 8) if to_float else _splat(b, b.lshr(one, _I32(1)), 8)
        scale = b.fdiv(ir.Constant(_F32, 1.0), b.sitofp(one, _F32))
        sums = [cgutils.alloca_once(b, ints) for _ in range(BLOCK // 8)]
        for c in range(3):
            colour = b.add(out, b.mul(plane, _I64(c)))
            with cgutils.for_range(b, b.udiv(width, _I64(BLOCK)), intp=_I64) as blocks:
                x = b.mul(blocks.index, _I64(BLOCK))
                begin = b.mul(b.add(b.mul(width, _I64(c)), x), _I64(4))
                for total in sums:
                    b.store(start, total)
                with cgutils.for_range(b, count, intp=_I64) as pairs:
                    line = b.add(_load(b, b.add(lines, b.mul(pairs.index, _I64(8))), _I64), begin)
                    weight = _splat(b, _load(b, b.add(weights, b.mul(pairs.index, _I64(4))), _I32), 8)
                    for i, total in enumerate(sums):
                        values = _load(b, b.add(line, _I64(32 * i)), ir.VectorType(_I16, 16))
                        product = _dot(b, has_avx2, values, b.bitcast(weight, values.type))
                        b.store(b.add(b.load(total), product), total)
                totals = [b.load(total) for total in sums]
                if to_float:
                    for i, total in enumerate(totals):
                        value = b.fmul(b.sitofp(total, ir.VectorType(_F32, 8)), _splat(b, scale, 8))
                        _store(b, _bounded(b, value, 255), b.add(colour, b.mul(b.add(x, _I64(8 * i)), _I64(4))))
                else:
                    shift = _splat(b, bits, 8)
                    totals = [_bounded(b, b.ashr(total, shift), 255) for total in totals]
                    while len(totals) > 1:
                        size = 2 * totals[0].type.count
                        totals = [
                            b.shuffle_vector(*two, _vector(_I32, range(size)))
                            for two in zip(totals[::2], totals[1::2], strict=True)
                        ]
                    _store(b, b.trunc(totals[0], ir.VectorType(_I8, BLOCK)), b.add(colour, x))
        return context.get_dummy_value()

    return numba.void(*(numba.int64,) * 7, view), codegen


@extending.intrinsic
def sum_lines(typing: Any, lines: Any, count: Any, weights: Any, width: Any, out: Any) -> Any:
    """Lines of float32, times their weights, added up into ``out``.

    Addresses: ``lines`` of ``count`` addresses, an even number, ``weights`` of float32 [count]. Lines are read, and
    ``out`` is written, to ``width`` or the next multiple of 32.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        lines, count, weights, width, out = args
        floats = ir.VectorType(_F32, 8)
        sums = [[cgutils.alloca_once(b, floats) for _ in range(BLOCK // 8)] for _ in range(2)]  # of even and odd lines
        blocks = b.udiv(b.add(width, _I64(BLOCK - 1)), _I64(BLOCK))
        with cgutils.for_range(b, blocks, intp=_I64) as loop:
            begin = b.mul(loop.index, _I64(4 * BLOCK))
            for total in (*sums[0], *sums[1]):
                b.store(ir.Constant(floats, [0.0] * 8), total)
            with cgutils.for_range(b, b.udiv(count, _I64(2)), intp=_I64) as twos:
                for side in (0, 1):
                    tap = b.add(b.mul(twos.index, _I64(2)), _I64(side))
                    line = b.add(_load(b, b.add(lines, b.mul(tap, _I64(8))), _I64), begin)
                    weight = _splat(b, _load(b, b.add(weights, b.mul(tap, _I64(4))), _F32), 8)
                    for i, total in enumerate(sums[side]):
                        product = b.fmul(_load(b, b.add(line, _I64(32 * i)), floats), weight, flags=["contract"])
                        b.store(b.fadd(b.load(total), product, flags=["contract"]), total)
            for i, two in enumerate(zip(*sums, strict=True)):
                _store(b, b.fadd(*map(b.load, two)), b.add(b.add(out, begin), _I64(32 * i)))
        return context.get_dummy_value()

    return numba.void(*(numba.int64,) * 5), codegen


@compiled
def address(array: np.ndarray) -> int:
    """Where its values begin, for the vector code; numba's ``ctypes.data`` is unsigned, and a float once added to."""
    return np.int64(array.ctypes.data)


# The passes -----------------------------------------------------------------------------------------------------------


@compiled
def _filters(start: float, length: float, low: int, high: int, size: int, outputs: int) -> Any:
    """Per output: first source index and number of taps (int64 (outputs,)); int16 weights (outputs, T), their bits.

    T is a multiple of 4, and ``first`` + T at most ``high`` or T over ``high`` - ``low``. Outputs from ``size`` on have
    no taps.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    first, count = np.zeros(outputs, np.int64), np.zeros(outputs, np.int64)
    offset, total = np.zeros(outputs, np.float32), np.zeros(outputs, np.float32)
    for i in range(size):
        centre = start + (i + 0.5) * scale
        first[i] = max(int(centre - support + 0.5), low)
        count[i] = min(int(centre + support + 0.5), high) - first[i]
        offset[i] = first[i] + 0.5 - centre
    taps = count.max()
    values = np.empty((taps, outputs), np.float32)
    inverse, two, one = np.float32(1.0 / stretch), np.float32(2.0), np.float32(1.0)
    largest = np.float32(0.0)
    for k in range(taps):
        line = values[k]
        for i in range(outputs):
            x = min(abs((offset[i] + np.float32(k)) * inverse), two)
            near = (np.float32(1.5) * x - np.float32(2.5)) * x * x + one
            far = ((np.float32(2.5) - np.float32(0.5) * x) * x - np.float32(4.0)) * x + two
            value = near if x < one else far
            value = value if k < count[i] else np.float32(0.0)
            line[i] = value
            total[i] += value
    for i in range(outputs):
        total[i] = one / total[i] if i < size else np.float32(0.0)
    for k in range(taps):
        line = values[k]
        for i in range(outputs):
            line[i] *= total[i]
            largest = max(largest, line[i])
    bits = 0
    while bits < 20 and largest * np.float32(1 << (bits + 1)) < np.float32(32766.0):
        bits += 1
    weights = np.zeros((outputs, (taps + _TAPS - 1) // _TAPS * _TAPS), np.int16)
    unit = np.float32(1 << bits)
    for i in range(size):
        carry = np.float32(0.5)
        for k in range(count[i]):
            carry += values[k, i] * unit
            rounded = np.floor(carry)
            weights[i, k] = np.int16(rounded)
            carry -= rounded
    return first, count, weights, bits


@compiled
def _for_columns(first: np.ndarray, weights: np.ndarray, width: int, size: int, flip: bool) -> Any:
    """What ``_two_rows`` takes: byte offsets (outputs,), weights, in the view's order; no tap lies beyond ``width``."""
    outputs, taps = weights.shape
    offsets = np.zeros(outputs, np.int64)
    laid = np.zeros((outputs // _GROUP, taps // _TAPS, _GROUP, _TAPS), np.int16)
    for i in range(size):
        to = size - 1 - i if flip else i
        begin = max(min(first[i], width - taps), 0)
        offsets[to] = 3 * begin
        group, lower = laid[to // _GROUP], first[i] - begin
        for step in range(taps // _TAPS):
            four = group[step, to % _GROUP]
            for k in range(_TAPS):
                tap = _TAPS * step + k - lower
                if tap >= 0:
                    four[k] = weights[i, tap]
    return offsets, laid


@compiled
def _for_rows(first: np.ndarray, count: np.ndarray, weights: np.ndarray) -> Any:
    """What ``_one_row`` takes: first pair, number of pairs (h,), weights (h, P, 2), counted from row ``first[0]``."""
    h, taps = weights.shape
    pair, pairs = np.empty(h, np.int64), np.empty(h, np.int64)
    laid = np.zeros((h, taps // 2 + 1, 2), np.int16)
    for y in range(h):
        row = first[y] - first[0]
        pair[y], pairs[y] = row // 2, (row + count[y] + 1) // 2 - row // 2
        for k in range(count[y]):
            laid[y, (row % 2 + k) // 2, (row + k) % 2] = weights[y, k]
    return pair, pairs, laid


@compiled
def _padded(source: np.ndarray, row: int, rows: int, column: int, width: int) -> Any:
    """Rows of the source from a column on, as many pixels wide as the first pass may read, and its slack."""
    copy = np.zeros((rows, 3 * width + _SLACK), np.uint8)
    there = min(3 * width, 3 * (source.shape[1] - column))
    for r in range(rows):
        copy[r, :there] = source[row + r].reshape(-1)[3 * column : 3 * column + there]
    return copy


@compiled
def _resize(
    source: np.ndarray,
    top: float,
    left: float,
    height: float,
    width: float,
    bounded: bool,
    flip: bool,
    w: int,
    view: np.ndarray,
) -> None:
    H, W = source.shape[0], source.shape[1]
    h, outputs, item = view.shape[1], view.shape[2], view.itemsize
    low_y, high_y, low_x, high_x = 0, H, 0, W
    if bounded:
        low_y, high_y = int(top), min(H, math.ceil(top + height - ROUNDING))
        low_x, high_x = int(left), min(W, math.ceil(left + width - ROUNDING))
    first_y, count_y, weights_y, bits_y = _filters(top, height, low_y, high_y, h, h)
    first_x, _, weights_x, bits_x = _filters(left, width, low_x, high_x, w, outputs)
    row, column, taps = first_y[0], first_x[0], weights_x.shape[1]
    rows = first_y[h - 1] + count_y[h - 1] - row
    span = max(W - column, taps)
    offsets, filters = _for_columns(first_x - column, weights_x, span, w, flip)
    pair, pairs, row_filters = _for_rows(first_y, count_y, weights_y)

    # Rows that may be read as they are; a narrow picture none, and the picture's last not beyond the picture.
    safe = rows if W - column >= taps else 0
    if row + rows == H and safe > 0:
        safe = (rows - 1) // 2 * 2
    tail = _padded(source, row + safe, rows - safe, column, span)
    slots = 1  # a power of two: remainders take as long as sums
    while slots < pairs.max():
        slots *= 2
    ring = np.empty((slots, 3, outputs, 2), np.int16)
    lines = np.empty(slots, np.int64)
    made = 0
    for y in range(h):
        for wanted in range(made, pair[y] + pairs[y]):
            r = 2 * wanted
            if r < safe:
                stride = 3 * W if r + 1 < rows else 0
                pixel = address(source) + 3 * ((row + r) * W + column)
            else:
                stride = tail.shape[1] if r + 1 < rows else 0
                pixel = address(tail) + (r - safe) * tail.shape[1]
            to = address(ring[wanted & (slots - 1)])
            _two_rows(pixel, stride, address(offsets), address(filters), taps // _TAPS, bits_x, outputs, to)
        made = max(made, pair[y] + pairs[y])
        for i in range(pairs[y]):
            lines[i] = address(ring[(pair[y] + i) & (slots - 1)])
        to = address(view) + y * outputs * item
        at = address(row_filters[y])
        _one_row(address(lines), pairs[y], at, bits_y, outputs, to, h * outputs * item, view)
