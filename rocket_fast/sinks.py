"""Where a run's records go: metrics.jsonl always; TensorBoard and W&B where ``loop.track`` asks for them."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any, Protocol

from rocket_fast.config import Tracker, TrainConfig, to_plain
from rocket_fast.errors import Failed, MissingExtra, installed, optional_import
from rocket_fast.files import write_atomically
from rocket_fast.metrics import JsonlLog


class Sink(Protocol):
    """Something that takes a run's records."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one record."""

    def close(self) -> None:
        """Write out what is held back."""


class RunLog:
    """All sinks of a run, written to at once. For the main rank only."""

    def __init__(self, config: TrainConfig, *, resume_step: int) -> None:
        folder = config.folder
        self._sinks: list[Sink] = [JsonlLog(folder / "metrics.jsonl", resume_step=resume_step)]
        if "tensorboard" in config.loop.track:
            self._sinks.append(TensorBoardSink(folder / "tensorboard", resume_step=resume_step))
        if "wandb" in config.loop.track:
            self._sinks.append(WandbSink(config))

    def write(self, record: dict[str, Any]) -> None:
        """Give the record to every sink."""
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Close all."""
        for sink in self._sinks:
            sink.close()


class TensorBoardSink:
    """Scalars in TensorBoard's event files, named as in metrics.jsonl; events of steps to be done again are hidden."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        module = optional_import("torch.utils.tensorboard", "track")
        self._writer = module.SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def write(self, record: dict[str, Any]) -> None:
        """Every number of the record."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases; one that is continued keeps its id (``wandb-id.txt`` in the run's folder).

    Project, entity and mode are wandb's own variables: ``WANDB_PROJECT`` (here rocket-fast if unset), ``WANDB_ENTITY``,
    ``WANDB_MODE`` (``offline`` needs no network).
    """

    def __init__(self, config: TrainConfig) -> None:
        wandb = optional_import("wandb", "track")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "rocket-fast"),
                name=config.name,
                id=_kept_id(config.folder / "wandb-id.txt"),
                resume="allow",
                dir=str(config.folder),
                config=to_plain(config),
            )
        except wandb.Error as error:  # no login, no network
            raise Failed(f"wandb: {error} (WANDB_MODE=offline needs neither login nor network)") from error

    def write(self, record: dict[str, Any]) -> None:
        """Every number of the record. W&B keeps the first of a step that was done again after a kill."""
        self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        """Send or write what is left."""
        self._run.finish()


def require_trackers(track: tuple[Tracker, ...]) -> None:
    """Raise ``MissingExtra`` for a tracker whose package is not installed: on every rank, before anything is built."""
    for tracker in track:
        if not installed(tracker):
            raise MissingExtra(
                f"loop.track: {tracker} is not installed; install it with: pip install 'rocket-fast[track]'"
            )


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The record's numbers, without the step itself; a dictionary in it gives ``name/key``."""
    found: dict[str, float] = {}
    for name, value in record.items():
        items = {f"{name}/{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        found |= {key: each for key, each in items.items() if isinstance(each, int | float) and key != "step"}
    return found


def _kept_id(path: Path) -> str:
    """The id in the file; a new one is written first, so that a killed start keeps it too."""
    if path.is_file() and (kept := path.read_text().strip()):
        return kept
    made = uuid.uuid4().hex[:12]
    write_atomically(path, lambda temporary: temporary.write_text(made + "\n"))
    return made
