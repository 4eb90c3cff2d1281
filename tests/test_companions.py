"""Every system of the paper trains: CL2L's companions, whole runs of a tiny model."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_support import assert_same_state, final_state

from rocket_fast.config import EvalConfig, TrainConfig, to_plain
from rocket_fast.models.heads import (
    BarLIPConfig,
    BYOLIPConfig,
    CompanionConfig,
    SharedHeadConfig,
    SiamLIPConfig,
    SwALIPConfig,
    SwALIPPrototypesConfig,
)
from rocket_fast.models.vision import ViTConfig
from rocket_fast.presets import preset
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


def with_unpaired(config: TrainConfig, ratio: int = 4) -> TrainConfig:
    """Beside the pairs, so many samples to each, 13 pictures in a folder, and those of the test set."""
    folder = Path(config.data.train[0]).parent / "alone"
    folder.mkdir(exist_ok=True)
    for number in range(13):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    patterns = (str(folder), str(folder.parent / "test-0.tar"))
    return replace(config, data=replace(config.data, unpaired=patterns, unpaired_ratio=ratio))


RUNS = """
import json, sys
import torch.distributed as dist
from rocket_fast.config import from_plain
from rocket_fast.trainer import train

dist.init_process_group("gloo")
for line in open(sys.argv[1]):
    train(from_plain(json.loads(line)))
dist.destroy_process_group()
"""


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


@pytest.mark.parametrize("name", COMPANIONS)
def test_unpaired_pictures_are_learnt_from(tiny_config: TrainConfig, name: str) -> None:
    config = replace(with_unpaired(with_companion(tiny_config, name, epochs=9)), eval=EvalConfig())
    train(config)
    losses = logged(config, "unpaired_loss")
    assert len(losses) == 54
    assert sum(losses[-6:]) < sum(losses[:6])


def test_what_unpaired_pictures_are_skipped_is_logged(tiny_config: TrainConfig) -> None:
    config = with_unpaired(with_companion(tiny_config, "swalip", max_steps=12))
    (Path(config.data.unpaired[0]) / "5.png").write_bytes(b"no picture")
    train(replace(config, eval=EvalConfig()))
    records = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["skipped_reasons"] == {"unpaired: corrupt image": 1}  # 43 pictures, 48 of them asked for


def test_a_micro_batch_needs_two_unpaired_pictures(tiny_config: TrainConfig) -> None:
    config = with_unpaired(with_companion(tiny_config, "barlip", accumulation=4))
    with pytest.raises(ValueError, match=r"data.unpaired_ratio: got 4, expected a smaller .* 4 unpaired pictures"):
        Trainer(config)


@pytest.mark.slow
def test_the_laptops_preset_learns(tiny_config: TrainConfig) -> None:
    config = preset("demo-siamlip")
    data = replace(config.data, train=tiny_config.data.train, batch_size=8)
    loop = replace(tiny_config.loop, epochs=5, max_steps=50)
    config = replace(config, out=tiny_config.out, data=data, loop=loop, eval=EvalConfig())
    train(config)
    losses, own = logged(config), logged(config, "siamlip_loss")
    assert len(losses) == 50
    assert sum(losses[-6:]) < sum(losses[:6])
    assert sum(own[-6:]) < sum(own[:6])


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
    """Averaged encoders, prototypes, batch statistics and the place among unpaired pictures included."""
    whole = with_unpaired(replace(with_companion(tiny_config, name, max_steps=7), eval=EvalConfig()))
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


@pytest.mark.system
def test_two_processes_train_as_one_beside_unpaired_pictures(tiny_config: TrainConfig, tmp_path: Path) -> None:
    """Six steps, in micro-batches where there is no batch norm; those of eight rows magnify rounding from then on."""
    towers = replace(
        tiny_config.model,
        vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
        text=replace(tiny_config.model.text, dropout=0.0),
    )
    # Seed 0 meets a fork that rounding decides, in one process too: step 5 of BYOLIP's and of the prototypes' run.
    base = replace(tiny_config, model=towers, eval=EvalConfig(), seed=2)
    shared = replace(base, model=replace(towers, h_head=SharedHeadConfig()))
    one = [with_unpaired(with_companion(shared, "swalip", max_steps=6), 2)]
    one += [with_unpaired(with_companion(base, name, max_steps=6), 2) for name in ("byolip", "barlip")]
    one = [replace(config, name=f"one{number}") for number, config in enumerate(one)]
    two = [
        replace(config, name=f"two{number}", loop=replace(config.loop, accumulation=2 if number == 0 else 1))
        for number, config in enumerate(one)
    ]
    for config in one:
        train(config)
    script, runs = tmp_path / "runs.py", tmp_path / "runs.jsonl"
    script.write_text(RUNS)
    runs.write_text("".join(json.dumps(to_plain(config)) + "\n" for config in two))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(runs)]
    subprocess.run(launch, check=True, capture_output=True, timeout=600)
    for alone, together in zip(one, two, strict=True):
        # Losses, not weights: Adam turns the rounding in gradients that should be zero into whole steps.
        assert logged(alone) == pytest.approx(logged(together), rel=1e-5), alone.model.companion
