"""Photographs to time decoders and loaders on: wallpapers of Debian packages, cut and scaled to tars of two sizes.

``small``: 500 x 375 pixels, JPEG quality 90, 600 of them; ``large``: 2048 x 1536, 60. Made once under ``data/photos``,
by ``apt-get download`` where there is one; without, noise and gradients take their place, and the results say so.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "plasma-workspace-wallpapers")
FOLDER = Path(__file__).parents[1] / "data" / "photos"
SIZES = {"small": ((500, 375), 600), "large": ((2048, 1536), 60)}


def shard(kind: str, *, count: int | None = None, folder: Path = FOLDER, real: bool = True) -> tuple[Path, str]:
    """A tar of JPEGs with captions, made if it is not there, and what its pictures are."""
    size, usual = SIZES[kind]
    count = usual if count is None else count
    photographs = sorted(_unpacked(folder)) if real else []
    what = "photographs" if photographs else "generated pictures"
    path = folder / f"{kind}-{what.split()[0]}-{count}.tar"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        _write(partial, _crops(photographs, size, count))
        partial.rename(path)
    return path, what


def _unpacked(folder: Path) -> Iterator[Path]:
    """The packages' JPEGs; fetched where apt is."""
    unpacked = folder / "packages"
    if not unpacked.is_dir() and shutil.which("apt-get") and shutil.which("dpkg"):
        with tempfile.TemporaryDirectory() as fetched:
            got = subprocess.run(["apt-get", "download", *PACKAGES], cwd=fetched, capture_output=True, check=False)
            if got.returncode == 0:
                folder.mkdir(parents=True, exist_ok=True)
                for package in Path(fetched).glob("*.deb"):
                    subprocess.run(["dpkg", "-x", str(package), str(unpacked)], check=True)
    return unpacked.rglob("*.jpg")


def _crops(photographs: list[Path], size: tuple[int, int], count: int) -> Iterator[bytes]:
    """JPEGs of random parts, each at least as large as ``size``, scaled down to it."""
    rng = np.random.default_rng(0)
    pictures = [Image.open(path).convert("RGB") for path in photographs[:40]]
    pictures = [picture for picture in pictures if picture.width >= 2 * size[0] and picture.height >= 2 * size[1]]
    for number in range(count):
        picture = pictures[number % len(pictures)] if pictures else _generated(rng, size)
        share = rng.uniform(0.6, 1.0)
        width = int(share * min(picture.width, picture.height * size[0] / size[1]))
        height = width * size[1] // size[0]
        left, top = rng.integers(0, picture.width - width + 1), rng.integers(0, picture.height - height + 1)
        part = picture.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        part.save(encoded, "JPEG", quality=90)
        yield encoded.getvalue()


def _generated(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(coarse, Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)), 0.1)


def _write(path: Path, jpegs: Iterator[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, jpeg in enumerate(jpegs):
            caption = f"a photo of the hills behind the old town, number {number}".encode()
            for suffix, content in (("jpg", jpeg), ("txt", caption)):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
