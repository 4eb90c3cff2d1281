"""YFCC as it is downloaded: 8-digit picture numbers ABCDEFGH lie as FGH.jpg in AB/CDE.zip; a pickle has the texts."""

from __future__ import annotations

import functools
import zlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from rocket_fast.errors import require
from rocket_fast.loaders.base import BadSampleError
from rocket_fast.loaders.sources import RawSample, Skipped
from rocket_fast.loaders.sources.pickles import load_pickle
from rocket_fast.loaders.sources.table import SourceOptions, Strings, caption_bytes, raw_sample
from rocket_fast.loaders.sources.webdataset import FileCache

_TAIL = 1 << 17  # holds the directory of a thousand members and what follows it
_END, _ENTRY, _MEMBER = b"PK\5\6", b"PK\1\2", b"PK\3\4"
_STORED, _DEFLATED = 0, 8


class ZipReader:
    """Single members of many zips, by few reads and without parsing a whole directory."""

    def __init__(self, files: FileCache) -> None:
        self._files = files
        self._directory = functools.lru_cache(maxsize=64)(functools.partial(_read_directory, files))

    def read(self, path: Path, name: str) -> bytes:
        """A member's bytes; BadSampleError if there is none of this name, or if it is damaged."""
        try:
            directory, shift = self._directory(path)
            entry = _find_entry(directory, name.encode())
            method, crc, packed, size = (
                _number(entry, at, width) for at, width in ((10, 2), (16, 4), (20, 4), (24, 4))
            )
            at = _number(entry, 42, 4) + shift
            header = self._files.read(path, at, 30)
            _check(header.startswith(_MEMBER) and len(header) == 30 and not entry[8] & 1)  # 1: encrypted
            data = self._files.read(path, at + 30 + _number(header, 26, 2) + _number(header, 28, 2), packed)
            if method == _DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            _check(method in (_STORED, _DEFLATED) and len(data) == size and zlib.crc32(data) == crc)
        except OSError as error:
            raise BadSampleError("zip cannot be read") from error
        except zlib.error as error:
            raise BadSampleError("damaged zip member") from error
        return data


def _read_directory(files: FileCache, path: Path) -> tuple[bytes, int]:
    """The central directory, and how much further on members lie than it says."""
    size = files.size(path)
    start = max(0, size - _TAIL)
    tail = files.read(path, start, _TAIL)
    end = tail.rfind(_END)
    if end < 0 or len(tail) < end + 22:
        raise BadSampleError("zip cannot be read")
    length, offset = _number(tail, end + 12, 4), _number(tail, end + 16, 4)
    begin = start + end - length  # the directory ends where its end record begins
    if begin < 0 or offset == 0xFFFFFFFF:
        raise BadSampleError("zip cannot be read")
    return tail[end - length : end] if length <= end else files.read(path, begin, length), begin - offset


def _find_entry(directory: bytes, name: bytes) -> bytes:
    """The directory's entry of a member: 46 bytes, its name behind."""
    at = directory.find(name)
    while at >= 0:
        entry = directory[max(0, at - 46) : at]
        if len(entry) == 46 and entry.startswith(_ENTRY) and _number(entry, 28, 2) == len(name):
            return entry
        at = directory.find(name, at + 1)
    raise BadSampleError("no image")


def _number(data: bytes, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "little")


def _check(fits: bool) -> None:
    if not fits:
        raise BadSampleError("damaged zip member")


class YFCCSource:
    """Pictures of the rows (index, title, description) of a pickle; title and description are two captions of one.

    Which zips are there is looked up now, members in them when they are read: opening 100,000 zips takes too long.
    """

    blocks: np.ndarray | None = None

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.name, self.skipped = path.stem, Skipped()
        self._member, self._zips = options.caption, ZipReader(options.files)
        self._indices, self._captions = array("I"), Strings()
        self._folders, self._found = options.folders(path), dict[int, tuple[int, str] | None]()
        rows = load_pickle(path)
        require(isinstance(rows, list | tuple), "pickle", type(rows).__name__, "a list of (index, title, description)")
        seen: set[int] = set()
        for number, row in enumerate(rows):
            try:
                self._add(row, seen)
            except BadSampleError as error:
                self.skipped.add(error.reason, f"row {number}")
        self._folders.forget()

    def __len__(self) -> int:
        return len(self._indices)

    def key(self, index: int) -> str:
        """Sample ``index``'s key: its picture's number."""
        return f"{self.name}/{self._indices[index]:08d}"

    def read(self, index: int) -> RawSample:
        """Sample ``index``'s bytes; BadSampleError if its zip does not hold it."""
        number = self._indices[index]
        found = self._found[number // 1000]
        assert found is not None
        image = self._zips.read(Path(self._folders.path(*found)), f"{number % 1000:03d}.jpg")
        return raw_sample(self.key(index), image, self._captions[index], self._member)

    def _add(self, row: Any, seen: set[int]) -> None:
        number = _index(row)
        if number in seen:
            raise BadSampleError("repeated key")
        archive = number // 1000
        if archive not in self._found:
            self._found[archive] = self._folders.find(f"{archive // 1000:02d}/{archive % 1000:03d}.zip")
        if self._found[archive] is None:
            raise BadSampleError("no image")
        caption = caption_bytes(row[1:3], self._member)
        seen.add(number)
        self._indices.append(number)
        self._captions.append(caption)


def _index(row: Any) -> int:
    try:
        number = int(row[0])
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise BadSampleError("record cannot be read") from error
    if not 0 <= number < 10**8 or not isinstance(row, list | tuple):
        raise BadSampleError("record cannot be read")
    return number
