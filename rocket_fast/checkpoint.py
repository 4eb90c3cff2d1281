"""Checkpoints that survive a kill at any moment: temporary file, fsync, rename; checksums; read without running code.

A run's ``checkpoints/`` holds ``step-00001234.pt`` (the last ``keep`` of them) and ``best.pt``. A file that cannot be
read is reported and the one before it is used.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rocket_fast.errors import Failed, require
from rocket_fast.files import write_atomically

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8})\.pt")


def load_checkpoint(path: Path, *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read one checkpoint, if its checksums are right; tensors and plain values are admitted, nothing else."""
    with zipfile.ZipFile(path) as archive:  # which torch writes checksums into, and does not look at them again
        damaged = archive.testzip()
    if damaged is not None:
        raise Failed(f"{path} is damaged: the checksum of {damaged} is wrong")
    state = torch.load(path, map_location=map_location, weights_only=True)
    got = state.get("format_version") if isinstance(state, dict) else type(state).__name__
    require(got == FORMAT_VERSION, f"format_version of {path}", got, str(FORMAT_VERSION))
    return state


class CheckpointFolder:
    """The checkpoints of one run; ``report`` is told, in words, of anything the reader should know."""

    def __init__(self, folder: Path, *, keep: int, report: Callable[[str], None] = print) -> None:
        require(keep >= 1, "loop.keep_checkpoints", keep, "a number >= 1")
        self.folder, self.keep, self.report = folder, keep, report

    @property
    def best_path(self) -> Path:
        """Where the checkpoint with the best score so far lies."""
        return self.folder / "best.pt"

    def step_paths(self) -> list[Path]:
        """The regular checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*.pt") if _NAME.fullmatch(path.name))

    def save(self, state: dict[str, Any], *, best: bool = False) -> Path:
        """Write ``state`` (with its ``step``), keep the last ``keep``; ``best`` writes best.pt too.

        Raises ``Failed`` where that cannot be done: the checkpoints before are as they were.
        """
        state = {"format_version": FORMAT_VERSION, **state}
        path = self.folder / f"step-{state['step']:08d}.pt"
        for target in [path, *([self.best_path] if best else [])]:
            try:
                write_atomically(target, lambda temporary: torch.save(state, temporary))
            except (OSError, RuntimeError) as error:  # torch's writer has its own words for a full disk
                free = shutil.disk_usage(target.parent).free / 2**20 if target.parent.is_dir() else 0.0
                reason = str(error).splitlines()[0]
                raise Failed(f"{target} could not be written ({reason}; {free:.1f} MiB are free there)") from error
        for old in self.step_paths()[: -self.keep]:
            old.unlink()
        return path

    def load_latest(self, *, map_location: str | torch.device = "cpu") -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None where there is none at all.

        Raises ``Failed`` when there are checkpoints and none of them can be read: starting over silently would
        overwrite what may still be rescued.
        """
        paths = self.step_paths()
        for path in reversed(paths):
            try:
                return load_checkpoint(path, map_location=map_location)
            except Exception as error:  # any damage has the same remedy: the checkpoint before it
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.report(f"{path} cannot be read ({reason}); trying the checkpoint before it")
        if paths:
            raise Failed(f"none of the {len(paths)} checkpoints in {self.folder} can be read; move them away first")
        return None
