"""Every system of the paper trains: CL2L's companions, whole runs of a tiny model."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_support import assert_same_state, final_state

from rocket_fast.config import EvalConfig, TrainConfig
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
    companion = COMPANIONS[name][0] if name in COMPANIONS else None
    model = replace(config.model, companion=companion)
    return replace(config, name=name, model=model, loop=replace(config.loop, **loop))


def logged(config: TrainConfig, key: str = "loss") -> list[float]:
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    return [record[key] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.parametrize("name", COMPANIONS)
def test_the_loss_falls_in_fifty_steps(tiny_config: TrainConfig, name: str) -> None:
    config = replace(with_companion(tiny_config, name, epochs=9), eval=EvalConfig())
    train(config)
    losses, own = (logged(config, key) for key in ("loss", COMPANIONS[name][1]))
    assert len(losses) == 54
    assert sum(losses[-6:]) < sum(losses[:6])
    assert len(set(own)) > 50, "the companion's loss moves"


def test_byolips_averaged_encoder_follows_every_step(tiny_config: TrainConfig) -> None:
    trainer = Trainer(replace(with_companion(tiny_config, "byolip"), eval=EvalConfig()))
    own, averaged = trainer.model.visual, trainer.model.momentum.visual
    expected = [parameter.detach().clone() for parameter in averaged.parameters()]
    for batch in [*trainer.loader][:3]:
        trainer.train_step(batch)
        for mean, new in zip(expected, own.parameters(), strict=True):
            mean.lerp_(new.detach(), 1 - BYOLIPConfig().momentum)
    trainer.close()
    torch.testing.assert_close([*averaged.parameters()], expected, check_stride=False)
    assert not torch.equal(expected[0], next(own.parameters()))


@pytest.mark.parametrize("name", COMPANIONS)
def test_a_run_continues_bit_for_bit(tiny_config: TrainConfig, name: str) -> None:
    """Averaged encoders, prototypes and batch statistics included."""
    whole = replace(with_companion(tiny_config, name, max_steps=7), eval=EvalConfig())
    parts = replace(whole, name="parts")
    train(whole)
    for stop in (4, 7):
        train(replace(parts, loop=replace(parts.loop, max_steps=stop)))
    assert final_state(whole)["step"] == 7
    assert_same_state(final_state(whole), final_state(parts))


class Asking(TorchDispatchMode):
    """Notes the step of everything that would make the host wait for a device, of the main thread's operations.

    What the CPU alone does is left out: its own attention and checks look at values that are at hand there, and
    micro-batches are cut while the batch is still the host's.
    """

    WAIT = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_consecutive")
    ON_THE_HOST = frozenset({"kernels/packed_attention.py", "kernels/checks.py", "rocket_fast/batch.py"})

    def __init__(self, step: Callable[[], int]) -> None:
        super().__init__()
        self.step, self.asked = step, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        lengths_unknown = name == "repeat_interleave" and kwargs.get("output_size") is None
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.WAIT or lengths_unknown or by_mask:
            files = ["/".join(Path(frame.f_code.co_filename).parts[-2:]) for frame, _ in traceback.walk_stack(None)]
            if not self.ON_THE_HOST & set(files):
                self.asked.append((self.step(), name, files[:6]))
        return function(*args, **kwargs)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("system", ["cl2l", *COMPANIONS])
def test_the_device_is_asked_for_numbers_on_log_steps_only(tiny_config: TrainConfig, system: str, accumulation: int):
    """In the steps themselves, backward and optimizer included, and between them."""
    options = {"log_every": 3, "checkpoint_every": 100, "epochs": 1, "accumulation": accumulation}
    config = replace(with_companion(tiny_config, system, **options), eval=EvalConfig())
    trainer = Trainer(config)
    with contextlib.closing(trainer), Asking(lambda: trainer.step) as asking:
        trainer.fit(type("Stop", (), {"signum": 0})())
    assert {step for step, *_ in asking.asked} == {3, 6}, [each for each in asking.asked if each[0] % 3]
