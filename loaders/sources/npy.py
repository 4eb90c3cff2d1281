"""Object arrays of records, as cc3m.npy and cc12m.npy are: image_id or image_name, and a list of captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rocket_fast.loaders.sources.pickles import load_object_array
from rocket_fast.loaders.sources.table import FileSource, Row, SourceOptions

_NAMES = ("image_name", "image_id")


def open_npy(path: Path, options: SourceOptions) -> FileSource:
    """A record is a sample; its image_name (or image_id) is the key and names the file, with or without suffix."""
    return FileSource(path.stem, _rows(load_object_array(path)), options.folders(path), options.caption)


def _rows(records: list[Any]) -> Iterator[Row | None]:
    for record in records:
        name = next((record[name] for name in _NAMES if name in record), None) if isinstance(record, dict) else None
        if not isinstance(name, int | str):
            yield None
            continue
        captions = record.get("captions", record.get("caption"))
        yield Row(str(name), str(name), captions if isinstance(captions, list | tuple) else [captions])
