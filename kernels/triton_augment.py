"""What follows a view's crop and resize, on the GPU: one Triton kernel from uint8 views to normalised ones.

Shape legend: B views of H x W pixels; images uint8 (B, 3, H, W) RGB, params float32 (B, FIELDS), out (B, 3, H, W).
The twin of ``augment.py`` without its windows: flip, colour matrix (about the view's mean luma) and shift, clip, blur,
erase, round, solarize, then ``image_augment.normalize``; parameters from the same ``ViewParams``.

A program makes one view: it reads the view for the mean luma where contrast pivots on it, and again, now from the
caches, to recolour and write it; where a rectangle takes the mean colour, once more before. Memory sees every pixel
once each way. Blurred views go tile by tile: a square of TILE x TILE pixels is recoloured, mirrored at the view's
borders, and multiplied from both sides with one band matrix of the Gaussian's taps, on tensor cores; of the square
``TILE - 2 * radius`` rows and columns are results. Nothing is kept in memory between the two directions. No atomics,
every sum in a fixed order: results repeat to the bit and do not depend on what else is in the batch.

Equal to the CPU's kernel within 1 grey level: where nothing is blurred only sums within float32 of a tie round apart;
blurred values, less 128, and taps are float16 before the products, which is at most 0.15 levels and mostly 0.01.

Importing this file needs triton; with ``TRITON_INTERPRET=1`` set before, everything here runs on CPU tensors.
"""

from __future__ import annotations

import math
import numbers
import typing as t  # kernels find names in modules only
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rocket_fast.errors import optional_import, require
from rocket_fast.image_augment import ViewParams
from rocket_fast.kernels.launch import INTERPRETED
from rocket_fast.kernels.launch import architecture as _architecture
from rocket_fast.kernels.launch import launch as _launch
from rocket_fast.kernels.launch import on_device_of as _on

triton: Any = optional_import("triton", "gpu")
tl: Any = optional_import("triton.language", "gpu")

# A view's parameters, one float32 each, by their first place in its row; ``pack_params`` writes them.
FLIP = tl.constexpr(0)  # 1 to mirror left-right, else 0
MATRIX = tl.constexpr(1)  # 9, row by row: colour' = matrix @ colour + pivot * mean luma + shift
PIVOT = tl.constexpr(10)  # 3
SHIFT = tl.constexpr(13)  # 3
SIGMA = tl.constexpr(16)  # of the blur, in pixels
RADIUS = tl.constexpr(17)  # of the blur, in pixels; 0 for none
BOX = tl.constexpr(18)  # 4: top, bottom, left, right in pixels of what takes the mean colour; top = bottom for none
SOLARIZE = tl.constexpr(22)  # values from here on are inverted; 256 for none
FIELDS = tl.constexpr(23)

MAX_RADIUS = 24  # leaves 16 rows and columns of the smallest pinned TILE
STEP = tl.constexpr(8)  # results of a tile begin at multiples of so many columns: stores of 16 bytes
LOG2E = tl.constexpr(1.4426950408889634)
RED, GREEN, BLUE = tl.constexpr(0.299), tl.constexpr(0.587), tl.constexpr(0.114)  # of luma: image_augment.LUMA
CENTRE = tl.constexpr(128.0)  # taken off before products: float16 is twice as fine there

# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _mean_luma(images_ptr: t.Any, plane: t.Any, BLOCK: tl.constexpr) -> Any:
    """Of the view as it came: a flip does not change it."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, plane, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ok = at < plane
        total += RED * tl.load(images_ptr + at, mask=ok, other=0).to(tl.float32)
        total += GREEN * tl.load(images_ptr + plane + at, mask=ok, other=0).to(tl.float32)
        total += BLUE * tl.load(images_ptr + 2 * tl.cast(plane, tl.int64) + at, mask=ok, other=0).to(tl.float32)
    return tl.sum(total, 0) / plane


@triton.jit
def _recoloured(red: t.Any, green: t.Any, blue: t.Any, params_ptr: t.Any, channel: t.Any, luma: t.Any) -> Any:
    """One channel after the colour matrix, clipped."""
    row_ptr = params_ptr + MATRIX + 3 * channel
    offset = tl.load(params_ptr + SHIFT + channel) + tl.load(params_ptr + PIVOT + channel) * luma
    colour = tl.load(row_ptr) * red + tl.load(row_ptr + 1) * green + tl.load(row_ptr + 2) * blue + offset
    return tl.minimum(tl.maximum(colour, 0.0), 255.0)


@triton.jit
def _boxed(params_ptr: t.Any, y: t.Any, x: t.Any) -> Any:
    """Which pixels take the mean colour."""
    inside_y = (y >= tl.load(params_ptr + BOX)) & (y < tl.load(params_ptr + BOX + 1))
    inside_x = (x >= tl.load(params_ptr + BOX + 2)) & (x < tl.load(params_ptr + BOX + 3))
    return inside_y[:, None] & inside_x[None, :]


@triton.jit
def _of_channel(channel: t.Any, red: t.Any, green: t.Any, blue: t.Any) -> Any:
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit
def _store(
    out_ptr: t.Any, ok: t.Any, colour: t.Any, params_ptr: t.Any, boxed: t.Any, mean: t.Any, scale: t.Any, shift: t.Any
) -> None:
    """One channel's last steps: erase, round, solarize, normalise."""
    level = tl.floor(tl.where(boxed, mean, colour) + 0.5)
    level = tl.where(level >= tl.load(params_ptr + SOLARIZE), 255.0 - level, level)
    tl.store(out_ptr, (level * scale + shift).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _plain_view(
    images_ptr: t.Any, params_ptr: t.Any, out_ptr: t.Any, H: t.Any, W: t.Any, luma: t.Any,
    scale_r: t.Any, scale_g: t.Any, scale_b: t.Any, shift_r: t.Any, shift_g: t.Any, shift_b: t.Any,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """A view that is not blurred; all three channels of ROWS x COLUMNS pixels at a time."""
    plane = tl.cast(H * W, tl.int64)
    across = tl.cdiv(W, COLUMNS)
    flip = tl.load(params_ptr + FLIP) != 0.0
    erases = tl.load(params_ptr + BOX + 1) > tl.load(params_ptr + BOX)
    mean_r, mean_g, mean_b = 0.0, 0.0, 0.0
    for sweep in range(tl.where(erases, 0, 1), 2):  # the first sums up the mean colour, the second writes
        for tile in range(tl.cdiv(H, ROWS) * across):
            y = tile // across * ROWS + tl.arange(0, ROWS)
            x = tile % across * COLUMNS + tl.arange(0, COLUMNS)
            ok = (y < H)[:, None] & (x < W)[None, :]
            taken = y[:, None] * W + tl.where(flip, W - 1 - x, x)[None, :]
            red = tl.load(images_ptr + taken, mask=ok, other=0).to(tl.float32)
            green = tl.load(images_ptr + plane + taken, mask=ok, other=0).to(tl.float32)
            blue = tl.load(images_ptr + 2 * plane + taken, mask=ok, other=0).to(tl.float32)
            new_red = _recoloured(red, green, blue, params_ptr, 0, luma)
            new_green = _recoloured(red, green, blue, params_ptr, 1, luma)
            new_blue = _recoloured(red, green, blue, params_ptr, 2, luma)
            if sweep == 0:
                mean_r += tl.sum(tl.where(ok, new_red, 0.0)) / plane
                mean_g += tl.sum(tl.where(ok, new_green, 0.0)) / plane
                mean_b += tl.sum(tl.where(ok, new_blue, 0.0)) / plane
            else:
                boxed = _boxed(params_ptr, y, x)
                written = y[:, None] * W + x[None, :]
                _store(out_ptr + written, ok, new_red, params_ptr, boxed, mean_r, scale_r, shift_r)
                _store(out_ptr + plane + written, ok, new_green, params_ptr, boxed, mean_g, scale_g, shift_g)
                _store(out_ptr + 2 * plane + written, ok, new_blue, params_ptr, boxed, mean_b, scale_b, shift_b)


@triton.jit
def _mirror(i: t.Any, size: t.Any, folds: t.Any) -> Any:
    """Index i reflected into [0, size), ... 2 1 | 0 1 2 ..., ``folds`` times; from farther out it is 0, or nearly."""
    last = size - 1
    for _ in range(folds):
        i = last - tl.abs(last - tl.abs(i))
    return tl.maximum(i, 0)


@triton.jit
def _band(params_ptr: t.Any, radius: t.Any, TILE: tl.constexpr) -> Any:
    """(TILE, TILE) float16: what pixel i + radius - k away weighs in result k; taps sum to one before they are rounded.

    Centred values keep a rounded sum's error small: taps that sum to 1 + 2^-12 move white by 0.03 levels.
    """
    i = tl.arange(0, TILE)
    sharpness = 1.0 / tl.load(params_ptr + SIGMA)
    z = (i - radius).to(tl.float32) * sharpness
    total = tl.sum(tl.where(i <= 2 * radius, tl.exp2(z * z * (-0.5 * LOG2E)), 0.0), 0)
    apart = i[:, None] - i[None, :] - radius
    z = apart.to(tl.float32) * sharpness
    return tl.where(tl.abs(apart) <= radius, tl.exp2(z * z * (-0.5 * LOG2E)) / total, 0.0).to(tl.float16)


@triton.jit
def _blurred_view(
    images_ptr: t.Any, params_ptr: t.Any, out_ptr: t.Any, H: t.Any, W: t.Any, luma: t.Any,
    scale_r: t.Any, scale_g: t.Any, scale_b: t.Any, shift_r: t.Any, shift_g: t.Any, shift_b: t.Any,
    TILE: tl.constexpr,
) -> None:  # fmt: skip
    """A blurred view, tile by tile and channel by channel."""
    plane = tl.cast(H * W, tl.int64)
    flip = tl.load(params_ptr + FLIP) != 0.0
    erases = tl.load(params_ptr + BOX + 1) > tl.load(params_ptr + BOX)
    radius = tl.load(params_ptr + RADIUS).to(tl.int32)
    band = _band(params_ptr, radius, TILE)
    side = (TILE - 2 * radius) // STEP * STEP  # of a tile's results
    across = tl.cdiv(W, side)
    folds_y, folds_x = 1 + radius // tl.maximum(H - 1, 1), 1 + radius // tl.maximum(W - 1, 1)
    i = tl.arange(0, TILE)
    mean_r, mean_g, mean_b = 0.0, 0.0, 0.0
    for sweep in range(tl.where(erases, 0, 1), 2):  # the first sums up the mean colour, the second writes
        # One loop, not two: what a tile's channels share would wait in registers, of which there are too few.
        for step in range(tl.cdiv(H, side) * across * 3):
            tile, channel = step // 3, step % 3
            first_y, first_x = tile // across * side, tile % across * side
            from_y, from_x = _mirror(first_y - radius + i, H, folds_y), _mirror(first_x - radius + i, W, folds_x)
            taken = from_y[:, None] * W + tl.where(flip, W - 1 - from_x, from_x)[None, :]
            red = tl.load(images_ptr + taken).to(tl.float32)
            green = tl.load(images_ptr + plane + taken).to(tl.float32)
            blue = tl.load(images_ptr + 2 * plane + taken).to(tl.float32)
            sharp = _recoloured(red, green, blue, params_ptr, channel, luma) - CENTRE
            half = tl.dot(sharp.to(tl.float16), band)
            colour = tl.dot(tl.trans(band), half.to(tl.float16)) + CENTRE
            y, x = first_y + i, first_x + i
            ok = ((i < side) & (y < H))[:, None] & ((i < side) & (x < W))[None, :]
            if sweep == 0:
                part = tl.sum(tl.where(ok, colour, 0.0)) / plane
                mean_r += tl.where(channel == 0, part, 0.0)
                mean_g += tl.where(channel == 1, part, 0.0)
                mean_b += tl.where(channel == 2, part, 0.0)
            else:
                _store(
                    out_ptr + channel * plane + (y[:, None] * W + x[None, :]), ok, colour, params_ptr,
                    _boxed(params_ptr, y, x), _of_channel(channel, mean_r, mean_g, mean_b),
                    _of_channel(channel, scale_r, scale_g, scale_b),
                    _of_channel(channel, shift_r, shift_g, shift_b),
                )  # fmt: skip


@triton.jit
def _augment_kernel(
    images_ptr: t.Any,  # (B, 3, H, W), uint8
    params_ptr: t.Any,  # (B, FIELDS)
    out_ptr: t.Any,  # (B, 3, H, W)
    H: t.Any,
    W: t.Any,
    scale_r: t.Any,  # normalised = scale * grey level + shift
    scale_g: t.Any,
    scale_b: t.Any,
    shift_r: t.Any,
    shift_g: t.Any,
    shift_b: t.Any,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One view, from its parameters."""
    view = tl.program_id(0).to(tl.int64)
    plane = H * W
    images_ptr += view * 3 * plane
    out_ptr += view * 3 * plane
    params_ptr += view * FIELDS
    pivots = tl.load(params_ptr + PIVOT) != 0.0
    pivots |= tl.load(params_ptr + PIVOT + 1) != 0.0
    pivots |= tl.load(params_ptr + PIVOT + 2) != 0.0
    luma = 0.0
    if pivots:
        luma = _mean_luma(images_ptr, plane, BLOCK)
    if tl.load(params_ptr + RADIUS) > 0.0:
        _blurred_view(
            images_ptr, params_ptr, out_ptr, H, W, luma, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b, TILE
        )  # fmt: skip
    else:
        _plain_view(
            images_ptr, params_ptr, out_ptr, H, W, luma, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
            ROWS, COLUMNS,
        )  # fmt: skip


# --- configurations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """How the kernel is built: the side of a blurred tile, rows and columns of a plain one, pixels that the mean takes
    at a time, warps and pipeline stages of a program, registers a thread at most (None: as many as there are)."""

    tile: int
    rows: int
    columns: int
    block: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def tiles(self) -> tuple[int, int, int, int]:
        return self.tile, self.rows, self.columns, self.block

    @property
    def built(self) -> dict[str, int]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


# By architecture (compute capability; 0 is every other device, which may not know the limit). Pinned: nothing is tuned
# at run time. With 128 registers a thread two programs share a multiprocessor; left alone the assembler takes up to 244
# on sm_80, and two do not fit. Half as many would spill.
CONFIGS: dict[int, Config] = {
    0: Config(tile=64, rows=32, columns=64, block=4096, warps=8, stages=1),
    **{arch: Config(64, 32, 64, block=4096, warps=8, stages=1, registers=128) for arch in (80, 90, 100)},
}

# --- the operation ----------------------------------------------------------------------------------------------------


def render(images_BCHW: Tensor, params_BF: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
    """One launch into ``out``; arguments as ``augment_batch``'s, checked there, contiguous and on one device."""
    B, _, H, W = images_BCHW.shape
    config = CONFIGS[_architecture(images_BCHW.device)]
    scale, shift = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    with _on(images_BCHW):
        _launch(
            _augment_kernel, (B,), images_BCHW, params_BF, out, H, W, *scale, *shift, *config.tiles, **config.built
        )  # fmt: skip


@torch.library.custom_op(
    "rocket_fast::augment_batch", mutates_args=(), device_types="cpu" if INTERPRETED else "cuda"
)  # fmt: skip
def augment_operation(
    images_BCHW: Tensor, params_BF: Tensor, mean: Sequence[float], std: Sequence[float], out_dtype: torch.dtype
) -> Tensor:
    """``augment_batch`` with packed parameters on the images' device."""
    out = torch.empty(images_BCHW.shape, dtype=out_dtype, device=images_BCHW.device)
    render(images_BCHW.contiguous(), params_BF.contiguous(), mean, std, out)
    return out


@augment_operation.register_fake
def _(
    images_BCHW: Tensor, params_BF: Tensor, mean: Sequence[float], std: Sequence[float], out_dtype: torch.dtype
) -> Tensor:
    return torch.empty(images_BCHW.shape, dtype=out_dtype, device=images_BCHW.device)


# --- public -----------------------------------------------------------------------------------------------------------


def pack_params(params: Sequence[ViewParams], height: int, width: int, *, pin_memory: bool = False) -> Tensor:
    """Views' parameters as the kernel reads them: float32 (B, 23) on the CPU, one row a view.

    A row holds, in this order: flip (0 or 1); matrix (9, row by row), pivot (3), shift (3); the blur's sigma and radius
    in pixels (0 for none); the erased rectangle's top, bottom, left, right in pixels; the solarize threshold. Window
    and warp are not in it.

    Args:
        params: one for each view; blurs up to sigma 8.
        height, width: of the views, in pixels.
        pin_memory: in page-locked memory, from which a copy to the device makes nobody wait.

    Raises:
        ValueError: not ViewParams, or a blur too wide.
    """
    listed = isinstance(params, Sequence) and all(isinstance(view, ViewParams) for view in params)
    require(listed, "params", type(params), "a list or tuple of ViewParams, or packed parameters")
    packed = torch.zeros(len(params), FIELDS.value, pin_memory=pin_memory)
    if not params:
        return packed
    rows = packed.numpy()
    matrix = np.array([view.matrix for view in params], np.float64).reshape(-1, 9)
    pivot, shift = (np.array([getattr(view, name) for view in params], np.float64) for name in ("pivot", "shift"))
    recoloured = (matrix != np.eye(3).reshape(9)).any(1) | (shift != 0).any(1)  # else the pivot does not count either
    sigma = np.array([view.blur_sigma for view in params], np.float64)
    wrong = ~(3 * sigma <= MAX_RADIUS)  # also where it is NaN
    require(not wrong.any(), "blur_sigma", sigma[wrong][:1].tolist(), f"at most {MAX_RADIUS / 3:g} pixels")
    rows[:, FLIP.value] = [view.flip for view in params]
    rows[:, MATRIX.value : PIVOT.value] = matrix
    rows[:, PIVOT.value : SHIFT.value] = np.where(recoloured[:, None], pivot, 0)
    rows[:, SHIFT.value : SIGMA.value] = shift
    rows[:, SIGMA.value] = np.maximum(sigma, 1e-3)  # so sharp that only one tap counts, and no division by zero
    rows[:, RADIUS.value] = np.where(sigma > 0, np.maximum(1, np.ceil(3 * sigma)), 0)
    rows[:, BOX.value : SOLARIZE.value] = _boxes(np.array([view.erase for view in params], np.float64), height, width)
    rows[:, SOLARIZE.value] = [view.solarize for view in params]
    return packed


def _boxes(erase_B4: np.ndarray, height: int, width: int) -> np.ndarray:
    """Top, bottom, left, right in pixels, as the CPU's kernel rounds them."""
    top, left, high, wide = erase_B4.T
    y, x = np.trunc(top * height), np.trunc(left * width)
    bottom, right = y + np.trunc(high * height + 0.5), x + np.trunc(wide * width + 0.5)
    boxes = np.stack([y, np.minimum(bottom, height), x, np.minimum(right, width)], axis=1)
    return np.where(high[:, None] > 0, boxes, 0)


def augment_batch(
    images_BCHW: Tensor,
    params: Sequence[ViewParams] | Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Views that were cropped and resized, augmented and normalised: what ``augment.render_view`` and then
    ``image_augment.normalize`` make of them, within 1 grey level before normalisation.

    One launch and, if ``params`` are not on the device yet, one copy there.

    Args:
        images_BCHW: uint8 (B, 3, H, W) on a CUDA device (on the CPU under Triton's interpreter).
        params: one ``ViewParams`` for each view, of which window and warp are done and not looked at; or what
            ``pack_params`` made of them, on the CPU or the images' device.
        mean, std: of the normalisation, per channel, in shares of the range.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        (B, 3, H, W), contiguous, in ``out_dtype``: (value / 255 - mean) / std.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    _check_images(images_BCHW)
    _check_normalisation(mean, std, out_dtype)
    B, _, H, W = images_BCHW.shape
    if not isinstance(params, Tensor):
        params = pack_params(params, H, W, pin_memory=images_BCHW.is_cuda)
        require(len(params) == B, "len(params)", len(params), f"{B}, one for each view")
    shape = tuple(params.shape)
    require(shape == (B, FIELDS.value), "params", shape, lambda: f"a shape ({B}, {FIELDS.value}), a row for each view")
    require(params.dtype == torch.float32, "params", params.dtype, "float32, as pack_params makes them")
    near = params.device.type == "cpu" or params.device == images_BCHW.device
    require(near, "params", params.device, f"the CPU or the device of images_BCHW, {images_BCHW.device}")
    packed = params.to(images_BCHW.device, non_blocking=True)
    return augment_operation(images_BCHW, packed, [float(m) for m in mean], [float(s) for s in std], out_dtype)


def _check_images(images: Tensor) -> None:
    require(isinstance(images, Tensor), "images_BCHW", type(images), "a tensor")
    shape = tuple(images.shape)
    fits = images.ndim == 4 and min(shape) > 0 and shape[1] == 3
    require(fits, "images_BCHW", shape, "a shape (B, 3, H, W), none of them 0")
    require(shape[2] * shape[3] < 2**30, "images_BCHW", shape, "views of fewer than 2^30 pixels")
    require(images.dtype == torch.uint8, "images_BCHW", images.dtype, "uint8")
    device = "cpu" if INTERPRETED else "cuda"
    require(images.device.type == device, "images_BCHW", images.device, f"a {device} device")


def _check_normalisation(mean: Sequence[float], std: Sequence[float], out_dtype: torch.dtype) -> None:
    for name, values in (("mean", mean), ("std", std)):
        listed = isinstance(values, Sequence) and all(isinstance(value, numbers.Real) for value in values)
        fits = listed and len(values) == 3 and all(math.isfinite(value) for value in values)
        require(fits, name, values, "three finite numbers")
    require(min(std) > 0, "std", std, "numbers > 0")
    allowed = (torch.bfloat16, torch.float16, torch.float32)
    require(out_dtype in allowed, "out_dtype", out_dtype, "bfloat16, float16 or float32")
