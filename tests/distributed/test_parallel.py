"""FSDP2 against DDP through the trainer, in real processes on gloo: same weights, half of the memory, saved in parts.

Run as a script, this file is a rank under torchrun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from rocket_fast import checkpoint, parallel, sharded
from rocket_fast.checkpoint import load_checkpoint
from rocket_fast.config import EvalConfig, TrainConfig, from_plain, to_plain
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


@pytest.mark.slow
@pytest.mark.system
def test_fsdp_trains_as_ddp_and_keeps_checkpoints_in_parts(tiny_config: TrainConfig, tmp_path: Path):
    vision = ViTConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2)
    model = replace(tiny_config.model, vision=vision)
    loop = replace(tiny_config.loop, max_steps=STEPS, checkpoint_every=2, keep_checkpoints=3, keep_every=2)
    base = replace(tiny_config, model=model, loop=loop, optim=replace(tiny_config.optim, clip_norm=20.0))
    kinds = {
        "plain": base,
        "parts": replace(
            base,
            loop=replace(loop, accumulation=2),
            loss=replace(base.loss, exchange="one_sided"),
            eval=EvalConfig(),
        ),
        "average": replace(
            base,
            model=replace(model, companion=BYOLIPConfig(hidden=24, out=8, predictor_hidden=24)),
            loop=replace(loop, weight_average=0.9),
        ),
        "narrow": replace(base, loop=replace(loop, precision="bf16", compile="towers"), eval=EvalConfig()),
    }
    ddp = {kind: replace(config, name=f"ddp-{kind}") for kind, config in kinds.items()}
    fsdp = {
        kind: replace(config, name=f"fsdp-{kind}", loop=replace(config.loop, parallel="fsdp"))
        for kind, config in kinds.items()
    }
    stopped = [
        replace(fsdp["parts"], name="fsdp-stopped", loop=replace(fsdp["parts"].loop, max_steps=steps))
        for steps in (3, STEPS)
    ]
    printed = launch([*ddp.values(), *fsdp.values(), *stopped], tmp_path)
    for kind in kinds:
        assert_alike(ddp[kind], fsdp[kind], precision=0.02 if kind == "narrow" else 1e-4)
    for rank in (0, 1):
        numbers = json.loads((tmp_path / f"held-{rank}.json").read_text())
        for kind in kinds:
            own, whole = numbers[f"fsdp-{kind}"]
            assert numbers[f"ddp-{kind}"][0] == whole
            assert own < 0.52 * whole

    def saved(kind: str) -> list[str]:
        return sorted(path.name for path in (fsdp[kind].folder / "checkpoints").iterdir())

    steps = [f"step-{step:08d}" for step in (2, 4, 6, 7)]
    assert saved("plain") == ["best", *steps]
    assert saved("parts") == [step for step in steps if "4" not in step]  # and no half of one
    assert "step-00000004 could not be written (OSError: No space left on device)" in printed
    assert "step-00000002 could not be written (No space left for the rest)" in printed
    for kind in ("plain", "average"):
        for which, step in (("best", 6), ("last", STEPS)):
            got, at = load_run(fsdp[kind].folder, which, torch.device("cpu"))
            expected, _ = load_run(ddp[kind].folder, which, torch.device("cpu"))
            assert at == step
            assert_close(got.state_dict(), expected.state_dict())

    for shard in ("shard-00001-model-00001-of-00001", "shard-00002-model-00001-of-00001"):
        bits = [
            load_file(run.folder / f"checkpoints/step-00000007/{shard}.safetensors")
            for run in (fsdp["parts"], stopped[0])
        ]
        torch.testing.assert_close(*bits, rtol=0, atol=0)

    flip_a_bit(fsdp["average"].folder / "checkpoints/step-00000007/shard-00002-model-00001-of-00001.safetensors")
    with pytest.raises(RuntimeError, match="checksum of shard-00002"):
        load_checkpoint(fsdp["average"].folder / "checkpoints/step-00000007")
    longer = {
        name: replace(config, loop=replace(config.loop, max_steps=9))
        for name, config in (("ddp", ddp["average"]), ("fsdp", fsdp["average"]))
    }
    printed = launch(list(longer.values()), tmp_path)
    assert "step-00000007 cannot be read (the checksum of shard-00002" in printed
    assert "step-00000006 cannot be read (Stale file handle" in printed  # on one rank
    assert_alike(*longer.values())
    for config in longer.values():  # one process goes on with what two have left
        train(replace(config, loop=replace(config.loop, max_steps=None)))
    assert_alike(*longer.values())


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
