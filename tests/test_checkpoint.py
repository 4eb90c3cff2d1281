"""Checkpoints: whole or absent, the last k and the best, damage survived, no code run on reading."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from rocket_fast.checkpoint import CheckpointFolder, load_checkpoint
from rocket_fast.files import write_atomically


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
