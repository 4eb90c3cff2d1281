"""What is done to a picture to make a view of it: one specification, drawn here, rendered by every loader backend.

A ``ViewConfig`` says what may happen; ``draw`` decides, with one random generator per (sample, view), what does happen
and returns it as ``ViewParams``; a backend (``kernels/augment.py`` on the CPU) renders exactly that. Everything done to
colour by brightness, contrast, saturation, hue, a random matrix and grayscale is one 3x3 matrix and an offset.

Differences from torchvision's ColorJitter: the order is fixed (brightness, contrast, random matrix, saturation, hue,
grayscale) instead of shuffled, hue turns in YIQ instead of HSV, and values are clipped once at the end instead of after
each. Contrast pivots on the mean luma of the view, as there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rocket_fast.errors import require

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SOLARIZE_THRESHOLD = 128  # torchvision's and BYOL's
NO_SOLARIZE = 256
_MID_GREY = 127.5

LUMA = (0.299, 0.587, 0.114)
_YIQ = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])  # the 1953 NTSC primaries
# Saturation s and hue angle t together are GRAY + s (cos t CHROMA + sin t TURN); s = 0 is grayscale.
SAME, ZERO = np.eye(3), np.zeros(3)
"""The matrix, and the pivot or shift, of colours that stay."""
_GRAY = np.tile(np.array(LUMA), (3, 1))
_CHROMA = np.eye(3) - _GRAY
_TURN = np.linalg.inv(_YIQ) @ np.array([(0.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, -1.0, 0.0)]) @ _YIQ

_CROP_TRIES = 10  # as torchvision's RandomResizedCrop
# Every decision has its own place among a view's uniform numbers, so switching one off leaves the others as they were.
_AT_CROP, _AT_PLACE, _AT_FLIP, _AT_JITTER, _AT_GRAY = 0, 20, 22, 23, 28
_AT_BLUR, _AT_SOLARIZE, _AT_WARP, _AT_ERASE, _AT_SHIFT, _AT_ZOOM, _UNIFORMS = 29, 31, 32, 35, 40, 43, 44


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What may happen to a picture on its way to one view; the defaults are the recipe's weak view."""

    size: int = 224
    """Height and width of the view in pixels."""
    scale: tuple[float, float] = (0.5, 1.0)
    """Random resized crop: share of the picture's area, smallest and largest."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random resized crop: width over height, smallest and largest."""
    flip_prob: float = 0.0
    """Probability of a left-right flip."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strength of brightness, contrast, saturation (factors 1 +- x) and hue (+- x turns)."""
    jitter_prob: float = 0.0
    """Probability that colours are jittered at all."""
    gray_prob: float = 0.0
    """Probability of grayscale."""
    blur_prob: float = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Blur: smallest and largest standard deviation in pixels of the view."""
    solarize_prob: float = 0.0
    """Probability that all values of 128 and more are inverted."""
    rotate_degrees: float = 0.0
    """Rotation by up to so many degrees either way; edges of the picture are repeated outwards."""
    shear_degrees: float = 0.0
    """Shear along x and along y by up to so many degrees either way."""
    zoom_out: float = 1.0
    """The crop is seen from up to so many times as far, with what lies around it, or its edges repeated outwards."""
    color_matrix_std: float = 0.0
    """Standard deviation of a random 3x3 colour matrix around the identity, about mid-grey; helps on small drawings."""
    color_shift: float = 0.0
    """Each channel moves by up to so much of its range, either way."""
    erase_prob: float = 0.0
    """Probability that a rectangle of 2% to 33% of the view takes the view's mean colour."""

    def __post_init__(self) -> None:
        require(self.size >= 1, "size", self.size, "a number of pixels >= 1")
        require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", self.scale, "0 < smallest <= largest <= 1")
        require(0 < self.ratio[0] <= self.ratio[1], "ratio", self.ratio, "0 < smallest <= largest")
        require(0 < self.blur_sigma[0] <= self.blur_sigma[1], "blur_sigma", self.blur_sigma, "0 < smallest <= largest")
        require(min(self.jitter) >= 0 and max(self.jitter[:3]) <= 1, "jitter", self.jitter, "strengths in [0, 1]")
        require(self.jitter[3] <= 0.5, "jitter (hue)", self.jitter[3], "at most 0.5 turns")
        for name in ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob", "erase_prob"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a probability")
        require(0 <= self.rotate_degrees <= 180, "rotate_degrees", self.rotate_degrees, "0 to 180")
        require(0 <= self.shear_degrees <= 60, "shear_degrees", self.shear_degrees, "0 to 60")
        require(1 <= self.zoom_out <= 4, "zoom_out", self.zoom_out, "1 to 4")
        require(self.color_matrix_std >= 0, "color_matrix_std", self.color_matrix_std, "a number >= 0")
        require(0 <= self.color_shift <= 1, "color_shift", self.color_shift, "a share of the range, 0 to 1")


@dataclass(frozen=True, kw_only=True)
class ImageAugmentConfig:
    """The views made of each picture: one weak, then the strong ones in order."""

    weak: ViewConfig
    """The weak view, view 0."""
    strong: tuple[ViewConfig, ...] = ()
    """The strong views, view 1 and up; empty for plain CLIP."""

    @property
    def views(self) -> tuple[ViewConfig, ...]:
        """All views, the weak one first."""
        return (self.weak, *self.strong)


def weak_view(size: int = 224) -> ViewConfig:
    """The recipe's weak view: RandomResizedCrop scale (.5, 1), nothing else."""
    return ViewConfig(size=size)


def strong_view(size: int = 224) -> ViewConfig:
    """The recipe's strong view (SimCLR's, lighter): crop from 8%, jitter .4 .4 .4 .1, gray, blur, flip, no solarize."""
    return ViewConfig(size=size, scale=(0.08, 1.0), flip_prob=0.5, jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5)


def plain_augment(size: int = 224) -> ImageAugmentConfig:
    """Plain CLIP: the weak view alone."""
    return ImageAugmentConfig(weak=weak_view(size))


def recipe_augment(size: int = 224, strong_size: int | None = None, strong_views: int = 2) -> ImageAugmentConfig:
    """The recipe: one weak view and equal strong ones, of side ``strong_size`` (192 for 29M) or else ``size``."""
    strong = strong_view(strong_size or size)
    return ImageAugmentConfig(weak=weak_view(size), strong=(strong,) * strong_views)


def asymmetric_augment(size: int = 224, strong_size: int | None = None) -> ImageAugmentConfig:
    """BYOL's pair of strong views: blur always / .1, solarize never / .2, jitter .4 .4 .2 .1."""
    base = dataclasses.replace(strong_view(strong_size or size), jitter=(0.4, 0.4, 0.2, 0.1))
    first = dataclasses.replace(base, blur_prob=1.0, solarize_prob=0.0)
    second = dataclasses.replace(base, blur_prob=0.1, solarize_prob=0.2)
    return ImageAugmentConfig(weak=weak_view(size), strong=(first, second))


@dataclass(frozen=True)
class ViewParams:
    """One view, fully decided: what a backend renders, in this order.

    ``window``: top, left, height, width of the part of the source, in source pixels, that fills the view.
    ``bounded``: True if the resize filter sees the window only (crop, then resize), False if the whole picture (resize,
    then crop). ``warp``: 2x2 row by row, from offsets (x, y) about the window's centre to source offsets.
    ``flip``: mirror left-right. ``matrix`` (3, 3), ``pivot`` and ``shift`` (3,), float64:
    colour' = matrix @ colour + pivot * (mean luma of the view) + shift. ``blur_sigma``: in view pixels, 0 for none.
    ``erase``: top, left, height, width as shares of the view, zero for none. ``solarize``: values from here on are
    inverted; 256 for none.
    """

    window: tuple[float, float, float, float]
    bounded: bool = True
    warp: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 1.0)
    flip: bool = False
    matrix: np.ndarray = dataclasses.field(default_factory=lambda: SAME)
    pivot: np.ndarray = dataclasses.field(default_factory=lambda: ZERO)
    shift: np.ndarray = dataclasses.field(default_factory=lambda: ZERO)
    blur_sigma: float = 0.0
    erase: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    solarize: int = NO_SOLARIZE


def draw(view: ViewConfig, height: int, width: int, rng: np.random.Generator) -> ViewParams:
    """Decide one view of a picture of ``height`` x ``width`` pixels; takes the same numbers from ``rng`` every time."""
    return draw_unplaced(view, rng)(height, width)


def draw_unplaced(view: ViewConfig, rng: np.random.Generator) -> Callable[[int, int], ViewParams]:
    """Decide one view of a picture of a size not yet known: ``draw``'s result as a function of height and width."""
    u = rng.random(_UNIFORMS).tolist()
    noise = rng.standard_normal((3, 3)) if view.color_matrix_std > 0 else None
    matrix, pivot, shift = _draw_colour(view, u, noise)
    warp, flip = _draw_warp(view, u), u[_AT_FLIP] < view.flip_prob
    sigma = _between(view.blur_sigma, u[_AT_BLUR + 1]) if u[_AT_BLUR] < view.blur_prob else 0.0
    erase = _draw_erase(u[_AT_ERASE:]) if u[_AT_ERASE] < view.erase_prob else (0.0, 0.0, 0.0, 0.0)
    solarize = SOLARIZE_THRESHOLD if u[_AT_SOLARIZE] < view.solarize_prob else NO_SOLARIZE

    def place(height: int, width: int) -> ViewParams:
        window = _draw_window(view, height, width, u)
        return ViewParams(window, True, warp, flip, matrix, pivot, shift, sigma, erase, solarize)

    return place


def centre_view(height: int, width: int, size: int) -> ViewParams:
    """The evaluation view: shorter side resized to ``size``, centre crop (torchvision's Resize and CenterCrop)."""
    short = min(height, width)
    resized_h, resized_w = int(size * height / short), int(size * width / short)
    top, left = round((resized_h - size) / 2), round((resized_w - size) / 2)
    step_y, step_x = height / resized_h, width / resized_w
    return ViewParams(window=(top * step_y, left * step_x, size * step_y, size * step_x), bounded=False)


def normalize(
    images: Tensor,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Tensor:
    """uint8 (B, 3, H, W) to float32 (x / 255 - mean) / std, on the images' device; float images are returned as is."""
    if images.is_floating_point():
        return images
    require(images.dtype == torch.uint8, "images", images.dtype, "uint8, or floating point if already normalised")
    scale, shift = _scale_and_shift(mean, std, images.device)
    return torch.addcmul(shift, images.to(torch.float32), scale)


@functools.lru_cache(maxsize=64)
def _scale_and_shift(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """``normalize``'s factors, (3, 1, 1) each; kept, since sending them to a device makes the host wait for it."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale[:, None, None], shift[:, None, None]


def _between(limits: tuple[float, float], u: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * u


def _draw_window(view: ViewConfig, height: int, width: int, u: list[float]) -> tuple[float, float, float, float]:
    """RandomResizedCrop: area and log-ratio until the box fits, else the largest centred one of an allowed ratio."""
    log_ratio = (math.log(view.ratio[0]), math.log(view.ratio[1]))
    for k in range(_AT_CROP, _AT_CROP + 2 * _CROP_TRIES, 2):
        area = height * width * _between(view.scale, u[k])
        ratio = math.exp(_between(log_ratio, u[k + 1]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(u[_AT_PLACE] * (height - h + 1)), int(u[_AT_PLACE + 1] * (width - w + 1))
            return float(top), float(left), float(h), float(w)
    ratio = min(max(width / height, view.ratio[0]), view.ratio[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return float((height - h) // 2), float((width - w) // 2), float(h), float(w)


def _draw_warp(view: ViewConfig, u: list[float]) -> tuple[float, float, float, float]:
    if view.rotate_degrees == 0 and view.shear_degrees == 0 and view.zoom_out == 1:
        return 1.0, 0.0, 0.0, 1.0
    zoom = view.zoom_out ** u[_AT_ZOOM]  # uniform in its logarithm
    turn = math.radians(view.rotate_degrees) * (2 * u[_AT_WARP] - 1)
    shear_x = math.tan(math.radians(view.shear_degrees) * (2 * u[_AT_WARP + 1] - 1))
    shear_y = math.tan(math.radians(view.shear_degrees) * (2 * u[_AT_WARP + 2] - 1))
    c, s = zoom * math.cos(turn), zoom * math.sin(turn)
    return c - s * shear_y, c * shear_x - s, s + c * shear_y, s * shear_x + c  # zoom rotation @ [[1, x], [y, 1]]


def _draw_colour(
    view: ViewConfig, u: list[float], noise: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrix, pivot and shift of: brightness b, contrast c, random matrix and shift, saturation and hue, grayscale."""
    jitters, grays = u[_AT_JITTER] < view.jitter_prob, u[_AT_GRAY] < view.gray_prob
    if not jitters and not grays and noise is None and view.color_shift == 0:
        return SAME, ZERO, ZERO  # a tenth of the time that multiplying by them takes
    brightness = contrast = saturation = 1.0
    angle = 0.0
    if jitters:
        brightness, contrast, saturation = (
            1 + strength * (2 * u[_AT_JITTER + 1 + i] - 1) for i, strength in enumerate(view.jitter[:3])
        )
        angle = 2 * math.pi * view.jitter[3] * (2 * u[_AT_JITTER + 4] - 1)
    if grays:
        chroma = _GRAY
    elif saturation != 1 or angle != 0:
        chroma = _GRAY + (saturation * math.cos(angle)) * _CHROMA + (saturation * math.sin(angle)) * _TURN
    else:
        chroma = SAME
    if noise is None and view.color_shift == 0:  # rows of chroma add up to 1: grey stays grey
        return (brightness * contrast) * chroma, np.full(3, (1 - contrast) * brightness), ZERO
    shift = 255 * view.color_shift * (2 * np.array(u[_AT_SHIFT : _AT_SHIFT + 3]) - 1)
    if noise is not None:
        random = SAME + view.color_matrix_std * noise
        shift = chroma @ (shift + _MID_GREY * (1 - random.sum(axis=1)))
        chroma = chroma @ random
    else:
        shift = chroma @ shift
    return (brightness * contrast) * chroma, ((1 - contrast) * brightness) * chroma.sum(axis=1), shift


def _draw_erase(u: list[float]) -> tuple[float, float, float, float]:
    """A rectangle of 2% to 33% of the view and ratio .3 to 3.3 (random erasing), cut to fit."""
    area, ratio = _between((0.02, 0.33), u[1]), math.exp(_between((math.log(0.3), math.log(3.3)), u[2]))
    height, width = min(1.0, math.sqrt(area * ratio)), min(1.0, math.sqrt(area / ratio))
    return u[3] * (1 - height), u[4] * (1 - width), height, width
