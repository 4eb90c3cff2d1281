"""DALI's batches are the CPU loader's, but for a few grey levels. Without a GPU its graph runs on the CPU."""

import contextlib
import gc
import io
import itertools
import json
import os
import tarfile
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rocket_fast.errors import MissingExtra
from rocket_fast.image_augment import (
    ImageAugmentConfig,
    ViewConfig,
    asymmetric_augment,
    recipe_augment,
    strong_view,
    weak_view,
)
from rocket_fast.loaders.base import BadSampleError, DataConfig
from rocket_fast.loaders.choose import choose_loader, open_loader
from rocket_fast.loaders.cpu import CPULoader, check_jpeg, decode_image
from rocket_fast.loaders.dali import DALILoader
from rocket_fast.text_augment import TextAugmentConfig
from rocket_fast.tokenizer import Tokenizer
from rocket_fast.trainer import Trainer, train

Image = pytest.importorskip("PIL.Image")
needs_dali = pytest.mark.skipif(
    "not __import__('rocket_fast.errors').errors.installed('nvidia.dali')", reason="nvidia-dali is not installed"
)
VIEWS = ImageAugmentConfig(weak=weak_view(24), strong=(strong_view(20), strong_view(20)))
TOKENIZER = Tokenizer()
MEAN_LEVELS, MOST_LEVELS = 0.4, 5  # measured: 0.04 to 0.23 on average for the operations below, 3 at most


def photo(height, width, seed):
    """Smooth colours with some grain."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC))
    return np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)


def encoded(pixels, image_format="JPEG", mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, image_format, **options)
    return file.getvalue()


def write_members(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for kind, content in members.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def photos(count, first=0):
    """JPEGs of odd sizes, with other pictures among them: PNG with transparency, WebP, gray, inks, progressive."""
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        3: ("png", "PNG", "RGBA", {}), 4: ("jpg", "JPEG", "RGB", {"progressive": True}), 5: ("webp", "WEBP", "RGB", {}),
        7: ("jpg", "JPEG", "L", {}), 8: ("jpg", "JPEG", "RGB", {"exif": exif}), 9: ("jpeg", "JPEG", "CMYK", {}),
        10: ("jpg", "JPEG", "RGB", {"keep_rgb": True}),
    }  # fmt: skip
    samples = {}
    for i in range(first, first + count):
        suffix, image_format, mode, options = kinds.get(i % 11, ("jpg", "JPEG", "RGB", {}))
        captions = [f"a photo of number {i}", f"another one, {i}"]
        samples[f"{i:05d}"] = {
            suffix: encoded(photo(37 + i % 23, 60 - i % 19, i), image_format, mode, **options),
            "txt": captions[0].encode(),
            "json": json.dumps({"captions": captions}).encode(),
        }
    return samples


@pytest.fixture
def data(tmp_path):
    write_members(tmp_path / "s0.tar", photos(30))
    write_members(tmp_path / "s1.tar", photos(17, first=30))
    return DataConfig(train=(f"{tmp_path}/s*.tar",), batch_size=10, workers=2)


@contextlib.contextmanager
def opened(data, loader=DALILoader, image=VIEWS, text=TextAugmentConfig(), **options):  # noqa: B008
    if loader is DALILoader:
        options.setdefault("device_id", None)
    loader = loader(data, image, text, TOKENIZER, **{"seed": 5, **options})
    try:
        yield loader
    finally:
        loader.close()


def assert_same(one, other):
    """All but the pixels."""
    assert one.keys == other.keys
    assert torch.equal(one.valid, other.valid)
    for a, b in zip(one.texts, other.texts, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.lengths, b.lengths)
    for a, b in zip(one.images, other.images, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype == torch.uint8


def assert_equal(one, other):
    assert_same(one, other)
    assert all(map(torch.equal, one.images, other.images))


def assert_near(one, other):
    assert_same(one, other)
    for a, b in zip(one.images, other.images, strict=True):
        assert (a.int() - b.int()).abs().float().mean() < MEAN_LEVELS


# What it has in common with the CPU loader ----------------------------------------------------------------------------


@needs_dali
@pytest.mark.parametrize("captions", ["txt", "several"])
def test_two_ranks_have_the_cpu_loaders_batches(data, captions):
    data = replace(data, captions=captions, drop_last=False)
    keys = Counter()
    for rank in range(2):
        split = {"rank": rank, "world_size": 2}
        with opened(data, CPULoader, **split) as cpu, opened(data, **split) as dali:
            assert dali.samples == cpu.samples == 47
            assert len(dali) == len(cpu) == 5
            for epoch in (0, 1):
                cpu.set_epoch(epoch)
                dali.set_epoch(epoch)
                for a, b in zip(cpu, dali, strict=True):
                    assert_near(a, b)
                    if epoch == 0:
                        keys.update(k for k, valid in zip(b.keys, b.valid.tolist(), strict=True) if valid)
    assert len(keys) == 47
    assert set(keys.values()) == {1}


PLAIN = ViewConfig(size=32, scale=(0.2, 1.0))
OPERATIONS = {
    "crop": PLAIN,
    "crop, enlarged": ViewConfig(size=96, scale=(0.1, 0.3)),
    "flip": replace(PLAIN, flip_prob=0.5),
    "jitter": replace(PLAIN, jitter_prob=0.8),
    "gray": replace(PLAIN, gray_prob=0.5),
    "matrix": replace(PLAIN, color_matrix_std=0.3),
    "shift": replace(PLAIN, color_shift=0.2),
    "blur": replace(PLAIN, blur_prob=0.5),
    "wide blur": replace(PLAIN, size=9, blur_prob=1.0, blur_sigma=(3.0, 5.0)),
    "erase": replace(PLAIN, erase_prob=0.7),
    "solarize": replace(PLAIN, solarize_prob=0.5),
}  # fmt: skip
ALL = replace(PLAIN, flip_prob=0.5, jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5, erase_prob=0.5, solarize_prob=0.3)


@needs_dali
def test_pixels_of_every_operation_are_within_a_few_levels(tmp_path):
    write_members(tmp_path / "s.tar", photos(60))
    data = DataConfig(train=(f"{tmp_path}/s.tar",), batch_size=60)
    names = [*OPERATIONS, "all", "all but colour shift"]
    views = (*OPERATIONS.values(), replace(ALL, color_matrix_std=0.2, color_shift=0.1), ALL)
    image = ImageAugmentConfig(weak=views[0], strong=views[1:])
    with opened(data, CPULoader, image) as cpu, opened(data, image=image) as dali:
        one, other = next(iter(cpu)), next(iter(dali))
    assert_same(one, other)
    found = {}
    for name, a, b in zip(names, one.images, other.images, strict=True):
        apart = (a.int() - b.int()).abs()
        if "solarize" in name or "all" in name:  # a pixel at the threshold may be inverted in one of them only
            apart = torch.minimum(apart, (255 - a.int() - b.int()).abs())
        found[name] = (round(float(apart.float().mean()), 3), int(apart.max()))
    assert all(mean < MEAN_LEVELS and most <= MOST_LEVELS for mean, most in found.values()), found


@needs_dali
def test_what_is_drawn_is_what_is_done(data):
    """Crops, boxes and flips exactly: on pictures of two halves, and against a view with the operation off."""
    half = np.zeros((40, 64, 3), np.uint8)
    half[:, 32:] = (200, 100, 50)
    folder = Path(data.train[0]).parent
    write_members(folder / "half.tar", {f"{i}": {"png": encoded(half, "PNG"), "txt": b"x"} for i in range(16)})
    data = replace(data, train=(f"{folder}/half.tar",), batch_size=16)
    whole = ViewConfig(size=32, scale=(1.0, 1.0), ratio=(1.6, 1.6))
    image = ImageAugmentConfig(
        weak=whole,
        strong=(replace(whole, flip_prob=0.5), replace(whole, erase_prob=1.0), replace(whole, solarize_prob=1.0)),
    )
    with opened(data, CPULoader, image) as cpu, opened(data, image=image) as dali:
        one, other = next(iter(cpu)), next(iter(dali))
    for a, b in zip(one.images, other.images, strict=True):
        assert (a.int() - b.int()).abs().max() <= 1
    flipped = [not torch.equal(view, other.images[0][0]) for view in other.images[1]]
    assert 0 < sum(flipped) < 16


@needs_dali
@pytest.mark.parametrize("image", [recipe_augment(40, strong_size=32), asymmetric_augment(32)], ids=["cl2l", "byol"])
def test_the_recipes_views(data, image):
    with opened(data, CPULoader, image) as cpu, opened(data, image=image) as dali:
        for a, b in itertools.islice(zip(cpu, dali, strict=True), 2):
            assert_near(a, b)
    assert b.images[0].is_contiguous()


# Bad pictures ---------------------------------------------------------------------------------------------------------


def bad_samples():
    good = encoded(photo(50, 40, 1))
    middle = len(good) * 3 // 4
    return {
        "truncated": ({"jpg": good[: len(good) // 2], "txt": b"x"}, "corrupt image"),
        "cut": ({"jpg": good[:-30], "txt": b"x"}, "corrupt image"),
        "scratched": ({"jpg": good[:middle] + good[middle + 60 :], "txt": b"x"}, "corrupt image"),
        "header": ({"jpg": b"\xff\xd8nothing", "txt": b"x"}, "corrupt image"),
        "nothing": ({"jpg": b"", "txt": b"x"}, "corrupt image"),
        "png": ({"png": encoded(photo(9, 9, 0), "PNG")[:-30], "txt": b"x"}, "corrupt image"),
        "huge": ({"jpg": encoded(np.zeros((100, 100, 3), np.uint8)), "txt": b"x"}, "image over the pixel limit"),
        "empty": ({"jpg": good, "txt": b" \n"}, "empty caption"),
        "textless": ({"jpg": good}, "no caption"),
    }


@needs_dali
def test_bad_samples_are_counted_and_replaced_as_on_the_cpu(tmp_path):
    samples, bad = {}, bad_samples()
    for i, (key, (members, _)) in enumerate(bad.items()):
        samples[key] = members
        samples |= {f"good{i}{j}": {"jpg": encoded(photo(40, 50, 9 * i + j)), "txt": b"a good one"} for j in range(4)}
    write_members(tmp_path / "s.tar", samples)
    data = DataConfig(train=(f"{tmp_path}/s.tar",), batch_size=11, pixel_limit=5000, drop_last=False)
    with opened(data, CPULoader) as cpu, opened(replace(data, workers=3)) as dali:
        for a, b in zip(cpu, dali, strict=True):
            assert_near(a, b)
        assert dali.skipped == cpu.skipped == Counter(reason for _, reason in bad.values())


def verdict(check, jpeg):
    try:
        return check(jpeg, 10**5) is not None or None
    except BadSampleError as error:
        return error.reason


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}])
def test_the_check_of_a_jpeg_is_as_strict_as_decoding_it(options, capfd):
    rng = np.random.default_rng(0)
    jpeg, verdicts = encoded(photo(60, 90, 3), **options), Counter()
    for _ in range(300):
        damaged = bytearray(jpeg)
        for at in rng.integers(2, len(jpeg), rng.integers(1, 3)).tolist():
            damaged[at] = rng.integers(256)
        damaged = bytes(damaged[: rng.integers(300, len(jpeg))] if rng.random() < 0.2 else damaged)
        checked = verdict(check_jpeg, damaged)
        if checked is not None:  # None leaves it to decode_image
            assert checked == verdict(decode_image, damaged)
            verdicts[checked] += 1
    assert min(verdicts[True], verdicts["corrupt image"]) > 30


@needs_dali
def test_a_picture_that_dali_refuses_is_decoded_on_the_cpu(data, monkeypatch, capfd):
    """Checked pictures that DALI cannot read cost a second try, and no sample."""
    with opened(data) as loader:
        expected = list(loader)
    bad_key, refused = expected[1].keys[3], []
    with opened(data) as loader:
        give, checked = loader._shards.read, loader._checked
        keys = {}

        def read(number):
            sample = give(number)
            keys[sample.image] = sample.key
            return sample

        def check(jpeg):
            picture = checked(jpeg)
            if keys[jpeg] != bad_key:
                return picture
            refused.append(bad_key)
            return picture._replace(encoded=np.frombuffer(b"\xff\xd8\xff\xe0 not for DALI", np.uint8))

        monkeypatch.setattr(loader._shards, "read", read)
        monkeypatch.setattr(loader, "_checked", check)
        got = list(loader)
        assert not loader.skipped
    assert refused == [bad_key]
    for a, b in zip(expected, got, strict=True):
        assert_equal(a, b)  # the CPU decodes JPEGs as DALI does there


@needs_dali
def test_an_error_that_is_nobodys_picture_arrives(data, monkeypatch):
    with opened(data) as loader:
        monkeypatch.setattr(loader._renderer, "render", lambda inputs: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            next(iter(loader))


# Place, order, end ----------------------------------------------------------------------------------------------------


@needs_dali
@pytest.mark.parametrize("stop", [0, 2, 4])
def test_resumes_bit_for_bit_from_the_next_batch(data, stop):
    with opened(data) as loader:
        loader.set_epoch(2)
        iterator = iter(loader)
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(loader.state_dict()))
        rest = list(iterator)
    with opened(data, CPULoader) as cpu:
        cpu.load_state_dict(state)
        assert cpu.state_dict() == state
    for change in ({"workers": 1, "prefetch": 0}, {"workers": 3, "prefetch": 4}):
        with opened(replace(data, **change)) as resumed:
            resumed.load_state_dict(state)
            resumed.set_epoch(2)
            again = list(resumed)
            assert len(again) == len(rest) == 4 - stop
            for a, b in zip(rest, again, strict=True):
                assert_equal(a, b)


def dali_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("rocket-fast")]


@needs_dali
def test_breaking_off_going_on_and_closing(data):
    with opened(data) as loader:
        list(loader)  # whatever starts threads once and for all
    del loader
    gc.collect()
    before = len(os.listdir("/proc/self/task"))
    with opened(data) as loader:
        expected = [batch.keys for batch in loader]
    with opened(data) as loader:
        got = [batch.keys for batch in itertools.islice(loader, 2)]
        got += [batch.keys for batch in loader]
        iterator = iter(loader)
        loader.set_epoch(1)
        next(iter(loader))  # batches are still being made when it is closed
    assert got == expected
    assert not dali_threads()
    del iterator
    gc.collect()
    assert len(os.listdir("/proc/self/task")) <= before
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(iter(loader))


@needs_dali
@pytest.mark.slow
def test_memory_stays_flat(data):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    with opened(data) as loader:
        for epoch in range(60):
            loader.set_epoch(epoch)
            for _ in loader:
                pass
            if epoch == 20:
                start = resident()
    assert resident() - start < 20


# The choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "change"),
    [
        ("data.quality", {"quality": "fast"}),
        ("data.trim_margins", {"trim_margins": True}),
        ("image.weak.rotate_degrees", replace(weak_view(8), rotate_degrees=10.0)),
        ("image.weak.shear_degrees", replace(weak_view(8), shear_degrees=10.0)),
        ("image.weak.zoom_out", replace(weak_view(8), zoom_out=2.0)),
    ],
)
def test_what_dali_cannot_do_is_refused(data, option, change):
    image = ImageAugmentConfig(weak=change) if isinstance(change, ViewConfig) else VIEWS
    data = data if isinstance(change, ViewConfig) else replace(data, **change)
    with pytest.raises(ValueError, match=rf"{option}: got .*'cpu'"):
        DALILoader(data, image, None, TOKENIZER, seed=0, device_id=None)


def test_the_backend_is_what_data_says_and_else_the_cpu(data):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert choose_loader(data, cpu) == ("cpu", "the device is not CUDA")
    assert choose_loader(data, cuda).name == "cpu"
    assert "data.backend = 'dali'" in choose_loader(data, cuda).reason
    assert choose_loader(replace(data, backend="cpu"), cuda) == ("cpu", "as data.backend says")
    assert choose_loader(replace(data, backend="dali"), cpu).name == "dali"
    with pytest.raises(ValueError, match=r"data\.backend: got 'ffcv'"):
        replace(data, backend="ffcv")


def test_without_dali_the_extra_is_named(data, monkeypatch):
    for name in ("nvidia.dali", "nvidia.dali.fn"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(MissingExtra, match=r"rocket-fast\[gpu\]"):
        open_loader(replace(data, backend="dali"), VIEWS, None, TOKENIZER, seed=0, device=torch.device("cpu"))
    assert not dali_threads()


@needs_dali
def test_a_run_with_dali_learns_and_continues_bit_for_bit(tiny_config, capsys):
    config = replace(tiny_config, data=replace(tiny_config.data, backend="dali"))
    whole = train(replace(config, name="whole"))
    assert "pictures by dali (as data.backend says)" in " ".join(capsys.readouterr().out.split())
    train(replace(config, name="parts", loop=replace(config.loop, max_steps=7)))
    train(replace(config, name="parts"))
    states = []
    for name in ("whole", "parts"):
        trainer = Trainer(replace(config, name=name))
        states.append((trainer.step, trainer.model.state_dict()))
        trainer.close()
    assert whole.step == states[0][0] == states[1][0] == 12
    torch.testing.assert_close(states[0][1], states[1][1], rtol=0, atol=0)


@needs_dali
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu_pixels_are_within_a_few_levels(data):
    with opened(data, CPULoader) as cpu, opened(data, device_id=0) as dali:
        for a, b in zip(cpu, dali, strict=True):
            assert all(image.is_cuda for image in b.images)
            b = replace(b, images=tuple(image.cpu() for image in b.images))
            assert_same(a, b)
            for x, y in zip(a.images, b.images, strict=True):
                assert (x.int() - y.int()).abs().float().mean() < 2
