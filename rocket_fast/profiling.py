"""A look at a few steps with torch.profiler: a trace for chrome://tracing or Perfetto, and a table of operators."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from rocket_fast.errors import require
from rocket_fast.files import write_atomically

ROWS = 40
"""Operators in the table."""


def profile_steps(text: str) -> tuple[int, int]:
    """First and last step (both from 1, both included) of ``START:STOP``; ValueError where it is not that."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    expected = "START:STOP, two step numbers with 1 <= START <= STOP, such as 10:15"
    require(match is not None, "loop.profile", text, expected)
    assert match is not None
    start, stop = int(match[1]), int(match[2])
    require(1 <= start <= stop, "loop.profile", text, expected)
    return start, stop


class ProfileWindow:
    """Profiles the steps that ``window`` names ("START:STOP", None for none), the wait for data between them included.

    Writes ``profile-START-STOP.json`` (the trace) and ``profile-START-STOP.txt`` (the costliest operators) into
    ``folder``; a run that ends earlier writes what there is.
    """

    def __init__(self, window: str | None, folder: Path, device: torch.device, report: Callable[[str], None]) -> None:
        self._first, self._last = (0, 0) if window is None else profile_steps(window)
        self._base, self._device, self._report = folder / f"profile-{self._first}-{self._last}", device, report
        self._profile: torch.profiler.profile | None = None
        self._begun = window is None

    def before(self, step: int) -> None:
        """The step of this number is about to start."""
        if self._profile is None and self._first <= step <= self._last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile, self._begun = torch.profiler.profile(activities=activities), True
            self._profile.start()

    def after(self, step: int) -> None:
        """The step of this number is done."""
        if step == self._last:
            self.close()

    def close(self) -> None:
        """Stop and write, if steps are being profiled; say so, if none ever were."""
        if not self._begun:
            self._report(f"nothing profiled: no step of {self._first} to {self._last} was made")
            self._begun = True
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        by = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
        trace, text = self._base.with_suffix(".json"), self._base.with_suffix(".txt")
        write_atomically(trace, lambda temporary: profile.export_chrome_trace(str(temporary)))
        write_atomically(text, lambda temporary: temporary.write_text(table + "\n"))
        self._report(f"profile: {trace} (open in chrome://tracing or ui.perfetto.dev), {text}")
