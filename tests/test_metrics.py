"""The log holds every step once whatever happened, and JSON that any reader takes."""

import json
import math
from pathlib import Path

from rocket_fast.metrics import JsonlLog, Stopwatch


def test_resuming_drops_lines_of_steps_to_be_done_again_and_torn_lines(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = JsonlLog(path)
    for step in (1, 2, 3):
        log.write({"step": step})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    log = JsonlLog(path, resume_step=2)
    log.write({"step": 3, "again": True})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]


def test_non_finite_values_stay_readable(tmp_path: Path):
    log = JsonlLog(tmp_path / "log")
    log.write({"step": 1, "loss": math.nan, "acc": math.inf})
    log.close()
    assert json.loads((tmp_path / "log").read_text()) == {"step": 1, "loss": "nan", "acc": "inf"}


def test_stopwatch_counts_since_its_last_reading():
    watch = Stopwatch()
    watch.add(waited=0.0, samples=10)
    assert watch.read()["images_per_s"] > 0
    assert watch.read() == {"images_per_s": 0.0, "data_wait": 0.0}
