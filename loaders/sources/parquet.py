"""Parquet: pictures in the file (binary, or a struct of bytes and path) or beside it, captions as text or lists."""

from __future__ import annotations

import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from rocket_fast.errors import optional_import, require
from rocket_fast.loaders.base import BadSampleError
from rocket_fast.loaders.sources import RawSample, Skipped, Source
from rocket_fast.loaders.sources.table import (
    IMAGE_COLUMNS,
    FileSource,
    Row,
    SourceOptions,
    Strings,
    caption_bytes,
    pick_caption_column,
    pick_column,
    raw_sample,
    read_whole,
    row_key,
)

OPEN_ROW_GROUPS = 8  # that a shuffled epoch has in use at a time
_IMAGES = ("image", "jpg", "png", "webp", "img", "image_bytes", "bytes", *IMAGE_COLUMNS)
_CACHED = 2 * OPEN_ROW_GROUPS
_ROWS = 1 << 16  # read at once from columns of text


class RowGroupCache:
    """The decoded row groups last used, of all files; one that several threads want is decoded once."""

    def __init__(self, limit: int = _CACHED) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._groups: OrderedDict[tuple[str, int], Future[Any]] = OrderedDict()

    def get(self, key: tuple[str, int], load: Callable[[], Any]) -> Any:
        """The row group under ``key``; an error of ``load`` is everybody's, and forgotten."""
        with self._lock:
            group = self._groups.get(key)
            mine = group is None
            if group is None:
                group = self._groups[key] = Future()
                if len(self._groups) > self._limit:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
        if mine:
            try:
                group.set_result(load())
            except BaseException as error:
                with self._lock:
                    self._groups.pop(key, None)
                group.set_exception(error)
        return group.result()


def open_parquet(path: Path, options: SourceOptions) -> Source:
    """A row is a sample, its number the key. Needs pyarrow."""
    arrow, parquet = optional_import("pyarrow", "parquet"), optional_import("pyarrow.parquet", "parquet")
    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        image = pick_column(schema.names, options.image_column, _IMAGES, "image_column")
        caption = pick_caption_column(schema.names, options)
        kind = schema.field(image).type
        if _is_text(arrow, kind):
            rows = _file_rows(file, image, caption)
            return FileSource(path.stem, rows, options.folders(path), options.caption)
        in_struct = arrow.types.is_struct(kind) and "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
        binary = arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)
        expected = f"binary, a struct with bytes, or paths (?image_column= names another of {schema.names})"
        require(in_struct or binary, f"column {image}", str(kind), expected)
        return ParquetSource(path, file, image, caption, options)


def _is_text(arrow: Any, kind: Any) -> bool:
    if arrow.types.is_dictionary(kind):
        kind = kind.value_type
    return arrow.types.is_string(kind) or arrow.types.is_large_string(kind)


def _captions(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _values(file: Any, column: str | None) -> Iterator[Any]:
    """Row by row what a column holds, or None without one."""
    if column is None:
        yield from repeat(None, file.metadata.num_rows)
        return
    for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
        yield from batch.column(column).to_pylist()


def _file_rows(file: Any, image: str, caption: str | None) -> Iterator[Row]:
    for number, (picture, captions) in enumerate(zip(_values(file, image), _values(file, caption), strict=True)):
        yield Row(row_key(number), picture or "", _captions(captions))


class ParquetSource:
    """Pictures in the file. They are read by whole row groups: an order that jumps about is slow, see ``blocks``."""

    def __init__(self, path: Path, file: Any, image: str, caption: str | None, options: SourceOptions) -> None:
        self.name, self.skipped = path.stem, Skipped()
        self._path, self._column, self._member, self._metadata = path, image, options.caption, file.metadata
        self._files = options.files
        self._cache, self._folders = options.row_groups, options.folders(path)
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *counts])
        self._captions, rows = Strings(), array("q")
        for number, value in enumerate(_values(file, caption)):
            try:
                self._captions.append(caption_bytes(_captions(value), options.caption))
                rows.append(number)
            except BadSampleError as error:
                self.skipped.add(error.reason, row_key(number))
        self._rows = np.array(rows, dtype=np.int64)
        self.blocks: np.ndarray | None = np.searchsorted(self._starts, self._rows, side="right") - 1

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """Sample ``index``'s key: the number of its row."""
        return f"{self.name}/{row_key(int(self._rows[index]))}"

    def read(self, index: int) -> RawSample:
        """Sample ``index``'s bytes; BadSampleError if its row group is damaged or it has no picture."""
        assert self.blocks is not None
        row, group = int(self._rows[index]), int(self.blocks[index])
        values = self._cache.get((str(self._path), group), partial(self._load, group))
        value = values[row - int(self._starts[group])].as_py()
        image = value.get("bytes") if isinstance(value, dict) else value
        if image is None and isinstance(value, dict) and value.get("path"):
            image = self._beside(value["path"])
        if not isinstance(image, bytes):
            raise BadSampleError("no image")
        return raw_sample(self.key(index), image, self._captions[index], self._member)

    def _beside(self, picture: str) -> bytes:
        paths = (os.path.join(folder, picture) for folder in self._folders.folders)
        return read_whole(next(filter(os.path.exists, paths), picture), "image")

    def _load(self, group: int) -> Any:
        parquet = optional_import("pyarrow.parquet", "parquet")

        def load() -> Any:
            # A file object of its own: they are not made for several threads.
            with open(self._path, "rb") as opened, parquet.ParquetFile(opened, metadata=self._metadata) as file:
                try:
                    return file.read_row_group(group, columns=[self._column]).column(self._column).combine_chunks()
                except (OSError, ValueError) as error:  # damaged pages are OSErrors of pyarrow's own
                    raise BadSampleError("row group cannot be read") from error

        try:
            return self._files.attempt(self._path, load)
        except OSError as error:
            raise BadSampleError("shard cannot be read") from error
