"""Webdataset tars: members that share a name up to the first dot are one sample (image, .txt, .json).

Only the headers are read when a shard is opened, or its index file (``tar_index.py``). Members are then read by
position (``pread``) rather than through a memory map: a shard rewritten or cut while in use gives damaged samples,
which are counted; a map kills the process. Reading 46 kB takes 2 us longer that way; decoding and rendering them takes
1,000.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from rocket_fast.loaders.base import BadSampleError
from rocket_fast.loaders.sources import IMAGE_SUFFIXES, CaptionMember, RawSample, Skipped

_BLOCK = 512
_NEAR = 1 << 16  # members with less than this between them are read at once
_WAITS = (0.1, 0.3, 0.6)  # seconds before a file that could not be read is tried again
_LOST_FOR = 30.0  # seconds in which it then is not
_ABSENT = -1
_IMAGE, _TEXT, _JSON = 0, 1, 2
_NEEDED: dict[CaptionMember, list[int]] = {"txt": [_IMAGE, _TEXT], "json": [_IMAGE, _JSON], "none": [_IMAGE]}
Result = TypeVar("Result")


class _OpenFile:
    """A file descriptor that is closed when the last thread using it lets go."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class FileCache:
    """Reads of many files through few descriptors; safe to share among threads.

    What fails is tried again for a second, with the file opened anew. A file that still cannot be read is named in a
    warning; for half a minute everything asked of it then fails at once, so that a lost shard does not cost a second
    for every sample. A file that was put out of the cache and comes back with another size is none that can be read.
    """

    def __init__(self, limit: int = 128) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._open: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._sizes: dict[Path, int] = {}
        self._lost: dict[Path, float] = {}  # when it was last found to be
        self._warned: set[Path] = set()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset`` on; fewer where the file ends. OSError where it cannot be read."""

        def read() -> bytes:
            file = self._file(path)  # held until pread returns: another thread may put it out of the cache meanwhile
            return os.pread(file.descriptor, size, offset)

        return self.attempt(path, read)

    def size(self, path: Path) -> int:
        """Bytes in the file."""

        def size() -> int:
            file = self._file(path)
            return os.fstat(file.descriptor).st_size

        return self.attempt(path, size)

    def attempt(self, path: Path, action: Callable[[], Result]) -> Result:
        """What ``action`` gives, which reads ``path``; its OSError, once it has been given its second."""
        lost_at = self._lost.get(path)
        if lost_at is not None and time.monotonic() < lost_at + _LOST_FOR:
            raise OSError(f"{path} could not be read a moment ago")
        for wait in (*(_WAITS if lost_at is None else ()), None):
            try:
                result = action()
            except OSError as error:
                with self._lock:
                    self._open.pop(path, None)
                if wait is None:
                    self._lose(path, error)
                    raise
                time.sleep(wait)
            else:
                break
        if lost_at is not None:
            self._lost.pop(path, None)
        return result

    def _lose(self, path: Path, error: OSError) -> None:
        with self._lock:
            self._lost[path] = time.monotonic()
            first = path not in self._warned
            self._warned.add(path)
        if first:
            warnings.warn(f"{path} cannot be read ({error}); its samples are skipped until it can", stacklevel=2)

    def _file(self, path: Path) -> _OpenFile:
        with self._lock:
            file = self._open.get(path)
            if file is not None:
                self._open.move_to_end(path)
                return file
        file = _OpenFile(path)
        size = os.fstat(file.descriptor).st_size
        with self._lock:
            expected = self._sizes.setdefault(path, size)
            if size != expected:
                raise OSError(f"it has {size} bytes, where it had {expected}")
            self._open[path] = file
            dropped = self._open.popitem(last=False) if len(self._open) > self._limit else None
        del dropped  # closed, if nobody reads it, when the lock is free again
        return file


class TarIndex(NamedTuple):
    """What the headers of a tar tell, whichever captions are wanted.

    ``keys``: bytes (N,), in the order in which their first members come. ``places``: int64 (N, 3, 2), offset and size
    of a key's image, text and json, offset -1 where there is none. ``repeated``: how many further images, texts and
    jsons had a key that has one. ``damaged``: whether the rest of the tar cannot be read.
    """

    keys: np.ndarray
    places: np.ndarray
    repeated: tuple[int, ...]
    damaged: bool


def scan_tar(path: Path, files: FileCache) -> TarIndex:
    """Read every header. Raises ValueError if the file is not a tar, OSError if it cannot be read."""
    rows: dict[str, list[int]] = {}
    repeated, damaged = [0, 0, 0], False
    for member in _members(path, files):
        if member is None:
            damaged = True
            break
        name, offset, size = member
        key, kind = _key_and_kind(name)
        if kind is None:
            continue
        row = rows.setdefault(key, [_ABSENT, 0, _ABSENT, 0, _ABSENT, 0])
        if row[2 * kind] == _ABSENT:
            row[2 * kind : 2 * kind + 2] = offset, size
        else:
            repeated[kind] += 1
    # Millions of samples: arrays, not Python objects.
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in rows], dtype=np.bytes_)
    places = np.array(list(rows.values()), dtype=np.int64).reshape(-1, 3, 2)
    return TarIndex(keys, places, tuple(repeated), damaged)


class TarSource:
    """One tar, indexed: sample i's image and its text or json bytes.

    ``caption`` is the member that a sample must have besides its image, if any; other members are ignored. ``index`` is
    that of the tar as it is now, if there is one; otherwise the headers are read.
    Raises ValueError if the file is not a tar, OSError if it cannot be read. ``skipped`` counts by reason: samples
    without an image or caption member, members that repeat a name, and a shard whose rest is damaged.
    """

    blocks: np.ndarray | None = None

    def __init__(
        self, path: Path, files: FileCache, *, caption: CaptionMember = "txt", index: TarIndex | None = None
    ) -> None:
        self.path, self.name, self.skipped, self._files = path, path.stem, Skipped(), files
        index = scan_tar(path, files) if index is None else index
        needed = _NEEDED[caption]
        offset = index.places[:, :, 0]
        there = offset != _ABSENT
        usable = np.flatnonzero(there[:, needed].all(axis=1))
        usable = usable[np.argsort(offset[usable][:, needed].min(axis=1), kind="stable")]
        self._keys, self._places = index.keys[usable], index.places[usable]
        self._places[:, [kind for kind in (_IMAGE, _TEXT, _JSON) if kind not in needed]] = _ABSENT, 0
        repeated = sum(index.repeated[kind] for kind in needed)
        if repeated:
            self.skipped.add("repeated member", "a name that comes twice", repeated)
        for reason, kind in zip(("no image", "no caption"), needed, strict=False):
            lacking = there[:, needed].any(axis=1) & ~there[:, kind]
            if lacking.any():
                self.skipped.add(reason, _decoded(index.keys[lacking.argmax()]), int(lacking.sum()))
        if index.damaged:
            self.skipped.add(
                "rest of a damaged shard", f"all behind {_decoded(index.keys[-1])}" if len(index.keys) else "all"
            )

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str:
        """Sample ``index``'s key."""
        return f"{self.name}/{_decoded(self._keys[index])}"

    def read(self, index: int) -> RawSample:
        """Sample ``index``'s bytes; BadSampleError if the file no longer has them."""
        places = self._places[index].tolist()
        kept = [(at, at + size) for at, size in places if at != _ABSENT]
        start, end, wanted = kept[0][0], 0, 0
        for at, after in kept:
            start, end, wanted = min(start, at), max(end, after), wanted + after - at
        try:
            if end - start <= wanted + _NEAR:
                whole = self._files.read(self.path, start, end - start)
                parts = [None if at == _ABSENT else whole[at - start : at - start + size] for at, size in places]
            else:
                parts = [None if at == _ABSENT else self._files.read(self.path, at, size) for at, size in places]
        except OSError as error:
            raise BadSampleError("shard cannot be read") from error
        image, text, json = parts
        if image is None or sum([len(part) for part in parts if part is not None]) != wanted:
            raise BadSampleError("shard cut short")
        return RawSample(self.key(index), image, text, json)


def _decoded(key: bytes) -> str:
    return bytes(key).decode("utf-8", "surrogateescape")


def _members(path: Path, files: FileCache) -> Iterator[tuple[str, int, int] | None]:
    """Name, offset and size of each regular file, from the headers (ustar, GNU long names, pax); None at damage."""
    end, offset = path.stat().st_size, 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = files.read(path, offset, _BLOCK)
        if not header.strip(b"\0") and (header or offset > 0):
            return  # the end-of-archive block, or the end of a file written without one
        size = _size_of_member(header)
        if size is None and offset == 0:
            raise ValueError("it does not begin with a tar header")
        if size is not None and long_size is not None:
            size = long_size
        data = offset + _BLOCK
        if size is None or data + size > end:
            yield None
            return
        kind = header[156:157]
        if kind == b"L":
            long_name = _text(files.read(path, data, size))
        elif kind == b"x":
            records = _pax_records(files.read(path, data, size))
            long_name = records.get("path", long_name)
            long_size = int(records["size"]) if "size" in records else None
        elif kind != b"g":
            if kind in (b"0", b"\0", b"7"):
                yield long_name if long_name is not None else _short_name(header), data, size
            long_name = long_size = None
        offset = data + -(-size // _BLOCK) * _BLOCK


def _key_and_kind(name: str) -> tuple[str, int | None]:
    """Webdataset's rule: the key is the path up to the first dot of its last part, the rest tells what it is."""
    folder, _, last = name.removeprefix("./").rpartition("/")
    stem, _, suffix = last.partition(".")
    suffix = suffix.lower()
    kind = _IMAGE if suffix in IMAGE_SUFFIXES else {"txt": _TEXT, "json": _JSON}.get(suffix)
    return (f"{folder}/{stem}" if folder else stem), (kind if stem else None)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _short_name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _size_of_member(header: bytes) -> int | None:
    """Size field of a header; None if this is no header (its checksum tells)."""
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
        if len(header) < _BLOCK or sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum:
            return None
        if header[124] & 0x80:  # base 256, for sizes of 8 GiB and more
            return int.from_bytes(header[125:136], "big")
        return int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        return None


def _pax_records(data: bytes) -> dict[str, str]:
    """Lines ``length key=value``, where length counts the whole line."""
    records = {}
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or int(length) <= len(length) + 1:
            break
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return records
