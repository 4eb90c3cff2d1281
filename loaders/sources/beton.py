"""FFCV's .beton files, as ``loaders.ffcv.fill_beton`` fills them: undecoded pictures behind an index, in one file.

The file begins with a header, a description of each field and one row per sample that tells where its bytes lie:
picture, key and caption, one behind the other within a page. Reading is numpy and ``pread``: it needs no FFCV, starts
without FFCV's 2.3 seconds of import, and is safe from files that are cut while in use, as memory maps are not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rocket_fast.errors import require
from rocket_fast.loaders.base import BadSampleError
from rocket_fast.loaders.sources import CaptionMember, RawSample, Skipped
from rocket_fast.loaders.sources.table import raw_sample
from rocket_fast.loaders.sources.webdataset import FileCache

VERSION = 2  # of FFCV's format; FFCV 1.0.2 knows no other
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
PICTURE = np.dtype([("mode", "u1"), ("width", "<u4"), ("height", "<u4"), ("data_ptr", "<u8"), ("size", "<u8")])
"""What ``loaders.ffcv``'s picture field keeps per sample: FFCV's own, sides of any length, and the size in bytes."""
BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
FIELDS = ("image", "key", "caption")
SAMPLE = np.dtype(list(zip(FIELDS, (PICTURE, BYTES, BYTES), strict=True)))
MIN_PAGE = 1 << 21
_MARK = b"rocket_fast 1 "


def picture_arguments(caption: CaptionMember) -> np.ndarray:
    """The picture field's arguments, uint8 (1024,): who wrote the file, in which layout, and what its captions are."""
    return np.frombuffer((_MARK + caption.encode()).ljust(1024, b"\0"), np.uint8)


class BetonSource:
    """One .beton of ``fill_beton``'s: sample i's picture under the key it had where it was taken from.

    ``caption`` is what the file's captions have to be, if they are wanted. Raises ValueError for a file that is no
    .beton, that another version of FFCV or another program wrote, or whose captions are of the other kind; OSError if
    it cannot be read.
    ``skipped`` counts the samples beyond the end of a file cut short.
    """

    blocks: np.ndarray | None = None

    def __init__(self, path: Path, files: FileCache, *, caption: CaptionMember = "txt") -> None:
        self.path, self.name, self.skipped = path, path.stem, Skipped()
        self._files, self._caption = files, caption
        end = path.stat().st_size
        samples = _read_head(path, end, caption)
        rows = np.fromfile(path, SAMPLE, samples, offset=HEADER.itemsize + len(FIELDS) * DESCRIPTOR.itemsize)
        starts = rows["image"]["data_ptr"]
        sizes = np.stack([rows[name]["size"] for name in FIELDS], axis=1)
        whole = starts + sizes.sum(axis=1, dtype=np.uint64) <= end
        if lost := samples - int(whole.sum()):
            self.skipped.add("rest of a damaged shard", f"number {int(np.argmin(whole))}", lost)
        self._starts, self._sizes = starts[whole], sizes[whole].astype(np.uint32)

    def __len__(self) -> int:
        return len(self._starts)

    def key(self, index: int) -> str:
        """Sample ``index``'s key, read from the file."""
        image, key, _ = self._sizes[index].tolist()
        return self._files.read(self.path, int(self._starts[index]) + image, key).decode("utf-8", "surrogateescape")

    def read(self, index: int) -> RawSample:
        """Sample ``index``'s bytes; BadSampleError if the file no longer has them."""
        image, key, caption = self._sizes[index].tolist()
        try:
            data = self._files.read(self.path, int(self._starts[index]), image + key + caption)
        except OSError as error:
            raise BadSampleError("shard cannot be read") from error
        if len(data) < image + key + caption:
            raise BadSampleError("shard cut short")
        name, text = data[image : image + key].decode("utf-8", "surrogateescape"), data[image + key :]
        return raw_sample(name, data[:image], text, self._caption)


def _read_head(path: Path, end: int, caption: CaptionMember) -> int:
    """The number of samples, once header and descriptors are found to be ``fill_beton``'s."""
    if end < HEADER.itemsize:
        raise ValueError("it is no .beton: it is too short")
    header = np.fromfile(path, HEADER, 1)[0]
    version, fields, page, samples = (int(value) for value in header.tolist()[:4])
    if page < MIN_PAGE or page & (page - 1):
        raise ValueError("it is no .beton: it does not begin with FFCV's header")
    require(version == VERSION, "format version", version, f"{VERSION}, that of FFCV 1.0.2; write the file anew")
    descriptors = np.fromfile(path, DESCRIPTOR, min(fields, 256), offset=HEADER.itemsize)
    names = tuple(bytes(each["name"]).rstrip(b"\0").decode("ascii", "replace") for each in descriptors)
    made = "those of a file that `rocket-fast data pack --format beton` made"
    require(names == FIELDS, "fields", names, f"{FIELDS}, {made}")
    arguments = bytes(descriptors[0]["arguments"]).rstrip(b"\0")
    require(arguments.startswith(_MARK), "picture field", arguments[:20], f"one that begins with {_MARK!r}, {made}")
    stored = arguments.removeprefix(_MARK).decode("ascii", "replace")
    kinds = {"txt": "txt", "json": "several"}
    expected = f"{kinds.get(stored)!r}, which the file was written with"
    require(caption in ("none", stored), "data.captions", kinds.get(caption), expected)
    table = HEADER.itemsize + fields * DESCRIPTOR.itemsize + samples * SAMPLE.itemsize
    if table > end:
        raise ValueError(f"it is cut short within its index: it has {end} bytes, the index takes {table}")
    return samples
