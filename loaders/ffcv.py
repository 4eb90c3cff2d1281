"""FFCV's .beton files, as `rocket-fast data pack` (convert.py) writes them.

What FFCV does here: the file format, and in writing its fields and its page allocator, so that FFCV's own ``Loader``
opens the files too (``custom_fields={"image": picture_field()}``; its decoders only if all pictures are JPEGs). What it
does not do: ``BetonSource`` reads, and the CPU loader decodes and renders, for keys, captions, crops and pixels to be
those of the same samples in a tar, bit for bit, and for an epoch to be resumed exactly. FFCV's loader can do neither:
its crops take no seed, a damaged JPEG gives it what the buffer held before, and an iterator broken off keeps its
buffers until it is closed; there are no such iterators here. Its decoder takes libjpeg-turbo's fast transforms: up to 6
grey levels from ours, 1 on average, in the same time. Its memory managers hold Python objects for every region of the
file (0.9 s and 170 MiB for 300,000 samples; our index 0.07 s and 20 bytes a sample), and map it, where a file cut
while in use kills the process.

What a .beton is good for: it is one file and opens at once, where each header of a tar has to be read, or its index
(`rocket-fast data index`). Batches come as fast from either; decoding takes the time.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rocket_fast.errors import optional_import, require
from rocket_fast.loaders.base import BadSampleError
from rocket_fast.loaders.cpu import read_caption, read_captions
from rocket_fast.loaders.sources import CaptionMember, RawSample
from rocket_fast.loaders.sources.beton import (
    ALLOCATION,
    DESCRIPTOR,
    FIELDS,
    HEADER,
    MIN_PAGE,
    PICTURE,
    SAMPLE,
    VERSION,
    picture_arguments,
)

_CUSTOM, _BYTES = 255, 3  # FFCV's numbers for a field it does not know, and for BytesField
_JPEG_MODE, _OTHER_MODE = 0, 255  # of a picture; FFCV knows 0, JPEG, and 1, raw pixels
_TABLE_ROWS = 1 << 18


class _Picture(NamedTuple):
    data: bytes
    height: int
    width: int


class BetonSample(NamedTuple):
    """What goes into the fields, in their order."""

    image: _Picture
    key: np.ndarray
    caption: np.ndarray

    @property
    def size(self) -> int:
        return len(self.image.data) + self.key.size + self.caption.size


def page_bytes(page_mib: int) -> int:
    """The bytes of a page; ValueError for a size that the format does not have."""
    page = page_mib << 20
    require(MIN_PAGE <= page < 1 << 32 and page & (page - 1) == 0, "page_mib", page_mib, "a power of two, 2 to 2048")
    return page


def check_installed() -> None:
    """Say now, not after the first samples, that FFCV is not installed: raises MissingExtra."""
    _ffcv()


def beton_sample(raw: RawSample, height: int, width: int, page: int) -> BetonSample:
    """What is stored of a sample whose picture has this size; BadSampleError for a caption that cannot be used, and
    for what does not fit a page."""
    if raw.json is None:
        read_caption(raw.text)
        caption = raw.text or b""
    else:
        caption = json.dumps({"captions": read_captions(raw.json)}).encode()
    key = raw.key.encode("utf-8", "surrogateescape")
    sample = BetonSample(
        _Picture(raw.image, height, width), np.frombuffer(key, np.uint8), np.frombuffer(caption, np.uint8)
    )
    if sample.size > page:
        raise BadSampleError("larger than a page (page_mib)")
    return sample


# The file ------------------------------------------------------------------------------------------------------------


class _FFCV(NamedTuple):
    fields: Any
    allocator: Any
    writer: Any


@functools.cache
def _ffcv() -> _FFCV:
    return _FFCV(*(optional_import(f"ffcv.{name}", "ffcv") for name in ("fields", "memory_allocator", "writer")))


@functools.cache
def picture_field() -> type:
    """FFCV's field of a picture kept as the file it was: an RGBImageField that never decodes or encodes."""
    base = _ffcv().fields.RGBImageField

    class PictureField(base):  # type: ignore[valid-type, misc]
        def __init__(self, caption: CaptionMember = "txt") -> None:
            super().__init__(write_mode="jpg")
            self.caption = caption

        @property
        def metadata_type(self) -> np.dtype:
            return PICTURE

        @staticmethod
        def from_binary(binary: np.ndarray) -> PictureField:
            return PictureField()

        def to_binary(self) -> tuple[np.ndarray]:
            return (picture_arguments(self.caption),)

        def encode(self, destination: np.ndarray, picture: _Picture, malloc: Callable[[int], Any]) -> None:
            destination["mode"] = _mode(picture.data)
            destination["height"], destination["width"] = picture.height, picture.width
            destination["data_ptr"], storage = malloc(len(picture.data))
            destination["size"] = len(picture.data)
            storage[:] = np.frombuffer(picture.data, np.uint8)

    return PictureField


def _mode(picture: bytes) -> int:
    """Whether FFCV's own decoders can read it: a JPEG, not in inks."""
    if not picture.startswith(b"\xff\xd8"):
        return _OTHER_MODE
    space = optional_import("simplejpeg", "train").decode_jpeg_header(picture)[2]
    return _OTHER_MODE if space in ("CMYK", "YCCK") else _JPEG_MODE


def fill_beton(
    path: Path, samples: Iterator[BetonSample], *, room: int, page: int, captions: Literal["txt", "several"]
) -> int:
    """Write header, index of up to ``room`` samples, pages and FFCV's allocation table; the number of samples.

    FFCV's ``DatasetWriter`` has to know the number beforehand, keeps its index in shared memory (64 MB in a container),
    and waits for ever for a worker that failed; only its parts are used.
    """
    bytes_field = _ffcv().fields.BytesField
    fields = {
        "image": picture_field()("txt" if captions == "txt" else "json"),
        "key": bytes_field(),
        "caption": bytes_field(),
    }
    rows = np.zeros(room, SAMPLE)
    front = HEADER.itemsize + len(fields) * DESCRIPTOR.itemsize
    path.touch()
    allocator = _ffcv().allocator.MemoryAllocator(str(path), front + rows.nbytes, page)
    os.truncate(path, allocator.offset)  # a hole: the allocator would fill it with zeros
    count = 0
    with allocator:
        for count, sample in enumerate(samples, start=1):
            _ffcv().writer.handle_sample(sample, count - 1, FIELDS, rows, allocator, fields)
            allocator.allocations.clear()  # tuples, three to a sample; the index has the same
    rows, end = rows[:count], front
    if count:
        whole = allocator.offset + (allocator.my_page + 1) * page
        if path.stat().st_size != whole:
            raise OSError(f"{path.stat().st_size} bytes were taken of {whole}: is the disk full?")
        end = int(rows[-1]["caption"]["ptr"] + rows[-1]["caption"]["size"])
    os.truncate(path, end)  # the rest of the last page is empty
    with open(path, "r+b") as file:
        file.write(np.array([(VERSION, len(fields), page, count, end)], HEADER).tobytes())
        file.write(_descriptors(fields).tobytes())
        file.write(rows.data)
        file.seek(end)
        for start in range(0, count, _TABLE_ROWS):
            file.write(_allocations(rows, start).tobytes())
    return count


def _descriptors(fields: dict[str, Any]) -> np.ndarray:
    descriptors = np.zeros(len(fields), DESCRIPTOR)
    for descriptor, (name, field) in zip(descriptors, fields.items(), strict=True):
        descriptor["type_id"] = _CUSTOM if name == "image" else _BYTES
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        descriptor["arguments"] = field.to_binary()[0]
    return descriptors


def _allocations(rows: np.ndarray, start: int) -> np.ndarray:
    """FFCV's table of the regions of up to ``_TABLE_ROWS`` samples, in the order in which they lie in the file."""
    part = rows[start : start + _TABLE_ROWS]
    table = np.empty((len(part), 3), ALLOCATION)
    table["sample_id"] = np.arange(start, start + len(part))[:, None]
    for column, (name, pointer) in enumerate((("image", "data_ptr"), ("key", "ptr"), ("caption", "ptr"))):
        table["ptr"][:, column], table["size"][:, column] = part[name][pointer], part[name]["size"]
    return table
