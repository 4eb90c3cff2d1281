"""What surrounds the loss: captions to token ids, bytes to augmented views, and one whole training step."""

import contextlib
import io
import json
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis

from rocket_fast import trainer as trainer_module
from rocket_fast.config import EvalConfig
from rocket_fast.image_augment import normalize, recipe_augment
from rocket_fast.loaders.cpu import CPULoader
from rocket_fast.presets import preset
from rocket_fast.text_augment import TextAugmentConfig, augment_strong
from rocket_fast.tokenizer import Tokenizer
from rocket_fast.trainer import Trainer

CAPTIONS = [f"a photo of {n} sunny dogs under the old bridge in paris, number {n}" for n in range(4096)]


def rate(benchmark, **amounts):
    """Amounts of one round as rates, for the record; nothing where benchmarks run untimed."""
    if benchmark.stats is not None:
        benchmark.extra_info.update({name: amount / benchmark.stats.stats.median for name, amount in amounts.items()})


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """1,024 noise-and-gradient PNGs of 48 x 48 with captions, as a webdataset tar."""
    from PIL import Image

    path = tmp_path_factory.mktemp("data") / "noise.tar"
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(1024):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8)).resize((48, 48)).save(picture, "PNG")
            members = {"png": picture.getvalue(), "txt": CAPTIONS[i].encode()}
            members["json"] = json.dumps({"captions": [CAPTIONS[i]]}).encode()
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{i:05d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.benchmark(group=f"{len(CAPTIONS)} clean captions to token ids, one thread")
class TestTokenizer:
    def test_rocket_fast(self, benchmark):
        ids = benchmark(Tokenizer().encode, CAPTIONS)
        rate(benchmark, captions_per_s=len(ids))

    def test_open_clip(self, benchmark):
        peer = pytest.importorskip("open_clip", reason="the bench extra brings open_clip_torch").SimpleTokenizer()
        benchmark.pedantic(peer, (CAPTIONS,), rounds=3)
        rate(benchmark, captions_per_s=len(CAPTIONS))


@pytest.mark.benchmark(group=f"strong augmentation of {len(CAPTIONS)} captions, one thread")
def test_text_augmentation(benchmark):
    config, rng = TextAugmentConfig(), np.random.default_rng(0)
    benchmark(lambda: [augment_strong(caption, config, rng) for caption in CAPTIONS])


@pytest.mark.benchmark(group="loader: 1,024 PNGs of 48 px, one weak and two strong views of 32 px, 2 threads")
def test_cpu_loader(benchmark, shard):
    data = replace(preset("demo").data, train=(str(shard),), batch_size=256, workers=2, captions="txt")
    loader = CPULoader(data, recipe_augment(size=32), TextAugmentConfig(), Tokenizer(), seed=0)
    epochs = iter(range(1, 1_000_000))

    def epoch():
        loader.set_epoch(next(epochs))
        return sum(len(batch) for batch in loader)

    samples = benchmark(epoch)
    rate(benchmark, samples_per_s=samples)
    loader.close()


@pytest.mark.benchmark(group="one training step of the demo preset, 2 threads")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_demo_step(benchmark, shard, tmp_path, precision):
    base = preset("demo")
    data = replace(base.data, train=(str(shard),))
    loop = replace(base.loop, precision=precision, threads=2)
    config = replace(base, out=tmp_path, data=data, loop=loop, eval=EvalConfig())
    trainer = Trainer(config)
    batch = next(iter(trainer.loader))
    benchmark.pedantic(trainer.train_step, (batch,), rounds=10, warmup_rounds=2)
    multiply_adds = sum(
        FlopCountAnalysis(trainer.model.visual, normalize(images[:1])).unsupported_ops_warnings(False).total()
        for images in batch.images
    )
    rate(benchmark, samples_per_s=len(batch), vision_tower_gflop_per_s=3 * 2 * multiply_adds * len(batch) / 1e9)
    trainer.close()


class Outside:
    """Seconds spent in what is not the loop's own, by the clock and of the main thread's CPU time."""

    def __init__(self):
        self.clock = self.cpu = 0.0
        self._inside = False

    @contextlib.contextmanager
    def counted(self):
        """Counts what is within, once where such calls are nested."""
        if self._inside:
            yield
            return
        self._inside, clock, cpu = True, time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self._inside = False
            self.clock += time.perf_counter() - clock
            self.cpu += time.thread_time() - cpu

    def of(self, function):
        """The function, counted."""

        def call(*arguments, **options):
            with self.counted():
                return function(*arguments, **options)

        return call

    def iterated(self, batches):
        """The batches, the wait for each counted."""
        batches = iter(batches)
        while (batch := self.of(next)(batches, None)) is not None:
            yield batch


@pytest.mark.benchmark(group="the loop's own time, beside a step of 50 ms")
def test_loop_overhead(benchmark, shard, tmp_path, monkeypatch):
    """All of ``fit`` but data, forward, backward, optimizer and saves. Tiny towers: only the gradients' norm grows."""
    base = preset("debug")
    epochs, steps = (1, 4) if benchmark.disabled else (6, None)
    options = {"precision": "fp32", "threads": 1, "weight_average": None, "checkpoint_every": 10**6, "log_every": 20}
    loop = replace(base.loop, epochs=epochs, max_steps=steps, **options)
    data = replace(base.data, train=(str(shard),), batch_size=64)
    trainer = Trainer(replace(base, out=tmp_path, data=data, loop=loop, eval=EvalConfig()))
    outside, whole, norm = Outside(), Outside(), Outside()
    timed = trainer_module._timed
    monkeypatch.setattr(trainer_module, "_timed", lambda loader: outside.iterated(timed(loader)))
    monkeypatch.setattr(torch.Tensor, "backward", outside.of(torch.Tensor.backward))
    for owner, name in ((trainer, "_embed"), (trainer.objective, "forward"), (trainer.optimizer, "step")):
        monkeypatch.setattr(owner, name, outside.of(getattr(owner, name)))
    monkeypatch.setattr(trainer, "save", outside.of(trainer.save))
    monkeypatch.setattr(trainer, "_guard", norm.of(trainer._guard))
    fit = whole.of(trainer.fit)
    benchmark.pedantic(fit, (type("Stop", (), {"signum": 0})(),), rounds=1)
    trainer.close()
    benchmark.extra_info["steps"] = trainer.step
    for kind in ("clock", "cpu"):
        own, guard = (
            1e3 * seconds / trainer.step
            for seconds in (getattr(whole, kind) - getattr(outside, kind), getattr(norm, kind))
        )
        benchmark.extra_info[f"own_ms_a_step_by_{kind}"] = own
        benchmark.extra_info[f"of_which_gradients_norm_by_{kind}"] = guard
        benchmark.extra_info[f"percent_of_50_ms_by_{kind}"] = 2 * own
