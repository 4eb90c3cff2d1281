"""FFCV's and DALI's own ways to one view of 224 pixels, on the CPU: an epoch of batches of uint8 (B, 3, 224, 224).

Each as its documentation has it, from the pictures that ours reads, undecoded. What they do less than ours: FFCV's
resize takes the pixels' areas, DALI's is linear, both antialiased; captions come as bytes (FFCV) or not at all (DALI);
FFCV decodes with libjpeg-turbo's fast transforms; a damaged picture is no concern of theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rocket_fast.errors import installed, optional_import
from rocket_fast.image_augment import weak_view
from rocket_fast.loaders.convert import PackConfig, pack
from rocket_fast.loaders.ffcv import picture_field

VIEW = weak_view(224)
AHEAD = 2  # batches, as ours
_KEPT: list[Any] = []


class FFCV:
    """A .beton, the picture decoded, cropped and resized by RandomResizedCropRGBImageDecoder."""

    needs = "ffcv"

    def __init__(self, path: Path, threads: int, batch: int, folder: Path) -> None:
        packed = PackConfig(out=folder / f"{path.stem}-beton", format="beton")
        pack([str(path)], packed)
        ffcv, transforms = optional_import("ffcv", "ffcv"), optional_import("ffcv.transforms", "ffcv")
        decoders = optional_import("ffcv.fields.decoders", "ffcv")
        crop = decoders.RandomResizedCropRGBImageDecoder((VIEW.size, VIEW.size), VIEW.scale, VIEW.ratio)
        self.loader = ffcv.Loader(
            str(packed.out / "00000.beton"),
            batch_size=batch,
            num_workers=threads,
            order=ffcv.loader.OrderOption.RANDOM,
            batches_ahead=AHEAD,
            custom_fields={"image": picture_field()},
            pipelines={
                "image": [crop, transforms.ToTensor(), transforms.ToTorchImage()],
                "key": None,
                "caption": [decoders.BytesDecoder()],
            },
        )
        self()  # compiles

    def __call__(self) -> int:
        return sum(len(images) for images, _ in self.loader)

    def close(self) -> None:
        """Kept to the end: numba's finalizers of FFCV's functions raise, which breaks whatever Python is doing then."""
        _KEPT.append(self.loader)


class DALI:
    """The webdataset reader, decoders.image and random_resized_crop."""

    needs = "nvidia.dali"

    def __init__(self, path: Path, threads: int, batch: int, folder: Path) -> None:
        dali, fn = optional_import("nvidia.dali", "gpu"), optional_import("nvidia.dali.fn", "gpu")
        options = {"batch_size": batch, "num_threads": threads, "device_id": None, "prefetch_queue_depth": AHEAD}
        self.pipeline = dali.Pipeline(**options)
        with self.pipeline:
            jpegs = fn.readers.webdataset(paths=[str(path)], ext=["jpg"], random_shuffle=True, name="reader")
            pictures = fn.decoders.image(jpegs, device="cpu", output_type=dali.types.RGB)
            views = fn.random_resized_crop(
                pictures, size=VIEW.size, random_area=VIEW.scale, random_aspect_ratio=VIEW.ratio
            )
            self.pipeline.set_outputs(fn.transpose(views, perm=(2, 0, 1)))
        self.pipeline.build()
        self.batches = self.pipeline.reader_meta("reader")["epoch_size"] // batch
        self.pipeline.schedule_run()  # the first makes as many batches as are kept ahead, every later one a single one
        for _ in range(AHEAD):
            self.pipeline.share_outputs()
            self.pipeline.release_outputs()

    def __call__(self) -> int:
        """Not ``pipeline.run``: that makes the next epoch's first batches while another contestant is timed.

        Here nothing is left over: a pause before an epoch does not make it faster.
        """
        scheduled = count = 0
        for done in range(self.batches):
            while scheduled < min(done + AHEAD, self.batches):
                self.pipeline.schedule_run()
                scheduled += 1
            (views,) = self.pipeline.share_outputs()
            count += len(torch.from_dlpack(views.as_tensor()).clone())
            self.pipeline.release_outputs()
        return count

    def close(self) -> None:
        self.pipeline = None


def peers(path: Path, threads: int, batch: int, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Those that are installed, by name, and for each of the others why it is not there."""
    kinds = {"FFCV": FFCV, "DALI": DALI}
    missing = [
        f"{name} left out: {kind.needs} is not installed" for name, kind in kinds.items() if not installed(kind.needs)
    ]
    made = {name: kind(path, threads, batch, folder) for name, kind in kinds.items() if installed(kind.needs)}
    return made, missing
