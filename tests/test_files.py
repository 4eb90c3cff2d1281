"""Files are there whole or not at all, also after a kill."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rocket_fast.files import remove, remove_leftovers, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "new" / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_files_are_as_open_to_others_as_any(tmp_path: Path):
    """However narrow the writer leaves them."""

    def narrow(temporary: Path) -> None:
        temporary.write_text("text")
        temporary.chmod(0o600)

    write_atomically(tmp_path / "ours", narrow)
    (tmp_path / "any").write_text("text")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_leftovers_of_dead_processes_go_and_everything_else_stays(tmp_path: Path):
    script = """
import os, signal, sys
from pathlib import Path
from rocket_fast.files import write_atomically
def killed(temporary):
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), killed)
"""
    saved = tmp_path / "checkpoints" / "step-00000001.pt"
    died = subprocess.Popen([sys.executable, "-c", script, str(saved)])
    died.wait()
    leftover = saved.with_name(f".{saved.name}.{died.pid}.tmp")
    own = tmp_path / f".eval.json.{os.getpid()}.tmp"
    others = [
        tmp_path / f".eval.json.{os.getppid()}.tmp",  # a running process's
        tmp_path / f"eval.json.{died.pid}.tmp",
        tmp_path / ".eval.json.tmp",
        tmp_path / f".eval.json.{died.pid}.tmp.png",
    ]
    for path in (own, *others):
        path.write_text("x")
    assert leftover.exists()
    remove_leftovers(tmp_path)
    assert not leftover.exists()
    assert not own.exists()
    assert all(path.exists() for path in others)
    remove_leftovers(tmp_path / "nowhere")


def test_a_folder_is_gone_from_its_name_before_anything_in_it(tmp_path: Path, monkeypatch):
    folder, file = tmp_path / "step-00000002", tmp_path / "step-00000004.pt"
    folder.mkdir()
    (folder / "part").touch()
    file.touch()
    remove(file)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(folder)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".step-00000002")
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
