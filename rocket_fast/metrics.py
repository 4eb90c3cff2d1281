"""What a run says about itself: a JSONL file, and one progress bar that also tells when the data is too slow."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rocket_fast.errors import optional_import
from rocket_fast.files import write_atomically


class JsonlLog:
    """Append-only ``metrics.jsonl``, one object a line, flushed at once.

    On resume, lines of steps that will be done again are dropped, so that every step stands in the file once.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
            write_atomically(path, lambda temporary: temporary.write_text("".join(line + "\n" for line in lines)))
        self._file = open(path, "a")  # noqa: SIM115 - closed by close()

    def write(self, record: dict[str, Any]) -> None:
        """Write one record; NaN and infinities become strings, since JSON has none."""
        clean = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line torn by a kill


class Stopwatch:
    """Seconds and samples since the last reading, and the part of that time spent waiting for data."""

    def __init__(self) -> None:
        self._start, self._waited, self._samples = time.perf_counter(), 0.0, 0

    def add(self, *, waited: float, samples: int) -> None:
        """Count one step."""
        self._waited += waited
        self._samples += samples

    def read(self) -> dict[str, float]:
        """``images_per_s`` and ``data_wait`` (share of the time, 0 to 1) since the last reading; starts anew."""
        elapsed = max(1e-9, time.perf_counter() - self._start)
        figures = {"images_per_s": self._samples / elapsed, "data_wait": self._waited / elapsed}
        self.__init__()  # type: ignore[misc]
        return figures


class TrainingBar:
    """The progress bar of a run: loss, learning rate, images/s, data-wait share, time left. Silent where not main."""

    def __init__(self, total_steps: int, done: int, *, enabled: bool) -> None:
        progress = optional_import("rich.progress", "train")
        self._bar = progress.Progress(
            progress.BarColumn(bar_width=10),  # all of it fits 80 columns
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("left"),
            disable=not enabled,
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=done, figures="")

    def __enter__(self) -> TrainingBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """One step done."""
        self._bar.advance(self._task)

    def show(self, record: dict[str, Any]) -> None:
        """Put a log record's main figures beside the bar."""
        figures = (
            f"loss {record['loss']:.3f} lr {record['lr']:.1e} {record['images_per_s']:.0f} img/s "
            f"data-wait {100 * record['data_wait']:.0f}%"
        )
        self._bar.update(self._task, figures=figures)
