"""Index files of tars: where the members lie, so that opening a shard reads one small file instead of every header.

``00000.tar.index`` lies beside ``00000.tar``, or in a folder of its own (``data/*.tar?index=FOLDER``). It holds what
``scan_tar`` found, with the tar's size and time of last change: one of another state of the tar, of another version or
damaged is not used, and ``ShardSet`` says so. Other formats have none: a .beton has its index inside; tables and
folders are looked through for pictures that come and go, which no time of change tells.

The file, all numbers little-endian: one ``_HEAD``, the keys (samples x width bytes, filled up with zeros), the places
(samples x 3 x 2 int64), in which the crc32 of the header is that of everything behind it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rocket_fast.errors import Failed, InvalidArgument, require
from rocket_fast.files import write_atomically
from rocket_fast.loaders.ordered_map import ordered_map
from rocket_fast.loaders.sources.webdataset import FileCache, TarIndex, scan_tar

_MAGIC = b"rocket_fast tar index 1"
_HEAD = np.dtype(
    [
        ("magic", "S24"),
        ("size", "<i8"),
        ("mtime_ns", "<i8"),
        ("samples", "<i8"),
        ("width", "<i8"),
        ("repeated", "<i8", 3),
        ("damaged", "<i8"),
        ("crc", "<u4"),
    ]
)
_PLACE = 3 * 2 * 8  # bytes of a sample's places
_AHEAD = 4  # shards in hand for each thread


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """``written`` index files, ``kept`` ones of tars that have not changed; usable or not, all ``samples`` in both."""

    written: int
    kept: int
    samples: int


def index_path(tar: Path, folder: Path | None) -> Path:
    """Where the index of ``tar`` is: beside it, or in ``folder``."""
    return (tar.parent if folder is None else folder) / f"{tar.name}.index"


def read_index(tar: Path, folder: Path | None = None) -> TarIndex | None:
    """The index of ``tar``, None if there is no file; ValueError if it cannot be used for the tar as it is now."""
    try:
        data = index_path(tar, folder).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"it cannot be read: {error}") from error
    if len(data) < _HEAD.itemsize or not data.startswith(_MAGIC):
        raise ValueError("it is none, or of another version")
    head, body, now = np.frombuffer(data, _HEAD, 1)[0], memoryview(data)[_HEAD.itemsize :], tar.stat()
    samples, width = int(head["samples"]), int(head["width"])
    whole = samples >= 0 and width > 0 and len(body) == samples * (width + _PLACE)
    if not whole or zlib.crc32(body) != head["crc"]:
        raise ValueError("it is damaged")
    if (int(head["size"]), int(head["mtime_ns"])) != (now.st_size, now.st_mtime_ns):
        raise ValueError("the tar has changed since")
    return TarIndex(
        keys=np.frombuffer(body, f"S{width}", samples),
        places=np.frombuffer(body, "<i8", samples * 6, offset=samples * width).reshape(samples, 3, 2),
        repeated=tuple(head["repeated"].tolist()),
        damaged=bool(head["damaged"]),
    )


def write_index(tar: Path, files: FileCache, folder: Path | None = None) -> TarIndex:
    """Read all headers of ``tar`` and write its index. ValueError if it is no tar, OSError if it cannot be read,
    ``Failed`` if the index cannot be written."""
    before = tar.stat()  # a tar that grows meanwhile has a stale index, not a wrong one
    index = scan_tar(tar, files)
    body = index.keys.tobytes() + np.ascontiguousarray(index.places, "<i8").tobytes()
    head = np.zeros(1, _HEAD)
    head[0] = (
        _MAGIC, before.st_size, before.st_mtime_ns, len(index.keys), index.keys.itemsize, index.repeated,
        index.damaged, zlib.crc32(body),
    )  # fmt: skip
    path = index_path(tar, folder)
    try:
        write_atomically(path, lambda temporary: temporary.write_bytes(head.tobytes() + body))
    except OSError as error:
        raise Failed(f"{path} cannot be written: {error}; --out FOLDER puts it elsewhere") from error
    return index


def index_tars(
    tars: Sequence[Path],
    *,
    folder: Path | None = None,
    workers: int = 2,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> IndexReport:
    """Write the index of each of ``tars`` that has none or a stale one; ``advance(done, total)`` is called as it goes.

    Raises ValueError for a tar that cannot be read, and for two of one name that would share an index in ``folder``.
    """
    require(workers >= 1, "workers", workers, "a number >= 1")
    paths = [index_path(tar, folder) for tar in tars]
    repeated = sorted({path.name for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
    require(not repeated, "out", repeated[:3], "tars of different names, or a folder for each of theirs")
    files = FileCache()

    def look(number: int) -> tuple[bool, int]:
        tar = tars[number]
        try:
            index = read_index(tar, folder)
        except ValueError:
            index = None
        if index is not None:
            return False, len(index.keys)
        try:
            return True, len(write_index(tar, files, folder).keys)
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"shards: {tar} cannot be read: {error}") from error

    written = samples = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="rocket-fast-index") as pool:
        for done, (new, count) in enumerate(ordered_map(pool, look, range(len(tars)), workers * _AHEAD), start=1):
            written, samples = written + new, samples + count
            advance(done, len(tars))
    return IndexReport(written=written, kept=len(tars) - written, samples=samples)
