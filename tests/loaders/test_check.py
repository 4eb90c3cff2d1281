"""`rocket-fast data check` counts exactly what training would skip, with keys to find it by."""

import io
import tarfile
from pathlib import Path

import pytest

from rocket_fast.loaders.check import check_shards


def test_counts_reasons_and_names_examples(tmp_path: Path, write_shard):
    write_shard(tmp_path / "good.tar", 5, 0)
    with tarfile.open(tmp_path / "good.tar") as tar:
        picture = tar.extractfile("00000.png").read()
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name, content in {
            "a.png": picture, "a.txt": b"fine",
            "b.png": picture[:60], "b.txt": b"truncated",
            "c.png": picture, "c.txt": b"  ",
            "d.png": picture, "d.txt": b"\xff\xfe\xff",
            "e.png": picture,
        }.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    seen = []
    report = check_shards([str(tmp_path / "*.tar")], advance=lambda done, total: seen.append((done, total)))
    assert report.usable == 6
    assert dict(report.skipped) == {
        "corrupt image": 1, "empty caption": 1, "caption not UTF-8": 1, "no caption": 1,
    }  # fmt: skip
    assert report.examples["corrupt image"] == ["bad/b"]
    assert report.pixels == (24 * 24, 24 * 24)
    assert seen[-1] == (9, 9)


def test_a_missing_shard_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere\.tar"):
        check_shards([str(tmp_path / "nowhere.tar")])
