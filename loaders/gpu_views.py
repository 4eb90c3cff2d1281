"""The loader ``cpu+gpu``: threads decode and crop, the GPU does what is left of a view and normalises it.

Shape legend: B samples of a batch, S side of a view. What needs the whole picture stays on the CPU, as in
``CPULoader``: reading, decoding, the crop with its resize (or rotation, shear, zoom) and the flip. Its views, uint8
(B, 3, S, S), go to the device with their ``ViewParams``, and ``triton_augment.augment_batch`` makes colour, blur,
erasing, solarizing and normalisation of them in one launch. Decoding and resizing remain the larger part: of the CPU
time of the recipe's three views it saves an eighth for pictures of 500 x 375, a fortieth for 2048 x 1536.

Views without colour or blur are ``CPULoader``'s, normalised. In the others the resize is rounded to whole grey levels
before the colours instead of after. That is 1 level at most where colours stay, and otherwise at most 1 more than half
of what the colour matrix makes of a level; on photographs, in the recipe's strong views, 0.1 on average, more than 1 in
4 of 100,000 values, and 2 at most.

Images come out normalised, in the type that the step computes in; floating-point ``Batch.images`` always are, and
``image_augment.normalize`` leaves them alone. Copy and kernel run on the stream of whoever takes the batch, so there is
nothing to wait for. On the CPU, under Triton's interpreter, all of this is tested; on a CUDA device it has not run yet.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rocket_fast.errors import optional_import, require
from rocket_fast.image_augment import IMAGENET_MEAN, IMAGENET_STD, ImageAugmentConfig, ViewParams
from rocket_fast.loaders.base import DataConfig
from rocket_fast.loaders.cpu import Chunk, CPULoader, Made, Making, assemble
from rocket_fast.text_augment import TextAugmentConfig
from rocket_fast.tokenizer import Tokenizer


class GPUViewsLoader(CPULoader):
    """Image-text batches as ``CPULoader``'s, their views finished on ``device``; implements ``loaders.base.Loader``.

    Images are normalised, (B, 3, S, S) in ``dtype`` on ``device``. Texts and ``valid`` stay on the CPU. Keys, captions,
    validity, order and crops equal the CPU loader's; a saved place can be continued by either. Raises ValueError for a
    device that is not CUDA and for blurs wider than the kernel's, MissingExtra without triton.
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
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._kernels = optional_import("rocket_fast.kernels.triton_augment", "gpu")
        usable = device.type == ("cpu" if self._kernels.INTERPRETED else "cuda")
        require(usable, "device", str(device), "a CUDA device; without one, data.backend = 'cpu' makes the same views")
        widest = self._kernels.MAX_RADIUS / 3
        for number, view in enumerate(image.views):
            fits = view.blur_prob == 0 or view.blur_sigma[1] <= widest
            expected = f"at most {widest:g}; data.backend = 'cpu' can do it"
            require(fits, f"blur_sigma of view {number}", view.blur_sigma[1], expected)
        self._device, self._dtype = device, dtype
        pinned = device.type == "cuda"
        super().__init__(data, image, text, tokenizer, seed=seed, rank=rank, world_size=world_size, pin_memory=pinned)

    def _submit(self, order: np.ndarray, epoch: int, number: int) -> Making:
        size, crops = self._cursor.batch_size, self._new_images()
        outs = [crop.numpy() for crop in crops]
        rest: list[list[ViewParams]] = [[_NOTHING] * size for _ in self.image.views]
        render_view = optional_import("rocket_fast.kernels.augment", "train").render_view

        def render(slot: int, picture: tuple[np.ndarray, list[ViewParams]]) -> None:
            pixels, views = picture
            for out, left, params in zip(outs, rest, views, strict=True):
                render_view(pixels, _crop_of(params), out[slot])
                left[slot] = replace(params, flip=False)

        return _Pending(self, crops, rest, self._make_chunks(order, epoch, number, self._decode, render))

    def finish(self, crop: Tensor, params: list[ViewParams]) -> Tensor:
        """A view of all samples, cropped, resized and flipped; normalised, on the device."""
        return self._kernels.augment_batch(
            crop.to(self._device, non_blocking=True),
            params,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            out_dtype=self._dtype,
        )


_NOTHING = ViewParams(window=(0.0, 0.0, 1.0, 1.0))


def _crop_of(params: ViewParams) -> ViewParams:
    """The part of a view that needs the whole picture, and the flip, which costs nothing there."""
    return ViewParams(window=params.window, bounded=params.bounded, warp=params.warp, flip=params.flip)


@dataclass(frozen=True)
class _Pending:
    """A batch being made: crops to be filled by the threads, what is to be done to them, and the threads' promises."""

    loader: GPUViewsLoader
    crops: tuple[Tensor, ...]
    params: list[list[ViewParams]]
    chunks: list[Future[Chunk]]

    def result(self) -> Made:
        made = [chunk.result() for chunk in self.chunks]  # crops and parameters are there once these are
        images = tuple(self.loader.finish(crop, params) for crop, params in zip(self.crops, self.params, strict=True))
        return assemble(images, made)

    def cancel(self) -> None:
        for chunk in self.chunks:
            chunk.cancel()
