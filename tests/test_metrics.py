"""The log holds every step once whatever happened, and JSON that any reader takes."""

import io
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from rocket_fast import trainer
from rocket_fast.config import EvalConfig, TrainConfig
from rocket_fast.device import peak_flops
from rocket_fast.metrics import JsonlLog, StepClock, Stopwatch, TrainingBar, headline_figures
from rocket_fast.plan import cost


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


RECORD = {
    "loss": 3.21,
    "clip_acc": 12.3,
    "logit_scale": 14.3,
    "h_logit_scale": 10.0,
    "images_per_s": 21234.5,
    "mfu": 0.45,
    "data_wait": 0.03,
    "skipped": 3,
    "lr": 1e-3,
}


def rendered(width: int, record: dict, total: int = 114_720) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    with TrainingBar(total, 5, enabled=True, console=console) as bar:
        bar.show(record)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n").splitlines()
    assert all(len(line) <= width for line in lines)
    return lines[-1]


def test_the_bar_fits_its_line_and_leaves_out_the_least_useful():
    everything = ["loss 3.210", "acc 12%", "T 14/10", "21234 img/s", "mfu 45%", "data 3%", "skip 3", "lr 1e-03"]
    assert [text for text in everything if text in rendered(140, RECORD)] == everything
    assert [text for text in everything if text in rendered(80, RECORD)] == everything[:6]
    assert [text for text in everything if text in rendered(60, RECORD)] == [everything[n] for n in (0, 3, 5)]
    assert "-:--:--" in rendered(60, RECORD)
    plain = {name: RECORD[name] for name in ("loss", "images_per_s", "data_wait", "lr")}
    assert headline_figures(plain, 80) == "loss 3.210 21234 img/s data 3% lr 1e-03"
    assert headline_figures(plain, 0) == ""


def test_a_steps_time_divides_without_rest():
    watch, clock = Stopwatch(), StepClock(torch.device("cpu"))
    for _ in range(3):
        for pause in (0.01, 0.02, 0.005):
            clock.mark()
            time.sleep(pause)
        clock.mark()
        time.sleep(0.004)
        watch.add(waited=0.003, samples=1)
    figures = watch.read(clock.read())
    parts = [figures[f"{part}_s"] for part in ("data", "forward", "backward", "optimizer", "other")]
    assert sum(parts) == pytest.approx(figures["step_s"])
    assert parts[0] == pytest.approx(0.003)
    assert figures["backward_s"] > figures["forward_s"] > figures["optimizer_s"] >= 0.005
    assert clock.read() == {}
    assert set(watch.read(clock.read())) == {"images_per_s", "data_wait"}


def test_waiting_that_the_device_computes_through_is_no_loss():
    watch = Stopwatch()
    time.sleep(0.01)
    watch.add(waited=0.008, samples=1)
    figures = watch.read({"forward": 0.9})  # an asynchronous device, busy all the time
    assert figures["data_wait"] > 0
    assert (figures["data_s"], figures["other_s"]) == (0, 0)


def test_on_cuda_the_parts_come_from_events(monkeypatch):
    class Event:
        now = 0.0
        waited = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = Event.now

        def synchronize(self) -> None:
            Event.waited += 1

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    for step in (0, 1):
        for milliseconds in (10, 20, 30, 5):
            clock.mark()
            Event.now += milliseconds + 2 * step
    assert Event.waited == 0
    assert clock.read() == pytest.approx({"forward": 0.011, "backward": 0.021, "optimizer": 0.031})
    assert Event.waited == 1
    assert clock.read() == {}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Some Card", None),
    ],
)
def test_the_peak_of_known_cards(name: str, peak: float | None, monkeypatch):
    card = SimpleNamespace(name=name, total_memory=40 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_mfu_is_the_part_of_the_peak_that_the_model_uses(tiny_config: TrainConfig, monkeypatch):
    monkeypatch.setattr(trainer, "peak_flops", lambda device, dtype: 1e12)
    trainer.train(replace(tiny_config, loop=replace(tiny_config.loop, max_steps=2), eval=EvalConfig()))
    record = json.loads((tiny_config.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["mfu"] == pytest.approx(record["images_per_s"] * cost(tiny_config).training_flops / 1e12)


def test_what_is_left_out_is_nobodys_time(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    watch = Stopwatch()
    watch.add(waited=0.0, samples=8)
    now = 2.0
    with watch.left_out():
        now = 7.0
    figures = watch.read({"forward": 1.5})
    assert (figures["images_per_s"], figures["step_s"], figures["other_s"]) == (4.0, 2.0, 0.5)
