"""`rocket-fast data check` counts exactly what training would skip, with keys to find it by."""

import io
import re
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rocket_fast.__main__ import main
from rocket_fast.loaders import check
from rocket_fast.loaders.check import check_shards
from rocket_fast.loaders.check_picture import draw_check, histogram, quantile


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
    assert report.examples["no caption"] == ["bad/e"]
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


def test_any_source_is_checked_and_drawn(tmp_path: Path, capsys):
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(encoded(10 + number, 40))
    rows = "".join(f"{number}.png,{'word ' * (1 + number % 7)}\n" for number in range(32))
    (tmp_path / "data.csv").write_text(f"filepath,title\n{rows}")
    assert main(["data", "check", str(tmp_path / "data.csv"), "--picture", str(tmp_path / "out/check.png")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"usable\W+30\W", text)
    assert re.search(r"no image\W+2\W", text)
    assert re.search(r"shorter side\W+24; 11 to 38 in nine of ten", text)
    with Image.open(tmp_path / "out/check.png") as picture:
        assert picture.width > 1000
        assert len(picture.getcolors(1 << 20)) > 10
    report = check_shards([str(tmp_path / "data.csv")])
    assert report.sides == Counter(min(10 + number, 40) for number in range(30))
    assert report.words == Counter(1 + number % 7 for number in range(30))
    assert [shown.key for shown in report.shown][:2] == ["data/00000000", "data/00000002"]
    assert len(report.shown) == 12


@given(values=st.lists(st.integers(0, 10**6), min_size=1, max_size=300))
def test_histograms_hold_every_value_once(values: list[int]):
    low, step, counts = histogram(Counter(values))
    assert sum(counts) == len(values)
    assert len(counts) <= 40
    assert low == min(values)
    assert counts[0] == sum(value < low + step for value in values) or len(counts) == 1
    assert quantile(Counter(values), 0.5) == sorted(values)[(len(values) - 1) // 2]


def test_nothing_usable_is_drawn_all_the_same(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("a")
    report = check_shards([str(tmp_path)])
    assert report.usable == 0
    draw_check(report, tmp_path / "check.png", "nothing")
    assert (tmp_path / "check.png").exists()
