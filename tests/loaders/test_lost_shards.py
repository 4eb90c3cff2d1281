"""Shards that vanish, are cut, replaced or come back while they are in use: retried, named once, skipped."""

import os
import time
import warnings
from collections import Counter
from dataclasses import replace

import pytest
from loader_support import opened

from rocket_fast.loaders.base import BadSampleError, DataConfig
from rocket_fast.loaders.shards import ShardSet
from rocket_fast.loaders.sources import webdataset
from rocket_fast.loaders.sources.webdataset import FileCache

LOST, CUT = "shard cannot be read", "shard cut short"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(webdataset, "_WAITS", (0.001, 0.002, 0.003))


@pytest.fixture
def data(tmp_path, write_shard):
    for number in range(4):
        write_shard(tmp_path / f"{number}.tar", 100, number)
    return DataConfig(train=(f"{tmp_path}/*.tar",), batch_size=10)


def one_descriptor(loader):
    """As with many more shards than are kept open."""
    files = loader._shards.sources[0]._files
    files._limit = 1
    files._open.clear()


def all_but_first(loader, change):
    """An epoch in which something happens after the first batch."""
    iterator = iter(loader)
    batches = [next(iterator)]
    change()
    return [*batches, *iterator]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_shard_that_vanishes_is_named_once_and_its_samples_are_skipped(data, tmp_path, shuffle):
    def vanish():
        (tmp_path / "2.tar").unlink()
        one_descriptor(loader)

    with opened(replace(data, shuffle=shuffle, prefetch=0)) as loader:
        with pytest.warns(UserWarning, match=r"2\.tar cannot be read") as warned:
            batches = all_but_first(loader, vanish)
        assert len(warned) == 1
        assert set(loader.skipped) == {LOST}
        keys = Counter(k for b in batches for k, valid in zip(b.keys, b.valid.tolist(), strict=True) if valid)
    assert set(keys.values()) == {1}
    assert loader.skipped[LOST] == 400 - len(keys) > 60
    assert sum(not key.startswith("2/") for key in keys) == 300
    assert len(batches) == 40


def test_a_shard_removed_while_it_is_open_is_read_to_the_end(data, tmp_path):
    with opened(data) as loader, warnings.catch_warnings():
        warnings.simplefilter("error")
        all_but_first(loader, (tmp_path / "2.tar").unlink)
        assert not loader.skipped


def test_a_shard_cut_while_in_use_kills_nothing(data, tmp_path):
    with opened(data) as loader:
        batches = all_but_first(loader, lambda: os.truncate(tmp_path / "1.tar", 5000))
        assert len(batches) == 40
        assert 60 < loader.skipped[CUT] <= 100
        assert set(loader.skipped) == {CUT}


def test_a_shard_replaced_by_another_is_not_taken_for_the_first(data, tmp_path, write_shard):
    def put_another():
        write_shard(tmp_path / "new", 7, 9)
        os.replace(tmp_path / "new", tmp_path / "3.tar")
        one_descriptor(loader)

    with opened(replace(data, prefetch=0)) as loader:
        with pytest.warns(UserWarning, match=r"3\.tar cannot be read.*bytes, where it had"):
            all_but_first(loader, put_another)
        assert set(loader.skipped) == {LOST}


def test_nothing_left_to_read_is_an_error_and_no_hang(data, tmp_path):
    with opened(replace(data, prefetch=0)) as loader:
        iterator = iter(loader)
        next(iterator)
        for path in tmp_path.glob("*.tar"):
            path.unlink()
        one_descriptor(loader)
        error = pytest.raises(ValueError, match=f"near and far.*{LOST}")
        with pytest.warns(UserWarning, match="cannot be read"), error:
            list(iterator)


def test_a_shard_that_is_back_within_the_second_is_not_missed(tmp_path, write_shard, monkeypatch):
    write_shard(tmp_path / "s.tar", 3, 0)
    shards = ShardSet([str(tmp_path / "s.tar")])
    (tmp_path / "s.tar").rename(tmp_path / "away")
    shards.sources[0]._files._open.clear()
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            (tmp_path / "away").rename(tmp_path / "s.tar")

    monkeypatch.setattr(webdataset.time, "sleep", sleep)
    assert shards.read(1).text
    assert slept == [0.001, 0.002]


def test_a_lost_shard_costs_no_waiting_and_is_tried_again_later(tmp_path, write_shard, monkeypatch):
    write_shard(tmp_path / "s.tar", 3, 0)
    shards = ShardSet([str(tmp_path / "s.tar")])
    (tmp_path / "s.tar").rename(tmp_path / "away")
    shards.sources[0]._files._open.clear()
    with pytest.warns(UserWarning, match=r"s\.tar"), pytest.raises(BadSampleError, match=LOST):
        shards.read(0)
    with monkeypatch.context() as patched:
        patched.setattr(webdataset.time, "sleep", lambda seconds: pytest.fail("waited again"))
        (tmp_path / "away").rename(tmp_path / "s.tar")
        with pytest.raises(BadSampleError, match=LOST):
            shards.read(0)
        assert shards.locate(0)[1] == "s/00000"
        later = time.monotonic() + 40
        patched.setattr(webdataset.time, "monotonic", lambda: later)
        assert shards.read(0).key == "s/00000"
    assert shards.read(1).key == "s/00001"


def test_a_stale_descriptor_is_opened_anew(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    files = FileCache()
    assert files.read(path, 1, 2) == b"23"
    os.close(files._open[path].descriptor)  # as a server that restarted does to its clients
    stale = files._open[path]
    assert files.read(path, 1, 2) == b"23"
    assert files._open[path] is not stale
    del stale.descriptor


def test_a_parquet_file_that_vanishes_is_a_lost_shard(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"image": [b"a", b"b"], "caption": ["x", "y"]}), tmp_path / "p.parquet")
    shards = ShardSet([str(tmp_path / "p.parquet")])
    (tmp_path / "p.parquet").unlink()
    with pytest.warns(UserWarning, match=r"p\.parquet"), pytest.raises(BadSampleError, match=LOST):
        shards.read(0)
    assert shards.locate(1) == (tmp_path / "p.parquet", "p/00000001")


def test_keys_are_known_without_reading_the_pictures(tmp_path, write_shard):
    write_shard(tmp_path / "s.tar", 3, 0)
    (tmp_path / "f").mkdir()
    (tmp_path / "f/a.png").write_bytes(b"")
    (tmp_path / "f/a.txt").write_text("x")
    (tmp_path / "t.csv").write_text("filepath,caption\nf/a.png,x\nf/a.png,y\n")
    shards = ShardSet([str(tmp_path / name) for name in ("s.tar", "f", "t.csv")])
    assert [shards.locate(i)[1] for i in range(len(shards))] == [shards.read(i).key for i in range(len(shards))]
