"""One image view in one pass over the pixels, on the CPU (numba, the GIL released): what ``image_augment.draw`` drew.

Shape legend: H, W source height and width; h, w view height and width. ``source`` uint8 (H, W, 3) RGB, C-contiguous;
``out`` uint8 (3, h, w). Order: window, resize (or warp), flip, colour matrix, blur, erase, solarize; the values stay
float32, are clipped to [0, 255] after each step, and are rounded once, at the end.

Resizing (resize.py) is the antialiased bicubic of Pillow, columns first: equal but for sums near a tie, seldom 1 grey
level, at most 2. (From Pillow 13 on, pictures much more reduced in height than in width take rows first there: seldom
10 levels apart, at hard edges.)
"""

from __future__ import annotations

import numpy as np

from rocket_fast.errors import require
from rocket_fast.image_augment import SAME, ZERO, ViewParams
from rocket_fast.kernels.resize import BLOCK, ROUNDING, address, compiled, resize, sum_lines

Four = tuple[float, float, float, float]
_MARGIN_LEVELS = 8  # what a JPEG's noise stays below
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's "L"; image_augment.LUMA, but numba's cache sees only this file


@compiled
def _clip(value: float) -> float:
    return min(max(value, np.float32(0.0)), np.float32(255.0))


@compiled
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


@compiled
def _bilinear(flat: np.ndarray, here: int, right: int, below: int, fx: float, fy: float) -> float:
    one = np.float32(1.0)
    upper = (one - fx) * np.float32(flat[here]) + fx * np.float32(flat[here + right])
    lower = (one - fx) * np.float32(flat[here + below]) + fx * np.float32(flat[here + below + right])
    return (one - fy) * upper + fy * lower


@compiled
def _recolour(view: np.ndarray, matrix: np.ndarray, pivot: np.ndarray, shift: np.ndarray) -> None:
    """colour' = matrix @ colour + pivot * mean luma + shift, in place and clipped."""
    flat = view.reshape(3, view.shape[1] * view.shape[2])
    offset = shift.astype(np.float32)
    if pivot[0] != 0.0 or pivot[1] != 0.0 or pivot[2] != 0.0:
        luma = LUMA[0] * flat[0].mean() + LUMA[1] * flat[1].mean() + LUMA[2] * flat[2].mean()
        for c in range(3):
            offset[c] += pivot[c] * luma
    m = matrix.astype(np.float32).reshape(9)
    reds, greens, blues = flat[0], flat[1], flat[2]
    for i in range(reds.size):
        red, green, blue = reds[i], greens[i], blues[i]
        reds[i] = _clip(m[0] * red + m[1] * green + m[2] * blue + offset[0])
        greens[i] = _clip(m[3] * red + m[4] * green + m[5] * blue + offset[1])
        blues[i] = _clip(m[6] * red + m[7] * green + m[8] * blue + offset[2])


@compiled
def _blur(view: np.ndarray, sigma: float, out: np.ndarray) -> None:
    """Separable Gaussian cut off at 3 sigma, edges mirrored without repeating the border (cv2's default), into ``out``.

    A row at a time: down the columns into a line with mirrored ends, which stays in the first cache, then along it.
    ``view`` and ``out``: ``_planes``.
    """
    h, w = view.shape[1], view.shape[2]
    radius = max(1, int(np.ceil(3.0 * sigma)))
    count = 2 * radius + 2  # the last for an even number, with a weight of zero
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 2) / sigma) ** 2)
    weights[-1] = 0.0
    weights = (weights / weights.sum()).astype(np.float32)
    left = np.array([radius + _mirror(x - radius, w) for x in range(radius)])
    right = np.array([radius + _mirror(w + x, w) for x in range(radius)])
    mirrored = np.array([_mirror(y - radius, h) for y in range(h + count)])
    line = np.zeros(w + 2 * radius + 2 * BLOCK, np.float32)
    columns = address(line) + 4 * np.arange(count)
    for c in range(3):
        rows = address(view[c]) + 4 * w * mirrored
        for y in range(h):
            sum_lines(address(rows[y:]), count, address(weights), w, columns[radius])
            for x in range(radius):
                line[x] = line[left[x]]
                line[radius + w + x] = line[right[x]]
            sum_lines(address(columns), count, address(weights), w, address(out[c, y]))


@compiled
def _planes(h: int, w: int) -> np.ndarray:
    """float32 (3, h, w), not yet written, in memory that ``sum_lines`` may read and write beyond."""
    memory = np.empty(3 * h * w + BLOCK, np.float32)
    memory[3 * h * w :] = 0.0  # no NaN, which a weight of zero would leave one
    return memory[: 3 * h * w].reshape(3, h, w)


@compiled
def _mirror(i: int, size: int) -> int:
    """Index i reflected into [0, size), as often as it takes: ... 2 1 | 0 1 2 ..."""
    if size == 1:
        return 0
    period = 2 * (size - 1)
    i = abs(i) % period
    return min(i, period - i)


@compiled
def _erase(view: np.ndarray, box: Four) -> None:
    """A rectangle, given in fractions of the view, takes the view's mean colour."""
    top, left, height, width = box
    h, w = view.shape[1], view.shape[2]
    y0, x0 = int(top * h), int(left * w)
    y1, x1 = min(h, y0 + int(height * h + 0.5)), min(w, x0 + int(width * w + 0.5))
    for c in range(3):
        mean = view[c].mean()
        view[c, y0:y1, x0:x1] = mean


@compiled
def _finish(
    view: np.ndarray,
    recolour: bool,
    matrix: np.ndarray,
    pivot: np.ndarray,
    shift: np.ndarray,
    sigma: float,
    erase: Four,
    solarize: int,
    out: np.ndarray,
) -> None:
    """What comes after the resize, and the rounding."""
    if recolour:
        _recolour(view, matrix, pivot, shift)
    if sigma > 0.0:
        blurred = _planes(view.shape[1], view.shape[2])
        _blur(view, sigma, blurred)
        view = blurred
    if erase[2] > 0.0:
        _erase(view, erase)
    values, target = view.reshape(view.size), out.reshape(out.size)
    threshold = np.int32(solarize)
    for i in range(values.size):
        value = np.int32(values[i] + np.float32(0.5))
        target[i] = np.uint8(np.int32(255) - value if value >= threshold else value)


@compiled
def _over_white(pixels: np.ndarray, out: np.ndarray) -> None:
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            alpha = np.int32(pixels[y, x, 3])
            for c in range(3):
                value = np.int32(pixels[y, x, 2 - c]) * alpha + 255 * (255 - alpha)
                out[y, x, c] = (value + 127) // 255


@compiled
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
    p, (height, width) = params, source.shape[:2]
    top, left, rows, columns = p.window
    inside = top >= 0 and left >= 0 and rows > 0 and columns > 0
    require(inside, "window", p.window, "an area that begins inside the picture")
    inside = top + rows <= height + ROUNDING and left + columns <= width + ROUNDING
    require(inside, "window", p.window, lambda: f"one that ends inside the picture of {height} x {width}")
    stays = p.matrix is SAME and p.shift is ZERO  # as drawn; comparing takes as long as a twentieth of resizing
    recolour = not stays and bool((p.matrix != SAME).any() or p.shift.any())
    warped = p.warp != (1.0, 0.0, 0.0, 1.0)
    if not (warped or recolour or p.blur_sigma > 0 or p.erase[2] > 0 or p.solarize <= 255):
        resize(source, p.window, p.bounded, p.flip, out)
        return
    view = _planes(*out.shape[1:])
    if warped:
        _warp(source, p.window, p.warp, p.flip, view)
    else:
        resize(source, p.window, p.bounded, p.flip, view)
    _finish(view, recolour, p.matrix, p.pivot, p.shift, p.blur_sigma, p.erase, p.solarize, out)


def over_white(pixels_bgra: np.ndarray) -> np.ndarray:
    """RGB (H, W, 3) of a transparent picture (uint8 (H, W, 4), BGRA as cv2 decodes it) laid over white."""
    out = np.empty((pixels_bgra.shape[0], pixels_bgra.shape[1], 3), np.uint8)
    _over_white(pixels_bgra, out)
    return out
