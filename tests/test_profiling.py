"""The window of steps is understood or refused; a run writes a trace that is JSON and a table that names operators."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rocket_fast.config import LoopConfig, TrainConfig
from rocket_fast.profiling import ProfileWindow, profile_steps
from rocket_fast.trainer import train


def test_a_window_is_two_step_numbers():
    assert profile_steps("10:15") == (10, 15)
    assert profile_steps("3:3") == (3, 3)
    for wrong in ("10", "10:", "15:10", "0:3", "-1:3", "a:b", "10:15:2", "1.5:2"):
        with pytest.raises(ValueError, match=f"loop.profile: got '{wrong}', expected START:STOP"):
            LoopConfig(profile=wrong)


def test_a_window_beyond_the_run_is_said(tmp_path: Path):
    told: list[str] = []
    window = ProfileWindow("10:15", tmp_path, torch.device("cpu"), report=told.append)
    window.before(1)
    window.after(1)
    for _ in range(2):
        window.close()
    ProfileWindow(None, tmp_path, torch.device("cpu"), report=told.append).close()
    assert told == ["nothing profiled: no step of 10 to 15 was made"]


@pytest.mark.parametrize(("window", "steps"), [("2:3", 2), ("2:900", 2)], ids=["inside", "cut"])
def test_the_steps_named_are_profiled(tiny_config: TrainConfig, window: str, steps: int):
    loop = replace(tiny_config.loop, profile=window, max_steps=3)
    config = replace(tiny_config, loop=loop, eval=replace(tiny_config.eval, sets=()))
    train(config)
    base = config.folder / f"profile-{window.replace(':', '-')}"
    events = json.loads(base.with_suffix(".json").read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step") for event in events) == steps
    table = base.with_suffix(".txt").read_text()
    assert "aten::mm" in table or "aten::addmm" in table
    assert "Self CPU time total" in table
