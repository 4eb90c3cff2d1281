"""Reading tars: every header format, and every way a tar can be broken."""

import io
import os
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from rocket_fast.loaders.base import BadSampleError
from rocket_fast.loaders.shards import ShardSet
from rocket_fast.loaders.sources.webdataset import FileCache, TarSource


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def source(path, **options):
    return TarSource(path, FileCache(), **options)


@pytest.mark.parametrize("caption", ["txt", "json"])
@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_tarfile_writes(tmp_path, tar_format, caption):
    long = "folder/" * 12 + "k" * 60 + "/" + "n" * 80
    names = ["a", "./b", "deep/er/c", long] + (["ünï"] if tar_format != tarfile.USTAR_FORMAT else [])
    members = []
    for i, name in enumerate(names):
        members += [
            (f"{name}.jpg", b"x" * (500 + i * 7)),
            (f"{name}.txt", f"text {i}".encode()),
            (f"{name}.json", b"{}"),
        ]
    tar = source(write_tar(tmp_path / "s.tar", members, format=tar_format), caption=caption)
    assert len(tar) == len(names)
    for i, name in enumerate(names):
        sample = tar.read(i)
        assert sample.key == f"s/{name.removeprefix('./')}"
        assert len(sample.image) == 500 + i * 7
        assert (sample.text, sample.json) == ((f"text {i}".encode(), None) if caption == "txt" else (None, b"{}"))
    assert not tar.skipped


def test_members_may_be_anywhere_and_others_are_ignored(tmp_path):
    far = b"y" * 300_000
    members = [
        ("a.png", b"A"),
        ("b.txt", b"tb"),
        ("filler.bin", far),
        ("b.PNG", b"B"),
        ("a.txt", b"ta"),
        ("c.d.png", b"C"),
    ]
    path = write_tar(tmp_path / "s.tar", [*members, (".hidden", b""), ("a.cls", b"3")])
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("dir.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    tar = source(path)
    samples = {s.key: (s.image, s.text) for s in map(tar.read, range(len(tar)))}
    assert samples == {"s/a": (b"A", b"ta"), "s/b": (b"B", b"tb")}
    assert not tar.skipped


def test_incomplete_and_repeated_members_are_counted(tmp_path):
    members = [("a.jpg", b"A"), ("b.txt", b"tb"), ("c.jpg", b"C"), ("c.txt", b"tc"), ("c.jpg", b"again")]
    tar = source(write_tar(tmp_path / "s.tar", members))
    assert [tar.read(i).image for i in range(len(tar))] == [b"C"]
    assert dict(tar.skipped) == {"no caption": 1, "no image": 1, "repeated member": 1}


def test_caption_in_json(tmp_path):
    members = [("a.jpg", b"A"), ("a.json", b"{}"), ("b.jpg", b"B"), ("b.txt", b"tb")]
    tar = source(write_tar(tmp_path / "s.tar", members), caption="json")
    assert [(tar.read(i).text, tar.read(i).json) for i in range(len(tar))] == [(None, b"{}")]
    assert dict(tar.skipped) == {"no caption": 1}


def full(count):
    return [(f"{i}.{kind}", bytes([65 + i]) * 700) for i in range(count) for kind in ("jpg", "txt")]


@pytest.mark.parametrize("cut", [100, 512, 1000, 5000, 8000])
def test_a_cut_tar_gives_what_is_whole(tmp_path, cut):
    path = write_tar(tmp_path / "s.tar", full(5))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    if cut < 512:
        with pytest.raises(ValueError, match="tar header"):
            source(path)
        return
    tar = source(path)
    assert len(tar) == cut // (2 * (512 + 1024))
    assert all(tar.read(i).image == bytes([65 + i]) * 700 for i in range(len(tar)))
    assert tar.skipped["rest of a damaged shard"] == (0 if cut % 1536 == 0 else 1)


def test_garbage_between_members_ends_the_shard(tmp_path):
    path = write_tar(tmp_path / "s.tar", full(5))
    whole = bytearray(path.read_bytes())
    whole[2 * 3072 : 2 * 3072 + 512] = b"\xa5" * 512
    path.write_bytes(whole)
    tar = source(path)
    assert len(tar) == 2
    assert tar.skipped["rest of a damaged shard"] == 1


def test_no_end_marker_is_no_damage(tmp_path):
    path = write_tar(tmp_path / "s.tar", full(2))
    path.write_bytes(path.read_bytes()[: 2 * 3072])
    assert len(source(path)) == 2
    assert not source(path).skipped


def test_large_sizes_are_in_base_256(tmp_path):
    path = tmp_path / "s.tar"
    picture, text = tarfile.TarInfo("big.jpg"), tarfile.TarInfo("big.txt")
    picture.size, text.size = 9 << 30, 2
    with open(path, "wb") as file:
        file.write(picture.tobuf(tarfile.GNU_FORMAT))
        file.seek(picture.size, io.SEEK_CUR)  # a hole: takes no room on the disk
        file.write(text.tobuf(tarfile.GNU_FORMAT) + b"ok".ljust(512, b"\0"))
    assert len(source(path)) == 1


def test_not_a_tar_names_path_and_pattern(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"not a tar" * 1000)
    with pytest.raises(ValueError, match=r"x\.tar \(pattern '.*\*\.tar'\) cannot be read"):
        ShardSet([f"{tmp_path}/*.tar"])
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.tar"):
        ShardSet([f"{tmp_path}/*.tar"])


def test_a_shard_cut_while_in_use_gives_a_bad_sample(tmp_path):
    path = write_tar(tmp_path / "s.tar", full(3))
    tar = source(path)
    with open(path, "r+b") as file:
        file.truncate(3072 + 600)
    assert tar.read(0).image == b"A" * 700
    with pytest.raises(BadSampleError):
        tar.read(1)


def test_descriptors_are_few_and_given_back(tmp_path):
    def open_files():
        return sum(os.path.realpath(f"/proc/self/fd/{fd}").startswith(folder) for fd in os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc here")
    folder = os.path.realpath(tmp_path)
    files = FileCache(limit=3)
    tars = [TarSource(write_tar(tmp_path / f"{i}.tar", full(1)), files) for i in range(9)]
    assert [tar.read(0).key for tar in tars] == [f"{i}/0" for i in range(9)]
    assert open_files() <= 3
    del files, tars
    assert open_files() == 0


def test_a_file_put_out_of_the_cache_is_not_closed_under_a_read(tmp_path):
    paths = [tmp_path / str(i) for i in range(6)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 4096)
    files = FileCache(limit=2)

    def wrong(thread):
        reads = ((thread * 7 + i * 5) % len(paths) for i in range(1000))
        return [n for n in reads if files.read(paths[n], 0, 4096) != bytes([n]) * 4096]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(wrong, range(8))) == [[]] * 8
    finally:
        sys.setswitchinterval(interval)
