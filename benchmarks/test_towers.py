"""The towers against the same model written the plain way (benchmarks/plain.py), with the same weights in one process.

Captions: emoji names and keywords (data/emoji, where it was built), and web-like ones: words of WordNet and stop words
(three in eight) in log-normal numbers, median 10, shape .8, through the recipe's augmentation of one weak and two
strong views and its tokenizer; the histogram of their lengths is printed. Ours is what pytest-benchmark times; before
each of its rounds the peer takes one. Without timing (``--benchmark-disable``) everything is tiny.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import PlainCLIP, PlainText, padded
from torch import Tensor

from rocket_fast.batch import PackedText
from rocket_fast.device import cpu_peak_bytes
from rocket_fast.losses import LossConfig, build_loss
from rocket_fast.models.clip import CLIPConfig, DualEncoder, encode_captions
from rocket_fast.models.text import TextConfig, TextTower
from rocket_fast.models.vision import VIT_S16
from rocket_fast.optim import OptimConfig, build_optimizer
from rocket_fast.text_augment import TextAugmentConfig, augment_strong, augment_weak, stopwords, synonyms
from rocket_fast.tokenizer import Tokenizer

EMOJI = Path(__file__).parents[1] / "data" / "emoji"
VIEWS = 3


def web_captions(count: int) -> list[str]:
    """Captions of words that exist, as long as those of the web."""
    rng = np.random.default_rng(0)
    nouns = ("dog", "city", "river", "woman", "guitar", "mountain", "street", "chocolate", "festival", "bridge")
    content = sorted({other for noun in nouns for other in (noun, *synonyms(noun))})
    filler = sorted(stopwords())
    captions = []
    for words in np.exp(rng.normal(np.log(10), 0.8, count)).round().clip(1, 70).astype(int):
        pools = [filler if rng.random() < 0.375 else content for _ in range(words)]
        captions.append(" ".join(str(rng.choice(pool)) for pool in pools))
    return captions


def emoji_captions(count: int) -> list[str]:
    """Captions of the demo's training data, or none where it was not built (``rocket-fast data emoji``)."""
    from rocket_fast.loaders.shards import ShardSet

    shards = sorted(str(path) for path in EMOJI.glob("train-*.tar"))
    if not shards:
        return []
    data = ShardSet(shards)
    samples = (data.read(int(i)) for i in np.random.default_rng(0).permutation(len(data))[:count])
    return [sample.text.decode() for sample in samples if sample.text is not None]


def views_of(captions: list[str]) -> tuple[PackedText, ...]:
    """The recipe's weak view and two strong ones."""
    config, tokenizer = TextAugmentConfig(), Tokenizer()
    edits: list[Callable] = [augment_weak, *[augment_strong] * (VIEWS - 1)]
    return tuple(
        tokenizer.pack([edit(text, config, np.random.default_rng((view, i))) for i, text in enumerate(captions)])
        for view, edit in enumerate(edits)
    )


def histogram(texts: tuple[PackedText, ...]) -> str:
    """How long the views' captions are, in tokens with both ends."""
    lengths = torch.cat([text.lengths for text in texts])
    bins = collections.Counter(min(int(length) // 8 * 8, 72) for length in lengths)
    shares = ", ".join(f"{start}-{min(start + 7, 77)}: {bins[start] / len(lengths):.1%}" for start in sorted(bins))
    median = int(lengths.median())
    return f"tokens: mean {lengths.double().mean():.1f}, median {median}, longest {int(lengths.max())} ({shares})"


# --- contestants ------------------------------------------------------------------------------------------------------


@dataclass
class Duel:
    """Ours against the plain way: a step each, and the numbers that both must agree on."""

    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    what: str

    def run(self, benchmark: Any, rounds: int) -> None:
        """Both in turns; memory is the most that a step has allocated at any time."""
        torch.testing.assert_close(self.ours(), self.plain(), rtol=1e-4, atol=1e-4)
        peer: list[float] = []
        own: list[float] = []
        benchmark.pedantic(
            lambda: own.append(timed(self.ours)), setup=lambda: peer.append(timed(self.plain)), rounds=rounds
        )
        ratio = statistics.median(other / mine for other, mine in zip(peer, own, strict=True))
        memory = [cpu_peak_bytes(step) / 2**20 for step in (self.ours, self.plain)]
        verdict = (
            f"{self.what}: {1e3 * statistics.median(own):.0f} ms, plain {1e3 * statistics.median(peer):.0f} ms: "
            f"{ratio:.2f} x; memory {memory[0]:.0f} MiB, plain {memory[1]:.0f} MiB: {memory[1] / memory[0]:.2f} x"
        )
        benchmark.extra_info["verdict"] = verdict
        print("\n" + verdict)


def timed(step: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def text_duel(config: TextConfig, texts: tuple[PackedText, ...]) -> Duel:
    """The text tower forward and backward, all views; what is compared is the sum of the features' absolute values."""
    torch.manual_seed(0)
    tower = TextTower(config)
    plain = PlainText(tower)
    rows = [padded(text, config.context_length) for text in texts]

    def step(features: Callable[[], list[Tensor]]) -> Tensor:
        tower.zero_grad()
        total = sum((part.abs().sum() for part in features()), torch.zeros(()))
        total.backward()
        return total.detach()

    return Duel(
        lambda: step(lambda: list(encode_captions(tower, texts))),
        lambda: step(lambda: [plain(row) for row in rows]),
        "text tower, forward and backward",
    )


def step_duel(config: CLIPConfig, texts: tuple[PackedText, ...], batch: int) -> Duel:
    """A training step: forward, loss, backward, optimizer. What is compared is the loss of the first step."""
    images = tuple(torch.randn(batch, 3, config.vision.image_size, config.vision.image_size) for _ in texts)
    rows = tuple(padded(text, config.text.context_length) for text in texts)
    models: list[DualEncoder] = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(DualEncoder(config))
    plain, objective = PlainCLIP(models[1]), build_loss(LossConfig(label_smoothing=0.1, reduction="avg"), None)
    optimizers = [build_optimizer(OptimConfig(lr=1e-5), model) for model in models]

    def step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return Duel(
        lambda: step(lambda: objective(models[0](images, texts)).total, optimizers[0]),
        lambda: step(lambda: plain.loss(images, rows, 0.1), optimizers[1]),
        f"step, ViT-S/16 at {config.vision.image_size} px, batch {batch}, {len(texts)} views",
    )


# --- benchmarks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [web_captions, emoji_captions], ids=["web", "emoji"])
def test_text_tower(captions: Callable[[int], list[str]], benchmark: Any) -> None:
    small = benchmark.disabled
    texts = captions(4 if small else 256)
    if not texts:
        pytest.skip("data/emoji was not built")
    views = views_of(texts)
    print("\n" + histogram(views))
    config = TextConfig(width=64, heads=2, layers=1) if small else TextConfig(layers=2)
    text_duel(config, views).run(benchmark, rounds=1 if small else 5)


@pytest.mark.parametrize(("size", "batch"), [(224, 16), (64, 64)])
def test_step(size: int, batch: int, benchmark: Any) -> None:
    config = CLIPConfig(vision=replace(VIT_S16, image_size=size), text=TextConfig())
    if benchmark.disabled:
        vision = replace(VIT_S16, image_size=32, width=32, heads=2, layers=1)
        config, batch = replace(config, vision=vision, text=TextConfig(width=64, heads=2, layers=1)), 4
    step_duel(config, views_of(web_captions(batch)), batch).run(benchmark, rounds=1 if benchmark.disabled else 3)
