"""Any source to numbered tars or .beton files, in parallel and to be continued: `rocket-fast data pack`."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from rocket_fast.errors import Failed, optional_import, require
from rocket_fast.files import remove_leftovers, write_atomically
from rocket_fast.loaders.base import BadSampleError
from rocket_fast.loaders.cpu import check_jpeg, decode_image, read_caption, read_captions
from rocket_fast.loaders.ffcv import BetonSample, beton_sample, check_installed, fill_beton, page_bytes
from rocket_fast.loaders.ordered_map import AHEAD, ordered_map
from rocket_fast.loaders.shards import ShardSet, expand_patterns

RECORD = "pack.json"
PackFormat = Literal["tar", "beton"]
_NOT_IN_KEYS = re.compile(r"[.\x00-\x1f\x7f]")  # the key of a member ends at the first dot
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Where the files go, and what goes into them."""

    out: Path
    """Folder for the files; an unfinished one of the same sources and options is continued."""
    format: PackFormat = "tar"
    """tar: webdataset's, which everything reads; beton: FFCV's, which open at once."""
    captions: Literal["txt", "several"] = "txt"
    """txt: one caption a picture; several: all of them, in tars as the list "captions" in a .json member besides."""
    shard_size: int = 10_000
    """Samples to a file, those that cannot be used included. FFCV's own loader takes one file: make it large."""
    page_mib: int = 16
    """Of a .beton: MiB to a page, a power of two; a larger sample is left out."""
    workers: int = 2
    """Threads that read and decode."""
    resize_shorter: int | None = None
    """Make the shorter side of larger pictures this many pixels and store them as JPEG; None keeps every byte."""
    quality: int = 90
    """Of these JPEGs."""
    pixel_limit: int = 100_000_000
    """Larger pictures are left out before they are decoded."""

    def __post_init__(self) -> None:
        require(self.format in get_args(PackFormat), "format", self.format, "'tar' or 'beton'")
        require(self.captions in ("txt", "several"), "captions", self.captions, "'txt' or 'several'")
        page_bytes(self.page_mib)
        for name in ("shard_size", "workers", "pixel_limit"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a number >= 1")
        side = self.resize_shorter
        require(side is None or side >= 1, "resize_shorter", side, "a number >= 1 or None")
        require(1 <= self.quality <= 100, "quality", self.quality, "a number from 1 to 100")


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """``samples`` packed into ``shards`` files, ``kept`` of which were there already; what was left out, by reason."""

    shards: int
    kept: int
    samples: int
    skipped: Counter[str]


class TarSample(NamedTuple):
    """A sample as it goes into a tar."""

    key: str
    suffix: str
    image: bytes
    text: str
    json: bytes | None


def pack(
    patterns: Sequence[str], config: PackConfig, *, advance: Callable[[int, int], None] = lambda done, total: None
) -> PackReport:
    """Write ``config.out/00000.tar`` (or .beton) ...; ``advance(done, total)`` is called as samples are done.

    A file is there whole or not at all, and ``pack.json`` tells which are done: the same call continues after a kill. A
    sample that cannot be used is left out and counted: every picture is decoded, but for JPEGs that a tar takes as they
    are, which are read to their end (``check_jpeg``). For tars, pictures of formats that they do not hold become JPEGs,
    and keys are made such as tars can hold; a .beton holds any picture and any key: its batches are the sources', bit
    for bit. Raises ValueError for sources that cannot be read and for a folder of other files, ``Failed`` if it cannot
    be written, MissingExtra for .beton without FFCV.
    """
    if config.format == "beton":
        check_installed()
    shards = ShardSet(patterns, caption="txt" if config.captions == "txt" else "json")
    record = _open_record(patterns, config, shards)
    done: dict[str, Any] = record["shards"]
    kept, total = 0, len(shards)

    def make(index: int) -> TarSample | BetonSample | str:
        try:
            return _make(shards, index, config)
        except BadSampleError as error:
            return error.reason

    with ThreadPoolExecutor(config.workers, thread_name_prefix="rocket-fast-pack") as pool:
        for start in range(0, total, config.shard_size):
            numbers = range(start, min(start + config.shard_size, total))
            path = config.out / f"{start // config.shard_size:05d}.{config.format}"
            if path.name in done and path.exists():
                kept += 1
                advance(numbers.stop, total)
                continue
            skipped = Counter[str]()
            results = ordered_map(pool, make, numbers, config.workers * AHEAD)
            samples = _counted(results, skipped, lambda more, start=start: advance(start + more, total))  # type: ignore[misc]
            fill = functools.partial(_fill, samples=samples, room=len(numbers), config=config)
            try:
                write_atomically(path, fill)
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
        others = sorted(each.name for kind in get_args(PackFormat) for each in config.out.glob(f"*.{kind}"))
        got = f"{config.out} with {', '.join(others[:3])}"
        require(not others, "out", got, "an empty folder, or one begun by this command")
        return {**plan, "shards": {}}
    record: dict[str, Any] = json.loads(path.read_text())
    for name, value in plan.items():
        require(record.get(name) == value, name, value, f"{record.get(name)!r}, as {path} was begun")
    remove_leftovers(config.out)
    return record


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_atomically(folder / RECORD, lambda temporary: temporary.write_text(json.dumps(record, indent=1)))


def _counted(
    results: Iterator[TarSample | BetonSample | str], skipped: Counter[str], advance: Callable[[int], None]
) -> Iterator[Any]:
    for number, result in enumerate(results, start=1):
        advance(number)
        if isinstance(result, str):
            skipped[result] += 1
        else:
            yield result


def _make(shards: ShardSet, index: int, config: PackConfig) -> TarSample | BetonSample:
    """Sample ``index`` as it goes into the file; BadSampleError if it cannot be used."""
    raw = shards.read(index)
    text = read_caption(raw.text) if raw.json is None else read_captions(raw.json)[0]
    if config.format == "beton":
        pixels = decode_image(raw.image, config.pixel_limit)
        smaller = _resized(pixels, config.resize_shorter)
        if smaller is not None:
            pixels, raw = smaller, replace(raw, image=_encoded(smaller, config.quality))
        height, width = pixels.shape[:2]
        return beton_sample(raw, height, width, page_bytes(config.page_mib))
    suffix, image = _suffix(raw.image), raw.image
    if suffix is not None and config.resize_shorter is None and check_jpeg(image, config.pixel_limit) is not None:
        return TarSample(raw.key, suffix, image, text, raw.json)
    pixels = decode_image(image, config.pixel_limit)
    smaller = _resized(pixels, config.resize_shorter)
    if suffix is None or smaller is not None:
        suffix, image = "jpg", _encoded(pixels if smaller is None else smaller, config.quality)
    return TarSample(raw.key, suffix, image, text, raw.json)


def _encoded(pixels: np.ndarray, quality: int) -> bytes:
    codec = optional_import("simplejpeg", "train")
    return codec.encode_jpeg(np.ascontiguousarray(pixels), quality=quality, colorspace="RGB")


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


def _fill(path: Path, *, samples: Iterator[Any], room: int, config: PackConfig) -> None:
    """Write one file of up to ``room`` samples."""
    if config.format == "tar":
        _write_tar(path, samples)
    else:
        fill_beton(
            path, _with_distinct_keys(samples), room=room, page=page_bytes(config.page_mib), captions=config.captions
        )


def _write_tar(path: Path, samples: Iterator[TarSample]) -> None:
    """Members ``key.suffix``, ``key.txt`` and ``key.json``, without times or owners, under keys made distinct."""
    taken: set[str] = set()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            key = _distinct(_NOT_IN_KEYS.sub("_", "/".join(filter(None, sample.key.split("/")))), taken)
            contents = {sample.suffix: sample.image, "txt": sample.text.encode()}
            if sample.json is not None:
                contents["json"] = sample.json
            for suffix, content in contents.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _with_distinct_keys(samples: Iterator[BetonSample]) -> Iterator[BetonSample]:
    """Two .beton files that are packed into one may have samples of the same keys."""
    taken: set[str] = set()
    for sample in samples:
        name = sample.key.tobytes().decode("utf-8", "surrogateescape")
        key = _distinct(name, taken).encode("utf-8", "surrogateescape")
        yield sample._replace(key=np.frombuffer(key, np.uint8))


def _distinct(key: str, taken: set[str]) -> str:
    """``key``, with a number behind it if it is taken; and take it."""
    chosen, number = key, 1
    while chosen in taken:
        number += 1
        chosen = f"{key}-{number}"
    taken.add(chosen)
    return chosen
