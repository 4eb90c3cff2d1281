"""The CPU loader: same batches whoever makes them, exact to resume, unmoved by bad data."""

import contextlib
import io
import itertools
import json
import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_support import TOKENIZER, VIEWS, assert_same, opened, write_members

from rocket_fast.errors import Failed
from rocket_fast.image_augment import ImageAugmentConfig, ViewParams, recipe_augment, weak_view
from rocket_fast.loaders.base import BadSampleError, DataConfig
from rocket_fast.loaders.choose import open_loader
from rocket_fast.loaders.cpu import CPULoader, decode_for_views, decode_image, iter_eval

Image = pytest.importorskip("PIL.Image")


def encoded(picture, image_format="PNG", **options):
    picture = picture if hasattr(picture, "save") else Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, image_format, **options)
    return file.getvalue()


def colours(height=20, width=16, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC))


@pytest.fixture
def data(tmp_path, write_shard):
    write_shard(tmp_path / "s0.tar", 50, 0)
    write_shard(tmp_path / "s1.tar", 37, 1)
    return DataConfig(train=(f"{tmp_path}/s*.tar",), batch_size=10, workers=2)


def by_key(batches):
    return {
        key: ([image[i] for image in batch.images], [text.padded()[i, : text.lengths[i]] for text in batch.texts])
        for batch in batches
        for i, key in enumerate(batch.keys)
    }


def test_batches_have_the_promised_shapes(data):
    with opened(data) as loader:
        batches = list(loader)
    assert len(batches) == len(loader) == 8
    for batch in batches:
        assert [image.shape for image in batch.images] == [(10, 3, 12, 12), (10, 3, 10, 10), (10, 3, 10, 10)]
        assert all(image.dtype == torch.uint8 for image in batch.images)
        assert [len(text) for text in batch.texts] == [10, 10, 10]
        assert batch.valid.all()
    keys = [key for batch in batches for key in batch.keys]
    assert len(set(keys)) == 80
    assert loader.samples == 87
    assert not loader.skipped


def test_views_are_different_and_so_are_epochs(data):
    with opened(replace(data, captions="several")) as loader:
        first = next(iter(loader))
        loader.set_epoch(1)
        other = by_key(loader)
    assert not torch.equal(first.images[1], first.images[2])
    for key, (images, _) in by_key([first]).items():
        if key in other:
            assert not torch.equal(images[1], other[key][0][1])


def test_memory_of_images_is_used_again_only_once_nobody_holds_it(data):
    with opened(replace(data, prefetch=0)) as loader, opened(replace(data, prefetch=0)) as untouched:
        places, kept = set(), []
        for number, (batch, same) in enumerate(zip(loader, untouched, strict=True)):
            places.add(batch.images[0].data_ptr())
            if number in (2, 5):
                kept.append((batch.images[1][3:].numpy(), same.images[1][3:].clone()))
            del batch
            assert all((held == before.numpy()).all() for held, before in kept)
    assert len(places) <= 4


@pytest.mark.parametrize("captions", ["txt", "several"])
def test_the_number_of_workers_changes_nothing(data, captions):
    data = replace(data, captions=captions)
    with opened(replace(data, workers=1)) as one, opened(replace(data, workers=3, prefetch=5)) as three:
        for a, b in zip(one, three, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_ranks_together_give_each_sample_once(data, world_size):
    data = replace(data, drop_last=False, batch_size=12)
    keys = Counter()
    with contextlib.ExitStack() as stack:
        loaders = [stack.enter_context(opened(data, rank=r, world_size=world_size)) for r in range(world_size)]
        assert len({len(loader) for loader in loaders}) == 1
        for batches in zip(*loaders, strict=True):
            keys.update(k for b in batches for k, valid in zip(b.keys, b.valid.tolist(), strict=True) if valid)
    assert len(keys) == 87
    assert set(keys.values()) == {1}


def test_augmentation_does_not_depend_on_batch_size_rank_or_order(data):
    with opened(data) as loader:
        plain = by_key(loader)
    others = [(replace(data, batch_size=14), {"rank": 1, "world_size": 2}), (replace(data, shuffle=False), {})]
    for config, options in others:
        with opened(config, **options) as loader:
            for key, (images, texts) in by_key(loader).items():
                if key in plain:
                    assert all(map(torch.equal, images, plain[key][0]))
                    assert all(map(torch.equal, texts, plain[key][1]))


@pytest.mark.parametrize("stop", [0, 3, 8])
def test_resumes_bit_for_bit_from_the_next_batch(data, stop):
    with opened(data) as loader:
        loader.set_epoch(2)
        iterator = iter(loader)
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(loader.state_dict()))
        rest = list(iterator)
        loader.set_epoch(3)
        following = next(iter(loader))
    with opened(replace(data, workers=1, prefetch=1)) as resumed:
        resumed.load_state_dict(state)
        resumed.set_epoch(2)
        again = list(resumed)
        assert len(again) == len(rest) == 8 - stop
        for a, b in zip(rest, again, strict=True):
            assert_same(a, b)
        assert list(resumed) == []
        resumed.set_epoch(3)
        assert_same(following, next(iter(resumed)))


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_weighted_mixture_is_exact_over_ranks_and_after_resuming(data, tmp_path, world_size):
    (tmp_path / "p").mkdir()
    for number in range(10):
        (tmp_path / f"p/{number}.png").write_bytes(encoded(colours(seed=number)))
        (tmp_path / f"p/{number}.txt").write_text(f"picture {number}")
    data = replace(data, train=(*data.train, f"{tmp_path}/p"), weights=(0.5, 2.3), drop_last=False, batch_size=6)
    whole, keys = [], Counter()
    for rank in range(world_size):
        with opened(data, rank=rank, world_size=world_size) as loader:
            batches = list(loader)
            whole.append(batches)
            assert loader.samples == 44 + 23
        keys.update(k for b in batches for k, valid in zip(b.keys, b.valid.tolist(), strict=True) if valid)
    assert set(keys.values()) == {1}
    shown = Counter(key.partition("#")[0] for key in keys)
    assert sum(count for key, count in shown.items() if key.startswith("s")) == 44
    assert sorted(count for key, count in shown.items() if key.startswith("p/")) == [2] * 7 + [3] * 3
    images = {key: views for batches in whole for key, (views, _) in by_key(batches).items()}
    assert not torch.equal(images["p/0.png"][1], images["p/0.png#2"][1])  # two showings, two crops
    with opened(data, world_size=world_size) as loader:
        next(iter(loader))
        state = json.loads(json.dumps(loader.state_dict()))
    with opened(data, world_size=world_size) as loader:
        loader.load_state_dict(state)
        for a, b in zip(loader, whole[0][1:], strict=True):
            assert_same(a, b)
    other = opened(replace(data, weights=(0.5, 2.2)), world_size=world_size)
    with other as loader, pytest.raises(ValueError, match=r"data\.train"):
        loader.load_state_dict(state)


def test_breaking_off_and_going_on_loses_nothing(data):
    with opened(data) as loader:
        expected = [batch.keys for batch in loader]
    with opened(data) as loader:
        got = [batch.keys for batch in itertools.islice(loader, 3)]
        got += [batch.keys for batch in loader]
    assert got == expected


def test_resuming_other_data_or_another_seed_is_refused(data, tmp_path, write_shard):
    with opened(data) as loader:
        state = loader.state_dict()
    with opened(data, seed=6) as loader, pytest.raises(ValueError, match="seed"):
        loader.load_state_dict(state)
    write_shard(tmp_path / "s2.tar", 1, 0)
    with opened(data) as loader, pytest.raises(ValueError, match=r"data\.train"):
        loader.load_state_dict(state)


def test_moving_the_loader_under_an_iterator_is_noticed(data):
    with opened(data) as loader:
        iterator = iter(loader)
        next(iterator)
        loader.set_epoch(1)
        with pytest.raises(RuntimeError, match="moved"):
            next(iterator)


def test_without_text_augmentation_all_views_have_the_caption(data):
    with opened(data, text=None) as loader:
        batch = next(iter(loader))
    assert all(torch.equal(text.tokens, batch.texts[0].tokens) for text in batch.texts)


def test_captions_of_several_chunks_stay_in_order(data):
    data = replace(data, shuffle=False, batch_size=80)
    with opened(data, text=None) as loader:
        batch = next(iter(loader))
    expected = TOKENIZER.pack([caption for part in iter_eval(data.train, 8, 80) for caption in part.captions][:80])
    for text in batch.texts:
        assert torch.equal(text.tokens, expected.tokens)
        assert torch.equal(text.lengths, expected.lengths)
        assert torch.equal(text.padded(), expected.padded())


def test_captions_are_packed_by_the_threads_that_made_them(data):
    packing = set()

    class Watched:
        def pack(self, captions):
            packing.add(threading.current_thread().name.rpartition("_")[0])
            return TOKENIZER.pack(captions)

    loader = CPULoader(replace(data, batch_size=80), VIEWS, None, Watched(), seed=0)
    list(loader)
    loader.close()
    assert packing == {"rocket-fast-loader"}


def test_several_captions_are_drawn_per_view(tmp_path):
    picture, captions = encoded(colours()), [f"caption {word}" for word in ("one", "two", "three")]
    member = json.dumps({"captions": [*captions, "", 7]}).encode()
    write_members(tmp_path / "s.tar", {str(i): {"png": picture, "json": member} for i in range(30)})
    data = DataConfig(train=(f"{tmp_path}/s.tar",), batch_size=30, captions="several")
    with opened(data, text=None) as loader:
        batch = next(iter(loader))
    expected = {tuple(ids) for ids in TOKENIZER.encode(captions)}
    views = [[tuple(row[:n].tolist()) for row, n in zip(t.padded(), t.lengths, strict=True)] for t in batch.texts]
    assert all(set(view) == expected for view in views)
    assert views[0] != views[1] != views[2]


def bad_samples():
    good = encoded(colours())
    return {
        "truncated": ({"png": good[: len(good) // 2], "txt": b"x"}, "corrupt image"),
        "jpeg": ({"jpg": encoded(colours(), "JPEG")[:-30], "txt": b"x"}, "corrupt image"),
        "garbage": ({"webp": b"RIFFnothing", "txt": b"x"}, "corrupt image"),
        "nothing": ({"png": b"", "txt": b"x"}, "corrupt image"),
        "huge": ({"png": encoded(np.zeros((100, 100), np.uint8)), "txt": b"x"}, "image over the pixel limit"),
        "empty": ({"png": good, "txt": b" \n"}, "empty caption"),
        "latin": ({"png": good, "txt": "caf\xe9".encode("latin-1")}, "caption not UTF-8"),
        "textless": ({"png": good}, "no caption"),
        "imageless": ({"txt": b"x"}, "no image"),
    }


def test_bad_samples_are_counted_and_replaced_alike_by_any_number_of_workers(tmp_path):
    samples, bad = {}, bad_samples()
    for i, (key, (members, _)) in enumerate(bad.items()):
        samples[key] = members
        samples |= {f"good{i}{j}": {"png": encoded(colours(seed=9 * i + j)), "txt": b"a good one"} for j in range(5)}
    write_members(tmp_path / "s.tar", samples)
    data = DataConfig(train=(f"{tmp_path}/s.tar",), batch_size=13, pixel_limit=5000, drop_last=False)
    with opened(replace(data, workers=1)) as one, opened(replace(data, workers=3)) as three:
        batches = list(one)
        for a, b in zip(batches, three, strict=True):
            assert_same(a, b)
        assert one.skipped == three.skipped == Counter(reason for _, reason in bad.values())
        assert one.samples == 45 + 7
    for batch in batches:
        assert len(set(batch.keys)) == len(batch)  # a substitute is another picture, not a copy beside itself
        assert all(key.startswith("s/good") for key in batch.keys)
    valid = [k for batch in batches for k, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if valid]
    assert sorted(valid) == sorted(f"s/good{i}{j}" for i in range(9) for j in range(5))


def test_nothing_but_bad_samples_is_an_error_not_a_hang(tmp_path):
    write_members(tmp_path / "s.tar", {str(i): {"png": b"\x89PNG\r\n\x1a\nbroken", "txt": b"x"} for i in range(4)})
    data = DataConfig(train=(f"{tmp_path}/s.tar",), batch_size=2)
    with opened(data) as loader, pytest.raises(ValueError, match=r"in a row.*corrupt image"):
        next(iter(loader))


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("rocket-fast")]


def test_close_leaves_no_threads(data):
    with opened(replace(data, workers=3)) as loader:
        iterator = iter(loader)
        next(iterator)
        assert loader_threads()
    assert not loader_threads()
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(iter(loader))


def test_an_exception_in_a_thread_arrives_and_leaves_no_threads(data, monkeypatch):
    class Broken:
        def pack(self, captions):
            raise ZeroDivisionError("a bug in the tokenizer")

    loader = CPULoader(data, VIEWS, None, Broken(), seed=0)
    with pytest.raises(ZeroDivisionError):
        list(loader)
    loader.close()
    assert not loader_threads()


@pytest.mark.parametrize(
    ("image_format", "mode"),
    [("JPEG", mode) for mode in ("RGB", "L", "CMYK")]
    + [
        (image_format, mode) for image_format in ("PNG", "WEBP", "GIF") for mode in ("RGB", "L", "P", "1", "RGBA", "LA")
    ],
)
def test_decodes_what_pillow_decodes(mode, image_format):
    data = encoded(Image.fromarray(colours(33, 47)).convert(mode), image_format)
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    expected = np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))
    got = decode_image(data, 10**6)
    assert got.flags.c_contiguous
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_decodes_transparency_sixteen_bits_and_ignores_orientation():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 4), dtype=np.uint8)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    for image_format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        got = decode_image(encoded(pixels, image_format, **options), 10**6)
        assert np.abs(got - expected).max() <= 1
    deep = np.arange(0, 65536, 512, dtype=np.uint16).reshape(8, 16)
    assert (decode_image(encoded(Image.fromarray(deep)), 10**6)[..., 0] == deep >> 8).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(colours(20, 30))
    for image_format in ("JPEG", "PNG", "WEBP"):
        assert decode_image(encoded(picture, image_format, exif=exif), 10**6).shape == (20, 30, 3)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_large_pictures_are_refused_and_cut_ones_are_corrupt(image_format):
    data = encoded(colours(40, 50), image_format)
    with pytest.raises(BadSampleError, match="pixel limit"):
        decode_image(data, 40 * 50 - 1)
    assert decode_image(data, 40 * 50).shape == (40, 50, 3)
    with pytest.raises(BadSampleError, match="corrupt"):
        decode_image(data[: len(data) * 2 // 3], 10**6)


def test_iter_eval_gives_every_picture_in_order(tmp_path):
    sizes = [(16, 16), (40, 16), (16, 61), (33, 32), (100, 90)]
    pictures = [colours(*size, seed=i) for i, size in enumerate(sizes)]
    samples = {f"{i}": {"png": encoded(p), "txt": f"class {i}".encode()} for i, p in enumerate(pictures)}
    samples["2"]["json"] = b"{of no concern here"
    write_members(tmp_path / "s.tar", samples)
    batches = list(iter_eval([f"{tmp_path}/s.tar"], 16, 2))
    assert [len(batch.keys) for batch in batches] == [2, 2, 1]
    assert [k for batch in batches for k in batch.keys] == [f"s/{i}" for i in range(5)]
    assert [c for batch in batches for c in batch.captions] == [f"class {i}" for i in range(5)]
    images = torch.cat([batch.images for batch in batches])
    assert images.shape == (5, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert (images[0].permute(1, 2, 0).numpy() == pictures[0]).all()
    tall = np.asarray(Image.fromarray(pictures[1]).crop((0, 12, 16, 28)))
    assert (images[1].permute(1, 2, 0).numpy() == tall).all()


def test_iter_eval_leaves_bad_ones_out_and_says_so(tmp_path):
    good = {"png": encoded(colours()), "txt": b"good"}
    samples = {"a": good} | {key: members for key, (members, _) in bad_samples().items() if key != "huge"} | {"b": good}
    write_members(tmp_path / "s.tar", samples)
    with pytest.warns(UserWarning, match="8 evaluation samples left out.*corrupt image"):
        keys = [key for batch in iter_eval([f"{tmp_path}/s.tar"], 8, 2) for key in batch.keys]
    assert keys == ["s/a", "s/b"]


def test_iter_eval_takes_the_first_of_several_captions(tmp_path):
    texts = {"a": b'{"captions": [" ", "one", "two"]}', "b": b'{"captions": ["three"]}', "c": b"[]", "d": b"{"}
    write_members(tmp_path / "s.tar", {key: {"png": encoded(colours()), "json": j} for key, j in texts.items()})
    with pytest.warns(UserWarning, match="json cannot be read"):
        batches = list(iter_eval([f"{tmp_path}/s.tar"], 8, 3, captions="several"))
    assert [caption for batch in batches for caption in batch.captions] == ["one", "three"]
    write_members(tmp_path / "s.tar", {"a": {"png": encoded(colours()), "txt": b"one"}})
    with pytest.raises(ValueError, match=r"image and \.json \(data.captions = several asks for it; txt for a .txt\)"):
        list(iter_eval([f"{tmp_path}/s.tar"], 8, 3, captions="several"))


def test_margins_are_trimmed_in_training_and_in_evaluation_where_asked(tmp_path):
    drawing = colours(20, 20)
    canvas = np.full((60, 60, 3), 255, np.uint8)
    canvas[30:50, 5:25] = drawing
    bare = {"png": encoded(drawing), "txt": b"one"}
    write_members(tmp_path / "bare.tar", {"a": bare})
    write_members(tmp_path / "canvas.tar", {"a": {"png": encoded(canvas), "txt": b"one"}})
    bare_picture, trimmed, whole = (
        next(iter_eval([f"{tmp_path}/{name}.tar"], 16, 1, trim_margins=trim)).images
        for name, trim in (("bare", False), ("canvas", True), ("canvas", False))
    )
    assert torch.equal(trimmed, bare_picture)
    assert not torch.equal(whole, bare_picture)
    view = ImageAugmentConfig(weak=replace(weak_view(16), scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    data = DataConfig(train=(f"{tmp_path}/canvas.tar",), batch_size=1, trim_margins=True)
    with opened(data, image=view) as loader:
        assert torch.equal(next(iter(loader)).images[0], bare_picture)


def test_without_prefetching_the_batches_are_the_same(data):
    with opened(data) as ahead, opened(replace(data, prefetch=0)) as asked:
        for one, other in zip(ahead, asked, strict=True):
            assert_same(one, other)


def test_closing_iter_eval_leaves_no_threads(data):
    batches = iter_eval(data.train, 8, 5)
    next(batches)
    batches.close()
    assert not loader_threads()


def test_recipe_views_of_a_real_size(data):
    with opened(replace(data, batch_size=4), image=recipe_augment(64, strong_size=48)) as loader:
        batch = next(iter(loader))
    assert [image.shape[-1] for image in batch.images] == [64, 48, 48]


def photo(height, width, seed=0):
    """A JPEG of smooth colours."""
    return encoded(colours(height, width, seed), "JPEG", quality=95)


@pytest.mark.parametrize("views", [VIEWS, recipe_augment(40, strong_size=16)])
def test_fast_quality_makes_the_same_crops_within_few_grey_levels(tmp_path, views):
    samples = {str(i): {"jpg": photo(90 + 31 * i, 203 - 9 * i, i), "txt": b"x"} for i in range(12)}
    samples |= {f"p{i}": {"png": encoded(colours(70, 50, i)), "txt": b"x"} for i in range(2)}
    samples["inks"] = {"jpg": encoded(Image.fromarray(colours(90, 60)).convert("CMYK"), "JPEG"), "txt": b"x"}
    write_members(tmp_path / "s.tar", samples)
    data = DataConfig(train=(f"{tmp_path}/s.tar",), batch_size=15)
    with opened(data, image=views) as exact, opened(replace(data, quality="fast"), image=views) as fast:
        one, other = next(iter(exact)), next(iter(fast))
    assert one.keys == other.keys
    assert not torch.equal(one.images[0], other.images[0])
    for a, b in zip(one.images, other.images, strict=True):
        difference = (a.int() - b.int()).abs().float()
        assert difference.mean() < 1.5
        assert difference.flatten(1).max(dim=1).values.quantile(0.5) <= 6
        for key, of_sample in zip(one.keys, difference, strict=True):
            assert not of_sample.any() or key[2:].isdigit()  # what is no common JPEG is decoded as ever


@pytest.mark.parametrize(
    ("size", "window", "expected"),
    [
        (20, (160, 320), (20, 40)),  # a crop eight times as large: an eighth
        (20, (159, 160), (40, 80)),
        (20, (100, 80), (40, 80)),
        (20, (60, 54), (60, 120)),
        (20, (41, 40), (80, 160)),
        (20, (39, 40), (160, 320)),
        (20, (10, 10), (160, 320)),
    ],
)
def test_fast_decoding_takes_the_least_scale_at_which_no_crop_is_smaller_than_its_view(size, window, expected):
    def draw_views(height, width):
        assert (height, width) == (160, 320)
        return [ViewParams(window=(0.0, 0.0, *map(float, window))), ViewParams(window=(0.0, 0.0, 160.0, 160.0))]

    views = [weak_view(size), weak_view(20)]
    pixels, scaled = decode_for_views(photo(160, 320), 10**6, views, draw_views)
    assert pixels.shape == (*expected, 3)
    scale = expected[0] / 160
    assert [p.window[:2] for p in scaled] == [(0, 0), (0, 0)]
    assert [p.window[2:] for p in scaled] == [(window[0] * scale, window[1] * scale), (160 * scale, 160 * scale)]


def test_fast_decoding_finds_the_same_pictures_bad():
    whole = photo(160, 320)
    draw_views = lambda height, width: [ViewParams(window=(0.0, 0.0, float(height), float(width)))]  # noqa: E731
    with pytest.raises(BadSampleError, match="corrupt"):
        decode_for_views(whole[:-400], 10**6, [weak_view(8)], draw_views)
    with pytest.raises(BadSampleError, match="pixel limit"):
        decode_for_views(whole, 160 * 320 - 1, [weak_view(8)], draw_views)


def test_scaled_windows_reach_the_last_pixels_of_odd_pictures(tmp_path):
    view = ImageAugmentConfig(weak=replace(weak_view(16), scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    write_members(tmp_path / "s.tar", {str(n): {"jpg": photo(n, n, n), "txt": b"x"} for n in range(129, 145)})
    data = DataConfig(train=(f"{tmp_path}/s.tar",), batch_size=16)
    with opened(data, image=view) as exact, opened(replace(data, quality="fast"), image=view) as fast:
        difference = next(iter(exact)).images[0].int() - next(iter(fast)).images[0].int()
    assert difference.abs().float().mean() < 1.5
    assert difference.abs().max() <= 12


def test_trimmed_margins_are_found_in_whole_pictures_in_fast_quality_too(tmp_path):
    canvas = np.full((120, 120, 3), 255, np.uint8)
    canvas[30:90, 5:85] = colours(60, 80)
    write_members(tmp_path / "s.tar", {"a": {"jpg": encoded(canvas, "JPEG", quality=95), "txt": b"x"}})
    data = DataConfig(train=(f"{tmp_path}/s.tar",), batch_size=1, trim_margins=True)
    with opened(data) as exact, opened(replace(data, quality="fast")) as fast:
        assert_same(next(iter(exact)), next(iter(fast)))


@pytest.mark.parametrize("bad", bad_samples())
def test_strict_stops_at_a_bad_sample_and_names_reason_shard_and_key(tmp_path, bad):
    members, reason = bad_samples()[bad]
    good = {"png": encoded(colours()), "txt": b"good"}
    write_members(tmp_path / "first.tar", {f"a{i}": good for i in range(3)})
    write_members(tmp_path / "second.tar", {"b0": good, bad: members, "b1": good})
    data = DataConfig(train=(f"{tmp_path}/*.tar",), batch_size=2, drop_last=False, pixel_limit=5000, strict=True)
    with pytest.raises(Failed, match=rf"{bad} of .*/second\.tar cannot be used: {reason}"), opened(data) as loader:
        list(loader)
    assert not loader_threads()
    with opened(replace(data, train=(f"{tmp_path}/first.tar",))) as loader:
        assert len(list(loader)) == 2


def test_strict_names_rows_and_pictures_too(tmp_path):
    (tmp_path / "good.png").write_bytes(encoded(colours()))
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.csv").write_text("filepath,caption\ngood.png,one\nmissing.png,two\n")
    (tmp_path / "b.csv").write_text("filepath,caption\ngood.png,one\nbad.png,two\n")
    for name, expected in (("a", "00000001 of .*a.csv.*no image"), ("b", "b/00000001 of .*b.csv.*corrupt image")):
        data = DataConfig(train=(f"{tmp_path}/{name}.csv",), batch_size=1, strict=True)
        with pytest.raises(Failed, match=expected), opened(data) as loader:
            list(loader)


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_images_are_made_in_pinned_memory_for_cuda_and_copied_without_waiting(data, monkeypatch, device, pinned):
    asked, copied, empty = [], [], torch.empty

    def watched(*size, pin_memory=False, **options):
        asked.append(pin_memory)
        return empty(*size, **options)  # there may be no CUDA here to pin for

    monkeypatch.setattr(torch, "empty", watched)
    parts = {"image": VIEWS, "text": None, "tokenizer": TOKENIZER, "seed": 5}
    loader, choice = open_loader(replace(data, backend="cpu"), **parts, device=torch.device(device))
    batch = next(iter(loader))
    loader.close()
    assert choice.name == "cpu"
    assert asked == [True] * len(asked)  # without CUDA nobody asks torch
    assert bool(asked) == pinned
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, place, non_blocking=False: copied.append((self.shape, non_blocking)) or self
    )
    batch.to("cuda")
    assert {image.shape for image in batch.images} <= {shape for shape, _ in copied}
    assert all(non_blocking for _, non_blocking in copied)


@pytest.mark.slow
def test_memory_stays_flat_over_20000_batches(tmp_path, write_shard):
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("no /proc here")
    write_shard(tmp_path / "s.tar", 2000, 0)
    data = DataConfig(train=(f"{tmp_path}/s.tar",), batch_size=2)
    view = ImageAugmentConfig(weak=weak_view(8))
    resident, batches = {}, 0
    with opened(data, image=view) as loader:
        for epoch in range(24):
            loader.set_epoch(epoch)
            batches += sum(1 for _ in loader)
            resident[batches] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert batches == 24_000
    assert resident[24_000] - resident[4_000] < 4 << 20, resident  # a kilobyte a batch would be 20 MiB
