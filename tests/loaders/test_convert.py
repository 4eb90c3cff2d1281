"""`rocket-fast data pack`: everything in, nothing twice, and on from where it was killed."""

import io
import json
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from loader_support import assert_same, opened, write_members

from rocket_fast.__main__ import main
from rocket_fast.errors import Failed, MissingExtra
from rocket_fast.loaders import convert, ffcv
from rocket_fast.loaders.base import DataConfig
from rocket_fast.loaders.convert import PackConfig, pack
from rocket_fast.loaders.shards import ShardSet
from rocket_fast.loaders.sources.beton import BetonSource
from rocket_fast.loaders.sources.webdataset import FileCache

Image = pytest.importorskip("PIL.Image")
needs_ffcv = pytest.mark.skipif(find_spec("ffcv") is None, reason="ffcv is not installed")


def encoded(height, width, image_format="JPEG", **options):
    file = io.BytesIO()
    pixels = np.linspace(0, 255, height * width * 3).astype(np.uint8).reshape(height, width, 3)
    Image.fromarray(pixels).save(file, image_format, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """25 pictures in a folder, two of them bad."""
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(25):
        (root / f"{number:02d}.jpg").write_bytes(encoded(20 + number, 60))
        (root / f"{number:02d}.txt").write_text(f"caption {number}")
    (root / "07.txt").write_text(" ")
    (root / "11.jpg").write_bytes(b"no picture")
    return root


def contents(out):
    return {path.name: path.read_bytes() for kind in ("tar", "beton") for path in sorted(out.glob(f"*.{kind}"))}


def test_packs_what_training_then_reads(tmp_path, folder):
    seen = []
    report = pack([str(folder)], PackConfig(out=tmp_path / "out", shard_size=10), advance=lambda *at: seen.append(at))
    assert (report.shards, report.kept, report.samples) == (3, 0, 23)
    assert report.skipped == Counter({"empty caption": 1, "corrupt image": 1})
    assert seen == [(i, 25) for i in range(1, 26)]
    assert sorted(contents(tmp_path / "out")) == ["00000.tar", "00001.tar", "00002.tar"]
    before, after = ShardSet([str(folder)]), ShardSet([f"{tmp_path}/out/*.tar"])
    usable = [before.read(i) for i in range(25) if i not in (7, 11)]
    packed = [after.read(i) for i in range(len(after))]
    assert [(s.image, s.text) for s in packed] == [(s.image, s.text) for s in usable]
    assert packed[0].key == "00000/pictures/00_jpg"
    assert not after.skipped


def test_damaged_pictures_are_left_out_of_tars_as_training_would(tmp_path):
    jpeg, png = encoded(40, 60), encoded(40, 60, "PNG")
    pictures = {"a.jpg": jpeg, "b.jpg": jpeg[:-60], "c.png": png, "d.png": png[:-60], "e.jpg": encoded(200, 200)}
    samples = {name[0]: {name[2:]: picture, "txt": b"x"} for name, picture in pictures.items()}
    write_members(tmp_path / "s.tar", samples)
    report = pack([f"{tmp_path}/s.tar"], PackConfig(out=tmp_path / "out", pixel_limit=5000))
    assert report.skipped == Counter({"corrupt image": 2, "image over the pixel limit": 1})
    packed = ShardSet([f"{tmp_path}/out/*.tar"])
    assert [packed.read(i).image for i in range(len(packed))] == [jpeg, png]


@pytest.mark.parametrize(("workers", "kind"), [(1, "tar"), (3, "tar"), pytest.param(2, "beton", marks=needs_ffcv)])
def test_continues_after_a_kill_and_ends_the_same(tmp_path, folder, monkeypatch, workers, kind):
    whole = PackConfig(out=tmp_path / "whole", shard_size=6, workers=2, format=kind)
    pack([str(folder)], whole)
    config = replace(whole, out=tmp_path / "out", workers=workers)
    make = convert._make

    def killed(shards, index, config):
        if index == 15:
            raise KeyboardInterrupt
        return make(shards, index, config)

    monkeypatch.setattr(convert, "_make", killed)
    with pytest.raises(KeyboardInterrupt):
        pack([str(folder)], config)
    monkeypatch.setattr(convert, "_make", make)
    assert sorted(contents(config.out)) == [f"00000.{kind}", f"00001.{kind}"]
    assert not list(config.out.glob(".*.tmp"))
    (config.out / f".00002.{kind}.999999999.tmp").write_bytes(b"half")  # what a SIGKILL leaves
    (config.out / f"00002.{kind}").write_bytes(b"not in the record")
    times = {path: path.stat().st_mtime_ns for path in config.out.glob(f"0000[01].{kind}")}
    report = pack([str(folder)], config)
    assert (report.shards, report.kept, report.samples) == (5, 2, 23)
    assert report.skipped == Counter({"empty caption": 1, "corrupt image": 1})
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert contents(config.out) == contents(whole.out)
    assert not list(config.out.glob(".*.tmp"))
    (config.out / f"00003.{kind}").unlink()
    assert pack([str(folder)], config).kept == 4
    assert contents(config.out) == contents(whole.out)


def test_other_options_or_sources_do_not_continue_it(tmp_path, folder, write_shard):
    out = tmp_path / "out"
    pack([str(folder)], PackConfig(out=out, shard_size=10))
    with pytest.raises(ValueError, match=r"shard_size: got 9, expected 10, as .*pack\.json was begun"):
        pack([str(folder)], PackConfig(out=out, shard_size=9))
    for wrong in (
        {"format": "zip"},
        *({"page_mib": mib} for mib in (1, 3, 12, 4096)),
        {"captions": "json"},
        {"workers": 0},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: got"):
            PackConfig(out=out, **wrong)
    (folder / "00.txt").unlink()
    with pytest.raises(ValueError, match="data: got"):
        pack([str(folder)], PackConfig(out=out, shard_size=10))
    write_shard(tmp_path / "tars/00000.tar", 3, 0)
    with pytest.raises(ValueError, match="expected a folder without the sources in it"):
        pack([f"{tmp_path}/tars/*.tar"], PackConfig(out=tmp_path / "tars"))
    with pytest.raises(ValueError, match="expected an empty folder, or one begun by this command"):
        pack([str(folder)], PackConfig(out=tmp_path / "tars"))
    (tmp_path / "file").write_text("")
    with pytest.raises(Failed, match="cannot be written"):
        pack([str(folder)], PackConfig(out=tmp_path / "file"))


def test_larger_pictures_are_made_smaller_and_others_kept(tmp_path):
    root = tmp_path / "p"
    root.mkdir()
    pictures = {"large.png": encoded(60, 90, "PNG"), "tall.jpg": encoded(400, 30), "small.jpg": encoded(24, 50)}
    for name, content in pictures.items():
        (root / name).write_bytes(content)
        (root / f"{name[:-4]}.txt").write_text(name)
    pack([str(root)], PackConfig(out=tmp_path / "out", resize_shorter=24, quality=95))
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    assert members["p/small_jpg.jpg"] == pictures["small.jpg"]
    for name, size in (("large_png", (36, 24)), ("tall_jpg", (24, 320))):
        made, original = Image.open(io.BytesIO(members[f"p/{name}.jpg"])), pictures[f"{name[:-4]}.{name[-3:]}"]
        assert (made.format, made.size) == ("JPEG", size)
        expected = Image.open(io.BytesIO(original)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(made, int) - np.asarray(expected, int)).mean() < 6


def test_other_formats_become_jpeg_and_suffixes_tell_the_truth(tmp_path):
    root = tmp_path / "p"
    root.mkdir()
    for number, image_format in enumerate(("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")):
        (root / f"{number}.jpg").write_bytes(encoded(9, 9, image_format))
        (root / f"{number}.txt").write_text(image_format)
    pack([str(root)], PackConfig(out=tmp_path / "out"))
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        names = [name.rpartition(".")[2] for name in tar.getnames() if not name.endswith("txt")]
    assert names == ["png", "webp", "gif", "bmp", "tif", "jpg"]


def test_several_captions_go_into_json_and_keys_are_distinct(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(9, 9))
    records = [{"id": key, "file_name": "a.jpg"} for key in ("x.1", "x_1", "../up", "ü")]
    annotations = [{"image_id": r["id"], "caption": f"{r['id']} {i}"} for r in records for i in range(2)]
    (tmp_path / "c.json").write_text(json.dumps({"images": records, "annotations": annotations}))
    report = pack([f"{tmp_path}/c.json"], PackConfig(out=tmp_path / "out", captions="several"))
    assert report.samples == 4
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    assert [name for name in members if name.endswith("jpg")] == [
        "c/x_1.jpg", "c/x_1-2.jpg", "c/__/up.jpg", "c/ü.jpg",
    ]  # fmt: skip
    assert members["c/x_1-2.txt"] == b"x_1 0"
    assert json.loads(members["c/x_1-2.json"]) == {"captions": ["x_1 0", "x_1 1"]}
    again = ShardSet([f"{tmp_path}/out/*.tar"], caption="json")
    assert len(again) == 4


@needs_ffcv
@pytest.mark.parametrize("captions", ["txt", "several"])
def test_batches_of_a_packed_beton_are_the_sources(tmp_path, folder, captions):
    """Bit for bit, over several files, whatever the pictures' format."""
    for number, image_format in enumerate(("PNG", "WEBP", "GIF", "PPM")):
        (folder / f"x{number}.jpg").write_bytes(encoded(31, 22 + number, image_format))
        (folder / f"x{number}.txt").write_text(f"  a {image_format} with spaces\n")
    for bad in ("07.txt", "11.jpg"):
        (folder / bad).unlink()  # a skipped sample is not there to have its place taken
    report = pack([str(folder)], PackConfig(out=tmp_path / "out", format="beton", captions=captions, shard_size=10))
    assert (report.shards, report.samples, report.skipped) == (3, 27, Counter({"no caption": 1}))
    data = DataConfig(train=(str(folder),), batch_size=9, captions=captions)
    with opened(data) as before, opened(replace(data, train=(f"{tmp_path}/out/*.beton",))) as after:
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    assert not after.skipped


@needs_ffcv
def test_a_beton_of_smaller_pictures_and_one_of_none(tmp_path):
    root = tmp_path / "p"
    root.mkdir()
    pictures = {"a.jpg": b"no picture", "b.png": encoded(60, 90, "PNG"), "c.jpg": encoded(24, 50)}
    for name, content in pictures.items():
        (root / name).write_bytes(content)
        (root / f"{name[:-4]}.txt").write_text(name)
    config = PackConfig(out=tmp_path / "out", format="beton", resize_shorter=24, shard_size=1)
    assert pack([str(root)], config).skipped == Counter({"corrupt image": 1})
    empty, large, small = (BetonSource(tmp_path / f"out/0000{i}.beton", FileCache()) for i in range(3))
    assert len(empty) == 0
    made = Image.open(io.BytesIO(large.read(0).image))
    assert (made.format, made.size) == ("JPEG", (36, 24))
    assert large.read(0).key == "p/b.png"
    assert small.read(0).image == pictures["c.jpg"]


@needs_ffcv
def test_keys_in_a_beton_are_distinct(tmp_path, folder):
    for name in ("one", "two"):
        pack([str(folder)], PackConfig(out=tmp_path / name, format="beton"))
    pack([f"{tmp_path}/{{one,two}}/00000.beton"], PackConfig(out=tmp_path / "both", format="beton"))
    both = ShardSet([f"{tmp_path}/both/00000.beton"])
    keys = [both.read(i).key for i in range(len(both))]
    assert len(set(keys)) == len(keys) == 46
    assert keys[0] == "pictures/00.jpg"
    assert keys[23] == "pictures/00.jpg-2"


@needs_ffcv
def test_the_command_writes_a_beton(tmp_path, folder, capsys):
    assert main(["data", "pack", str(folder), "--out", str(tmp_path / "out"), "--format", "beton"]) == 0
    assert "packed into 1 betons (0 were there)" in " ".join(capsys.readouterr().out.split())
    assert sorted(contents(tmp_path / "out")) == ["00000.beton"]


def test_a_beton_without_ffcv_is_refused_at_once(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    for name in [name for name in sys.modules if name.startswith("ffcv.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(ffcv, "_ffcv", ffcv._ffcv.__wrapped__)
    with pytest.raises(MissingExtra, match=r"rocket-fast\[ffcv\]"):
        pack([str(folder)], PackConfig(out=tmp_path / "out", format="beton"))
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, folder, capsys):
    out = tmp_path / "out"
    assert main(["data", "pack", str(folder), "--out", str(out), "--shard-size", "20", "--resize-shorter", "16"]) == 0
    text = capsys.readouterr().out
    assert "packed into 2 tars (0 were there)" in text
    assert "empty caption" in text
    assert len(contents(out)) == 2
    assert main(["data", "pack", f"{tmp_path}/nowhere.npy", "--out", str(out)]) == 2
    assert "nowhere.npy" in capsys.readouterr().err
