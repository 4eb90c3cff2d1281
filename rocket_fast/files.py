"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.(\d{1,9})\.tmp")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary file beside ``path``, then put it in place so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        usual = temporary.stat().st_mode
        write(temporary)
        os.chmod(temporary, usual)  # safetensors keeps its files from everybody else
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def remove(path: Path) -> None:
    """Delete a file, or a folder so that no half of it is ever there under its name."""
    if path.is_dir():
        temporary = path.with_name(f".{path.name}.removed.{os.getpid()}.tmp")
        os.replace(path, temporary)
        shutil.rmtree(temporary)
    else:
        path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files and folders that killed processes left in ``folder`` and below; not those of running ones.

    To be called before this process writes there: a file under its own number is an earlier process's (a container's
    first process always has the same number).
    """
    for path in folder.rglob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is not None and (int(match[1]) == os.getpid() or not _is_running(int(match[1]))):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as somebody else
    return True
