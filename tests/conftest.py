"""Small real data and a small configuration, for the tests that run the whole way through; Triton's interpreter."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # beside others: a core each, before numpy and torch count them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Files in their order, the distributed ones first: two processes then end at about the same time."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40)}
SHAPES = ("square", "bar", "frame")


def _picture(colour: tuple[int, int, int], shape: str, rng: np.random.Generator) -> bytes:
    from PIL import Image

    pixels = np.full((24, 24, 3), 255, np.uint8)
    top, left = rng.integers(0, 8, size=2)
    if shape == "square":
        pixels[top : top + 14, left : left + 14] = colour
    elif shape == "bar":
        pixels[top : top + 5, :] = colour
    else:
        pixels[top : top + 14, left : left + 14] = colour
        pixels[top + 4 : top + 10, left + 4 : left + 10] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def write_shard() -> Callable[[Path, int, int], None]:
    """Write a webdataset tar of so many coloured shapes, drawn with a seed."""

    def write(path: Path, samples: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for i in range(samples):
                name, colour = list(COLOURS.items())[rng.integers(len(COLOURS))]
                shape = SHAPES[rng.integers(len(SHAPES))]
                caption = f"{name} {shape}"
                members = {
                    "png": _picture(colour, shape, rng),
                    "txt": caption.encode(),
                    "json": json.dumps({"captions": [caption, f"a {shape} in {name}"]}).encode(),
                }
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{i:05d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

    return write


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[[Path, int, int], None]) -> Path:
    """The data of ``tiny_config``: 100 pictures to train on, in two shards, and 30 to test with. Not to be changed."""
    folder = tmp_path_factory.mktemp("shards")
    for name, samples, seed in (("train-0", 60, 0), ("train-1", 40, 1), ("test-0", 30, 2)):
        write_shard(folder / f"{name}.tar", samples, seed)
    return folder


@pytest.fixture(scope="session")
def tiny_config_in(tiny_shards: Path) -> Callable[[Path], "TrainConfig"]:  # noqa: F821
    """Make, in a folder of its own, what ``tiny_config`` is."""
    from rocket_fast.config import EvalConfig, EvalSet, LoopConfig, TrainConfig
    from rocket_fast.image_augment import recipe_augment
    from rocket_fast.loaders.base import DataConfig
    from rocket_fast.losses import LossConfig
    from rocket_fast.models.clip import CLIPConfig
    from rocket_fast.models.heads import MLPHeadConfig
    from rocket_fast.models.text import TextConfig
    from rocket_fast.models.vision import ConvStemViTConfig
    from rocket_fast.optim import OptimConfig
    from rocket_fast.text_augment import TextAugmentConfig

    def make(folder: Path) -> TrainConfig:
        shutil.copytree(tiny_shards, folder / "data")
        test = EvalSet(name="test", shards=(str(folder / "data/test-*.tar"),))
        vision = ConvStemViTConfig(image_size=16, stem_widths=(8, 16), stem_blocks=(0, 1), width=16, layers=1, heads=2)
        return TrainConfig(
            name="tiny",
            out=folder / "runs",
            data=DataConfig(train=(str(folder / "data/train-*.tar"),), batch_size=16, captions="several"),
            image=recipe_augment(size=16),
            text=TextAugmentConfig(),
            model=CLIPConfig(
                vision=vision,
                text=TextConfig(width=16, layers=1, heads=2, context_length=16, dropout=0.1),
                embed_dim=16,
                h_head=MLPHeadConfig(hidden=32),
            ),
            loss=LossConfig(),
            optim=OptimConfig(lr=3e-3),
            loop=LoopConfig(epochs=2, threads=1, log_every=1, checkpoint_every=4, precision="fp32"),
            eval=EvalConfig(sets=(test,), pixel_baseline=True),
        )

    return make


@pytest.fixture
def tiny_config(tmp_path: Path, tiny_config_in: Callable[[Path], "TrainConfig"]) -> "TrainConfig":  # noqa: F821
    """A CL2L run of seconds: 2 epochs of 6 steps on 100 pictures, dropout and both heads included."""
    return tiny_config_in(tmp_path)


# --- Triton's interpreter, which has to be chosen for a whole process -------------------------------------------------


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> tuple[int, str]:
    """Exit status and output of the quick tests of the test's file, once more under ``TRITON_INTERPRET=1``."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", str(request.path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout
