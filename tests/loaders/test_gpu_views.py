"""``cpu+gpu`` gives the CPU loader's batches, normalised: under Triton's interpreter, and on a GPU if there is one."""

import contextlib
import io
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from loader_support import TOKENIZER, VIEWS, opened, write_members

pytest.importorskip("triton")
pytest.importorskip("numba")
from rocket_fast.errors import MissingExtra
from rocket_fast.image_augment import IMAGENET_MEAN, IMAGENET_STD, ImageAugmentConfig, normalize, strong_view, weak_view
from rocket_fast.loaders.base import DataConfig
from rocket_fast.loaders.choose import choose_loader, open_loader
from rocket_fast.loaders.cpu import CPULoader
from rocket_fast.loaders.gpu_views import GPUViewsLoader
from rocket_fast.trainer import Trainer

Image = pytest.importorskip("PIL.Image")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by triton when it is imported, for the whole process
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
everywhere = pytest.mark.parametrize("device", ["cpu" if INTERPRETED else GPU])
WARPED = replace(weak_view(12), rotate_degrees=20, shear_degrees=5, zoom_out=1.3, flip_prob=0.5, erase_prob=0.5)
SOLARIZED = replace(strong_view(16), solarize_prob=0.5, color_shift=0.2, color_matrix_std=0.2)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_in_the_interpreter(interpreted: tuple[int, str]):
    """All of this file again, with the kernel run by Triton's interpreter on the CPU."""
    status, said = interpreted
    assert status == 0, said[-10_000:]


@pytest.fixture
def data(tmp_path):
    """26 smooth pictures with some grain, one of them damaged."""
    samples = {}
    for number in range(26):
        rng, file = np.random.default_rng(number), io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((40 + number, 50 - number), Image.BICUBIC)) + rng.normal(
            0, 4, (50 - number, 40 + number, 3)
        )
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG")
        jpeg = file.getvalue() if number != 3 else file.getvalue()[:200]
        samples[f"{number:03d}"] = {"jpg": jpeg, "txt": b"number %d" % number}
    write_members(tmp_path / "s.tar", samples)
    return DataConfig(train=(f"{tmp_path}/s.tar",), batch_size=8, drop_last=False)


@contextlib.contextmanager
def finished(data, image, device, dtype=torch.float32, **split):
    loader = GPUViewsLoader(data, image, None, TOKENIZER, seed=5, device=torch.device(device), dtype=dtype, **split)
    try:
        yield loader
    finally:
        loader.close()


def levels(images):
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.double().cpu() * std + mean) * 255


class Drawn(CPULoader):
    """The CPU loader, which keeps what it drew."""

    def _decode(self, draft):
        pixels, views = super()._decode(draft)
        self.__dict__.setdefault("drawn", {})[draft.sample.key] = views
        return pixels, views


@everywhere
@pytest.mark.parametrize(
    "image", [VIEWS, ImageAugmentConfig(weak=WARPED, strong=(SOLARIZED,))], ids=["recipe", "everything"]
)
def test_batches_are_the_cpu_loaders_normalised(data, device, image):
    """Within 1 level of rounding, and half a level of the resize's rounding, as the colour matrix enlarges it."""
    cpu = Drawn(data, image, None, TOKENIZER, seed=5)
    apart, unchanged = [], 0
    with contextlib.closing(cpu), finished(data, image, device) as gpu:
        assert len(cpu) == len(gpu) == 4
        for a, b in zip(cpu, gpu, strict=True):
            assert a.keys == b.keys
            assert torch.equal(a.valid, b.valid)
            for x, y in zip(a.texts, b.texts, strict=True):
                assert torch.equal(x.tokens, y.tokens)
            for view, (x, y) in enumerate(zip(a.images, b.images, strict=True)):
                assert y.dtype == torch.float32
                assert y.device.type == device
                difference = (levels(y) - x).abs()
                for key, each in zip(a.keys, difference, strict=True):
                    params = cpu.drawn[key][view]
                    plain = (params.matrix == np.eye(3)).all() and not params.blur_sigma and not params.shift.any()
                    if plain and params.erase[2] == 0 and params.solarize == 256:
                        unchanged += 1
                        assert each.max() < 1e-3
                    gain = np.abs(params.matrix + np.outer(params.pivot, (0.299, 0.587, 0.114))).sum(1).max()
                    assert each.max() <= 0.5 * gain + 1.001, params
                apart.append(difference.mean())
        assert cpu.skipped == gpu.skipped == {"corrupt image": 1}
    assert unchanged >= 8
    assert 0 < np.mean(apart) < 0.4


@everywhere
def test_normalised_once_and_in_the_type_asked_for(data, device):
    image = ImageAugmentConfig(weak=weak_view(12))
    with (
        opened(data, image) as cpu,
        finished(data, image, device) as gpu,
        finished(data, image, device, torch.bfloat16) as half,
    ):
        for a, b, c in zip(cpu, gpu, half, strict=True):
            assert normalize(b.images[0]) is b.images[0]
            torch.testing.assert_close(b.images[0].cpu(), normalize(a.images[0]), rtol=1e-5, atol=1e-5)
            assert c.images[0].dtype == torch.bfloat16
            torch.testing.assert_close(c.images[0].float(), b.images[0], rtol=2**-7, atol=0)


@everywhere
def test_continues_bit_for_bit_and_from_the_cpu_loaders_place(data, device):
    with finished(data, VIEWS, device) as whole:
        expected = list(whole)
    with opened(data, text=None) as cpu:
        next(iter(cpu))
        state = cpu.state_dict()
    with finished(replace(data, workers=3, prefetch=0), VIEWS, device) as other:
        other.load_state_dict(state)
        rest = list(other)
    assert len(rest) == 3
    for a, b in zip(expected[1:], rest, strict=True):
        assert a.keys == b.keys
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))


@everywhere
def test_a_step_is_that_of_the_cpu_loader(tiny_config, device):
    """The step's images are normalised exactly once, whoever does it."""
    loop = replace(tiny_config.loop, device=device)
    losses = {}
    for backend in ("cpu", "cpu+gpu"):
        config = replace(tiny_config, name=backend, loop=loop, data=replace(tiny_config.data, backend=backend))
        trainer = Trainer(config)
        assert trainer.loading == (backend, "as data.backend says")
        losses[backend] = trainer.train_step(next(iter(trainer.loader))).total.item()
        trainer.close()
    assert losses["cpu+gpu"] == pytest.approx(losses["cpu"], rel=3e-3)


def test_what_it_cannot_do_is_named(data, monkeypatch):
    cpu = torch.device("cpu")
    chosen = replace(data, backend="cpu+gpu")
    assert choose_loader(chosen, torch.device("cuda", 0)) == ("cpu+gpu", "as data.backend says")
    if not INTERPRETED:
        with pytest.raises(ValueError, match=r"device: got 'cpu', expected a CUDA device; .*data\.backend = 'cpu'"):
            open_loader(chosen, VIEWS, None, TOKENIZER, seed=0, device=cpu)
    wide = ImageAugmentConfig(weak=replace(weak_view(12), blur_prob=0.1, blur_sigma=(0.1, 9.0)))
    with pytest.raises(ValueError, match=r"blur_sigma of view 0: got 9\.0, expected at most 8|device: got"):
        GPUViewsLoader(data, wide, None, TOKENIZER, seed=0, device=cpu)
    monkeypatch.setitem(sys.modules, "rocket_fast.kernels.triton_augment", None)
    with pytest.raises(MissingExtra, match=r"rocket-fast\[gpu\]"):
        open_loader(chosen, VIEWS, None, TOKENIZER, seed=0, device=cpu)
