"""Records reach TensorBoard and W&B as they reach metrics.jsonl, across a resumption; what is missing is named."""

import json
from dataclasses import replace

import pytest

from rocket_fast import sinks
from rocket_fast.config import LoopConfig, TrainConfig
from rocket_fast.errors import MissingExtra, installed
from rocket_fast.sinks import require_trackers, scalars
from rocket_fast.trainer import train


def losses(config: TrainConfig) -> dict[int, float]:
    records = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def in_two_parts(config: TrainConfig) -> None:
    for max_steps in (3, 5):
        train(replace(config, loop=replace(config.loop, max_steps=max_steps)))


def test_numbers_alone_are_sent():
    record = {"step": 3, "loss": 1.5, "set": "test", "skipped_reasons": {"no caption": 2}, "bad": "nan"}
    assert scalars(record) == {"loss": 1.5, "skipped_reasons/no caption": 2}


def test_what_is_missing_or_unknown_is_named(monkeypatch):
    monkeypatch.setattr(sinks, "installed", lambda name: name != "wandb")
    require_trackers(("tensorboard",))
    with pytest.raises(MissingExtra, match=r"loop.track: wandb is not installed.*rocket-fast\[track\]"):
        require_trackers(("tensorboard", "wandb"))
    for wrong in (("mlflow",), ("wandb", "wandb")):
        with pytest.raises(ValueError, match=r"loop\.track: got"):
            LoopConfig(track=wrong)


@pytest.mark.skipif(not installed("tensorboard"), reason="needs the extra track")
def test_tensorboard_gets_every_record(tiny_config: TrainConfig):
    config = replace(tiny_config, loop=replace(tiny_config.loop, track=("tensorboard",)))
    in_two_parts(config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.folder / "tensorboard"))
    events.Reload()
    sent = {event.step: event.value for event in events.Scalars("loss")}
    assert sent == pytest.approx(losses(config))
    assert set(sent) == {1, 2, 3, 4, 5}
    assert {"lr", "logit_scale_raw", "images_per_s", "forward_s"} <= set(events.Tags()["scalars"])


@pytest.mark.slow
@pytest.mark.skipif(not installed("wandb"), reason="needs the extra track")
def test_wandb_offline_keeps_one_id(tiny_config: TrainConfig, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = replace(tiny_config, loop=replace(tiny_config.loop, track=("wandb",)))
    in_two_parts(config)
    kept = (config.folder / "wandb-id.txt").read_text().strip()
    files = list((config.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert {path.name for path in files} == {f"run-{kept}.wandb"}
