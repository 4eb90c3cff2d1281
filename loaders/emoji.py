"""Emoji drawings of eleven sets with names and keywords: the demonstration data, built from package registries.

The drawings are SVG inside small npm packages (Iconify's re-packaging of each vendor's own release); they are fetched,
matched to Unicode names, rendered on white and written as webdataset shards. Four splits make the evaluation honest:

- ``train`` and ``val``: the training vendors' pictures; ``val`` holds names that ``train`` never shows;
- ``heldout``: names kept away from training and from tuning, in every training vendor's drawing;
- ``openmoji``: a vendor never trained on, drawing the names of ``train`` and ``val``;
- ``unseen``: the same vendor drawing held-out names, so that neither style nor name was ever seen.

The artwork stays its owners': credit it (``ATTRIBUTION.md``) and do not commit it.
"""

import hashlib
import io
import json
import multiprocessing
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rocket_fast.errors import optional_import, require
from rocket_fast.files import write_atomically
from rocket_fast.loaders.emoji_sources import (
    OPENMOJI,
    PACKAGES,
    TRAINING_VENDORS,
    Drawing,
    Package,
    fetch,
    match_drawings,
)

HELDOUT_FRACTION = 0.1
VAL_FRACTION = 0.1
"""Of the names left after the held-out ones."""


SPLITS = ("train", "val", "heldout", "openmoji", "unseen")


@dataclass(frozen=True, kw_only=True)
class EmojiConfig:
    """Where the emoji data go and how they are drawn."""

    out: Path = Path("data/emoji")
    """Folder of the shards; downloaded packages are kept in its subfolder `downloads`."""
    size: int = 48
    """Side of the square pictures, in pixels."""
    seed: int = 0
    """Chooses the names of each split and the order of the samples."""
    shard_size: int = 1000
    """Samples in a shard."""
    workers: int = 0
    """Rendering processes; 0 means one a core, 8 at most."""

    def __post_init__(self) -> None:
        require(8 <= self.size <= 1024, "size", self.size, "8 to 1024 pixels")
        require(self.shard_size >= 1, "shard_size", self.shard_size, "at least 1 sample")
        require(self.workers >= 0, "workers", self.workers, "0 (one a core) or a number of processes")

    @property
    def processes(self) -> int:
        """Rendering processes after resolving 0."""
        return self.workers or min(os.cpu_count() or 1, 8)


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """One split: its shards with their SHA-256, its pictures by vendor, its class names in alphabetical order."""

    pictures: int
    vendors: dict[str, int]
    shards: dict[str, str]
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EmojiManifest:
    """What ``manifest.json`` holds; ``fingerprint`` identifies everything the pictures depend on."""

    fingerprint: str
    config: dict[str, Any]
    splits: dict[str, SplitSummary]
    packages: tuple[Package, ...]

    @classmethod
    def load(cls, folder: Path) -> "EmojiManifest":
        """Read ``manifest.json`` of a folder that `build_emoji` filled."""
        fields = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return cls(
            fingerprint=fields["fingerprint"],
            config=fields["config"],
            splits={name: SplitSummary(**{**s, "names": tuple(s["names"])}) for name, s in fields["splits"].items()},
            packages=tuple(Package(**package) for package in fields["packages"]),
        )


def build_emoji(config: EmojiConfig) -> EmojiManifest:
    """Fetch, match, render and write the emoji data; continue where an interrupted call stopped.

    Finished shards (checked by SHA-256) and downloaded packages are kept, so a second call needs no network.
    Raises ImportError where resvg-py, Pillow, rich or npm is missing, Failed where a package cannot be fetched.
    """
    for module in ("resvg_py", "PIL", "rich"):
        optional_import(module, "demo")
    archives = {package.vendor: fetch(package, config.out / "downloads") for package in PACKAGES}
    drawings = match_drawings(archives)
    plan = _plan_shards(drawings, _split_names(drawings, config.seed), config)
    fingerprint = _fingerprint(plan, config)
    checksums = _write_shards(plan, fingerprint, config)
    splits = {split: _summary(split, plan, checksums) for split in SPLITS}
    fixed = {"size": config.size, "seed": config.seed, "shard_size": config.shard_size}
    manifest = EmojiManifest(fingerprint=fingerprint, config=fixed, splits=splits, packages=PACKAGES)
    _write_text(config.out / "ATTRIBUTION.md", _attribution(manifest))
    _write_contact_sheet(plan, config)
    _write_text(config.out / "manifest.json", json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n")
    print(_attribution(manifest))
    print(f"{config.out} is complete (contact_sheet.png shows it); next: rocket-fast train --preset demo")
    return manifest


# Splits --------------------------------------------------------------------------------------------------------------


def _rank(text: str, seed: int) -> str:
    """A seeded order that does not move when other samples come or go."""
    return hashlib.sha256(f"{seed}/{text}".encode()).hexdigest()


def _groups(drawings: list[Drawing]) -> dict[str, str]:
    """Name to the first name of its group, whose names share a split.

    Names belong together that any vendor draws with the very same picture, and those that differ by a mirror image only
    ("man running", "man running facing right").
    """
    parent = {drawing.name: drawing.name for drawing in drawings}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    first: dict[str, str] = {}
    for drawing in drawings:
        mirrored = drawing.name.removesuffix(" facing right")
        for identity in (drawing.vendor + drawing.svg, drawing.codepoint, mirrored):
            low, high = sorted((root(first.setdefault(identity, drawing.name)), root(drawing.name)))
            parent[high] = low
    return {name: root(name) for name in parent}


def _split_names(drawings: list[Drawing], seed: int) -> dict[str, str]:
    """Name to ``train``, ``val`` or ``heldout``, whole groups of names at a time."""
    group = _groups(drawings)
    trained = sorted({d.name for d in drawings if d.vendor != OPENMOJI.vendor})
    members: dict[str, list[str]] = defaultdict(list)
    for name in trained:
        members[group[name]].append(name)
    heldout = round(HELDOUT_FRACTION * len(trained))
    val = round(VAL_FRACTION * (len(trained) - heldout))
    split: dict[str, str] = {}
    for key in sorted(members, key=lambda name: _rank(name, seed)):
        counts = Counter(split.values())
        for name_split, wanted in (("heldout", heldout), ("val", val), ("train", len(trained))):
            if counts[name_split] + len(members[key]) <= wanted:
                split.update(dict.fromkeys(members[key], name_split))
                break
    return split


def _split_of(drawing: Drawing, name_split: dict[str, str]) -> str:
    """The split a drawing goes to; a name that only OpenMoji draws was never trained on, like a held-out one."""
    if drawing.vendor != OPENMOJI.vendor:
        return name_split[drawing.name]
    return "openmoji" if name_split.get(drawing.name) in ("train", "val") else "unseen"


# Shards --------------------------------------------------------------------------------------------------------------


def _plan_shards(drawings: list[Drawing], split: dict[str, str], config: EmojiConfig) -> dict[str, list[Drawing]]:
    """Shard file name to its samples, in a seeded order."""
    by_split: dict[str, list[Drawing]] = {name: [] for name in SPLITS}
    for drawing in sorted(drawings, key=lambda d: _rank(d.key, config.seed)):
        by_split[_split_of(drawing, split)].append(drawing)
    return {
        f"{name}-{number:04d}.tar": samples[start : start + config.shard_size]
        for name, samples in by_split.items()
        for number, start in enumerate(range(0, len(samples), config.shard_size))
    }


def _fingerprint(plan: dict[str, list[Drawing]], config: EmojiConfig) -> str:
    content = json.dumps(
        [config.size, [[shard, [[asdict(d), d.captions] for d in samples]] for shard, samples in plan.items()]]
    )
    return hashlib.sha256(content.encode()).hexdigest()


def _render(svg: str, size: int) -> bytes:
    """PNG of an SVG document on white, RGB, ``size`` x ``size``."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
    output = io.BytesIO()
    Image.open(io.BytesIO(bytes(png))).convert("RGB").save(output, "PNG", optimize=False)
    return output.getvalue()


def _render_all(drawings: list[Drawing], config: EmojiConfig, pool: ProcessPoolExecutor | None) -> Iterator[bytes]:
    """Pictures in the order of ``drawings``, in this process where there is no pool."""
    apply: Callable[..., Iterator[bytes]] = pool.map if pool else map
    chunks = {"chunksize": 32} if pool else {}
    return apply(_render, [d.svg for d in drawings], [config.size] * len(drawings), **chunks)


def _shard_bytes(drawings: list[Drawing], pictures: Iterable[bytes], advance: Callable[[], None]) -> bytes:
    """A tar of ``key.png``, ``key.txt``, ``key.json`` for each sample, without times or owners."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for drawing, picture in zip(drawings, pictures, strict=True):
            fields = {
                "name": drawing.name,
                "captions": drawing.captions,
                "keywords": drawing.keywords,
                "vendor": drawing.vendor,
                "codepoint": drawing.codepoint,
                "licence": drawing.licence,
            }
            text = json.dumps(fields, ensure_ascii=False).encode()
            for extension, content in (("png", picture), ("txt", drawing.name.encode()), ("json", text)):
                member = tarfile.TarInfo(f"{drawing.key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            advance()
    return output.getvalue()


def _write_shards(plan: dict[str, list[Drawing]], fingerprint: str, config: EmojiConfig) -> dict[str, str]:
    """Render what is not there yet; the SHA-256 of each shard. ``progress.json`` remembers the finished ones."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    state = config.out / "progress.json"
    done = _finished_shards(state, fingerprint, config.out)
    for stale in config.out.glob("*.tar"):
        if stale.name not in done and re.fullmatch(rf"({'|'.join(SPLITS)})-\d{{4}}\.tar", stale.name):
            stale.unlink()
    missing = {shard: drawings for shard, drawings in plan.items() if shard not in done}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    pool = None
    if config.processes > 1 and sum(map(len, missing.values())) > 256:
        pool = ProcessPoolExecutor(config.processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        with Progress(*columns) as progress:
            task = progress.add_task("Rendering emoji", total=sum(map(len, missing.values())))
            for shard, drawings in missing.items():
                pictures = _render_all(drawings, config, pool)
                content = _shard_bytes(drawings, pictures, lambda: progress.advance(task))
                _write_bytes(config.out / shard, content)
                done[shard] = hashlib.sha256(content).hexdigest()
                _write_text(state, json.dumps({"fingerprint": fingerprint, "shards": done}))
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return done


def _finished_shards(state: Path, fingerprint: str, folder: Path) -> dict[str, str]:
    """Shards of this very plan that lie complete in ``folder``, with their SHA-256."""
    try:
        recorded = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if recorded.get("fingerprint") != fingerprint:
        return {}
    return {
        shard: checksum
        for shard, checksum in recorded["shards"].items()
        if (folder / shard).exists() and hashlib.sha256((folder / shard).read_bytes()).hexdigest() == checksum
    }


def _write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _write_text(path: Path, text: str) -> None:
    _write_bytes(path, text.encode("utf-8"))


# What a person reads -------------------------------------------------------------------------------------------------


def _summary(split: str, plan: dict[str, list[Drawing]], checksums: dict[str, str]) -> SplitSummary:
    shards = {shard: samples for shard, samples in plan.items() if shard.rsplit("-", 1)[0] == split}
    drawings = [drawing for samples in shards.values() for drawing in samples]
    return SplitSummary(
        pictures=len(drawings),
        vendors=dict(sorted(Counter(d.vendor for d in drawings).items())),
        shards={shard: checksums[shard] for shard in shards},
        names=tuple(sorted({d.name for d in drawings})),
    )


def _attribution(manifest: EmojiManifest) -> str:
    """Credits as Markdown: every package with author, licence, source and what was changed."""
    pictures: Counter[str] = Counter()
    for split in manifest.splits.values():
        pictures.update(split.vendors)
    size = manifest.config["size"]
    lines = [
        "# Attribution",
        "",
        f"Rendered to {size} x {size} pixels on white from the vendors' SVG drawings, otherwise unchanged.",
        "The drawings stay under their owners' licences.",
        "",
    ]
    for package in manifest.packages:
        used = f"{pictures[package.vendor]} pictures" if package.vendor in pictures else "names and keywords"
        lines.append(
            f"- {package.vendor} ({package.package} {package.version}): {used}, by {package.author}, "
            f"{package.licence}, {package.url}"
        )
    return "\n".join(lines) + "\n"


def _write_contact_sheet(plan: dict[str, list[Drawing]], config: EmojiConfig, rows_per_split: int = 5) -> None:
    """``contact_sheet.png``: vendors as columns, a few names of each name split as rows."""
    from PIL import Image, ImageDraw

    cell, label, header = config.size + 8, 220, 24
    vendors = [vendor.vendor for vendor in (*TRAINING_VENDORS, OPENMOJI)]
    drawn: dict[str, dict[str, Drawing]] = defaultdict(dict)
    split_of: dict[str, str] = {}
    for shard, samples in plan.items():
        for drawing in samples:
            drawn[drawing.name][drawing.vendor] = drawing
            split_of.setdefault(drawing.name, shard.rsplit("-", 1)[0])
    rows = []
    for split in SPLITS[:3]:
        names = [name for name in drawn if split_of[name] == split]
        rows += sorted(names, key=lambda name: (-len(drawn[name]), _rank(name, config.seed)))[:rows_per_split]
    column = max(cell, 84)
    sheet = Image.new("RGB", (label + column * len(vendors), header + cell * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, vendor in enumerate(vendors):
        pen.text((label + column * x, 2), vendor.replace("-", "\n", 1), fill="black", font_size=9)
    for y, name in enumerate(rows):
        pen.text((4, header + cell * y + cell // 2 - 6), f"{split_of[name]}: {name}"[:40], fill="black", font_size=10)
        for x, vendor in enumerate(vendors):
            if vendor in drawn[name]:
                picture = Image.open(io.BytesIO(_render(drawn[name][vendor].svg, config.size)))
                sheet.paste(picture, (label + column * x, header + cell * y + 4))
    output = io.BytesIO()
    sheet.save(output, "PNG")
    _write_bytes(config.out / "contact_sheet.png", output.getvalue())
