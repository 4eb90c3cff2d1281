"""What the tests of loaders share: small views, tars of given members, a loader that is closed, equal batches."""

import contextlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch

from rocket_fast.batch import Batch
from rocket_fast.image_augment import ImageAugmentConfig, strong_view, weak_view
from rocket_fast.loaders.base import DataConfig
from rocket_fast.loaders.cpu import CPULoader
from rocket_fast.text_augment import TextAugmentConfig
from rocket_fast.tokenizer import Tokenizer

VIEWS = ImageAugmentConfig(weak=weak_view(12), strong=(strong_view(10), strong_view(10)))
TOKENIZER = Tokenizer()


def write_members(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """A tar of ``key.kind`` members."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for kind, content in members.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@contextlib.contextmanager
def opened(
    data: DataConfig,
    image: ImageAugmentConfig = VIEWS,
    text: TextAugmentConfig | None = TextAugmentConfig(),  # noqa: B008 - frozen
    **options: int,
) -> Iterator[CPULoader]:
    """The CPU loader, closed at the end."""
    loader = CPULoader(data, image, text, TOKENIZER, **{"seed": 5, **options})
    try:
        yield loader
    finally:
        loader.close()


def assert_same(one: Batch, other: Batch) -> None:
    """Bit for bit."""
    assert one.keys == other.keys
    assert torch.equal(one.valid, other.valid)
    for a, b in zip(one.images, other.images, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one.texts, other.texts, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.lengths, b.lengths)
