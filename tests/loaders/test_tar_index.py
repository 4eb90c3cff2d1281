"""Index files of tars: the same samples as from the headers, and never those of another state of the tar."""

import os
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loader_support import write_members

from rocket_fast.__main__ import main
from rocket_fast.errors import Failed
from rocket_fast.loaders.shards import ShardSet
from rocket_fast.loaders.sources import tar_index, webdataset
from rocket_fast.loaders.sources.tar_index import IndexReport, index_path, index_tars, read_index, write_index
from rocket_fast.loaders.sources.webdataset import FileCache, TarSource


def members(count, first=0):
    return {
        f"é{i}" if i % 3 else f"folder/{i}": {"jpg": b"j" * (5 + i), "txt": b"t%d" % i, "json": b"{%d}" % i}
        for i in range(first, first + count)
    }


@pytest.fixture
def tars(tmp_path):
    paths = [tmp_path / f"{i}.tar" for i in range(3)]
    for i, path in enumerate(paths):
        write_members(path, members(10 + i, first=100 * i))
    return paths


def samples(source):
    return [source.read(i) for i in range(len(source))], source.skipped


def headers_are_not_read(monkeypatch):
    def unwanted(*_):
        raise AssertionError("headers were read")

    monkeypatch.setattr(webdataset, "_members", unwanted)


@pytest.mark.parametrize("caption", ["txt", "json"])
def test_shards_are_the_same_without_reading_headers(tars, tmp_path, caption, monkeypatch):
    pattern = f"{tmp_path}/*.tar"
    plain = ShardSet([pattern], caption=caption)
    seen = []
    report = index_tars(tars, workers=3, advance=lambda *at: seen.append(at))
    assert report == IndexReport(written=3, kept=0, samples=33)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    headers_are_not_read(monkeypatch)
    assert index_tars(tars) == IndexReport(written=0, kept=3, samples=33)
    indexed = ShardSet([pattern], caption=caption)
    assert indexed.fingerprint == plain.fingerprint
    assert samples(indexed) == samples(plain)


kinds = st.sampled_from(["jpg", "png", "txt", "json", "cls"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.tuples(st.sampled_from("abcd"), kinds), max_size=14), cut=st.integers(0, 4000))
def test_odd_tars_count_the_same_things(tmp_path, names, cut):
    """Members missing, repeated, apart from each other; a damaged rest; no sample at all."""
    import io
    import tarfile

    path, files = tmp_path / "odd.tar", FileCache()
    with tarfile.open(path, "w") as tar:
        for number, (key, kind) in enumerate(names):
            info = tarfile.TarInfo(f"{key}.{kind}")
            info.size = number
            tar.addfile(info, io.BytesIO(b"x" * number))
    os.truncate(path, max(512, path.stat().st_size - cut))
    write_index(path, files)
    for caption in ("txt", "json"):
        expected = samples(TarSource(path, FileCache(), caption=caption))
        assert samples(TarSource(path, files, caption=caption, index=read_index(path))) == expected


def test_an_index_of_another_state_is_not_used_and_said_so(tars, tmp_path):
    index_tars(tars)
    write_members(tars[1], members(4, first=500))
    with pytest.warns(UserWarning, match=r"1 index files cannot be used.*1\.tar\.index: the tar has changed since"):
        changed = ShardSet([f"{tmp_path}/*.tar"])
    assert len(changed) == 10 + 4 + 12
    os.utime(tars[0], ns=(0, 7))  # the same bytes: cannot be known
    with pytest.warns(UserWarning, match="2 index files"):
        ShardSet([f"{tmp_path}/*.tar"])
    assert index_tars(tars) == IndexReport(written=2, kept=1, samples=26)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert samples(ShardSet([f"{tmp_path}/*.tar"])) == samples(changed)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], "damaged"),
        (lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:], "damaged"),
        (lambda data: data + b"x", "damaged"),
        (lambda data: data[:30], "another version"),
        (lambda data: b"", "another version"),
        (lambda data: data.replace(b"index 1", b"index 2"), "another version"),
    ],
)
def test_a_damaged_index_is_not_used(tars, damage, reason):
    write_index(tars[0], FileCache())
    path = index_path(tars[0], None)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=reason):
        read_index(tars[0])
    with pytest.warns(UserWarning, match=reason):
        assert len(ShardSet([str(tars[0])])) == 10
    assert index_tars(tars[:1]).written == 1


def test_what_is_written_is_there_whole_or_not_at_all(tars, monkeypatch):
    def full(path, write):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(tar_index, "write_atomically", full)
        with pytest.raises(Failed, match=r"0\.tar\.index cannot be written: no space left; --out FOLDER"):
            index_tars(tars)
    assert not list(tars[0].parent.glob("*index*"))
    (tars[0].parent / "x.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"x\.tar cannot be read: it does not begin with a tar header"):
        index_tars([tars[0].parent / "x.tar"])


def test_index_files_in_another_folder(tars, tmp_path, monkeypatch, capsys):
    out = tmp_path / "elsewhere"
    assert main(["data", "index", f"{tmp_path}/*.tar", "--out", str(out)]) == 0
    assert "3 index files written, 0 kept, 33 samples, in" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["0.tar.index", "1.tar.index", "2.tar.index"]
    headers_are_not_read(monkeypatch)
    assert len(ShardSet([f"{tmp_path}/*.tar?index={out}"])) == 33
    with pytest.raises(AssertionError, match="headers were read"):
        ShardSet([f"{tmp_path}/*.tar"])
    with pytest.raises(ValueError, match=r"index: got .*expected an existing folder"):
        ShardSet([f"{tmp_path}/*.tar?index={tmp_path}/none"])
    (tmp_path / "b").mkdir()
    write_members(tmp_path / "b/1.tar", members(2))
    with pytest.raises(ValueError, match=r"out: got \['1\.tar\.index'\]"):
        index_tars([*tars, tmp_path / "b/1.tar"], folder=out)


def test_the_command_is_for_tars(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("filepath,caption\n")
    assert main(["data", "index", f"{tmp_path}/a.csv"]) == 2
    assert "nothing else has an index" in capsys.readouterr().err


def test_places_can_be_large(tmp_path):
    """Offsets and sizes of 8 GiB and more."""
    path = tmp_path / "s.tar"
    write_members(path, members(1))
    index = webdataset.scan_tar(path, FileCache())._replace(places=np.full((1, 3, 2), 9 << 30))
    assert TarSource(path, FileCache(), index=index)._places.max() == 9 << 30
