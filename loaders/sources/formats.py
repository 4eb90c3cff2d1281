"""Which source reads a path, and the options that may follow it: ``data/cc3m.npy?images=data/cc3m_images``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rocket_fast.errors import require
from rocket_fast.loaders.sources import Source
from rocket_fast.loaders.sources.beton import BetonSource
from rocket_fast.loaders.sources.csv import open_csv
from rocket_fast.loaders.sources.folder import open_folder
from rocket_fast.loaders.sources.json import open_json, open_jsonl
from rocket_fast.loaders.sources.npy import open_npy
from rocket_fast.loaders.sources.parquet import open_parquet
from rocket_fast.loaders.sources.table import SourceOptions
from rocket_fast.loaders.sources.tar_index import index_path, read_index
from rocket_fast.loaders.sources.webdataset import TarSource
from rocket_fast.loaders.sources.yfcc_zip import YFCCSource


class Format(NamedTuple):
    """How a format is opened, and the options it knows."""

    open: Callable[[Path, SourceOptions], Source]
    options: tuple[str, ...]


def _open_tar(path: Path, options: SourceOptions) -> Source:
    try:
        index = read_index(path, options.index)
    except ValueError as error:
        options.stale_indexes.append(f"{index_path(path, options.index)}: {error}")
        index = None
    return TarSource(path, options.files, caption=options.caption, index=index)


def _open_beton(path: Path, options: SourceOptions) -> Source:
    return BetonSource(path, options.files, caption=options.caption)


_COLUMNS = ("images", "image_column", "caption_column")
FOLDER = Format(open_folder, _COLUMNS)
FORMATS = {
    ".tar": Format(_open_tar, ("index",)),
    ".beton": Format(_open_beton, ()),
    ".csv": Format(open_csv, _COLUMNS),
    ".tsv": Format(open_csv, _COLUMNS),
    ".parquet": Format(open_parquet, _COLUMNS),
    ".npy": Format(open_npy, ("images",)),
    ".json": Format(open_json, _COLUMNS),
    ".jsonl": Format(open_jsonl, _COLUMNS),
    ".pkl": Format(YFCCSource, ("images",)),
}


def open_source(path: Path, given: Mapping[str, str], shared: SourceOptions) -> Source:
    """The source at ``path``; ValueError for a format or an option nobody knows, and for a damaged file."""
    kind = FOLDER if path.is_dir() else FORMATS.get(path.suffix.lower())
    require(kind is not None, "format", path.name, f"a folder, or a file ending in {', '.join(FORMATS)}")
    assert kind is not None
    for name in given:
        require(name in kind.options, "option", name, f"one of {', '.join(kind.options) or '(none)'}")
    folders = {name: Path(given[name]) for name in ("images", "index") if name in given}
    for name, folder in folders.items():
        require(folder.is_dir(), name, str(folder), "an existing folder")
    options = replace(
        shared,
        images=folders.get("images"),
        index=folders.get("index"),
        image_column=given.get("image_column"),
        caption_column=given.get("caption_column"),
    )
    return kind.open(path, options)
