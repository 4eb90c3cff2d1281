"""Annotations in JSON: COCO captions, RedCaps, and plain lists (or lines, .jsonl) of records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rocket_fast.errors import require
from rocket_fast.loaders.sources.table import (
    IMAGE_COLUMNS,
    FileSource,
    Row,
    SourceOptions,
    pick_caption_column,
    pick_column,
    row_key,
)


def open_json(path: Path, options: SourceOptions) -> FileSource:
    """COCO (``images``, ``annotations``), RedCaps (``annotations``) or a list of records with the columns of a CSV."""
    return FileSource(path.stem, _rows(_load(path), options), options.folders(path), options.caption)


def open_jsonl(path: Path, options: SourceOptions) -> FileSource:
    """A record a line, with the columns of a CSV."""
    return FileSource(path.stem, jsonl_rows(path, options), options.folders(path), options.caption)


def jsonl_rows(path: Path, options: SourceOptions) -> Iterator[Row | None]:
    """The lines' rows, None for a line that is no record."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        yield from record_rows((_parse_line(line) for line in file if line.strip()), options)


def record_rows(records: Iterable[Any], options: SourceOptions) -> Iterator[Row | None]:
    """Rows of records that name their fields; the first one tells which are read, a caption may be a list of them."""
    image = ""
    caption: str | None = None
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            yield None
            continue
        if not image:
            names = list(record)
            image = pick_column(names, options.image_column, IMAGE_COLUMNS, "image_column")
            caption = pick_caption_column(names, options)
        captions = None if caption is None else record.get(caption)
        yield Row(row_key(number), str(record.get(image, "")), captions if isinstance(captions, list) else [captions])


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _rows(value: Any, options: SourceOptions) -> Iterator[Row | None]:
    if isinstance(value, list):
        return record_rows(value, options)
    annotations = value.get("annotations") if isinstance(value, dict) else None
    got = sorted(value)[:9] if isinstance(value, dict) else type(value).__name__
    require(isinstance(annotations, list), "JSON", got, "COCO's or RedCaps' annotations, or a list of records")
    assert isinstance(value, dict)
    assert isinstance(annotations, list)
    images = value.get("images")
    return _redcaps_rows(annotations) if images is None else _coco_rows(images, annotations)


def _coco_rows(images: Any, annotations: list[Any]) -> Iterator[Row | None]:
    """An image is a sample, with all of its annotations' captions; the key is its id."""
    captions: dict[Any, list[object]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str):
            captions.setdefault(annotation["image_id"], []).append(annotation.get("caption"))
    for image in images:
        usable = isinstance(image, dict) and isinstance(image.get("id"), int | str)
        yield Row(str(image["id"]), str(image.get("file_name", "")), captions.get(image["id"], ())) if usable else None


def _redcaps_rows(annotations: list[Any]) -> Iterator[Row | None]:
    """Pictures lie in ``subreddit/image_id.jpg``; the key is the image_id."""
    for annotation in annotations:
        if not isinstance(annotation, dict) or not isinstance(annotation.get("image_id"), int | str):
            yield None
            continue
        name = str(annotation["image_id"])
        yield Row(name, f"{annotation.get('subreddit', '')}/{name}.jpg".lstrip("/"), [annotation.get("caption")])
