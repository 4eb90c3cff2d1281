"""What the tests of training share: what a run left, and that two left the same."""

import json

import torch

from rocket_fast.checkpoint import CheckpointFolder
from rocket_fast.config import TrainConfig


def final_state(config: TrainConfig) -> dict:
    state = CheckpointFolder(config.folder / "checkpoints", keep=9).load_latest()
    assert state is not None
    return state


def assert_same_state(one: dict, other: dict) -> None:
    assert one["step"] == other["step"]
    for part in ("model", "average"):
        if one[part] is not None:
            torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    torch.testing.assert_close(one["optimizer"]["state"], other["optimizer"]["state"], rtol=0, atol=0)
    for part in ("loader", "best_top1", "measured_step", "skipped"):
        assert one[part] == other[part], part


def records(config: TrainConfig) -> list[dict]:
    return [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
