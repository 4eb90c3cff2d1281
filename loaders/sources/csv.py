"""CSV with a header, as open_clip reads it: one column of picture paths, one of captions, tabs or commas between."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from rocket_fast.loaders.sources.table import (
    IMAGE_COLUMNS,
    FileSource,
    Row,
    SourceOptions,
    pick_caption_column,
    pick_column,
    row_key,
)


def open_csv(path: Path, options: SourceOptions) -> FileSource:
    """A row is a sample, its number the key, also where several rows name one picture."""
    return FileSource(path.stem, csv_rows(path, options), options.folders(path), options.caption)


def csv_rows(path: Path, options: SourceOptions) -> Iterator[Row]:
    """The table's rows; ValueError, with the line, where it is no CSV."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        delimiter = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = next(reader, [])
            image = header.index(pick_column(header, options.image_column, IMAGE_COLUMNS, "image_column"))
            name = pick_caption_column(header, options)
            captions = slice(0) if name is None else slice(header.index(name), header.index(name) + 1)
            for number, cells in enumerate(reader):
                if cells:
                    cells += [""] * (image + 1 - len(cells))
                    yield Row(row_key(number), cells[image], cells[captions])
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error
