"""What a run says about itself: a JSONL file, where a step's time goes, and one progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

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


class StepClock:
    """Seconds of the parts of a step, without waiting for the device.

    ``mark`` is called at a step's start and after each part. It notes the host's time on the CPU; on CUDA it records an
    event in the stream, to be read by ``read`` once the device has been asked for the loss.
    """

    def __init__(self, device: torch.device, parts: tuple[str, ...] = ("forward", "backward", "optimizer")) -> None:
        self._parts, self._cuda = parts, device.type == "cuda"
        self._now: list[Any] = []
        self._steps: deque[list[Any]] = deque(maxlen=4096)  # of a longer interval the last steps stand for all

    def mark(self) -> None:
        """The step's start, or the end of its next part."""
        if self._cuda:
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._now.append(mark)
        if len(self._now) > len(self._parts):
            self._steps.append(self._now)
            self._now = []

    def read(self) -> dict[str, float]:
        """Mean seconds a step of each part since the last reading; nothing if there was no step. Starts anew."""
        steps, self._now, self._steps = list(self._steps), [], deque(maxlen=4096)
        if not steps:
            return {}
        if self._cuda:
            steps[-1][-1].synchronize()  # the last work of the step, which no number has waited for
        return {
            part: sum(self._seconds(marks[place], marks[place + 1]) for marks in steps) / len(steps)
            for place, part in enumerate(self._parts)
        }

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self._cuda else end - start


class Stopwatch:
    """Seconds, steps and samples since the last reading, and the part of that time spent waiting for data."""

    def __init__(self) -> None:
        self._start, self._waited, self._samples, self._steps = time.perf_counter(), 0.0, 0, 0

    def add(self, *, waited: float, samples: int) -> None:
        """Count one step."""
        self._waited += waited
        self._samples += samples
        self._steps += 1

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """The time that is spent within is not counted."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def read(self, parts: dict[str, float] | None = None) -> dict[str, float]:
        """``images_per_s`` and ``data_wait`` (share of the time, 0 to 1) since the last reading; starts anew.

        With ``parts``, the seconds a step that the device computed, also how a step's time divides: ``step_s`` = those
        (``forward_s`` ...) + ``data_s`` + ``other_s``. Waiting for data while the device still computes is no loss, and
        not in ``data_s``.
        """
        elapsed = max(1e-9, time.perf_counter() - self._start)
        figures = {"images_per_s": self._samples / elapsed, "data_wait": self._waited / elapsed}
        if parts and self._steps:
            step, waited = elapsed / self._steps, self._waited / self._steps
            idle = max(0.0, step - sum(parts.values()))
            figures |= {"step_s": step, "data_s": min(waited, idle)}
            figures |= {f"{part}_s": seconds for part, seconds in parts.items()}
            figures["other_s"] = idle - figures["data_s"]
        self.__init__()  # type: ignore[misc]
        return figures


def headline_figures(record: dict[str, Any], room: int) -> str:
    """A log record's figures in at most ``room`` characters; the least useful ones go first."""
    scales = [record[name] for name in ("logit_scale", "h_logit_scale") if name in record]
    candidates = {  # in the order shown
        f"loss {record['loss']:.3f}": 1,
        f"acc {record.get('clip_acc', 0):.0f}%": 5 if "clip_acc" in record else None,
        f"T {'/'.join(f'{scale:.0f}' for scale in scales)}": 6 if scales else None,
        f"{record['images_per_s']:.0f} img/s": 2,
        f"mfu {100 * record.get('mfu', 0):.0f}%": 4 if "mfu" in record else None,
        f"data {100 * record['data_wait']:.0f}%": 3,
        f"skip {record.get('skipped', 0)}": 7 if record.get("skipped") else None,
        f"lr {record['lr']:.0e}": 8,
    }
    shown: set[str] = set()
    for text, rank in sorted(candidates.items(), key=lambda item: item[1] or 0):
        if rank is not None and len(text) + sum(len(other) + 1 for other in shown) <= room:
            shown.add(text)
    return " ".join(text for text in candidates if text in shown)


class TrainingBar:
    """The progress bar of a run; silent where not ``enabled``.

    Loss, accuracy in percent, temperatures (both as the factor of the cosines), images/s, MFU where it is known, share
    of the time spent waiting for data, samples skipped, learning rate, time left: as many as the line has room for.
    """

    WIDE = 110
    """Columns from which on there is a bar beside the figures."""

    def __init__(self, total_steps: int, done: int, *, enabled: bool, console: Any = None) -> None:
        progress = optional_import("rich.progress", "train")
        console = console or optional_import("rich.console", "train").Console()
        bar = [progress.BarColumn(bar_width=10)] if console.width >= self.WIDE else []
        self._bar = progress.Progress(
            *bar,
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[figures]}", markup=False),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not enabled,
        )
        count, left, gaps = 2 * len(str(total_steps)) + 1, len("999:59:59"), 2 + len(bar)
        self._room = console.width - (10 * len(bar) + count + left + gaps)
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
        self._bar.update(self._task, figures=headline_figures(record, self._room))
