"""Rows of picture files and captions: what most formats come down to once they are parsed."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rocket_fast.errors import require
from rocket_fast.loaders.base import BadSampleError
from rocket_fast.loaders.sources import IMAGE_SUFFIXES, CaptionMember, RawSample, Skipped
from rocket_fast.loaders.sources.webdataset import FileCache

if TYPE_CHECKING:
    from rocket_fast.loaders.sources.parquet import RowGroupCache

IMAGE_COLUMNS = ("filepath", "file_name", "filename", "image", "image_path", "path", "file")
CAPTION_COLUMNS = ("caption", "captions", "title", "text", "txt")
_GUESSED_SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How a source is to be read; ``files``, ``row_groups`` and ``stale_indexes`` are shared by a set's sources."""

    caption: CaptionMember
    files: FileCache
    row_groups: RowGroupCache
    stale_indexes: list[str] = field(default_factory=list)
    """Index files that could not be used, and why."""
    index: Path | None = None
    """Folder of the tars' index files, if they are not beside them."""
    images: Path | None = None
    """Folder of the pictures."""
    image_column: str | None = None
    caption_column: str | None = None

    def folders(self, beside: Path) -> PictureFolders:
        """Where pictures are looked for, in this order, if no folder was named."""
        around = (beside.parent, beside.parent / "images", Path())
        return PictureFolders(around if self.images is None else (self.images,))


class Row(NamedTuple):
    """One sample as its table tells it; captions that are not strings, or blank, count as missing."""

    key: str
    picture: str
    captions: Iterable[object]


def row_key(number: int) -> str:
    """The key of row ``number`` (from 0, header not counted) of a table that has no keys of its own."""
    return f"{number:08d}"


def pick_column(names: Sequence[str], wanted: str | None, known: Sequence[str], option: str) -> str:
    """The column to read: ``wanted``, or the first of ``known`` that is there, in any case."""
    if wanted is not None:
        require(wanted in names, option, wanted, f"one of the columns {list(names)}")
        return wanted
    by_lower = {name.strip().lower(): name for name in reversed(names)}
    found = next((by_lower[name] for name in known if name in by_lower), None)
    require(found is not None, "columns", list(names), f"one of {', '.join(known)}, or its name: ?{option}=NAME")
    assert found is not None
    return found


def pick_caption_column(names: Sequence[str], options: SourceOptions) -> str | None:
    """``pick_column`` for captions; None where none are wanted."""
    if options.caption == "none":
        return None
    return pick_column(names, options.caption_column, CAPTION_COLUMNS, "caption_column")


def caption_bytes(captions: Iterable[object], member: CaptionMember) -> bytes:
    """The first caption as a .txt member holds it, or all of them as the .json member; BadSampleError without any.

    Nothing where none are wanted.
    """
    if member == "none":
        return b""
    texts = [text.strip() for text in captions if isinstance(text, str)]
    if not texts:
        raise BadSampleError("no caption")
    texts = [text for text in texts if text]
    if not texts:
        raise BadSampleError("empty caption")
    texts = [text for text in texts if _is_unicode(text)]
    if not texts:
        raise BadSampleError("caption not UTF-8")
    return (texts[0] if member == "txt" else json.dumps({"captions": texts}, ensure_ascii=False)).encode()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True


def raw_sample(key: str, image: bytes, caption: bytes, member: CaptionMember) -> RawSample:
    """A sample whose ``caption`` is in the given member."""
    return RawSample(key, image, caption if member == "txt" else None, caption if member == "json" else None)


def read_whole(path: str, what: str) -> bytes:
    """The bytes of a sample's image or caption file; BadSampleError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise BadSampleError(f"no {what}") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise BadSampleError(f"{what} file cannot be read") from error


class Strings:
    """Millions of byte strings in two objects; grows by ``append``."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return bytes(self._bytes[self._ends[index] : self._ends[index + 1]])

    def append(self, value: bytes) -> None:
        """Add one at the end."""
        self._bytes += value
        self._ends.append(len(self._bytes))


class PictureFolders:
    """Finds pictures by relative path in one of several folders.

    Each folder on the way is listed once: asking for every file by itself takes an hour on a network disk.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [str(folder) for folder in folders]
        self._names: dict[str, frozenset[str]] = {}

    def find(self, picture: str) -> tuple[int, str] | None:
        """Number of the folder and path in it; the suffix may be missing in ``picture``. None if there is no file."""
        has_suffix = picture.rpartition(".")[2].lower() in IMAGE_SUFFIXES | {"zip"}
        for number, folder in enumerate(self.folders):
            parent, name = os.path.split(os.path.join(folder, picture))
            names = self._listing(parent)
            for suffix in _GUESSED_SUFFIXES[:1] if has_suffix else _GUESSED_SUFFIXES:
                if name + suffix in names:
                    return number, picture + suffix
        return None

    def path(self, number: int, picture: str) -> str:
        """The path of what ``find`` found."""
        return os.path.join(self.folders[number], picture)

    def forget(self) -> None:
        """Give the listings' memory back."""
        self._names.clear()

    def _listing(self, folder: str) -> frozenset[str]:
        names = self._names.get(folder)
        if names is None:
            try:
                names = frozenset(os.listdir(folder or "."))
            except (OSError, ValueError):
                names = frozenset()
            self._names[folder] = names
        return names


class FileSource:
    """Samples whose pictures are files; a row that is None counts as one that cannot be read."""

    blocks: np.ndarray | None = None

    def __init__(self, name: str, rows: Iterable[Row | None], folders: PictureFolders, member: CaptionMember) -> None:
        self.name, self.skipped = name, Skipped()
        self._folders, self._member = folders, member
        self._keys, self._pictures, self._captions, self._places = Strings(), Strings(), Strings(), array("B")
        seen: set[str] = set()
        for number, row in enumerate(rows):
            try:
                self._add(row, seen)
            except BadSampleError as error:
                self.skipped.add(error.reason, f"row {number}" if row is None else row.key)
        folders.forget()

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        """Sample ``index``'s key."""
        return f"{self.name}/{os.fsdecode(self._keys[index])}"

    def read(self, index: int) -> RawSample:
        """Sample ``index``'s bytes; BadSampleError if the picture is gone."""
        image = read_whole(self._folders.path(self._places[index], os.fsdecode(self._pictures[index])), "image")
        return raw_sample(self.key(index), image, self._captions[index], self._member)

    def _add(self, row: Row | None, seen: set[str]) -> None:
        if row is None:
            raise BadSampleError("record cannot be read")
        if row.key in seen:
            raise BadSampleError("repeated key")
        try:
            key, found = os.fsencode(row.key), self._folders.find(row.picture)
            picture = os.fsencode(found[1]) if found else b""
        except UnicodeEncodeError as error:
            raise BadSampleError("no image") from error
        if found is None:
            raise BadSampleError("no image")
        caption = caption_bytes(row.captions, self._member)
        seen.add(row.key)
        self._keys.append(key)
        self._pictures.append(picture)
        self._captions.append(caption)
        self._places.append(found[0])
