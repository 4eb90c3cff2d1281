"""Checkpoints that survive a kill at any moment: temporary file, fsync, rename; checksums; read without running code.

A run's ``checkpoints/`` holds ``step-00001234.pt`` (the last ``keep`` of them, and multiples of ``keep_every``) and
``best.pt``; under FSDP2 folders of the same names without ``.pt`` (rocket_fast/sharded.py), ``best`` being a link to
one. What cannot be read is reported and the one before it is used. They are written beside the training, from a copy.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rocket_fast.distributed import is_main
from rocket_fast.errors import Failed, require
from rocket_fast.files import remove, write_atomically
from rocket_fast.sharded import REST, ShardedFolders, names_in, read_whole

FORMAT_VERSION = 2
_NAME = re.compile(r"step-(\d{8})(\.pt)?")


def load_checkpoint(path: Path, *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read one checkpoint, if its checksums are right; tensors and plain values are admitted, nothing else.

    Earlier formats are brought up to the present one. Of a folder, the weights are put together on the CPU, and what
    AdamW keeps is left out.
    """
    if path.is_dir():
        ShardedFolders(alone=True).require_whole(path)
        return {**_read_file(path / REST, map_location), **read_whole(path)}
    return _read_file(path, map_location)


def _read_file(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # which torch writes checksums into, and does not look at them again
        damaged = archive.testzip()
    if damaged is not None:
        raise Failed(f"{path} is damaged: the checksum of {damaged} is wrong")
    state = torch.load(path, map_location=map_location, weights_only=True)
    got = state.get("format_version") if isinstance(state, dict) else type(state).__name__
    while got in _MIGRATIONS:
        state = _MIGRATIONS[got](state)
        got = state["format_version"]
    known = f"{FORMAT_VERSION}, or one of {sorted(_MIGRATIONS)} to be brought up to it"
    require(got == FORMAT_VERSION, f"format_version of {path}", got, known)
    return state


def _from_format_1(state: dict[str, Any]) -> dict[str, Any]:
    """There was no fp16, and at first no reasons were kept with the samples skipped."""
    state = {**state, "format_version": 2, "loss_scale": None}
    if isinstance(state.get("skipped"), int):
        state["skipped"] = {"reason not kept": state["skipped"]} if state["skipped"] else {}
    return state


_MIGRATIONS: dict[Any, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_format_1}


class CheckpointFolder:
    """The checkpoints of one run; ``report`` is told, in words, of anything the reader should know.

    With ``sharded``, all ranks write and read each checkpoint together and have to call the same methods; without, one
    process does.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        report: Callable[[str], None] = print,
        sharded: ShardedFolders | None = None,
    ) -> None:
        require(keep >= 1, "loop.keep_checkpoints", keep, "a number >= 1")
        self.folder, self.keep, self.keep_every, self.report = folder, keep, keep_every, report
        self.sharded = sharded
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @property
    def best_path(self) -> Path:
        """Where the checkpoint with the best score so far lies."""
        folder = self.folder / "best"
        return folder if folder.is_dir() else self.folder / "best.pt"

    def step_paths(self) -> list[Path]:
        """The regular checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name))

    def save(self, state: dict[str, Any], tensors: dict[str, Tensor] | None = None, *, best: bool = False) -> None:
        """Write ``state`` (with its ``step``) and ``tensors`` as ``begin`` does, and wait until it is done."""
        self.begin(state, tensors, best=best)
        self.wait()

    def begin(self, state: dict[str, Any], tensors: dict[str, Tensor] | None = None, *, best: bool = False) -> None:
        """Copy ``state`` (with its ``step``) to the host's memory and write it beside whatever follows.

        ``tensors``: in a sharded run, what ranks hold parts of. Keeps the last ``keep``; ``best`` keeps this one as the
        best too. Waits first for the write before, and raises what ``wait`` does.
        """
        self.wait()
        state = {"format_version": FORMAT_VERSION, **_on_host(state)}
        if self.sharded is not None:
            tensors = self.sharded.on_host(tensors or {})
        self._writing = self._writer.submit(self._write, state, tensors, best)

    def wait(self) -> None:
        """Until what ``begin`` began is on disk.

        Raises ``Failed`` where it could not be written: the checkpoints before are as they were.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and say what failed; harmless to repeat."""
        try:
            self.wait()
        except Failed as error:
            self.report(str(error))
        self._writer.shutdown()

    def _write(self, state: dict[str, Any], tensors: dict[str, Tensor] | None, best: bool) -> None:
        name = f"step-{state['step']:08d}"
        if self.sharded is not None:
            assert tensors is not None
            if best:  # first, where the weights are there: a kill in between only has the evaluation done again
                self.sharded.together(partial(self._link_best, name))
            self.sharded.write(self.folder / name, tensors, lambda path: torch.save(state, path))
            if best:
                self.sharded.together(partial(self._link_best, name))
        else:
            for target in [*([self.folder / "best.pt"] if best else []), self.folder / f"{name}.pt"]:
                _write_file(state, target)
        if self.sharded is None or is_main():
            self._remove_old()

    def _link_best(self, name: str) -> None:
        """On the main rank: have ``best`` lead to this checkpoint, if it is there, whatever it led to before."""
        if not is_main() or not (self.folder / name).is_dir():
            return
        temporary = self.folder / f".best.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        os.symlink(name, temporary)
        os.replace(temporary, self.folder / "best")

    def _remove_old(self) -> None:
        best = (self.folder / "best").resolve()
        for path in self.step_paths()[: -self.keep]:
            step = int(path.stem.removeprefix("step-"))
            if path.resolve() == best or (self.keep_every is not None and step % self.keep_every == 0):
                continue
            try:
                remove(path)
            except OSError as error:  # of no importance to the run
                self.report(f"{path} could not be removed ({error})")

    def load_latest(
        self,
        *,
        map_location: str | torch.device = "cpu",
        tensors: Callable[[set[str]], dict[str, Tensor]] | None = None,
    ) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None where there is none at all.

        ``tensors``: in a sharded run, gives the tensors to be filled from their names there.

        Raises ``Failed`` when there are checkpoints and none of them can be read: starting over silently would
        overwrite what may still be rescued.
        """
        paths = self.step_paths()
        for path in reversed(paths):
            try:
                if self.sharded is None or tensors is None:
                    return load_checkpoint(path, map_location=map_location)
                self.sharded.require_whole(path)
                state, wanted = self.sharded.together(partial(_prepare, path, map_location, tensors))
                self.sharded.read_into(path, wanted)
                return state
            except torch.OutOfMemoryError:
                raise  # no damage
            except Exception as error:  # any damage has the same remedy: the checkpoint before it
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.report(f"{path} cannot be read ({reason}); trying the checkpoint before it")
        if paths:
            raise Failed(f"none of the {len(paths)} checkpoints in {self.folder} can be read; move them away first")
        return None


def _prepare(
    path: Path, map_location: str | torch.device, tensors: Callable[[set[str]], dict[str, Tensor]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a folder holds beside tensors, and the tensors to fill."""
    return _read_file(path / REST, map_location), tensors(names_in(path))


def _write_file(state: dict[str, Any], target: Path) -> None:
    try:
        write_atomically(target, lambda temporary: torch.save(state, temporary))
    except (OSError, RuntimeError) as error:  # torch's writer has its own words for a full disk
        free = shutil.disk_usage(target.parent).free / 2**20 if target.parent.is_dir() else 0.0
        reason = str(error).splitlines()[0]
        raise Failed(f"{target} could not be written ({reason}; {free:.1f} MiB are free there)") from error


def _on_host(value: Any) -> Any:
    """A copy whose tensors lie in the host's memory and stay as they are now."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_host(inner) for inner in value)
    return value
