"""The DALI loader: pictures are decoded and rendered by NVIDIA DALI on a GPU, or, for tests, on the CPU.

Shape legend: B samples of a batch, S side of a view. Order, captions, crops and all other random numbers, resuming, and
which samples are bad, are the CPU loader's: its threads read, check every picture and draw its views; DALI is given the
JPEGs as they are, what to do with them as tensors, and decides nothing. It keeps no state between batches.

Pixels follow ``kernels/augment.py`` step by step: decode once; per view crop, antialiased bicubic resize, flip, colour
matrix, clip, Gaussian blur, erase, round, solarize. On the CPU, where JPEGs are decoded alike, only the resize differs:
Pillow leaves out what lies beyond the crop's border, DALI repeats the last pixel, and Pillow rounds between columns and
rows. On photographs that is 0.1 to 0.3 grey levels on average and 3 at most, on noise and checkerboards 1 and 40. On a
GPU, nvJPEG's rounding is added.

DALI decodes damaged JPEGs without a word as long as it finds all lines, so none gets there unchecked (``check_jpeg``,
0.6 of the time of decoding on the CPU, and the larger part of what is left for the CPU to do). Whatever is no ordinary
JPEG the CPU decodes and passes on as uncompressed PPM, which changes no pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rocket_fast.errors import optional_import, require
from rocket_fast.image_augment import LUMA, ImageAugmentConfig, ViewConfig, ViewParams
from rocket_fast.loaders.base import DataConfig
from rocket_fast.loaders.cpu import Chunk, CPULoader, Draft, Made, Making, assemble, check_jpeg, decode_image
from rocket_fast.text_augment import TextAugmentConfig
from rocket_fast.tokenizer import Tokenizer


def unsupported_option(data: DataConfig, image: ImageAugmentConfig) -> tuple[str, object] | None:
    """Name and value of the first option in use that only the CPU loader knows."""
    if data.trim_margins:
        return "data.trim_margins", data.trim_margins
    if data.quality != "exact":
        return "data.quality", data.quality
    names = ["image.weak", *(f"image.strong.{number}" for number in range(len(image.strong)))]
    for where, view in zip(names, image.views, strict=True):
        for option, off in (("rotate_degrees", 0), ("shear_degrees", 0), ("zoom_out", 1)):
            if getattr(view, option) != off:
                return f"{where}.{option}", getattr(view, option)
    return None


class DALILoader(CPULoader):
    """Image-text batches as ``CPULoader``'s, with pictures by DALI; implements ``loaders.base.Loader``.

    ``device_id``: the CUDA device that decodes and renders and where the images are given; None is the CPU. Texts and
    ``valid`` stay on the CPU. Keys, captions, validity and order equal the CPU loader's; a saved place can be
    continued by either. Raises ValueError for an option that DALI cannot do, MissingExtra where it is not installed.

    A whole JPEG that DALI cannot read (rare ones: odd subsampling, say) costs the batch a second try, with all its
    pictures decoded on the CPU.
    """

    def __init__(
        self,
        data: DataConfig,
        image: ImageAugmentConfig,
        text: TextAugmentConfig | None,
        tokenizer: Tokenizer | None,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device_id: int | None,
    ) -> None:
        option, value = unsupported_option(data, image) or ("", None)
        require(not option, option, value, "no such thing with DALI; data.backend = 'cpu' can do it")
        super().__init__(data, image, text, tokenizer, seed=seed, rank=rank, world_size=world_size)
        self._renderer = _Renderer(image.views, self._cursor.batch_size, data.workers, device_id)
        self._runner = ThreadPoolExecutor(1, thread_name_prefix="rocket-fast-dali")  # one, so batches stay in order

    def close(self) -> None:
        """Stop and join the threads, DALI's too."""
        super().close()
        self._runner.shutdown(wait=True, cancel_futures=True)
        self._renderer.close()

    def _submit(self, order: np.ndarray, epoch: int, number: int) -> Making:
        inputs, chunks = self._prepare(order, epoch, number)
        return _Pending(chunks, self._runner.submit(self._finish, order, epoch, number, inputs, chunks))

    def _prepare(
        self, order: np.ndarray, epoch: int, number: int, *, decoded: bool = False
    ) -> tuple[_Inputs, list[Future[Chunk]]]:
        """Have the threads fill what DALI needs for a batch; with ``decoded`` they decode all its pictures."""
        inputs = _Inputs(self.image.views, self._cursor.batch_size)

        def decode(draft: Draft) -> tuple[_Picture, list[ViewParams]]:
            picture = (self._decoded if decoded else self._checked)(draft.sample.image)
            return picture, draft.views(picture.height, picture.width)

        def give(slot: int, made: tuple[_Picture, list[ViewParams]]) -> None:
            inputs.put(slot, *made)

        return inputs, self._make_chunks(order, epoch, number, decode, give)

    def _checked(self, data: bytes) -> _Picture:
        size = check_jpeg(data, self.data.pixel_limit)
        return self._decoded(data) if size is None else _Picture(np.frombuffer(data, np.uint8), *size)

    def _decoded(self, data: bytes) -> _Picture:
        pixels = decode_image(data, self.data.pixel_limit)
        height, width = pixels.shape[:2]
        header = np.frombuffer(b"P6\n%d %d\n255\n" % (width, height), np.uint8)
        return _Picture(np.concatenate([header, pixels.reshape(-1)]), height, width)

    def _finish(self, order: np.ndarray, epoch: int, number: int, inputs: _Inputs, chunks: list[Future[Chunk]]) -> Made:
        made = [chunk.result() for chunk in chunks]
        try:
            images = self._renderer.render(inputs.named)
        except RuntimeError:  # what DALI raises for anything, and so for a JPEG of a kind it does not know
            inputs, chunks = self._prepare(order, epoch, number, decoded=True)
            made = [chunk.result() for chunk in chunks]
            images = self._renderer.render(inputs.named)
        return assemble(images, made)


@dataclass(frozen=True)
class _Pending:
    """A batch being made: first chunks of its samples, then the whole of it."""

    chunks: list[Future[Chunk]]
    batch: Future[Made]

    def result(self) -> Made:
        batch, skipped = self.batch.result()
        for image in batch.images:
            if (
                image.is_cuda
            ):  # its memory belongs to the loader's stream: not to be used again before the caller's is done
                image.record_stream(torch.cuda.current_stream(image.device))
        return batch, skipped

    def cancel(self) -> None:
        self.batch.cancel()
        for chunk in self.chunks:
            chunk.cancel()


# What DALI is given ---------------------------------------------------------------------------------------------------


class _Picture(NamedTuple):
    encoded: np.ndarray
    height: int
    width: int


class _Field(NamedTuple):
    """An input of a view's graph: what each sample has in it."""

    shape: tuple[int, ...]
    dtype: type[np.generic]


def _fields(view: ViewConfig) -> dict[str, _Field]:
    """The inputs of a view's graph, which has no steps that its configuration rules out."""
    fields = {"start": _Field((2,), np.int32), "extent": _Field((2,), np.int32)}
    if view.flip_prob > 0:
        fields["flip"] = _Field((), np.int32)
    if view.jitter_prob > 0 or view.gray_prob > 0 or view.color_matrix_std > 0 or view.color_shift > 0:
        fields["matrix"] = _Field((3, 3), np.float32)
        fields["pivot"] = _Field((3, 3), np.float32)
        fields["shift"] = _Field((3,), np.float32)
    if view.blur_prob > 0:
        fields |= {"sigma": _Field((), np.float32), "taps": _Field((), np.int32)}
    if view.erase_prob > 0:
        fields |= {"box_start": _Field((2,), np.float32), "box_extent": _Field((2,), np.float32)}
    if view.solarize_prob > 0:
        fields["solarize"] = _Field((), np.int32)
    return fields


def _values(params: ViewParams, size: int) -> dict[str, Any]:
    """What a view's fields hold for one sample; ``size`` is the view's side."""
    top, left, height, width = params.window
    box_top, box_left = int(params.erase[0] * size), int(params.erase[1] * size)
    box_height, box_width = (int(share * size + 0.5) for share in params.erase[2:])
    blurs = params.blur_sigma > 0
    return {
        "start": (top, left),
        "extent": (height, width),
        "flip": params.flip,
        "matrix": params.matrix,
        "pivot": np.outer(params.pivot, LUMA),  # of the view's mean colour, whose luma is its mean luma
        "shift": params.shift,
        "sigma": params.blur_sigma if blurs else 1.0,
        "taps": 2 * max(1, int(np.ceil(3 * params.blur_sigma))) + 1 if blurs else 1,  # one tap changes nothing
        "box_start": (box_top, box_left),
        "box_extent": (min(box_height, size - box_top), min(box_width, size - box_left)),
        "solarize": params.solarize,
    }


class _Inputs:
    """A batch for DALI: the encoded pictures, and per view its fields, a row a sample. Threads fill it slot by slot."""

    def __init__(self, views: tuple[ViewConfig, ...], size: int) -> None:
        self._sides = [view.size for view in views]
        self._rows = [
            {name: np.empty((size, *field.shape), field.dtype) for name, field in _fields(view).items()}
            for view in views
        ]
        self._encoded = [np.empty(0, np.uint8)] * size

    def put(self, slot: int, picture: _Picture, views: list[ViewParams]) -> None:
        """Sample ``slot``."""
        self._encoded[slot] = picture.encoded
        for rows, params, side in zip(self._rows, views, self._sides, strict=True):
            values = _values(params, side)
            for name, row in rows.items():
                row[slot] = values[name]

    @property
    def named(self) -> dict[str, Any]:
        """By the names in the graph."""
        fields = {f"{name}{view}": row for view, rows in enumerate(self._rows) for name, row in rows.items()}
        return {"encoded": self._encoded, **fields}


# The graph ------------------------------------------------------------------------------------------------------------


class _Dali(NamedTuple):
    dali: ModuleType
    fn: Any
    types: Any
    math: Any

    @property
    def dtypes(self) -> Mapping[type[np.generic], Any]:
        return {np.int32: self.types.INT32, np.float32: self.types.FLOAT, np.uint8: self.types.UINT8}


def _import() -> _Dali:
    return _Dali(*(optional_import(f"nvidia.dali{name}", "gpu") for name in ("", ".fn", ".types", ".math")))


class _Renderer:
    """DALI's pipeline for batches of one size: from the encoded pictures to the views."""

    def __init__(self, views: tuple[ViewConfig, ...], batch_size: int, threads: int, device_id: int | None) -> None:
        self._dali, self._views = _import(), views
        self._options = {"batch_size": batch_size, "num_threads": threads, "device_id": device_id}
        self._stream = None if device_id is None else torch.cuda.Stream(device_id)
        self._pipeline = self._build()

    def render(self, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Per view uint8 (B, 3, S, S), complete, on the device. Raises RuntimeError for a picture it cannot read."""
        try:
            with torch.cuda.stream(self._stream):
                outputs = self._pipeline.run(self._stream, **inputs)
                images = tuple(torch.from_dlpack(output.as_tensor()).clone() for output in outputs)
        except RuntimeError:
            self._pipeline = self._build()  # one that raised is not valid any more, it says
            raise
        if self._stream is not None:
            self._stream.synchronize()
        return images

    def close(self) -> None:
        """End DALI's threads; there is no rendering afterwards."""
        self._pipeline = None

    def _build(self) -> Any:
        fn, types, device = self._dali.fn, self._dali.types, "cpu" if self._stream is None else "gpu"
        # Depth 1: a batch goes in and comes out. The batches ahead wait in the loader, where bad ones can be mended.
        pipeline = self._dali.dali.Pipeline(**self._options, prefetch_queue_depth=1)
        with pipeline:
            pictures = fn.decoders.image(
                fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
                device="cpu" if self._stream is None else "mixed",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
            )
            outputs = [self._view(pictures, view, number, device) for number, view in enumerate(self._views)]
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline

    def _view(self, pictures: Any, view: ViewConfig, number: int, device: str) -> Any:
        """The steps of one view, (S, S, 3) float until they are rounded."""
        fn, types, clamp = self._dali.fn, self._dali.types, self._dali.math.clamp
        given = {
            name: fn.external_source(
                name=f"{name}{number}", dtype=self._dali.dtypes[field.dtype], ndim=len(field.shape)
            )
            for name, field in _fields(view).items()
        }
        # Cropped first: resizing a region of interest would look at the pixels around it.
        crop = fn.slice(pictures, start=given["start"], shape=given["extent"], axes=(0, 1))
        cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True, "dtype": types.FLOAT}
        image = clamp(fn.resize(crop, size=(view.size, view.size), **cubic), 0.0, 255.0)
        if "flip" in given:
            image = fn.flip(image, horizontal=given["flip"])
        if "matrix" in given:
            mean = fn.reductions.mean(image, axes=(0, 1), keep_dims=True)
            colour = fn.coord_transform(image, M=given["matrix"], T=given["shift"])
            image = clamp(colour + fn.coord_transform(mean, M=given["pivot"]), 0.0, 255.0)
        if "sigma" in given:
            image = fn.gaussian_blur(image, sigma=given["sigma"], window_size=given["taps"])
        if "box_start" in given:
            ones = fn.constant(device=device, fdata=1.0, shape=(view.size, view.size, 1), layout="HWC")
            kept = fn.erase(ones, anchor=given["box_start"], shape=given["box_extent"], axis_names="HW", fill_value=0.0)
            image = image * kept + fn.reductions.mean(image, axes=(0, 1), keep_dims=True) * (1.0 - kept)
        image = fn.cast(image, dtype=types.UINT8)
        if "solarize" in given:
            threshold = given["solarize"] if device == "cpu" else given["solarize"].gpu()
            inverted = fn.cast(image >= threshold, dtype=types.UINT8)
            image = image ^ (inverted * types.Constant(255, types.UINT8))
        return fn.transpose(image, perm=(2, 0, 1))
