"""Every format of data, whole and damaged: what is read, what is left out and why, and what is an error."""

import csv
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from loader_support import write_members

from rocket_fast.loaders.base import BadSampleError
from rocket_fast.loaders.shards import ShardSet

Image = pytest.importorskip("PIL.Image")


def picture(number, image_format="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (20 + number, 16), (9 * number % 256, 80, 120)).save(file, image_format)
    return file.getvalue()


PICTURES = [picture(i) for i in range(6)]


def write_pictures(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PICTURES[number % len(PICTURES)])


def everything(path, caption="txt"):
    """{key: (picture's number, caption)} of all samples that can be read, and the reasons of the others."""
    shards = ShardSet([str(path)], caption=caption)
    found, reasons = {}, dict(shards.skipped)
    for index in range(len(shards)):
        try:
            sample = shards.read(index)
        except BadSampleError as error:
            reasons[error.reason] = reasons.get(error.reason, 0) + 1
            continue
        text = sample.text.decode() if caption == "txt" else json.loads(sample.json)["captions"]
        assert (sample.text is None) != (sample.json is None)
        assert sample.key not in found
        found[sample.key] = PICTURES.index(sample.image), text
    return found, reasons


# Folders


def test_folder_with_captions_beside(tmp_path):
    root = tmp_path / "pets.v1"
    write_pictures(root, ["b/z.JPG", "a.b.jpg", "a.png", "b/alone.jpg", ".hidden.jpg", ".git/x.jpg"])
    captions = {"b/z.txt": "z", "a.b.txt": "dotted", "a.txt": "A", ".hidden.txt": "h", ".git/x.txt": "x"}
    for name, text in captions.items():
        (root / name).write_text(text)
    (root / "a.json").write_text('{"captions": ["one", "two"]}')
    (root / "notes.md").write_text("not a picture")
    found, reasons = everything(root)
    assert found == {"pets.v1/a.b.jpg": (1, "dotted"), "pets.v1/a.png": (2, "A"), "pets.v1/b/z.JPG": (0, "z")}
    assert reasons == {"no caption": 1}
    found, _ = everything(root, "json")
    assert found["pets.v1/a.png"] == (2, ["one", "two"])
    assert found["pets.v1/b/z.JPG"] == (0, ["z"])


def test_a_folder_of_tars_says_how_they_are_named(tmp_path, write_shard):
    write_shard(tmp_path / "tars/0.tar", 3, 0)
    with pytest.raises(ValueError, match=rf"folder: got '{tmp_path}/tars', .*{tmp_path}/tars/\*\.tar"):
        ShardSet([f"{tmp_path}/tars"])


def test_folder_whose_files_vanish(tmp_path):
    write_pictures(tmp_path / "f", ["a.jpg", "b.jpg", "c.jpg"])
    for name in "abc":
        (tmp_path / f"f/{name}.txt").write_text(name)
    shards = ShardSet([str(tmp_path / "f")])
    (tmp_path / "f/a.jpg").unlink()
    (tmp_path / "f/b.txt").unlink()
    for index, reason in enumerate(["no image", "no caption"]):
        with pytest.raises(BadSampleError, match=reason):
            shards.read(index)
    assert shards.read(2).text == b"c"
    (tmp_path / "g").mkdir()
    with pytest.raises(ValueError, match="at least one sample"):
        ShardSet([str(tmp_path / "g")])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_folder_with_metadata(tmp_path, kind):
    write_pictures(tmp_path / "f", ["a.jpg", "sub/b.jpg", "unlisted.jpg"])
    rows = [("a.jpg", "first, with comma"), ("sub/b.jpg", "second"), ("gone.jpg", "third")]
    if kind == "csv":
        with open(tmp_path / "f/metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), *rows])
    else:
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
        (tmp_path / "f/metadata.jsonl").write_text("\n".join([*lines, "", "{damaged", "7"]))
    found, reasons = everything(tmp_path / "f")
    assert found == {"f/00000000": (0, "first, with comma"), "f/00000001": (1, "second")}
    assert reasons == {"no image": 1, **({"record cannot be read": 2} if kind == "jsonl" else {})}


# Pictures alone


def alone(path, suffix=""):
    """{key: picture's number} where no captions are wanted, and the reasons of what is left out."""
    shards = ShardSet([f"{path}{suffix}"], caption="none")
    read = [shards.read(index) for index in range(len(shards))]
    assert all(sample.text is None and sample.json is None for sample in read)
    return {sample.key: PICTURES.index(sample.image) for sample in read}, dict(shards.skipped)


def test_pictures_alone_from_every_format(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    write_pictures(tmp_path / "f", ["a.jpg", "sub/b.jpg", "c.jpg", "images/AB/012.jpg"])
    (tmp_path / "f/c.txt").write_text("a caption")
    assert alone(tmp_path / "f") == ({"f/a.jpg": 0, "f/c.jpg": 2, "f/images/AB/012.jpg": 3, "f/sub/b.jpg": 1}, {})

    write_members(
        tmp_path / "t.tar",
        {"one": {"jpg": PICTURES[1]}, "two": {"txt": b"no picture"}, "three": {"txt": b"x", "jpg": PICTURES[3]}},
    )
    assert alone(tmp_path / "t.tar") == ({"t/one": 1, "t/three": 3}, {})

    (tmp_path / "d.csv").write_text("filepath,size\nf/a.jpg,7\nf/gone.jpg,8\nf/c.jpg,9\n")
    assert alone(tmp_path / "d.csv") == ({"d/00000000": 0, "d/00000002": 2}, {"no image": 1})
    (tmp_path / "l.jsonl").write_text('{"file_name": "f/c.jpg"}\n{"file_name": "f/a.jpg", "caption": ""}\n')
    assert alone(tmp_path / "l.jsonl") == ({"l/00000000": 2, "l/00000001": 0}, {})
    (tmp_path / "coco.json").write_text(
        json.dumps({"images": [{"id": 5, "file_name": "f/a.jpg"}], "annotations": [{"image_id": 6, "caption": "x"}]})
    )
    assert alone(tmp_path / "coco.json") == ({"coco/5": 0}, {})
    for name, column in (("inside", [PICTURES[4], PICTURES[5]]), ("beside", ["f/c.jpg", "f/a.jpg"])):
        parquet.write_table(pyarrow.table({"image": column}), tmp_path / f"{name}.parquet")
    assert alone(tmp_path / "inside.parquet") == ({"inside/00000000": 4, "inside/00000001": 5}, {})
    assert alone(tmp_path / "beside.parquet") == ({"beside/00000000": 2, "beside/00000001": 0}, {})


# CSV


def test_open_clip_csv_with_tabs_and_every_damage(tmp_path):
    write_pictures(tmp_path, ["p/a.jpg", "p/ü b.jpg", "c.jpg"])
    lines = [
        "id\tfilepath\ttitle",
        "0\tp/a.jpg\ta cat, really",
        '1\tp/ü b.jpg\t"quoted ""tab\t"""',
        "2\tp/missing.jpg\tgone",
        "3\tc.jpg\t",
        "4\tc.jpg",
        "",
        "5",
        f"6\t{tmp_path}/c.jpg\tabsolute",
        "7\tp/a.jpg\tthe same picture again",
        "8\tp/\0.jpg\tzero byte",
    ]
    (tmp_path / "data.csv").write_bytes("\r\n".join(lines).encode() + b"\r\n9\tc.jpg\tnot \xff unicode\r\n")
    found, reasons = everything(tmp_path / "data.csv")
    assert found == {
        "data/00000000": (0, "a cat, really"),
        "data/00000001": (1, 'quoted "tab\t"'),
        "data/00000007": (2, "absolute"),
        "data/00000008": (0, "the same picture again"),
    }
    assert reasons == {"no image": 3, "empty caption": 1, "no caption": 1, "caption not UTF-8": 1}
    assert everything(tmp_path / "data.csv", "json")[0]["data/00000007"] == (2, ["absolute"])


def test_csv_columns_may_be_named_and_pictures_be_elsewhere(tmp_path):
    write_pictures(tmp_path / "else", ["a.jpg"])
    (tmp_path / "t.tsv").write_text("\ufeffwhere,what\na.jpg,it\n")
    with pytest.raises(ValueError, match=r"t\.tsv .*columns: got \['where', 'what'\], .*\?image_column=NAME"):
        ShardSet([str(tmp_path / "t.tsv")])
    query = f"{tmp_path}/t.tsv?images={tmp_path}/else&image_column=where&caption_column=what"
    assert everything(query)[0] == {"t/00000000": (0, "it")}
    with pytest.raises(ValueError, match=r"image_column: got 'nope', expected one of the columns"):
        ShardSet([query.replace("=where", "=nope")])


def test_options_are_checked(tmp_path, write_shard):
    write_pictures(tmp_path, ["a.jpg"])
    (tmp_path / "t.csv").write_text("filepath,title\na.jpg,it\n")
    write_shard(tmp_path / "s0.tar", 2, 0)
    with pytest.raises(ValueError, match=r"option: got 'Images', expected one of images, image_column, caption_column"):
        ShardSet([f"{tmp_path}/t.csv?Images=x"])
    with pytest.raises(ValueError, match=r"option: got 'images', expected one of index"):
        ShardSet([f"{tmp_path}/s0.tar?images=x"])
    with pytest.raises(ValueError, match=r"images: got 'nowhere', expected an existing folder"):
        ShardSet([f"{tmp_path}/t.csv?images=nowhere"])
    assert len(ShardSet([f"{tmp_path}/s?.tar"])) == 2  # a question mark is a glob's all the same
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"format: got 'x\.zip', expected a folder, or a file ending in \.tar, "):
        ShardSet([f"{tmp_path}/x.zip"])


def test_no_csv_is_an_error_with_its_line(tmp_path):
    (tmp_path / "t.csv").write_text("")
    with pytest.raises(ValueError, match=r"t\.csv .*columns: got \[\]"):
        ShardSet([f"{tmp_path}/t.csv"])
    (tmp_path / "t.csv").write_text('filepath,title\na.jpg,"never closed\n' + "b.jpg,x\n" * 30000)
    with pytest.raises(ValueError, match=r"t\.csv .*line \d+: field larger"):
        ShardSet([f"{tmp_path}/t.csv"])


# Object arrays


def test_npy_by_id_and_by_name(tmp_path):
    write_pictures(tmp_path / "cc3m_images", ["7.jpg", "x/8.png", "9", "10.jpg"])
    records = [
        {"image_id": 7, "captions": ["", "seven", "VII"]},
        {"image_name": np.str_("x/8.png"), "captions": np.array(["eight"])},
        {"image_id": "9", "captions": ("nine",)},
        {"image_id": np.int64(7), "captions": ["again"]},
        {"image_id": 404, "captions": ["gone"]},
        {"image_id": 10, "captions": []},
        {"image_id": 10, "captions": [" "]},
        {"captions": ["no id"]},
        "no record",
    ]
    array = np.empty(len(records), dtype=object)
    array[:] = records
    np.save(tmp_path / "cc3m.npy", array, allow_pickle=True)
    found, reasons = everything(f"{tmp_path}/cc3m.npy?images={tmp_path}/cc3m_images")
    assert found == {"cc3m/7": (0, "seven"), "cc3m/x/8.png": (1, "eight"), "cc3m/9": (2, "nine")}
    assert reasons == {
        "repeated key": 1, "no image": 1, "no caption": 1, "empty caption": 1, "record cannot be read": 2,
    }  # fmt: skip
    found, _ = everything(f"{tmp_path}/cc3m.npy?images={tmp_path}/cc3m_images", "json")
    assert found["cc3m/7"] == (0, ["seven", "VII"])


# JSON


def test_coco_captions(tmp_path):
    write_pictures(tmp_path / "images", ["one.jpg", "two.jpg", "three.jpg"])
    value = {
        "images": [
            {"id": 1, "file_name": "one.jpg"},
            {"id": 2, "file_name": "two.jpg"},
            {"id": 1, "file_name": "three.jpg"},
            {"id": 3, "file_name": "three.jpg"},
            {"id": 4, "file_name": "gone.jpg"},
            {"file_name": "three.jpg"},
        ],
        "annotations": [
            {"image_id": 1, "id": 0, "caption": "first"},
            {"image_id": 2, "id": 1, "caption": "other\n"},
            {"image_id": 1, "id": 2, "caption": "second \ud800"},
            {"image_id": 1, "id": 3, "caption": "third"},
            {"image_id": 4, "id": 4, "caption": "gone"},
            None,
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(value))
    found, reasons = everything(tmp_path / "captions.json", "json")
    assert found == {"captions/1": (0, ["first", "third"]), "captions/2": (1, ["other"])}
    assert reasons == {"repeated key": 1, "no caption": 1, "no image": 1, "record cannot be read": 1}
    assert everything(tmp_path / "captions.json")[0]["captions/1"] == (0, "first")


def test_redcaps(tmp_path):
    write_pictures(tmp_path / "images", ["cats/abc1.jpg", "itookapicture/abc2.jpg"])
    value = {
        "info": {"version": "1"},
        "annotations": [
            {"image_id": "abc1", "subreddit": "cats", "caption": "a cat", "raw_caption": "A Cat!"},
            {"image_id": "abc2", "subreddit": "itookapicture", "caption": "a view"},
            {"image_id": "abc3", "subreddit": "cats", "caption": "deleted"},
            {"image_id": "abc1", "subreddit": "cats", "caption": "twice"},
            {"subreddit": "cats"},
        ],
    }
    (tmp_path / "cats_2017.json").write_text(json.dumps(value))
    found, reasons = everything(tmp_path / "cats_2017.json")
    assert found == {"cats_2017/abc1": (0, "a cat"), "cats_2017/abc2": (1, "a view")}
    assert reasons == {"no image": 1, "repeated key": 1, "record cannot be read": 1}


def test_json_records_and_lines(tmp_path):
    write_pictures(tmp_path, ["a.jpg", "b.jpg"])
    records = [{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": "b"}, {"image": "b.jpg"}, 3]
    (tmp_path / "r.json").write_text(json.dumps(records))
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, records)))
    for name in ("r.json", "l.jsonl"):
        found, reasons = everything(tmp_path / name, "json")
        assert found == {f"{name[0]}/00000000": (0, ["one", "two"]), f"{name[0]}/00000001": (1, ["b"])}
        assert reasons == {"no caption": 1, "record cannot be read": 1}


@pytest.mark.parametrize("text", ["", "{", '{"images": []}', "7", "[" * 100_000])
def test_other_json_is_an_error_with_its_path(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        ShardSet([str(tmp_path / "x.json")])


# YFCC


def write_yfcc(folder, members, compression=zipfile.ZIP_STORED):
    for name, names in members.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.comment = b"comment 001.jpg"
            for number in names:
                archive.writestr(f"{number:03d}.jpg", PICTURES[number])


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_yfcc_zips(tmp_path, compression):
    write_yfcc(tmp_path / "images", {"00/000.zip": [0, 3], "12/345.zip": [1]}, compression)
    rows = [
        (3, "title", "description"),
        (np.int64(12345001), "", "only a description"),
        ("00000000", "  ", ""),
        (0, "zero", None),
        (3, "again", "x"),
        (12345002, "not in the zip", ""),
        (99000000, "no such zip", ""),
        (10**8, "too large", ""),
        ("three", "no number", ""),
        None,
    ]
    (tmp_path / "yfcc15m.pkl").write_bytes(pickle.dumps(rows))
    found, reasons = everything(tmp_path / "yfcc15m.pkl")
    assert found == {
        "yfcc15m/00000003": (3, "title"),
        "yfcc15m/12345001": (1, "only a description"),
        "yfcc15m/00000000": (0, "zero"),
    }
    assert reasons == {"empty caption": 1, "repeated key": 1, "no image": 2, "record cannot be read": 3}
    found, _ = everything(f"{tmp_path}/yfcc15m.pkl?images={tmp_path}/images", "json")
    assert found["yfcc15m/00000003"] == (3, ["title", "description"])


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_zips_are_their_samples_problem(tmp_path, compression):
    write_yfcc(tmp_path, {f"00/00{n}.zip": [0, 1, 2] for n in range(5)}, compression)
    (tmp_path / "y.pkl").write_bytes(pickle.dumps([(1000 * n + i, "t", "") for n in range(5) for i in range(3)]))
    whole = (tmp_path / "00/000.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "00/000.zip") as archive:
        second = archive.getinfo("001.jpg").header_offset
    for at in range(second, second + 300, 7):  # one byte anywhere in a member: header, name or data
        changed = bytearray(whole)
        changed[at] ^= 0x5A
        (tmp_path / "00/001.zip").write_bytes(changed)
        found, reasons = everything(tmp_path / "y.pkl")
        assert [found[f"y/{1000 + n:08d}"] for n in (0, 2)] == [(0, "t"), (2, "t")]
        assert found.get("y/00001001", (1, "t")) == (1, "t")
        assert "y/00001001" in found or sum(reasons.values()) == 1
    (tmp_path / "00/002.zip").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "00/003.zip").write_bytes(b"")
    (tmp_path / "00/004.zip").write_bytes(b"PK\5\6" + b"\xff" * 40)
    found, reasons = everything(tmp_path / "y.pkl")
    assert {key for key in found if key >= "y/00002"} == set()
    assert reasons["zip cannot be read"] == 9


def test_zips_behind_other_bytes_and_with_large_directories(tmp_path):
    (tmp_path / "00").mkdir()
    path = tmp_path / "00/000.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(1000):
            info = zipfile.ZipInfo(f"{number:03d}.jpg")
            info.comment = b"c" * 300  # a directory beyond the part of the file that is read at first
            archive.writestr(info, PICTURES[number % 6])
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    (tmp_path / "y.pkl").write_bytes(pickle.dumps([(n, "t", "") for n in (0, 500, 999)]))
    found, reasons = everything(tmp_path / "y.pkl")
    assert [number for number, _ in found.values()] == [0, 2, 3]
    assert not reasons


# Parquet


def write_parquet(path, columns, **options):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path, **options)


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary", "path", "struct of paths"])
def test_parquet_of_every_kind(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    write_pictures(tmp_path, [f"p/{i}.jpg" for i in range(5)])
    names = [f"p/{i}.jpg" for i in range(5)]
    images = {
        "struct": [{"bytes": PICTURES[i], "path": None} for i in range(5)],
        "binary": PICTURES[:5],
        "large_binary": pa.array(PICTURES[:5], pa.large_binary()),
        "path": names,
        "struct of paths": pa.array(
            [{"bytes": None, "path": name} for name in names],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
    }[kind]
    write_parquet(
        tmp_path / "one.parquet", {"n": range(5), "image": images, "caption": list("abcde")}, row_group_size=2
    )
    several = [["a", "A"], ["b"], [], None, ["", "e"]]
    write_parquet(tmp_path / "list.parquet", {"image": images, "captions": several}, row_group_size=2)
    found, reasons = everything(tmp_path / "one.parquet")
    assert found == {f"one/{i:08d}": (i, text) for i, text in enumerate("abcde")}
    assert not reasons
    found, reasons = everything(tmp_path / "list.parquet", "json")
    assert found == {"list/00000000": (0, ["a", "A"]), "list/00000001": (1, ["b"]), "list/00000004": (4, ["e"])}
    assert reasons == {"no caption": 2}


def test_parquet_without_pictures_or_with_a_strange_column(tmp_path):
    images = [
        {"bytes": PICTURES[0], "path": None},
        {"bytes": None, "path": "gone.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    write_parquet(tmp_path / "x.parquet", {"image": images, "text": list("abcd")})
    found, reasons = everything(tmp_path / "x.parquet")
    assert found == {"x/00000000": (0, "a")}
    assert reasons == {"no image": 3}
    write_parquet(tmp_path / "x.parquet", {"image": [1, 2], "text": ["a", "b"]})
    with pytest.raises(ValueError, match=r"column image: got 'int64', expected binary, a struct with bytes, or paths"):
        ShardSet([f"{tmp_path}/x.parquet"])


def test_damaged_parquet(tmp_path):
    columns = {"image": [bytes(np.random.default_rng(i).bytes(5000)) for i in range(40)], "caption": ["c"] * 40}
    write_parquet(tmp_path / "x.parquet", columns, row_group_size=10, compression="none")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"x\.parquet \(pattern .*\) cannot be read"):
        ShardSet([f"{tmp_path}/x.parquet"])
    (tmp_path / "x.parquet").write_bytes(whole)
    shards = ShardSet([f"{tmp_path}/x.parquet"])
    (tmp_path / "x.parquet").write_bytes(whole[:60_000])  # cut while in use: the first row group is still whole
    assert shards.read(3).image == columns["image"][3]
    for _ in range(2):
        with pytest.raises(BadSampleError, match="row group cannot be read"):
            shards.read(25)


def test_a_shuffled_epoch_of_parquet_decodes_row_groups_about_once(tmp_path, monkeypatch, write_shard):
    parquet = pytest.importorskip("pyarrow.parquet")
    for part in range(2):
        images = [b"%d" % (part * 500 + i) for i in range(500)]
        write_parquet(tmp_path / f"{part}.parquet", {"image": images, "caption": ["c"] * 500}, row_group_size=10)
    write_shard(tmp_path / "s.tar", 100, 0)
    shards = ShardSet([f"{tmp_path}/*.parquet", f"{tmp_path}/s.tar"], weights=[2, 1])
    order = shards.epoch_order(1, 0, shuffle=True)
    assert np.array_equal(np.bincount(order % 1100), [2] * 1000 + [1] * 100)
    assert np.array_equal(order, shards.epoch_order(1, 0, shuffle=True))
    assert not np.array_equal(order, shards.epoch_order(1, 1, shuffle=True))
    reads = []
    read = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", lambda *a, **o: reads.append(1) or read(*a, **o))
    for number in order:
        sample = shards.read(int(number))
        assert sample.key.startswith("s/") or int(sample.image) == int(number % 1100)
    assert 100 <= len(reads) <= 220  # 100 row groups shown twice, sometimes soon after; those around the end again
    places = np.flatnonzero(order % 1100 >= 1000)  # the tar's samples are everywhere
    assert np.histogram(places, bins=5, range=(0, 2100))[0].min() >= 8
