"""Pictures in a folder and those in it; captions in a metadata file, or in a .txt or .json beside each picture."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from rocket_fast.errors import require
from rocket_fast.loaders.sources import IMAGE_SUFFIXES, CaptionMember, RawSample, Skipped, Source
from rocket_fast.loaders.sources.csv import csv_rows
from rocket_fast.loaders.sources.json import jsonl_rows
from rocket_fast.loaders.sources.table import FileSource, SourceOptions, Strings, caption_bytes, raw_sample, read_whole

_METADATA = {"metadata.csv": csv_rows, "metadata.jsonl": jsonl_rows}
_SUFFIXES: dict[CaptionMember, tuple[str, ...]] = {"txt": ("txt",), "json": ("json", "txt"), "none": ()}


def open_folder(path: Path, options: SourceOptions) -> Source:
    """The pictures that metadata.csv or metadata.jsonl lists, if there is one; otherwise all with captions beside."""
    for name, read in _METADATA.items():
        if (path / name).is_file():
            options = replace(options, images=options.images or path)
            folders = options.folders(path / name)
            return FileSource(path.resolve().name, read(path / name, options), folders, options.caption)
    return FolderSource(path, options.caption)


class FolderSource:
    """``a.jpg`` with its caption in ``a.txt``, or its captions in ``a.json`` as in tars (if none, ``a.txt``).
    Where no captions are wanted, any picture.

    The key is the picture's path in the folder. Hidden files and folders are left out, linked folders not followed.
    """

    blocks: np.ndarray | None = None

    def __init__(self, path: Path, member: CaptionMember) -> None:
        self.name, self.skipped = path.resolve().name, Skipped()
        self._root, self._member, self._pictures = str(path), member, Strings()
        suffixes = _SUFFIXES[member]
        self._caption_suffixes = bytearray()
        for folder, subfolders, files in os.walk(path):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            there = frozenset(files)
            for name in sorted(files):
                stem, _, suffix = name.rpartition(".")
                if not stem or name.startswith(".") or suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                relative = os.path.relpath(os.path.join(folder, name), path)
                number = next((i for i, kind in enumerate(suffixes) if f"{stem}.{kind}" in there), None)
                if number is None and suffixes:
                    self.skipped.add("no caption", relative)
                    continue
                self._pictures.append(os.fsencode(relative))
                self._caption_suffixes.append(number or 0)
        self._suffixes = suffixes
        tars = not self._pictures and not self.skipped and any(path.glob("*.tar"))
        require(not tars, "folder", str(path), f"one of pictures; its tars are named {path}/*.tar")

    def __len__(self) -> int:
        return len(self._pictures)

    def key(self, index: int) -> str:
        """Sample ``index``'s key: its picture's path in the folder."""
        return f"{self.name}/{os.fsdecode(self._pictures[index])}"

    def read(self, index: int) -> RawSample:
        """Sample ``index``'s bytes; BadSampleError if picture or caption cannot be read."""
        picture = os.fsdecode(self._pictures[index])
        image = read_whole(os.path.join(self._root, picture), "image")
        if not self._suffixes:
            return raw_sample(self.key(index), image, b"", self._member)
        suffix = self._suffixes[self._caption_suffixes[index]]
        caption = read_whole(os.path.join(self._root, f"{picture.rpartition('.')[0]}.{suffix}"), "caption")
        if self._member == "json" and suffix == "txt":
            caption = caption_bytes([caption.decode("utf-8-sig", "surrogateescape")], "json")
        return raw_sample(self.key(index), image, caption, self._member)
