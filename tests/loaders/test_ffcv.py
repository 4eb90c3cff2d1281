"""A .beton gives the batches of the tar it was written from, bit for bit; FFCV itself opens it."""

import contextlib
import gc
import io
import itertools
import json
import os
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from loader_support import TOKENIZER, VIEWS, assert_same, opened, write_members

from rocket_fast.errors import MissingExtra
from rocket_fast.loaders import convert
from rocket_fast.loaders import ffcv as beton
from rocket_fast.loaders.base import BadSampleError, DataConfig
from rocket_fast.loaders.convert import PackConfig
from rocket_fast.loaders.cpu import CPULoader, decode_image, iter_eval
from rocket_fast.loaders.shards import ShardSet
from rocket_fast.loaders.sources.beton import (
    ALLOCATION,
    DESCRIPTOR,
    FIELDS,
    HEADER,
    MIN_PAGE,
    SAMPLE,
    VERSION,
    BetonSource,
)
from rocket_fast.loaders.sources.webdataset import FileCache

Image = pytest.importorskip("PIL.Image")
needs_ffcv = pytest.mark.skipif("not __import__('importlib').util.find_spec('ffcv')", reason="ffcv is not installed")
MEMBERS = {"txt": "txt", "several": "json"}


def encoded(height, width, seed, image_format="JPEG", mode="RGB", **options):
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(small).resize((width, height), Image.BICUBIC).convert(mode)
    picture.save(file, image_format, **options)
    return file.getvalue()


def photos(count, first=0):
    """JPEGs of odd sizes, with every other kind of picture among them, under keys that are not all ASCII."""
    kinds = {
        3: ("png", "PNG", "RGBA"), 5: ("webp", "WEBP", "RGB"), 7: ("jpg", "JPEG", "L"), 9: ("jpeg", "JPEG", "CMYK"),
    }  # fmt: skip
    samples = {}
    for i in range(first, first + count):
        suffix, image_format, mode = kinds.get(i % 11, ("jpg", "JPEG", "RGB"))
        captions = [f"  a photo of number {i} \n", f"another one, {i}", ""]
        samples[f"é{i}" if i % 4 == 0 else f"{i:05d}"] = {
            suffix: encoded(17 + i % 23, 40 - i % 19, i, image_format, mode),
            "txt": captions[0].encode(),
            "json": json.dumps({"captions": captions, "url": "https://example.org"}).encode(),
        }
    return samples


def pack(patterns, path, captions="txt", advance=lambda done, total: None, **options):
    """All in one file, ``path``."""
    config = PackConfig(
        out=path.parent / f"{path.stem}-out", format="beton", captions=captions, **{"page_mib": 2, **options}
    )
    report = convert.pack([str(pattern) for pattern in patterns], config, advance=advance)
    (config.out / "00000.beton").rename(path)
    return report


@pytest.fixture
def tars(tmp_path):
    write_members(tmp_path / "s0.tar", photos(50))
    write_members(tmp_path / "s1.tar", photos(37, first=50))
    return DataConfig(train=(f"{tmp_path}/s*.tar",), batch_size=10, workers=2)


@pytest.fixture
def packed(tars, tmp_path):
    pack(tars.train, tmp_path / "p.beton")
    return replace(tars, train=(f"{tmp_path}/p.beton",))


# What FFCV has to be there for ---------------------------------------------------------------------------------------


@needs_ffcv
@pytest.mark.parametrize("captions", ["txt", "several"])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_batches_are_those_of_the_tars(tars, tmp_path, captions, rank, world_size):
    report = pack(tars.train, tmp_path / "p.beton", captions)
    assert report.samples == 87
    assert not report.skipped
    tars = replace(tars, captions=captions, drop_last=False)
    packed = replace(tars, train=(f"{tmp_path}/p.beton",), workers=3)
    split = {"rank": rank, "world_size": world_size}
    with opened(tars, **split) as cpu, opened(packed, **split) as ffcv:
        assert len(cpu) == len(ffcv) == 9
        assert cpu.samples == ffcv.samples
        for epoch in (0, 3):
            cpu.set_epoch(epoch)
            ffcv.set_epoch(epoch)
            for a, b in zip(cpu, ffcv, strict=True):
                assert_same(a, b)
        assert not ffcv.skipped


@needs_ffcv
def test_bytes_are_stored_untouched_over_many_pages(tmp_path):
    rng = np.random.default_rng(0)
    samples = {}
    for i in range(9):  # noise does not compress: half a megabyte each
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (400, 400 + 50 * i, 3), dtype=np.uint8)).save(file, "PNG")
        samples[str(i)] = {"png": file.getvalue(), "txt": b"  raw \xc3\xa9 " * (i + 1)}
    write_members(tmp_path / "s.tar", samples)
    pack([tmp_path / "s.tar"], tmp_path / "p.beton")
    tar, packed = (ShardSet([f"{tmp_path}/{name}"]) for name in ("s.tar", "p.beton"))
    assert len(tar) == len(packed) == 9
    assert [packed.read(i) for i in range(9)] == [tar.read(i) for i in range(9)]
    size = os.path.getsize(tmp_path / "p.beton")
    assert (
        3 * MIN_PAGE < size < os.path.getsize(tmp_path / "s.tar") + 3 * MIN_PAGE
    )  # the last page is cut, not filled up


@needs_ffcv
def test_bad_samples_are_left_out_and_counted(tmp_path):
    good = encoded(20, 30, 0)
    bad = {
        "cut": ({"jpg": good[:-40], "txt": b"x"}, "corrupt image"),
        "empty": ({"jpg": good, "txt": b" "}, "empty caption"),
        "latin": ({"jpg": good, "txt": b"caf\xe9"}, "caption not UTF-8"),
        "textless": ({"jpg": good}, "no caption"),
        "huge": ({"png": encoded(100, 100, 0, "PNG"), "txt": b"x"}, "image over the pixel limit"),
        "large": ({"jpg": good + bytes(MIN_PAGE), "txt": b"x"}, "larger than a page (page_mib)"),
    }
    samples = {}
    for key, (members, _) in bad.items():
        samples |= {key: members, f"good-{key}": {"jpg": good, "txt": key.encode()}}
    write_members(tmp_path / "s.tar", samples)
    seen = []
    report = pack(
        [tmp_path / "s.tar"], tmp_path / "p.beton", pixel_limit=5000, advance=lambda *progress: seen.append(progress)
    )
    assert report.samples == len(bad)
    assert report.skipped == Counter(reason for _, reason in bad.values())
    assert seen == [(i, 11) for i in range(1, 12)]
    packed = ShardSet([f"{tmp_path}/p.beton"])
    assert [packed.read(i).key for i in range(len(packed))] == [f"s/good-{key}" for key in bad]
    assert not packed.skipped


@needs_ffcv
def test_a_full_disk_is_an_error(tars, tmp_path, monkeypatch):
    allocator = pytest.importorskip("ffcv.memory_allocator").MemoryAllocator

    class Short(allocator):
        def __exit__(self, *error):
            super().__exit__(*error)
            os.truncate(self.fname, self.offset + 100)

    monkeypatch.setattr(beton._ffcv().allocator, "MemoryAllocator", Short)
    with pytest.raises(RuntimeError, match=r"00000\.beton cannot be written.*disk full"):
        pack(tars.train, tmp_path / "p.beton")
    assert not list(tmp_path.glob("p-out/*"))


@needs_ffcv
@pytest.mark.parametrize("stop", [0, 3, 8])
def test_resumes_bit_for_bit_from_the_next_batch(packed, stop):
    with opened(packed) as loader:
        loader.set_epoch(2)
        iterator = iter(loader)
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(loader.state_dict()))
        rest = list(iterator)
    with opened(replace(packed, workers=1, prefetch=0)) as resumed:
        resumed.load_state_dict(state)
        again = list(resumed)
    assert len(again) == len(rest) == 8 - stop
    for a, b in zip(rest, again, strict=True):
        assert_same(a, b)


@needs_ffcv
def test_all_ranks_together_give_each_sample_once(packed):
    packed = replace(packed, drop_last=False, batch_size=12)
    with contextlib.ExitStack() as stack:
        loaders = [stack.enter_context(opened(packed, rank=r, world_size=3)) for r in range(3)]
        batches = [batch for loader in loaders for batch in loader]
    keys = Counter(k for b in batches for k, valid in zip(b.keys, b.valid.tolist(), strict=True) if valid)
    assert len(keys) == 87
    assert set(keys.values()) == {1}


@needs_ffcv
def test_mixes_with_tars_and_serves_evaluation(tars, packed, tmp_path):
    write_members(tmp_path / "t.tar", photos(9, first=200))
    mixed = replace(packed, train=(*packed.train, f"{tmp_path}/t.tar"), drop_last=False)
    with opened(mixed) as loader:
        assert loader.samples == 96
        assert len({k for b in loader for k, valid in zip(b.keys, b.valid.tolist(), strict=True) if valid}) == 96
    for one, other in zip(iter_eval(tars.train, 16, 20), iter_eval(packed.train, 16, 20), strict=True):
        assert one.keys == other.keys
        assert one.captions == other.captions
        assert torch.equal(one.images, other.images)


def resident():
    """MiB of memory in use by this process."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


@needs_ffcv
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc here")
def test_memory_stays_flat_over_epochs_broken_off_and_whole(tmp_path):
    write_members(tmp_path / "s.tar", photos(12))
    pack([tmp_path / "s.tar"], tmp_path / "p.beton")
    data = DataConfig(train=(f"{tmp_path}/p.beton",), batch_size=4)

    def epochs(loader, numbers):
        for epoch in numbers:
            loader.set_epoch(epoch)
            for _ in itertools.islice(loader, 1 if epoch % 4 else None):
                pass

    with opened(data) as loader:
        epochs(loader, range(1, 20))
        before = resident()
        epochs(loader, range(20, 220))
        assert resident() - before < 8


@needs_ffcv
def test_the_layout_is_ffcvs():
    types = pytest.importorskip("ffcv.types")
    writer = pytest.importorskip("ffcv.writer")
    assert types.CURRENT_VERSION == VERSION
    assert writer.MIN_PAGE_SIZE == MIN_PAGE
    fields = [beton.picture_field()(), types.BytesField(), types.BytesField()]
    theirs = (types.HeaderType, types.FieldDescType, types.ALLOC_TABLE_TYPE, types.get_metadata_type(fields))
    for ours, their in zip((HEADER, DESCRIPTOR, ALLOCATION, SAMPLE), theirs, strict=True):
        assert ours.itemsize == their.itemsize
        assert [field[:2] for field in ours.fields.values()] == [field[:2] for field in their.fields.values()]
    assert types.TYPE_ID_HANDLER[beton._BYTES] is types.BytesField
    assert types.TYPE_ID_HANDLER[beton._CUSTOM] is None


@needs_ffcv
def test_ffcvs_own_reader_finds_every_region(packed):
    reader = pytest.importorskip("ffcv.reader").Reader(packed.train[0], {"image": beton.picture_field()})
    manager = pytest.importorskip("ffcv.memory_managers").OSCacheManager(reader)
    assert reader.num_samples == 87
    assert reader.field_names == list(FIELDS)
    assert reader.alloc_table["sample_id"].tolist() == np.repeat(np.arange(87), 3).tolist()
    shards, read = ShardSet(packed.train), manager.compile_reader()
    with manager.schedule_epoch([]) as context:
        for index in range(87):
            raw, row = shards.read(index), reader.metadata[index]
            pointers = row["f0"]["data_ptr"], row["f1"]["ptr"], row["f2"]["ptr"]
            for pointer, expected in zip(pointers, (raw.image, raw.key.encode(), raw.text), strict=True):
                assert bytes(read(pointer, context.state)) == expected
            assert (row["f0"]["height"], row["f0"]["width"]) == decode_image(raw.image, 10**6).shape[:2]
            assert (row["f0"]["mode"] == 0) == (index % 11 not in (3, 5, 9))


@needs_ffcv
@pytest.mark.slow
def test_ffcvs_own_loader_decodes_the_same_jpegs(tmp_path):
    samples = {str(i): {"jpg": encoded(40, 56, i, quality=90), "txt": b"%d" % i * (1 + i)} for i in range(12)}
    write_members(tmp_path / "s.tar", samples)
    pack([tmp_path / "s.tar"], tmp_path / "p.beton")
    ffcv = pytest.importorskip("ffcv")
    decoders = pytest.importorskip("ffcv.fields.decoders")
    loader = ffcv.Loader(
        str(tmp_path / "p.beton"), batch_size=5, num_workers=1, drop_last=False,
        custom_fields={"image": beton.picture_field()},
        pipelines={
            "image": [decoders.SimpleRGBImageDecoder()], "key": [decoders.BytesDecoder()], "caption": None,
        },
    )  # fmt: skip
    iterator = iter(loader)
    try:
        batches = [(images.copy(), [bytes(key[:3]) for key in keys]) for images, keys in iterator]
    finally:
        iterator.close()
    pixels = np.concatenate([images for images, _ in batches])
    ours = np.stack([decode_image(members["jpg"], 10**6) for members in samples.values()])
    assert np.abs(pixels.astype(int) - ours).max() <= 8  # FFCV's takes libjpeg-turbo's fast transforms:
    decode = pytest.importorskip("simplejpeg").decode_jpeg
    fast = np.stack([decode(members["jpg"], "RGB", fastdct=True) for members in samples.values()])
    assert np.abs(pixels.astype(int) - fast).max() <= 1
    assert [key for _, keys in batches for key in keys] == [b"s/%d" % i if i < 10 else b"s/1" for i in range(12)]


@needs_ffcv
def test_files_of_others_are_refused_by_name(packed, tmp_path):
    path = tmp_path / "x.beton"
    whole = bytearray((tmp_path / "p.beton").read_bytes())

    def changed(place, value, kind="<u2"):
        content = whole.copy()
        content[place : place + np.dtype(kind).itemsize] = np.array(value, kind).tobytes()
        return bytes(content)

    first = HEADER.itemsize
    refused = {
        "it is too short": b"",
        "does not begin with FFCV's header": b"no beton, but a text " * 500,
        r"format version: got 3, expected 2, that of FFCV 1\.0\.2": changed(0, 3),
        r"fields: got \('lmage', 'key', 'caption'\), expected \('image'": changed(first + 1, ord("l"), "u1"),
        r"fields: got \('image', 'key'\)": changed(2, 2),
        r"picture field: got b'rocket_fast 2 txt'": changed(first + 17 + 12, ord("2"), "u1"),
        "cut short within its index": bytes(whole[:4000]),
    }
    for message, content in refused.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"x\.beton \(pattern '.*x\.beton'\) cannot be read: .*{message}"):
            ShardSet([str(path)])
    with pytest.raises(ValueError, match=r"data\.captions: got 'several', expected 'txt', which the file"):
        ShardSet(packed.train, caption="json")


@needs_ffcv
def test_a_file_cut_short_gives_its_beginning_or_bad_samples(packed, tmp_path):
    source = BetonSource(tmp_path / "p.beton", FileCache())
    assert len(source) == 87
    end = int(source._starts[40] + 10)
    os.truncate(tmp_path / "p.beton", end)
    assert source.read(39).key == "s0/00039"
    for index in (40, 80):
        with pytest.raises(BadSampleError, match="shard cut short"):
            source.read(index)
    shards = ShardSet(packed.train)
    assert len(shards) == 40
    assert shards.skipped == Counter({"rest of a damaged shard": 47})


# What works without it -----------------------------------------------------------------------------------------------


def test_what_is_missing_is_named(tars, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    for name in [name for name in sys.modules if name.startswith("ffcv.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(beton, "_ffcv", beton._ffcv.__wrapped__)
    with pytest.raises(MissingExtra, match=r"pip install 'rocket-fast\[ffcv\]'"):
        pack(tars.train, tmp_path / "p.beton")


def test_a_tar_is_no_beton(tars, tmp_path):
    (tmp_path / "s0.tar").rename(tmp_path / "s0.beton")
    with pytest.raises(ValueError, match=r"s0\.beton.*it is no \.beton"):
        CPULoader(replace(tars, train=(f"{tmp_path}/s0.beton",)), VIEWS, None, TOKENIZER, seed=0)
