"""Images a second from a tar to batches, against the ways that open_clip and the original take, and decoding alone.

One thread each, in one process, in turns; ours with two threads as well. Photographs (benchmarks/photos.py) of 500 x
375 and 2048 x 1536 pixels to views of 224. ``open_clip``: webdataset, Pillow, torchvision's RandomResizedCrop(.9, 1),
bicubic, normalised floats. ``original``: Pillow and torchvision, the recipe's one weak and two strong views, captions
left alone. FFCV and DALI, one view, with one thread and with two: benchmarks/loader_peers.py. ``floor``: libjpeg-turbo
decoding alone. Ours gives uint8 views and packed token ids of augmented captions;
normalising them belongs to the device. Without timing (``--benchmark-disable``) there are four generated pictures.
"""

from __future__ import annotations

import functools
import io
import random
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import loader_peers
import photos
import pytest
import simplejpeg
import torch
from PIL import Image, ImageFilter

from rocket_fast.image_augment import ImageAugmentConfig, plain_augment, recipe_augment
from rocket_fast.loaders.base import DataConfig, Quality
from rocket_fast.loaders.cpu import CPULoader
from rocket_fast.text_augment import TextAugmentConfig
from rocket_fast.tokenizer import Tokenizer

Epoch = Callable[[], int]
FIRST_BATCH = """
import sys, time
start = time.perf_counter()
from rocket_fast.image_augment import recipe_augment
from rocket_fast.loaders.base import DataConfig
from rocket_fast.loaders.cpu import CPULoader
from rocket_fast.text_augment import TextAugmentConfig
from rocket_fast.tokenizer import Tokenizer
imported = time.perf_counter()
data = DataConfig(train=(sys.argv[1],), batch_size=int(sys.argv[2]))
loader = CPULoader(data, recipe_augment(224), TextAugmentConfig(), Tokenizer(), seed=0)
next(iter(loader))
print(imported - start, time.perf_counter() - imported)
loader.close()
"""


class Ours:
    """An epoch of the CPU loader."""

    def __init__(
        self, path: Path, image: ImageAugmentConfig, workers: int, count: int, quality: Quality = "exact"
    ) -> None:
        data = DataConfig(train=(str(path),), batch_size=min(100, count), workers=workers, quality=quality)
        text = TextAugmentConfig() if image.strong else None
        self.loader, self.epoch = CPULoader(data, image, text, Tokenizer(), seed=0), 0

    def __call__(self) -> int:
        self.epoch += 1
        self.loader.set_epoch(self.epoch)
        return sum(len(batch) for batch in self.loader)

    def close(self) -> None:
        self.loader.close()


def jpegs(path: Path) -> list[bytes]:
    with tarfile.open(path) as tar:
        return [tar.extractfile(member).read() for member in tar if member.name.endswith("jpg")]  # type: ignore[union-attr]


def floor(pictures: list[bytes]) -> int:
    for picture in pictures:
        simplejpeg.decode_jpeg(picture, "RGB")
    return len(pictures)


@functools.cache
def transforms() -> dict[str, Any]:
    """torchvision's: open_clip's training transform, and the recipe's weak and strong views."""
    tv = pytest.importorskip("torchvision.transforms", reason="timm brings torchvision")
    finish = [tv.ToTensor(), tv.Normalize((0.5,) * 3, (0.25,) * 3)]

    def crop(*scale: float) -> Any:
        return tv.RandomResizedCrop(224, scale=scale, interpolation=tv.InterpolationMode.BICUBIC)

    jitter = tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    blur = tv.RandomApply([lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))], p=0.5)
    strong = [crop(0.08, 1.0), jitter, tv.RandomGrayscale(p=0.2), blur, tv.RandomHorizontalFlip()]
    return {
        "open_clip": tv.Compose([crop(0.9, 1.0), *finish]),
        "weak": tv.Compose([crop(0.5, 1.0), *finish]),
        "strong": tv.Compose([*strong, *finish]),
    }


def open_clip(path: Path) -> int:
    wds = pytest.importorskip("webdataset", reason="the bench extra brings webdataset")
    made = (transforms()["open_clip"], str)
    data = wds.WebDataset(str(path), shardshuffle=False).decode("pilrgb").to_tuple("jpg", "txt").map_tuple(*made)
    return sum(len(images) for images, _ in data.batched(100))


def original(pictures: list[bytes]) -> int:
    weak, strong = transforms()["weak"], transforms()["strong"]
    for picture in pictures:
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        weak(image), strong(image), strong(image)
    return len(pictures)


@pytest.mark.parametrize("kind", photos.SIZES)
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("quality", ["exact", "fast"])
def test_images_per_second(kind: str, views: int, quality: Quality, benchmark: Any, tmp_path: Path) -> None:
    small = benchmark.disabled
    path, what = photos.shard(kind, count=4, folder=tmp_path, real=False) if small else photos.shard(kind)
    pictures = jpegs(path)
    image = plain_augment(224) if views == 1 else recipe_augment(224)
    ours, two = (Ours(path, image, workers, len(pictures), quality) for workers in (1, 2))
    others: dict[str, Epoch] = {"floor": lambda: floor(pictures), "ours, 2 threads": two}
    others |= {"open_clip": lambda: open_clip(path)} if views == 1 else {"original": lambda: original(pictures[:100])}
    exact = Ours(path, image, 1, len(pictures))
    if quality == "fast":
        others["exact"] = exact
    peers, notes = dict[str, Any](), list[str]()
    if views == 1 and quality == "exact":  # FFCV and DALI make no several views of one decode
        peers, notes = one_view_peers(path, len(pictures), tmp_path, threads=(1,) if small else (1, 2))
    ours(), exact()  # compiles what is compiled
    rates = paired_rates(ours, {**others, **peers}, benchmark, rounds=1 if small else 5)
    for loader in (ours, two, exact, *peers.values()):
        loader.close()
    verdict = f"{what}, {kind}, {views} views, {quality}: " + "; ".join([*compared(rates), *notes])
    benchmark.extra_info["verdict"] = verdict
    print("\n" + verdict)


def one_view_peers(
    path: Path, count: int, folder: Path, *, threads: tuple[int, ...]
) -> tuple[dict[str, Any], list[str]]:
    """FFCV and DALI by name and threads, and why one is not there."""
    made: dict[str, Any] = {}
    missing: list[str] = []
    for number in threads:
        found, missing = loader_peers.peers(path, number, min(100, count), folder)
        made |= {name if number == 1 else f"{name}, {number} threads": peer for name, peer in found.items()}
    return made, missing


class Rates(NamedTuple):
    """Samples a second of one contestant in each round, and a second of CPU time, which other processes do not take."""

    wall: list[float]
    cpu: list[float]


def paired_rates(ours: Epoch, others: Mapping[str, Epoch], benchmark: Any, *, rounds: int) -> dict[str, Rates]:
    """Everybody's, ours last."""
    rates = {name: Rates([], []) for name in (*others, "ours")}

    def timed(name: str, epoch: Epoch) -> None:
        torch.set_num_threads(1)  # torchvision's part; FFCV's loaders set it to theirs, for whoever comes after them
        wall, cpu = time.perf_counter(), time.process_time()
        count = epoch()
        rates[name].wall.append(count / (time.perf_counter() - wall))
        rates[name].cpu.append(count / (time.process_time() - cpu))

    def before() -> None:
        for name, epoch in others.items():
            timed(name, epoch)

    threads = torch.get_num_threads()
    benchmark.pedantic(lambda: timed("ours", ours), setup=before, rounds=rounds)
    torch.set_num_threads(threads)
    return rates


def compared(rates: Mapping[str, Rates]) -> list[str]:
    """Everybody's rate and CPU time, and how many times as fast ours is with as many threads, by either."""
    lines = []
    for name, values in rates.items():
        own = rates["ours, 2 threads" if name.endswith(", 2 threads") else "ours"]
        ratios = [statistics.median(a / b for a, b in zip(x, y, strict=True)) for x, y in zip(own, values, strict=True)]
        shown = "" if own is values else f" (ours {ratios[0]:.2f} x, by CPU time {ratios[1]:.2f} x)"
        lines.append(
            f"{name} {statistics.median(values.wall):.0f}/s, {1e6 / statistics.median(values.cpu):.0f} us{shown}"
        )
    return lines


def test_time_to_first_batch(benchmark: Any, tmp_path: Path) -> None:
    """In a fresh process, with what is compiled already on disk: the full recipe, 100 small pictures, two threads."""
    small = benchmark.disabled
    path, what = photos.shard("small", count=4, folder=tmp_path, real=False) if small else photos.shard("small")
    times: list[list[float]] = []

    def start() -> None:
        command = [sys.executable, "-c", FIRST_BATCH, str(path), str(4 if small else 100)]
        times.append([float(part) for part in subprocess.check_output(command, text=True).split()])

    start()  # compiles what is compiled
    benchmark.pedantic(start, rounds=1 if small else 5)
    importing, first = (statistics.median(column) for column in zip(*times[1:], strict=True))
    verdict = f"{what}: {first:.2f} s from opening the loader to its first batch, after {importing:.2f} s of importing"
    benchmark.extra_info["verdict"] = verdict
    print("\n" + verdict)
