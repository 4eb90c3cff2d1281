"""The loop: it learns, stops, continues bit for bit, and tells what went wrong. Real files, processes and signals."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model

from rocket_fast.checkpoint import CheckpointFolder, load_checkpoint
from rocket_fast.config import EvalConfig, TrainConfig, to_plain
from rocket_fast.errors import Failed
from rocket_fast.evaluation import Evaluator
from rocket_fast.image_augment import plain_augment
from rocket_fast.loaders.sources import webdataset
from rocket_fast.models.clip import DualEncoder
from rocket_fast.models.heads import (
    BarLIPConfig,
    BYOLIPConfig,
    SharedHeadConfig,
    SiamLIPConfig,
    SwALIPConfig,
    SwALIPPrototypesConfig,
)
from rocket_fast.models.vision import ViTConfig
from rocket_fast.trainer import Interrupted, NonFiniteLoss, Trainer, _StopRequest, train

RUN = """
import json, sys
from rocket_fast.config import from_plain
from rocket_fast.__main__ import main
from rocket_fast import trainer, presets
presets.PRESETS["tiny"] = lambda: from_plain(json.load(open(sys.argv[1])))
sys.exit(main(["train", "--preset", "tiny"]))
"""


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


def test_trains_evaluates_and_leaves_a_full_record(tiny_config: TrainConfig):
    config = replace(tiny_config, loop=replace(tiny_config.loop, epochs=12))
    result = train(config)
    assert result.step == 72
    steps = [r for r in records(config) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 73))
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    for record in steps:
        parts = [record[f"{part}_s"] for part in ("data", "forward", "backward", "optimizer", "other")]
        assert sum(parts) == pytest.approx(record["step_s"])
        assert min(parts[1:4]) > 0
        for scale in ("logit_scale", "h_logit_scale"):
            assert math.exp(record[f"{scale}_raw"]) == pytest.approx(record[scale])
        assert (record["skipped"], record["skipped_reasons"]) == (0, {})
        assert "mfu" not in record  # nobody knows a CPU's peak
    assert {"lr", "images_per_s", "data_wait", "logit_scale", "h_logit_scale", "clip_acc", "skipped"} <= set(steps[0])
    (test,) = result.evaluation.sets
    assert test.accuracy.top1[0.5] > 3 * test.chance
    weights = DualEncoder(config.model)
    load_model(weights, config.folder / "weights.safetensors")
    torch.testing.assert_close(weights.state_dict(), final_state(config)["model"], rtol=0, atol=0)
    for name in ("config.json", "run.jsonl", "eval.json", "captions-test.png", "checkpoints/best.pt"):
        assert (config.folder / name).stat().st_size > 0, name
    assert len(list((config.folder / "checkpoints").glob("step-*.pt"))) == config.loop.keep_checkpoints


def test_what_was_skipped_is_kept_by_reason_across_a_resumption(tiny_config: TrainConfig):
    shard = next(Path(tiny_config.data.train[0]).parent.glob("train-1.tar"))
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        pictures = [member for member in tar if member.name.endswith(".png")][:5]
    for member in pictures:
        middle = member.offset_data + member.size // 2
        content = content[: member.offset_data] + b"x" * (middle - member.offset_data) + content[middle:]
    shard.write_bytes(content)
    whole, parts = replace(tiny_config, name="whole"), replace(tiny_config, name="parts")
    train(whole)
    for max_steps in (5, None):
        train(replace(parts, loop=replace(parts.loop, max_steps=max_steps)))
    counted = [[r["skipped_reasons"] for r in records(config) if "loss" in r][-1] for config in (whole, parts)]
    assert counted[0] == counted[1]
    assert 8 <= counted[0]["corrupt image"] <= 12  # five pictures in each of two epochs, which leave four samples out
    state = final_state(whole)
    torch.save({**state, "skipped": 7}, CheckpointFolder(whole.folder / "checkpoints", keep=9).step_paths()[-1])
    trainer = Trainer(whole)
    trainer.close()
    assert trainer.skipped == {"reason not kept": 7}


def test_a_shard_lost_in_an_epoch_is_retried_reported_counted_and_passed_over(tiny_config: TrainConfig, monkeypatch):
    waited: list[float] = []
    clock = types.SimpleNamespace(sleep=waited.append, monotonic=time.monotonic)
    monkeypatch.setattr(webdataset, "time", clock)
    data = replace(tiny_config.data, prefetch=0, workers=1)
    config = replace(tiny_config, data=data, loop=replace(tiny_config.loop, checkpoint_every=100))
    trainer = Trainer(config)
    step = trainer.train_step

    def lose(batch):
        if trainer.step == 2:
            (config.out.parent / "data/train-1.tar").unlink()
            trainer.loader._shards.sources[0]._files._open.clear()  # as with more shards than are kept open
        return step(batch)

    monkeypatch.setattr(trainer, "train_step", lose)
    with contextlib.closing(trainer), pytest.warns(UserWarning, match=r"train-1\.tar cannot be read") as warned:
        trainer.fit(_StopRequest())
    assert sum("cannot be read" in str(each.message) for each in warned) == 1
    assert waited[:3] == list(webdataset._WAITS)
    steps = [r for r in records(config) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert all(math.isfinite(r["loss"]) for r in steps)
    assert steps[1]["skipped_reasons"] == {}
    lost = steps[-1]["skipped_reasons"]
    assert set(lost) == {"shard cannot be read"}
    assert 40 < lost["shard cannot be read"] <= 80  # of 40, most of one epoch and all but four at most of another


def test_steps_between_records_ask_the_device_for_nothing(tiny_config: TrainConfig, monkeypatch):
    config = replace(tiny_config, loop=replace(tiny_config.loop, log_every=3, checkpoint_every=100))
    trainer = Trainer(config)
    asked: list[int] = []
    for name in ("item", "__bool__", "__float__", "tolist", "cpu"):
        real = getattr(torch.Tensor, name)

        def counted(tensor, *arguments, real=real, **options):
            if threading.current_thread() is threading.main_thread():  # the loader's threads have no device
                asked.append(trainer.step)
            return real(tensor, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)
    real_step = trainer.train_step

    def without_asking(batch):
        before = len(asked)
        output = real_step(batch)
        del asked[before:]  # on the CPU some operators ask, and nothing has to be waited for
        return output

    monkeypatch.setattr(trainer, "train_step", without_asking)
    monkeypatch.setattr(trainer, "_evaluate_if_due", lambda: None)
    trainer.fit(type("Stop", (), {"signum": 0})())
    trainer.close()
    assert set(asked) == {3, 6, 9, 12}


@pytest.mark.parametrize("weight_average", [None, 0.9])
def test_resuming_from_the_middle_of_an_epoch_is_bit_exact(tiny_config: TrainConfig, weight_average: float | None):
    tiny_config = replace(tiny_config, loop=replace(tiny_config.loop, weight_average=weight_average))
    whole = replace(tiny_config, name="whole")
    train(whole)
    parts = replace(tiny_config, name="parts")
    for max_steps in (3, 4, 9, None):
        train(replace(parts, loop=replace(parts.loop, max_steps=max_steps)))
    assert_same_state(final_state(whole), final_state(parts))
    losses = [[r["loss"] for r in records(config) if "loss" in r] for config in (whole, parts)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "companion",
    [
        SiamLIPConfig(hidden=24, out=8, predictor_hidden=24, separate_local=True),
        BYOLIPConfig(hidden=24, out=8, predictor_hidden=24),
        BarLIPConfig(hidden=24, out=12),
        SwALIPConfig(),
        SwALIPPrototypesConfig(hidden=24, out=8, prototypes=20, freeze_steps=2),
    ],
    ids=lambda companion: type(companion).__name__,
)
def test_every_companion_trains_and_resumes(tiny_config: TrainConfig, companion):
    if isinstance(companion, SwALIPPrototypesConfig):
        model = replace(tiny_config.model, h_head=None, companion=companion)
        tiny_config = replace(tiny_config, image=plain_augment(16), model=model)
    config = replace(tiny_config, model=replace(tiny_config.model, companion=companion))
    whole, parts = replace(config, name="whole"), replace(config, name="parts")
    train(whole)
    train(replace(parts, loop=replace(parts.loop, max_steps=5)))
    train(parts)
    assert_same_state(final_state(whole), final_state(parts))
    losses = [r["loss"] for r in records(whole) if "loss" in r]
    assert losses[-1] < losses[0]


def test_frozen_prototypes_do_not_move(tiny_config: TrainConfig):
    companion = SwALIPPrototypesConfig(hidden=24, out=8, prototypes=20, freeze_steps=3)
    model = replace(tiny_config.model, h_head=None, companion=companion)
    config = replace(tiny_config, image=plain_augment(16), model=model)
    trainer = Trainer(config)
    start = trainer.model.companion.image_prototypes.direction.detach().clone()
    moved = []
    for batch in trainer.loader:
        trainer.train_step(batch)
        moved.append(not torch.equal(trainer.model.companion.image_prototypes.direction, start))
    trainer.close()
    assert moved == [False] * 3 + [True] * 3


class PoisonedGradient(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


@pytest.mark.parametrize("poison", [lambda out: out * float("nan"), PoisonedGradient.apply], ids=["loss", "gradient"])
def test_what_is_not_finite_stops_with_a_dump_and_keeps_the_weights(tiny_config: TrainConfig, monkeypatch, poison):
    config = replace(tiny_config, loop=replace(tiny_config.loop, log_every=3, checkpoint_every=1))
    trainer = Trainer(config)
    weights: dict[int, dict] = {}
    real_step = trainer.train_step

    def poisoned(batch):
        weights[trainer.step] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        handle = None
        if trainer.step == 4:
            handle = trainer.model.image_z.register_forward_hook(lambda module, args, out: poison(out))
        output = real_step(batch)
        if handle is not None:
            handle.remove()
        return output

    monkeypatch.setattr(trainer, "train_step", poisoned)
    stop = type("Stop", (), {"signum": 0})()
    with pytest.raises(NonFiniteLoss, match=r"not finite at step 5.*nonfinite-rank0.json"):
        trainer.fit(stop)
    trainer.close()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, weights[4][name]), name
    dump = json.loads((config.folder / "nonfinite-rank0.json").read_text())
    assert dump["step"] == 5
    assert len(dump["keys"]) == 16
    assert [path.name for path in trainer.checkpoints.step_paths()] == ["step-00000003.pt", "step-00000004.pt"]


def test_stopping_before_a_bad_step_was_noticed_does_not_claim_to_have_saved(tiny_config: TrainConfig, monkeypatch):
    config = replace(tiny_config, loop=replace(tiny_config.loop, log_every=100, checkpoint_every=100))
    trainer = Trainer(config)
    stop = type("Stop", (), {"signum": 0})()
    real_step = trainer.train_step

    def poisoned(batch):
        trainer.model.image_z.weight.data.fill_(float("nan"))
        stop.signum = signal.SIGTERM
        return real_step(batch)

    monkeypatch.setattr(trainer, "train_step", poisoned)
    with pytest.raises(NonFiniteLoss):
        trainer.fit(stop)
    trainer.close()
    assert trainer.checkpoints.step_paths() == []


@pytest.mark.parametrize("step", [6, 12])
def test_a_stop_at_the_end_of_an_epoch_loses_no_evaluation(tiny_config: TrainConfig, step: int, monkeypatch):
    whole, stopped = replace(tiny_config, name="whole"), replace(tiny_config, name="stopped")
    train(whole)
    real_step = Trainer.train_step

    def interrupted(self, batch):
        output = real_step(self, batch)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return output

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(Interrupted):
        train(stopped)
    monkeypatch.setattr(Trainer, "train_step", real_step)
    train(stopped)
    assert_same_state(final_state(whole), final_state(stopped))
    scores = [[r for r in records(config) if "zero_shot_top1" in r] for config in (whole, stopped)]
    assert scores[0] == scores[1]
    assert [r["step"] for r in scores[0]] == [6, 12]
    best = [load_checkpoint(config.folder / "checkpoints/best.pt") for config in (whole, stopped)]
    assert_same_state(*best)


def test_a_kill_during_an_evaluation_loses_neither_steps_nor_the_evaluation(tiny_config: TrainConfig, monkeypatch):
    config = replace(tiny_config, loop=replace(tiny_config.loop, checkpoint_every=1000))

    def killed(self, model, autocast):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "top1", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert final_state(config)["step"] == 6
    train(config)
    assert [r["step"] for r in records(config) if "zero_shot_top1" in r] == [6, 12]


def test_a_dry_run_that_ends_early_picks_no_best(tiny_config: TrainConfig):
    train(replace(tiny_config, loop=replace(tiny_config.loop, max_steps=3)))
    assert not (tiny_config.folder / "checkpoints/best.pt").exists()


def test_bf16_resumes_bit_for_bit_too(tiny_config: TrainConfig):
    config = replace(tiny_config, loop=replace(tiny_config.loop, precision="bf16"))
    whole, parts = replace(config, name="whole"), replace(config, name="parts")
    train(whole)
    train(replace(parts, loop=replace(parts.loop, max_steps=5)))
    train(parts)
    assert_same_state(final_state(whole), final_state(parts))


def test_another_configuration_in_the_same_folder_is_refused(tiny_config: TrainConfig):
    train(replace(tiny_config, loop=replace(tiny_config.loop, max_steps=1)))
    with pytest.raises(ValueError, match=r"optim.lr: 0.003 -> 0.001"):
        train(replace(tiny_config, optim=replace(tiny_config.optim, lr=1e-3)))
    with pytest.raises(ValueError, match="a folder without a run in it"):
        train(tiny_config, resume=False)
    train(
        replace(
            tiny_config,
            loop=replace(tiny_config.loop, log_every=7, threads=2),
            data=replace(tiny_config.data, workers=1),
        )
    )


def test_a_finished_run_is_evaluated_again_and_not_trained(tiny_config: TrainConfig):
    first = train(tiny_config)
    before = final_state(tiny_config)
    again = train(tiny_config)
    assert_same_state(before, final_state(tiny_config))
    assert again.evaluation == first.evaluation


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop_and_the_run_continues_bit_for_bit(tiny_config: TrainConfig, signum: int, monkeypatch):
    whole = replace(tiny_config, name="whole")
    train(whole)
    real_step = Trainer.train_step

    def interrupted(self, batch):
        output = real_step(self, batch)
        if self.step == 7:
            os.kill(os.getpid(), signum)
        return output

    config = replace(tiny_config, name="stopped")
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="saved at step 7") as caught:
        train(config)
    assert caught.value.signum == signum
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert final_state(config)["step"] == 7
    monkeypatch.setattr(Trainer, "train_step", real_step)
    train(config)
    assert_same_state(final_state(whole), final_state(config))


@pytest.mark.system
@pytest.mark.slow
def test_killed_at_random_steps_the_run_ends_with_the_same_weights(tiny_config: TrainConfig, tmp_path: Path):
    loop = replace(tiny_config.loop, epochs=6, checkpoint_every=3)
    whole, killed = (replace(tiny_config, name=name, loop=loop) for name in ("whole", "killed"))
    train(whole)
    description = tmp_path / "killed.json"
    description.write_text(json.dumps(to_plain(killed)))
    rng = random.Random(time.time_ns())
    command = [sys.executable, "-c", RUN, str(description)]
    kills = [rng.randrange(2, 18), rng.randrange(18, 34)]
    for at_step in kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and _last_step(killed) < at_step:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, (kills, process.stderr.read())
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert_same_state(final_state(whole), final_state(killed))
    assert [r["step"] for r in records(killed) if "loss" in r] == list(range(1, 37)), kills


def _last_step(config: TrainConfig) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        return json.loads((config.folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    return 0


@pytest.mark.system
def test_an_interrupted_command_exits_with_128_plus_the_signal(tiny_config: TrainConfig, tmp_path: Path):
    config = replace(tiny_config, loop=replace(tiny_config.loop, epochs=500, checkpoint_every=10_000))
    description = tmp_path / "run.json"
    description.write_text(json.dumps(to_plain(config)))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(description)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and _last_step(config) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # launchers often send it twice
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped and saved at step" in errors
    assert load_checkpoint(CheckpointFolder(config.folder / "checkpoints", keep=1).step_paths()[-1])["step"] >= 3


@pytest.mark.system
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tiny_config: TrainConfig, tmp_path: Path, monkeypatch, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    config = replace(tiny_config, out=disk, eval=EvalConfig())
    filler, step = disk / "filler", Trainer.train_step

    def fill_and_free(self: Trainer, batch: object) -> object:
        if self.step == 5:
            filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - 2**15))  # leaves room for the log
        if self.step == 9:
            filler.unlink(missing_ok=True)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", fill_and_free)
    try:
        assert train(config).step == 12
        said = " ".join(capsys.readouterr().out.split())
        assert re.search(
            r"step-00000008\.pt could not be written \(.*; 0\.\d MiB are free there\); the checkpoints", said
        )
        paths = CheckpointFolder(config.folder / "checkpoints", keep=9).step_paths()
        assert [load_checkpoint(path)["step"] for path in paths] == [4, 12]
        filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - 2**20))
        with pytest.raises(Failed, match=r"step-0000000\d\.pt could not be written"):
            train(replace(config, name="last", loop=replace(config.loop, max_steps=3)))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_more_micro_batches_than_samples_allow_are_refused_at_once(tiny_config: TrainConfig):
    config = replace(tiny_config, loop=replace(tiny_config.loop, accumulation=9))
    with pytest.raises(ValueError, match=r"loop\.accumulation: got 9, expected 1, or at most 8: a process has 16"):
        train(config)
    assert not config.folder.exists()


@pytest.mark.parametrize("norm", [False, True], ids=["no batch norm", "batch norm"])
def test_micro_batches_train_as_the_whole_batch(tiny_config: TrainConfig, norm: bool):
    """To rounding without dropout and batch norm; with batch norm it is another normalisation, and training goes on."""
    model = replace(
        tiny_config.model,
        vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
        text=replace(tiny_config.model.text, dropout=0.0),
        h_head=tiny_config.model.h_head if norm else SharedHeadConfig(),
    )
    losses = []
    for parts in (1, 3):
        loop = replace(tiny_config.loop, accumulation=parts)
        config = replace(tiny_config, name=f"parts{parts}", model=model, loop=loop, eval=EvalConfig())
        train(config)
        losses.append([r["loss"] for r in records(config) if "loss" in r])
    assert losses[0] == pytest.approx(losses[1], rel=0.2 if norm else 1e-4)
    assert (losses[0] == pytest.approx(losses[1], rel=1e-4)) != norm


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("NVIDIA H100 80GB HBM3", r"the cost model expects .* what should fit: "),
        ("A card", "a smaller data.batch_size"),
    ],
)
def test_out_of_memory_says_what_would_fit(tiny_config: TrainConfig, name: str, hint: str, monkeypatch):
    def full(self: Trainer, batch: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    card = types.SimpleNamespace(name=name, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2**29)
    monkeypatch.setattr(Trainer, "train_step", full)
    with pytest.raises(Failed, match=rf"out of memory at step 1: 0.5 of 1.0 GiB taken\. .*{hint}"):
        train(tiny_config)


FAULT = """
import json, os, sys, time
from rocket_fast.config import from_plain
from rocket_fast.trainer import Trainer, train

step = Trainer.train_step

def faulty(self, batch):
    if self.step == 3 and os.environ["RANK"] == "1":
        if sys.argv[2] == "dies":
            raise RuntimeError("a loose cable")
        while True:
            time.sleep(1)
    return step(self, batch)

Trainer.train_step = faulty
train(from_plain(json.load(open(sys.argv[1]))))
"""


@pytest.mark.system
@pytest.mark.parametrize(
    ("fault", "traces"), [("dies", ["RuntimeError: a loose cable"]), ("hangs", ["Timeout (0:00:15)!", "in faulty"])]
)
def test_a_rank_that_fails_ends_all(tiny_config: TrainConfig, tmp_path: Path, fault: str, traces: list[str]):
    """Within a minute, saying where; what was saved can be continued."""
    loop = replace(tiny_config.loop, hang_timeout_s=15.0, checkpoint_every=2)
    config = replace(tiny_config, loop=loop, eval=EvalConfig())
    description, script = tmp_path / "run.json", tmp_path / "fault.py"
    script.write_text(FAULT)
    description.write_text(json.dumps(to_plain(config)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(description)]
    done = subprocess.run([*launch, fault], capture_output=True, text=True, timeout=90)
    assert done.returncode != 0
    for trace in traces:
        assert trace in done.stderr
    assert train(config).step == 12
    assert [r["step"] for r in records(config) if "loss" in r] == list(range(1, 13))


@pytest.mark.system
def test_two_processes_train_as_one_and_resume(tiny_config: TrainConfig, tmp_path: Path):
    """Head h's batch norm is synchronised. Without the tower's and dropout, which are not, two ranks equal one."""
    model = replace(
        tiny_config.model,
        vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
        text=replace(tiny_config.model.text, dropout=0.0),
    )
    config = replace(tiny_config, model=model)
    one, two = replace(config, name="one"), replace(config, name="two")
    train(one)
    description, script = tmp_path / "two.json", tmp_path / "run.py"
    script.write_text(RUN)
    description.write_text(json.dumps(to_plain(replace(two, loop=replace(two.loop, max_steps=5)))))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(description)]
    subprocess.run(launch, check=True, capture_output=True, timeout=300)
    description.write_text(json.dumps(to_plain(two)))
    subprocess.run(launch, check=True, capture_output=True, timeout=300)
    assert final_state(two)["step"] == 12
    # Losses, not weights: Adam turns the rounding in gradients that should be zero (biases of keys) into whole steps.
    losses = [[r["loss"] for r in records(c) if "loss" in r] for c in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
