"""A checkpoint that no process holds whole: a folder of safetensors files, one from each rank, and their checksums.

torch.distributed.checkpoint writes and reads the tensors, so that another number of processes can read them; through
safetensors, since its own format is read by unpickling. The rest of a checkpoint lies beside them in a file of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from rocket_fast.distributed import rank, world_size
from rocket_fast.errors import Failed
from rocket_fast.files import remove, write_atomically

_CHECKSUMS, REST = "checksums.json", "rest.pt"  # the latter has checksums of its own
_READ_BYTES = 2**24
Result = TypeVar("Result")


def tensors_of(
    modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, Tensor]:
    """All tensors of a training state by name: ``modules``' (``model.visual...``), and the optimizer's of ``model``'s
    parameters (``optimizer.visual....exp_avg``)."""
    found = {
        f"{part}.{name}": tensor for part, module in modules.items() for name, tensor in module.state_dict().items()
    }
    for name, parameter in model.named_parameters():
        found |= {f"optimizer.{name}.{key}": tensor for key, tensor in optimizer.state.get(parameter, {}).items()}
    return found


def prepare_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, names: set[str]) -> None:
    """Give a new optimizer tensors for what ``names`` lists of it, to be filled by ``read_into``."""
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        keys = [each.removeprefix(prefix) for each in names if each.startswith(prefix)]
        if keys:
            step = torch.zeros((), device=parameter.device)
            optimizer.state[parameter] = {key: step if key == "step" else torch.zeros_like(parameter) for key in keys}


class ShardedFolders:
    """How this run's ranks write and read such folders; every rank has to call every method.

    ``alone``: this process reads for itself, whatever others do.
    """

    def __init__(self, *, alone: bool = False) -> None:
        together = world_size() > 1 and not alone
        self._group: Any = dist.new_group(backend="gloo") if together else None  # of the thread that writes
        self._mesh = init_device_mesh("cpu", (world_size(),)) if together else None
        self._process = _mains(os.getpid(), self._group)
        self._whole: set[Path] = set()  # written or read by this run
        self._rank, self._ranks = (rank(), world_size()) if together else (0, 1)

    def on_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of this rank's parts in the host's memory."""
        return {name: self._on_host(tensor.detach()) for name, tensor in tensors.items()}

    def _on_host(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)  # channels_last has no place there
        local = tensor.to_local().to("cpu", copy=True)
        assert self._mesh is not None
        options: dict[str, Any] = {"run_check": False, "shape": tensor.shape, "stride": tensor.stride()}
        return DTensor.from_local(local, self._mesh, tensor.placements, **options)

    def write(self, path: Path, tensors: Mapping[str, Tensor], write_rest: Callable[[Path], object]) -> None:
        """Put a whole folder at ``path``, or none; ``tensors`` are ``on_host``'s, ``write_rest`` is the main rank's.

        Of a folder that this run has written or read before, with the same weights then, only the rest is replaced.
        Raises ``Failed`` on every rank where one of them could not write.
        """
        temporary = path.with_name(f".{path.name}.{self._process}.tmp")
        try:
            if path not in self._whole:
                self.together(lambda: self._write_own(temporary, tensors))
                sums = self.together(lambda: _checksums(temporary, f"shard-{self._rank + 1:05d}-*"))
                everyones = {name: value for each in self._everyones(sums) for name, value in each.items()}
                self.together(lambda: _finish(temporary, path, everyones, write_rest) if self._rank == 0 else None)
                self._whole.add(path)
            else:
                self.together(lambda: write_atomically(path / REST, write_rest) if self._rank == 0 else None)
        except Failed as error:
            raise Failed(f"{path} could not be written ({error})") from error
        finally:
            if self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _write_own(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        with _quiet():  # nothing that can fail on one rank may stand before this: others would wait in it
            writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(dict(tensors), storage_writer=writer, process_group=self._group, no_dist=self._group is None)

    def require_whole(self, path: Path) -> None:
        """Check the tensors' files, each rank some; raises ``Failed`` on every rank where one is damaged."""

        def check() -> None:
            expected = json.loads((path / _CHECKSUMS).read_text())
            for name in sorted(expected)[self._rank :: self._ranks]:
                if _checksum(path / name) != expected[name]:
                    raise Failed(f"the checksum of {name} is wrong")

        self.together(check)

    def read_into(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Fill ``tensors``, or this rank's parts of them; ``Failed`` on every rank where one cannot."""

        def read() -> None:
            with _quiet():
                reader = dcp.HuggingFaceStorageReader(str(path))
                dcp.load(tensors, storage_reader=reader, process_group=self._group, no_dist=self._group is None)

        self.together(read)
        self._whole.add(path)

    def together(self, act: Callable[[], Result]) -> Result:
        """What ``act`` gives; ``Failed`` on every rank, with the first one's reason, where it raises on any.

        Else those on which it does not would wait for the others.
        """
        result, reason = None, None
        try:
            result = act()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            lines = str(error).strip().splitlines()
            reason = lines[-1 if isinstance(error, CheckpointException) else 0] if lines else type(error).__name__
        reasons = [each for each in self._everyones(reason) if each is not None]
        if reasons:
            raise Failed(reasons[0])
        return cast(Result, result)

    def _everyones(self, own: Any) -> list[Any]:
        if self._group is None:
            return [own]
        gathered: list[Any] = [None] * self._ranks
        dist.all_gather_object(gathered, own, group=self._group)
        return gathered


def read_whole(path: Path, parts: tuple[str, ...] = ("model", "average")) -> dict[str, dict[str, Tensor]]:
    """On one process, without a process group: the named parts' tensors, whole, by their names there."""
    with _quiet():
        reader = dcp.HuggingFaceStorageReader(str(path))
        known = _described(reader)
        wanted = {
            name: torch.empty(kind.size, dtype=kind.properties.dtype)
            for name, kind in known.items()
            if name.split(".")[0] in parts
        }
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    found: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for name, tensor in wanted.items():
        part, _, inner = name.partition(".")
        found[part][inner] = tensor
    return found


def names_in(path: Path) -> set[str]:
    """The tensors that a folder holds."""
    return set(_described(dcp.HuggingFaceStorageReader(str(path))))


def _described(reader: Any) -> dict[str, TensorStorageMetadata]:
    return reader.read_metadata().state_dict_metadata


def _finish(temporary: Path, path: Path, sums: dict[str, int], write_rest: Callable[[Path], object]) -> None:
    """On the main rank: the rest, checksums, everything on disk, the folder in its place."""
    missing = [name for name in sums if not (temporary / name).is_file()]
    if missing:
        raise Failed(f"{missing[0]} of another process is not there: do the processes share the run's folder?")
    write_rest(temporary / REST)
    (temporary / _CHECKSUMS).write_text(json.dumps(sums, indent=1))
    for file in temporary.iterdir():
        _to_disk(file)
    _to_disk(temporary)
    if path.exists():  # a damaged one, which this run did not continue from
        remove(path)
    os.replace(temporary, path)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksums(folder: Path, pattern: str) -> dict[str, int]:
    for file in folder.glob(pattern):
        _to_disk(file)
    return {file.name: _checksum(file) for file in folder.glob(pattern)}


def _checksum(path: Path) -> int:
    """CRC-32, as the zip files of other checkpoints have it."""
    found = 0
    with open(path, "rb") as file:
        while part := file.read(_READ_BYTES):
            found = zlib.crc32(part, found)
    return found


def _mains(value: int, group: Any) -> int:
    """The main rank's."""
    values = [value]
    if group is not None:
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that one process is one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
