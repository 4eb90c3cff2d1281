"""Any source to numbered webdataset tars, in parallel and to be continued: `rocket-fast data pack`."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rocket_fast.errors import Failed, optional_import, require
from rocket_fast.files import remove_leftovers, write_atomically
from rocket_fast.loaders.base import BadSampleError
from rocket_fast.loaders.cpu import decode_image, read_caption, read_captions
from rocket_fast.loaders.ordered_map import AHEAD, ordered_map
from rocket_fast.loaders.shards import ShardSet, expand_patterns

RECORD = "pack.json"
_NOT_IN_KEYS = re.compile(r"[.\x00-\x1f\x7f]")  # the key of a member ends at the first dot
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Where the tars go, and what goes into them."""

    out: Path
    """Folder for the tars; an unfinished one of the same sources and options is continued."""
    captions: Literal["txt", "several"] = "txt"
    """txt: one caption a picture; several: all of them, as the list "captions" in a .json member besides."""
    shard_size: int = 10_000
    """Samples to a tar, those that cannot be used included."""
    workers: int = 2
    """Threads that read, and decode where pictures are resized."""
    resize_shorter: int | None = None
    """Make the shorter side of larger pictures this many pixels and store them as JPEG; None keeps every byte."""
    quality: int = 90
    """Of these JPEGs."""
    pixel_limit: int = 100_000_000
    """Larger pictures are left out before they are decoded."""

    def __post_init__(self) -> None:
        require(self.captions in ("txt", "several"), "captions", self.captions, "'txt' or 'several'")
        for name in ("shard_size", "workers", "pixel_limit"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a number >= 1")
        side = self.resize_shorter
        require(side is None or side >= 1, "resize_shorter", side, "a number >= 1 or None")
        require(1 <= self.quality <= 100, "quality", self.quality, "a number from 1 to 100")


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """``samples`` packed into ``shards`` tars, ``kept`` of which were there already; what was left out, by reason."""

    shards: int
    kept: int
    samples: int
    skipped: Counter[str]


class _Member(NamedTuple):
    """A sample as it goes into a tar."""

    key: str
    suffix: str
    image: bytes
    text: str
    json: bytes | None


def pack(
    patterns: Sequence[str], config: PackConfig, *, advance: Callable[[int, int], None] = lambda done, total: None
) -> PackReport:
    """Write ``config.out/00000.tar`` ...; ``advance(done, total)`` is called as samples are done.

    A tar is there whole or not at all, and ``pack.json`` tells which are done: the same call continues after a kill. A
    sample that cannot be used is left out and counted; pictures are decoded only to resize them or if their format is
    none that tars hold. Raises ValueError for sources that cannot be read and for a folder of other tars, ``Failed`` if
    it cannot be written.
    """
    shards = ShardSet(patterns, caption="txt" if config.captions == "txt" else "json")
    record = _open_record(patterns, config, shards)
    done: dict[str, Any] = record["shards"]
    kept, total = 0, len(shards)

    def make(index: int) -> _Member | str:
        try:
            return _make(shards, index, config)
        except BadSampleError as error:
            return error.reason

    with ThreadPoolExecutor(config.workers, thread_name_prefix="rocket-fast-pack") as pool:
        for start in range(0, total, config.shard_size):
            numbers = range(start, min(start + config.shard_size, total))
            path = config.out / f"{start // config.shard_size:05d}.tar"
            if path.name in done and path.exists():
                kept += 1
                advance(numbers.stop, total)
                continue
            skipped = Counter[str]()
            results = ordered_map(pool, make, numbers, config.workers * AHEAD)
            members = _counted(results, skipped, lambda more, start=start: advance(start + more, total))  # type: ignore[misc]
            try:
                write_atomically(path, lambda temporary, members=members: _write_tar(temporary, members))  # type: ignore[misc]
            except OSError as error:
                raise Failed(f"{path} cannot be written: {error}") from error
            done[path.name] = {"samples": len(numbers) - skipped.total(), "skipped": dict(skipped)}
            _write_record(config.out, record)
    return PackReport(
        shards=len(done),
        kept=kept,
        samples=sum(shard["samples"] for shard in done.values()),
        skipped=sum((Counter(shard["skipped"]) for shard in done.values()), Counter(shards.skipped)),
    )


def _open_record(patterns: Sequence[str], config: PackConfig, shards: ShardSet) -> dict[str, Any]:
    """The record of an unfinished folder, or a new one; ValueError if the folder holds something else."""
    folders = [each.path.resolve().parent for each in expand_patterns(patterns)]
    require(config.out.resolve() not in folders, "out", str(config.out), "a folder without the sources in it")
    options = dataclasses.asdict(config)
    plan: dict[str, Any] = {"sources": list(patterns), "data": shards.fingerprint}
    plan |= {name: options[name] for name in options if name not in ("out", "workers")}
    path = config.out / RECORD
    if not path.exists():
        tars = sorted(each.name for each in config.out.glob("*.tar"))
        require(
            not tars, "out", f"{config.out} with {', '.join(tars[:3])}", "an empty folder, or one begun by this command"
        )
        return {**plan, "shards": {}}
    record: dict[str, Any] = json.loads(path.read_text())
    for name, value in plan.items():
        require(record.get(name) == value, name, value, f"{record.get(name)!r}, as {path} was begun")
    remove_leftovers(config.out)
    return record


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_atomically(folder / RECORD, lambda temporary: temporary.write_text(json.dumps(record, indent=1)))


def _counted(
    results: Iterator[_Member | str], skipped: Counter[str], advance: Callable[[int], None]
) -> Iterator[_Member]:
    for number, result in enumerate(results, start=1):
        advance(number)
        if isinstance(result, str):
            skipped[result] += 1
        else:
            yield result


def _make(shards: ShardSet, index: int, config: PackConfig) -> _Member:
    raw = shards.read(index)
    text = read_caption(raw.text) if raw.json is None else read_captions(raw.json)[0]
    suffix, image = _suffix(raw.image), raw.image
    if suffix is None or config.resize_shorter is not None:
        pixels = decode_image(raw.image, config.pixel_limit)
        smaller = _resized(pixels, config.resize_shorter)
        if suffix is None or smaller is not None:
            codec = optional_import("simplejpeg", "train")
            chosen = np.ascontiguousarray(pixels if smaller is None else smaller)
            suffix, image = "jpg", codec.encode_jpeg(chosen, quality=config.quality, colorspace="RGB")
    return _Member(raw.key, suffix, image, text, raw.json)


def _suffix(image: bytes) -> str | None:
    """What a tar calls a picture of this format; None for one that has no place in tars."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in _MAGIC.items() if image.startswith(magic)), None)


def _resized(pixels: np.ndarray, shorter: int | None) -> np.ndarray | None:
    """The picture with its shorter side made ``shorter`` (bicubic, antialiased); None if it is not larger."""
    height, width = pixels.shape[:2]
    if shorter is None or min(height, width) <= shorter:
        return None
    pil = optional_import("PIL.Image", "train")
    scale = shorter / min(height, width)
    size = max(shorter, round(width * scale)), max(shorter, round(height * scale))
    return np.asarray(pil.fromarray(pixels).resize(size, pil.Resampling.BICUBIC))


def _write_tar(path: Path, members: Iterator[_Member]) -> None:
    """Members ``key.suffix``, ``key.txt`` and ``key.json``, without times or owners, under keys made distinct."""
    taken: set[str] = set()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for member in members:
            key = _distinct(_NOT_IN_KEYS.sub("_", "/".join(filter(None, member.key.split("/")))), taken)
            contents = {member.suffix: member.image, "txt": member.text.encode()}
            if member.json is not None:
                contents["json"] = member.json
            for suffix, content in contents.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _distinct(key: str, taken: set[str]) -> str:
    """``key``, with a number behind it if it is taken; and take it."""
    chosen, number = key, 1
    while chosen in taken:
        number += 1
        chosen = f"{key}-{number}"
    taken.add(chosen)
    return chosen
