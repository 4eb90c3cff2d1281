"""`rocket-fast data check` counts exactly what training would skip, with keys to find it by."""

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from rocket_fast.__main__ import main
from rocket_fast.loaders import check
from rocket_fast.loaders.check import check_shards


def encoded(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_counts_reasons_and_names_examples(tmp_path: Path, write_shard):
    write_shard(tmp_path / "good.tar", 5, 0)
    with tarfile.open(tmp_path / "good.tar") as tar:
        picture = tar.extractfile("00000.png").read()
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name, content in {
            "a.png": encoded(30, 40), "a.txt": b"fine",
            "b.png": picture[:60], "b.txt": b"truncated",
            "c.png": picture, "c.txt": b"  ",
            "d.png": picture, "d.txt": b"\xff\xfe\xff",
            "e.png": picture,
            "f.png": encoded(3, 5), "f.txt": b"small",
        }.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    seen = []
    report = check_shards([str(tmp_path / "*.tar")], advance=lambda done, total: seen.append((done, total)))
    assert report.usable == 7
    assert dict(report.skipped) == {
        "corrupt image": 1, "empty caption": 1, "caption not UTF-8": 1, "no caption": 1,
    }  # fmt: skip
    assert report.examples["corrupt image"] == ["bad/b"]
    assert report.pixels == (3 * 5, 30 * 40)
    assert seen[-1] == (10, 10)


def test_a_missing_shard_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere\.tar"):
        check_shards([str(tmp_path / "nowhere.tar")])


def test_few_samples_are_in_hand_at_a_time(tmp_path: Path, write_shard, monkeypatch):
    write_shard(tmp_path / "s.tar", 300, 0)
    submitted, in_hand = [], []

    class Watched(ThreadPoolExecutor):
        def submit(self, *args, **options):
            submitted.append(1)
            return super().submit(*args, **options)

    monkeypatch.setattr(check, "ThreadPoolExecutor", Watched)
    report = check_shards(
        [str(tmp_path / "s.tar")], workers=1, advance=lambda done, total: in_hand.append(len(submitted) - done)
    )
    assert report.usable == len(in_hand) == 300
    assert max(in_hand) <= 64


def test_the_command_passes_its_options_on(tmp_path: Path, write_shard, monkeypatch):
    write_shard(tmp_path / "s.tar", 3, 0)
    passed = []
    monkeypatch.setattr(check, "check_shards", lambda *args, **options: passed.append(options) or check_shards(*args))
    assert main(["data", "check", str(tmp_path / "s.tar"), "--workers", "3"]) == 0
    assert passed[0]["workers"] == 3
    with pytest.raises(ValueError, match="workers: got 0, expected a number >= 1"):
        check_shards([str(tmp_path / "s.tar")], workers=0)
