"""Every system of the paper trains: CL2L's companions, whole runs of a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from rocket_fast.config import TrainConfig
from rocket_fast.models.heads import (
    BarLIPConfig,
    BYOLIPConfig,
    CompanionConfig,
    SiamLIPConfig,
    SwALIPConfig,
    SwALIPPrototypesConfig,
)
from rocket_fast.trainer import Trainer, train

SIAMESE = {"hidden": 32, "out": 16, "predictor_hidden": 32}
COMPANIONS: dict[str, tuple[CompanionConfig, str]] = {
    "siamlip": (SiamLIPConfig(**SIAMESE), "siamlip_loss"),
    "siamlip, separate heads": (SiamLIPConfig(**SIAMESE, separate_local=True), "siamlip_loss"),
    "byolip": (BYOLIPConfig(**SIAMESE), "siamlip_loss"),
    "barlip": (BarLIPConfig(hidden=32, out=64), "barlip_loss"),
    "swalip": (SwALIPConfig(), "swalip_loss"),
    "swalip with prototypes": (SwALIPPrototypesConfig(prototypes=24), "swalip_loss"),
}


def with_companion(config: TrainConfig, name: str, **loop: object) -> TrainConfig:
    model = replace(config.model, companion=COMPANIONS[name][0])
    return replace(config, name=name, model=model, loop=replace(config.loop, **loop))


@pytest.mark.parametrize("name", COMPANIONS)
def test_the_loss_falls_in_fifty_steps(tiny_config: TrainConfig, name: str) -> None:
    config = with_companion(tiny_config, name, epochs=9)
    config = replace(config, eval=replace(config.eval, sets=()))
    train(config)
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    assert len(records) == 54
    losses, own = ([record[key] for record in records] for key in ("loss", COMPANIONS[name][1]))
    assert sum(losses[-6:]) < sum(losses[:6])
    assert len(set(own)) > 50, "the companion's loss moves"


@pytest.mark.parametrize("name", COMPANIONS)
def test_a_run_continues_bit_for_bit(tiny_config: TrainConfig, name: str) -> None:
    """Averaged encoders, prototypes and batch statistics included."""
    whole = with_companion(tiny_config, name, max_steps=7)
    parts = replace(whole, name="parts")
    states = []
    for config, stops in ((whole, (7,)), (parts, (4, 7))):
        for stop in stops:
            train(replace(config, loop=replace(config.loop, max_steps=stop)))
        trainer = Trainer(replace(config, loop=replace(config.loop, max_steps=7)))
        states.append((trainer.step, trainer.model.state_dict()))
        trainer.close()
    assert states[0][0] == states[1][0] == 7
    torch.testing.assert_close(states[1][1], states[0][1], rtol=0, atol=0)
