"""One image view in one pass over the pixels, on the CPU (numba, the GIL released): what ``image_augment.draw`` drew.

Shape legend: H, W source height and width; h, w view height and width. ``source`` uint8 (H, W, 3) RGB, C-contiguous;
``out`` uint8 (3, h, w). Order: window, resize (or warp), flip, colour matrix, blur, erase, solarize; the values stay
float32, are clipped to [0, 255] after each step, and are rounded once, at the end.

Resizing is the antialiased bicubic of Pillow (a = -0.5, the filter stretched by the reduction), columns first, rounded
between the passes: equal but for sums within float32 of a tie, seldom 1 grey level, at most 2. (From Pillow 13 on,
pictures much more reduced in height than in width take rows first there: seldom 10 levels apart, at hard edges.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rocket_fast.errors import optional_import
from rocket_fast.image_augment import ViewParams

numba = optional_import("numba", "train")

Four = tuple[float, float, float, float]
_MARGIN_LEVELS = 8  # what a JPEG's noise stays below
_LANES = 16
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's "L"; image_augment.LUMA, but numba's cache sees only this file


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba.njit without the GIL, cached on disk; compiled anew in every process where no folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True, fastmath=True)(function)
    except RuntimeError:  # numba: "no locator available": neither __pycache__ nor the user's cache folder is writable
        return numba.njit(nogil=True, fastmath=True)(function)


@_jit
def _bicubic_taps(start: float, length: float, low: int, high: int, size: int) -> Any:
    """Per output pixel: first source index (size,), number of taps (size,), weights (size, T) summing to one."""
    scale = length / size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    first = np.empty(size, np.int64)
    count = np.empty(size, np.int64)
    weights = np.zeros((size, int(np.ceil(support)) * 2 + 1), np.float32)
    for i in range(size):
        centre = start + (i + 0.5) * scale
        begin = max(int(centre - support + 0.5), low)
        end = min(int(centre + support + 0.5), high)
        total = 0.0
        for k in range(end - begin):
            x = abs((begin + k + 0.5 - centre) / stretch)
            value = 0.0
            if x < 1.0:
                value = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                value = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
            weights[i, k] = value
            total += value
        for k in range(end - begin):
            weights[i, k] /= total
        first[i] = begin
        count[i] = end - begin
    return first, count, weights


@_jit
def _resize(source: np.ndarray, window: Four, bounded: bool, flip: bool, view: np.ndarray) -> None:
    """Columns first, rounded and clipped as Pillow does between its passes, then rows, into ``view`` (3, h, w) float32.

    Columns are combined for ``_LANES`` rows at once, laid side by side, so that both passes run on whole vectors.
    """
    top, left, height, width = window
    h, w = view.shape[1], view.shape[2]
    low_y, high_y, low_x, high_x = 0, source.shape[0], 0, source.shape[1]
    if bounded:
        low_y, high_y, low_x, high_x = int(top), int(top + height), int(left), int(left + width)
    first_y, count_y, weight_y = _bicubic_taps(top, height, low_y, high_y, h)
    first_x, count_x, weight_x = _bicubic_taps(left, width, low_x, high_x, w)
    row, rows = first_y[0], first_y[h - 1] + count_y[h - 1] - first_y[0]
    column, span = first_x[0], 3 * (first_x[w - 1] + count_x[w - 1] - first_x[0])
    lines = source.reshape(source.shape[0], source.shape[1] * 3)[row : row + rows, 3 * column : 3 * column + span]
    between = np.empty((rows, 3 * w), np.float32)
    block = np.zeros(span * _LANES, np.float32)
    sums = np.empty(3 * _LANES, np.float32)
    for start in range(0, rows, _LANES):
        lanes = min(_LANES, rows - start)
        if lanes == _LANES:  # a constant count, which the compiler unrolls
            for j in range(span):
                for lane in range(_LANES):
                    block[j * _LANES + lane] = lines[start + lane, j]
        else:
            for j in range(span):
                for lane in range(lanes):
                    block[j * _LANES + lane] = lines[start + lane, j]
        for x in range(w):
            sums[:] = 0.5
            at = 3 * _LANES * (first_x[x] - column)
            for k in range(count_x[x]):
                weight, taken = weight_x[x, k], block[at : at + 3 * _LANES]
                for j in range(3 * _LANES):
                    sums[j] += weight * taken[j]
                at += 3 * _LANES
            for j in range(3 * _LANES):
                sums[j] = np.float32(np.int32(_clip(sums[j])))
            to = w - 1 - x if flip else x
            for c in range(3):
                for lane in range(lanes):
                    between[start + lane, c * w + to] = sums[c * _LANES + lane]
    total = np.empty(3 * w, np.float32)
    for y in range(h):
        total[:] = 0.0
        for k in range(count_y[y]):
            weight, taken = weight_y[y, k], between[first_y[y] - row + k]
            for j in range(3 * w):
                total[j] += weight * taken[j]
        for c in range(3):
            for x in range(w):
                view[c, y, x] = _clip(total[c * w + x])


@_jit
def _clip(value: float) -> float:
    return min(max(value, np.float32(0.0)), np.float32(255.0))


@_jit
def _warp(source: np.ndarray, window: Four, warp: Four, flip: bool, view: np.ndarray) -> None:
    """Rotated, sheared or zoomed-out window: bilinear, averaged over points at most 2 source pixels apart.

    Outside the picture its edges are repeated.
    """
    H, W = source.shape[0], source.shape[1]
    h, w = view.shape[1], view.shape[2]
    top, left, height, width = window
    stretch_x, stretch_y = np.hypot(warp[0], warp[2]), np.hypot(warp[1], warp[3])
    points_y = max(1, int(np.ceil(height / h * stretch_y / 2)))
    points_x = max(1, int(np.ceil(width / w * stretch_x / 2)))
    step_y, step_x = np.float32(height / (h * points_y)), np.float32(width / (w * points_x))
    half_y, half_x = np.float32((height - step_y) / 2), np.float32((width - step_x) / 2)
    centre_y, centre_x = np.float32(top + height / 2 - 0.5), np.float32(left + width / 2 - 0.5)
    last_y, last_x, zero = np.float32(H - 1), np.float32(W - 1), np.float32(0.0)
    xx, xy, yx, yy = np.float32(warp[0]), np.float32(warp[1]), np.float32(warp[2]), np.float32(warp[3])
    share = np.float32(1.0 / (points_y * points_x))
    flat = source.reshape(source.size)
    for y in range(h):
        for x in range(w):
            red = green = blue = zero
            for point_y in range(points_y):
                dy = np.float32(y * points_y + point_y) * step_y - half_y
                for point_x in range(points_x):
                    dx = np.float32(x * points_x + point_x) * step_x - half_x
                    at_x = min(max(centre_x + xx * dx + xy * dy, zero), last_x)
                    at_y = min(max(centre_y + yx * dx + yy * dy, zero), last_y)
                    x0, y0 = np.int64(at_x), np.int64(at_y)
                    here = np.uint64((y0 * W + x0) * 3)  # unsigned: numba then leaves out the test for negative indices
                    right = np.uint64(3 if x0 < W - 1 else 0)
                    below = np.uint64(3 * W if y0 < H - 1 else 0)
                    fx, fy = at_x - np.float32(x0), at_y - np.float32(y0)
                    red += _bilinear(flat, here, right, below, fx, fy)
                    green += _bilinear(flat, here + np.uint64(1), right, below, fx, fy)
                    blue += _bilinear(flat, here + np.uint64(2), right, below, fx, fy)
            to = w - 1 - x if flip else x
            view[0, y, to] = red * share
            view[1, y, to] = green * share
            view[2, y, to] = blue * share


@_jit
def _bilinear(flat: np.ndarray, here: int, right: int, below: int, fx: float, fy: float) -> float:
    one = np.float32(1.0)
    upper = (one - fx) * np.float32(flat[here]) + fx * np.float32(flat[here + right])
    lower = (one - fx) * np.float32(flat[here + below]) + fx * np.float32(flat[here + below + right])
    return (one - fy) * upper + fy * lower


@_jit
def _recolour(view: np.ndarray, matrix: np.ndarray, pivot: np.ndarray, shift: np.ndarray) -> None:
    """colour' = matrix @ colour + pivot * mean luma + shift, in place and clipped."""
    flat = view.reshape(3, view.shape[1] * view.shape[2])
    offset = shift.astype(np.float32)
    if pivot[0] != 0.0 or pivot[1] != 0.0 or pivot[2] != 0.0:
        luma = LUMA[0] * flat[0].mean() + LUMA[1] * flat[1].mean() + LUMA[2] * flat[2].mean()
        for c in range(3):
            offset[c] += pivot[c] * luma
    m = matrix.astype(np.float32).reshape(9)
    for i in range(flat.shape[1]):
        red, green, blue = flat[0, i], flat[1, i], flat[2, i]
        for c in range(3):
            value = m[3 * c] * red + m[3 * c + 1] * green + m[3 * c + 2] * blue + offset[c]
            flat[c, i] = _clip(value)


@_jit
def _blur(view: np.ndarray, sigma: float) -> None:
    """Separable Gaussian cut off at 3 sigma, edges mirrored without repeating the border (cv2's default), in place."""
    h, w = view.shape[1], view.shape[2]
    radius = max(1, int(np.ceil(3.0 * sigma)))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    above = np.empty((h, w), np.float32)
    line = np.empty(w + 2 * radius, np.float32)
    for c in range(3):
        for y in range(h):
            above[y] = 0.0
            for k in range(2 * radius + 1):
                weight = taps[k]
                taken = view[c, _mirror(y + k - radius, h)]
                for x in range(w):
                    above[y, x] += weight * taken[x]
        for y in range(h):
            for x in range(w + 2 * radius):
                line[x] = above[y, _mirror(x - radius, w)]
            target = view[c, y]
            target[:] = 0.0
            for k in range(2 * radius + 1):
                weight = taps[k]
                for x in range(w):
                    target[x] += weight * line[x + k]


@_jit
def _mirror(i: int, size: int) -> int:
    """Index i reflected into [0, size), as often as it takes: ... 2 1 | 0 1 2 ..."""
    if size == 1:
        return 0
    period = 2 * (size - 1)
    i = abs(i) % period
    return min(i, period - i)


@_jit
def _erase(view: np.ndarray, box: Four) -> None:
    """A rectangle, given in fractions of the view, takes the view's mean colour."""
    top, left, height, width = box
    h, w = view.shape[1], view.shape[2]
    y0, x0 = int(top * h), int(left * w)
    y1, x1 = min(h, y0 + int(height * h + 0.5)), min(w, x0 + int(width * w + 0.5))
    for c in range(3):
        mean = view[c].mean()
        view[c, y0:y1, x0:x1] = mean


@_jit
def _render(
    source: np.ndarray,
    window: Four,
    bounded: bool,
    warp: Four,
    flip: bool,
    matrix: np.ndarray,
    pivot: np.ndarray,
    shift: np.ndarray,
    sigma: float,
    erase: Four,
    solarize: int,
    out: np.ndarray,
) -> None:
    view = np.empty(out.shape, np.float32)
    top, left, height, width = window
    if top < 0.0 or left < 0.0 or height <= 0.0 or width <= 0.0:
        raise ValueError("window: expected an area that begins inside the picture")
    if top + height > source.shape[0] + 1e-6 or left + width > source.shape[1] + 1e-6:
        raise ValueError("window: expected one that ends inside the picture")
    if warp == (1.0, 0.0, 0.0, 1.0):
        _resize(source, window, bounded, flip, view)
    else:
        _warp(source, window, warp, flip, view)
    if np.any(matrix != np.eye(3)) or np.any(shift != 0.0):
        _recolour(view, matrix, pivot, shift)
    if sigma > 0.0:
        _blur(view, sigma)
    if erase[2] > 0.0:
        _erase(view, erase)
    values, target = view.reshape(view.size), out.reshape(out.size)
    for i in range(values.size):
        value = np.int32(values[i] + np.float32(0.5))
        target[i] = 255 - value if value >= solarize else value


@_jit
def _over_white(pixels: np.ndarray, out: np.ndarray) -> None:
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            alpha = np.int32(pixels[y, x, 3])
            for c in range(3):
                value = np.int32(pixels[y, x, 2 - c]) * alpha + 255 * (255 - alpha)
                out[y, x, c] = (value + 127) // 255


@_jit
def _content_box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of what is not the corner's colour; an empty box (0, 0, 0, 0) if nothing is."""
    h, w = pixels.shape[0], pixels.shape[1]
    top, bottom, left, right = h, 0, w, 0
    for y in range(h):
        for x in range(w):
            for c in range(3):
                if abs(np.int32(pixels[y, x, c]) - np.int32(pixels[0, 0, c])) > _MARGIN_LEVELS:
                    top, bottom = min(top, y), max(bottom, y + 1)
                    left, right = min(left, x), max(right, x + 1)
    if bottom == 0:
        return 0, 0, 0, 0
    return top, bottom, left, right


def trim_margins(pixels: np.ndarray) -> np.ndarray:
    """The picture (uint8 (H, W, 3), contiguous) without margins of its corner's colour, kept square where it fits.

    The box around everything that differs by more than 8 grey levels is widened to a square inside the picture, so
    that proportions stay; a picture of one colour is returned as it is.
    """
    top, bottom, left, right = _content_box(pixels)
    if bottom == 0:
        return pixels
    top, bottom = _widen(top, bottom, right - left, pixels.shape[0])
    left, right = _widen(left, right, bottom - top, pixels.shape[1])
    return np.ascontiguousarray(pixels[top:bottom, left:right])


def _widen(start: int, end: int, wanted: int, limit: int) -> tuple[int, int]:
    """The range made ``wanted`` long if it is shorter, about its middle, inside [0, limit)."""
    length = min(max(end - start, wanted), limit)
    start = min(max(0, (start + end - length) // 2), limit - length)
    return start, start + length


def render_view(source: np.ndarray, params: ViewParams, out: np.ndarray) -> None:
    """Render one view of ``source`` (uint8 (H, W, 3) RGB, contiguous) into ``out`` (uint8 (3, h, w), contiguous).

    Releases the GIL while it works, takes no threads of its own, and gives the same bytes whatever runs beside it.
    Raises ValueError if the window does not lie inside the source.
    """
    p = params
    colour = (p.matrix, p.pivot, p.shift)
    _render(source, p.window, p.bounded, p.warp, p.flip, *colour, p.blur_sigma, p.erase, p.solarize, out)


def over_white(pixels_bgra: np.ndarray) -> np.ndarray:
    """RGB (H, W, 3) of a transparent picture (uint8 (H, W, 4), BGRA as cv2 decodes it) laid over white."""
    out = np.empty((pixels_bgra.shape[0], pixels_bgra.shape[1], 3), np.uint8)
    _over_white(pixels_bgra, out)
    return out
