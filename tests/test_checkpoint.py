"""Checkpoints: whole or absent, the last k and the best, damage survived, no code run on reading."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from rocket_fast.checkpoint import CheckpointFolder, load_checkpoint
from rocket_fast.errors import Failed
from rocket_fast.files import write_atomically
from rocket_fast.sharded import ShardedFolders


def state(step: int) -> dict:
    return {"step": step, "model": {"weight": torch.full((3,), float(step))}}


def test_keeps_the_last_k_and_the_best(tmp_path: Path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        folder.save(state(step), best=step == 2)
    assert [path.name for path in folder.step_paths()] == ["step-00000003.pt", "step-00000004.pt"]
    assert folder.load_latest()["step"] == 4
    best = load_checkpoint(folder.best_path)
    assert best["step"] == 2
    assert torch.equal(best["model"]["weight"], torch.full((3,), 2.0))


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path):
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage", "one bit"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(tmp_path: Path, damage: str):
    told: list[str] = []
    folder = CheckpointFolder(tmp_path, keep=3, report=told.append)
    folder.save(state(1))
    folder.save(state(2))
    newest = folder.step_paths()[-1]
    whole = newest.read_bytes()
    at = whole.index(torch.full((3,), 2.0).numpy().tobytes())
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    damaged = {"truncate": whole[: len(whole) // 2], "empty": b"", "garbage": b"x" * len(whole), "one bit": flipped}
    newest.write_bytes(damaged[damage])
    assert folder.load_latest()["step"] == 1
    assert len(told) == 1
    assert newest.name in told[0]


def test_nothing_readable_is_an_error_and_nothing_at_all_is_none(tmp_path: Path):
    folder = CheckpointFolder(tmp_path, keep=1, report=lambda text: None)
    assert folder.load_latest() is None
    (tmp_path / "step-00000001.pt").write_bytes(b"")
    with pytest.raises(RuntimeError, match="none of the 1 checkpoints"):
        folder.load_latest()


def test_reading_runs_no_code(tmp_path: Path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    path = tmp_path / "step-00000001.pt"
    torch.save({"format_version": 2, "step": Attack()}, path)
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(path)
    assert not (tmp_path / "owned").exists()


def test_another_format_is_named(tmp_path: Path):
    path = tmp_path / "old.pt"
    torch.save({"format_version": 0}, path)
    with pytest.raises(ValueError, match=r"format_version of .*: got 0, expected 2"):
        load_checkpoint(path)


def test_folders_keep_the_best_of_before_where_a_better_one_cannot_be_written(tmp_path: Path, monkeypatch):
    """A step's second checkpoint, with the same weights, leaves their file as it is."""
    folder = CheckpointFolder(tmp_path, keep=1, sharded=ShardedFolders())
    weights = {"model.weight": torch.arange(6.0).view(2, 3).t()}
    folder.save({"step": 1, "score": None}, weights)
    (shard,) = (tmp_path / "step-00000001").glob("shard-*")
    written = shard.stat()
    folder.save({"step": 1, "score": 0.5}, weights, best=True)
    assert (shard.stat().st_ino, shard.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)

    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch.distributed.checkpoint.HuggingFaceStorageWriter, "write_data", full)
        with pytest.raises(Failed, match=r"step-00000002 could not be written \(OSError: No space left"):
            folder.save({"step": 2, "score": 0.6}, weights, best=True)
    assert sorted(os.listdir(tmp_path)) == ["best", "step-00000001"]
    best = load_checkpoint(folder.best_path)
    assert (best["step"], best["score"]) == (1, 0.5)
    assert torch.equal(best["model"]["weight"], weights["model.weight"])
    folder.save({"step": 2, "score": 0.6}, weights, best=True)
    assert sorted(os.listdir(tmp_path)) == ["best", "step-00000002"]
    assert load_checkpoint(folder.best_path)["score"] == 0.6
    folder.close()
