"""FSDP2 against DDP through the trainer, in real processes on gloo: same weights, half of the memory, saved in parts.

Run as a script, this file is a rank under torchrun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from rocket_fast import checkpoint, parallel, sharded
from rocket_fast.checkpoint import load_checkpoint
from rocket_fast.config import EvalConfig, TrainConfig, from_plain, to_plain
from rocket_fast.models.clip import DualEncoder
from rocket_fast.models.heads import BYOLIPConfig
from rocket_fast.models.vision import ViTConfig
from rocket_fast.trainer import Trainer, load_run, train

STEPS = 7


def held(trainer: Trainer) -> tuple[int, int]:
    """How many numbers of parameters and of AdamW's moments this rank holds, and how many there are."""
    tensors = [t for state in trainer.optimizer.state.values() for t in state.values() if t.ndim]
    tensors += list(trainer.model.parameters())
    own = sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)
    return own, sum(t.numel() for t in tensors)


def rank_main(folder: Path) -> None:
    """Train every configuration; of each, note what this rank held at the end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    fit, write, found = Trainer.fit, HuggingFaceStorageWriter.write_data, {}
    checksums, read = sharded._checksums, checkpoint._read_file

    def fit_and_measure(self: Trainer, stop: object) -> None:
        fit(self, stop)
        found[self.config.name] = held(self)

    def no_room_once(self: HuggingFaceStorageWriter, *arguments: object) -> object:
        if dist.get_rank() == 1 and "fsdp-parts" in str(self.path) and "step-00000004" in str(self.path):
            raise OSError("No space left on device")
        return write(self, *arguments)

    def no_room_at_last(folder: Path, pattern: str) -> dict[str, int]:
        if dist.get_rank() == 1 and "fsdp-stopped" in str(folder) and "step-00000002" in str(folder):
            raise OSError("No space left for the rest")
        return checksums(folder, pattern)

    def unreadable_once(path: Path, *arguments: object) -> object:
        if dist.get_rank() == 1 and "fsdp-average" in str(path) and "step-00000006" in str(path):
            raise OSError("Stale file handle")
        return read(path, *arguments)

    parallel.BACKEND = "aot_eager"
    Trainer.fit, HuggingFaceStorageWriter.write_data = fit_and_measure, no_room_once
    sharded._checksums, checkpoint._read_file = no_room_at_last, unreadable_once
    for plain in json.loads((folder / "configs.json").read_text()):
        train(from_plain(plain))
    (folder / f"held-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def launch(configs: list[TrainConfig], folder: Path) -> str:
    """What two ranks print that train these one after the other."""
    (folder / "configs.json").write_text(json.dumps([to_plain(config) for config in configs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "COLUMNS": "300"})
    assert done.returncode == 0, done.stderr[:6000]
    return done.stdout


def logged(config: TrainConfig) -> list[tuple[float, ...]]:
    """Of every step the loss, the norm of the gradients and both scales, whose gradients FSDP2 leaves to us."""
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    names = "loss", "grad_norm", "logit_scale", "h_logit_scale"
    return [tuple(record[name] for name in names) for record in map(json.loads, lines) if "loss" in record]


def assert_close(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor], precision: float = 1e-4) -> None:
    """All together: AdamW turns the rounding of a gradient that should be zero (a bias of keys) into whole steps."""
    assert weights.keys() == others.keys()
    one, other = (torch.cat([each[name].flatten().float() for name in weights]) for each in (weights, others))
    assert torch.linalg.vector_norm(one - other) < 10 * precision * torch.linalg.vector_norm(one)


def assert_alike(one: TrainConfig, other: TrainConfig, precision: float = 1e-4) -> None:
    torch.testing.assert_close(logged(one), logged(other), rtol=precision, atol=precision)
    weights = [load_file(config.folder / "weights.safetensors") for config in (one, other)]
    assert_close(*weights, precision)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@dataclass(frozen=True)
class Launched:
    """What two ranks trained: of every kind DDP's run and FSDP2's, and one of FSDP2 that was stopped and continued."""

    folder: Path
    ddp: dict[str, TrainConfig]
    fsdp: dict[str, TrainConfig]
    stopped: TrainConfig
    printed: str


def kinds(base: TrainConfig) -> dict[str, TrainConfig]:
    """Plain; in micro-batches, with a loss whose scales differ in gradients by rank; averaged; compiled, in bf16."""
    model = replace(base.model, vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2))
    loop = replace(base.loop, max_steps=STEPS, checkpoint_every=2, keep_checkpoints=3, keep_every=2)
    base = replace(base, model=model, loop=loop, optim=replace(base.optim, clip_norm=20.0))
    parts = replace(base, loss=replace(base.loss, exchange="one_sided"), eval=EvalConfig())
    byolip = replace(model, companion=BYOLIPConfig(hidden=24, out=8, predictor_hidden=24))
    return {
        "plain": base,
        "parts": replace(parts, loop=replace(loop, accumulation=2)),
        "average": replace(base, model=byolip, loop=replace(loop, weight_average=0.9)),
        "narrow": replace(base, loop=replace(loop, precision="bf16", compile="towers"), eval=EvalConfig()),
    }


def with_loop(config: TrainConfig, name: str, **changes: Any) -> TrainConfig:
    return replace(config, name=name, loop=replace(config.loop, **changes))


@pytest.fixture(scope="module")
def launched(tiny_config_in: Callable[[Path], TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("parallel")
    made = kinds(tiny_config_in(folder))
    ddp = {kind: replace(config, name=f"ddp-{kind}") for kind, config in made.items()}
    fsdp = {kind: with_loop(config, f"fsdp-{kind}", parallel="fsdp") for kind, config in made.items()}
    stopped = [with_loop(fsdp["parts"], "fsdp-stopped", max_steps=steps) for steps in (3, STEPS)]
    printed = launch([*ddp.values(), *fsdp.values(), *stopped], folder)
    return Launched(folder, ddp, fsdp, stopped[1], printed)


def test_ddp_averages_buckets_of_the_size_asked_for(tiny_config: TrainConfig, monkeypatch):
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "DistributedDataParallel", lambda model, **options: asked.append(options))
    for size in (None, 3.0):  # None: torch's own, which are of two sizes
        loop = replace(tiny_config.loop, bucket_mib=size)
        parallel.StepModel(DualEncoder(tiny_config.model), None, loop, torch.device("cpu"), torch.float32, print)
    assert [options["bucket_cap_mb"] for options in asked] == [None, 3.0]


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("kind", ["plain", "parts", "average", "narrow"])
def test_fsdp_trains_as_ddp_and_holds_half(launched: Launched, kind: str):
    assert_alike(launched.ddp[kind], launched.fsdp[kind], precision=0.02 if kind == "narrow" else 1e-4)
    for rank in (0, 1):
        numbers = json.loads((launched.folder / f"held-{rank}.json").read_text())
        own, whole = numbers[f"fsdp-{kind}"]
        assert numbers[f"ddp-{kind}"][0] == whole
        assert own < 0.52 * whole


@pytest.mark.slow
@pytest.mark.system
def test_a_rank_that_cannot_write_costs_a_checkpoint_and_leaves_no_half_of_one(launched: Launched):
    def saved(kind: str) -> list[str]:
        return sorted(path.name for path in (launched.fsdp[kind].folder / "checkpoints").iterdir())

    steps = [f"step-{step:08d}" for step in (2, 4, 6, 7)]
    assert saved("plain") == ["best", *steps]
    assert saved("parts") == [step for step in steps if "4" not in step]
    assert "step-00000004 could not be written (OSError: No space left on device)" in launched.printed
    assert "step-00000002 could not be written (No space left for the rest)" in launched.printed


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("kind", ["plain", "average"])
@pytest.mark.parametrize(("which", "step"), [("best", 6), ("last", STEPS)])
def test_parts_are_read_as_a_whole(launched: Launched, kind: str, which: Any, step: int):
    got, at = load_run(launched.fsdp[kind].folder, which, torch.device("cpu"))
    expected, _ = load_run(launched.ddp[kind].folder, which, torch.device("cpu"))
    assert at == step
    assert_close(got.state_dict(), expected.state_dict())


@pytest.mark.slow
@pytest.mark.system
def test_a_stopped_run_continues_bit_for_bit(launched: Launched):
    for shard in (1, 2):
        name = f"checkpoints/step-00000007/shard-0000{shard}-model-00001-of-00001.safetensors"
        bits = [load_file(run.folder / name) for run in (launched.fsdp["parts"], launched.stopped)]
        torch.testing.assert_close(*bits, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.system
def test_what_is_damaged_is_passed_over_and_one_process_continues_what_two_left(launched: Launched):
    """Last in this file: it changes the runs."""
    newest = launched.fsdp["average"].folder / "checkpoints/step-00000007"
    flip_a_bit(newest / "shard-00002-model-00001-of-00001.safetensors")
    with pytest.raises(RuntimeError, match="checksum of shard-00002"):
        load_checkpoint(newest)
    longer = [with_loop(runs["average"], runs["average"].name, max_steps=9) for runs in (launched.ddp, launched.fsdp)]
    printed = launch(longer, launched.folder)
    assert "step-00000007 cannot be read (the checksum of shard-00002" in printed
    assert "step-00000006 cannot be read (Stale file handle" in printed  # on one rank
    assert_alike(*longer)
    for config in longer:
        train(with_loop(config, config.name, max_steps=None))
    assert_alike(*longer)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
