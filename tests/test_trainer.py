"""The loop: it learns, stops, continues bit for bit, and tells what went wrong. Real files, processes and signals."""

import contextlib
import json
import math
import os
import signal
import tarfile
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model
from trainer_support import assert_same_state, final_state, records

from rocket_fast.checkpoint import CheckpointFolder, load_checkpoint
from rocket_fast.config import EvalConfig, TrainConfig
from rocket_fast.evaluation import Evaluator
from rocket_fast.image_augment import plain_augment
from rocket_fast.loaders.sources import webdataset
from rocket_fast.models.clip import DualEncoder
from rocket_fast.models.heads import (
    SharedHeadConfig,
    SwALIPPrototypesConfig,
)
from rocket_fast.models.vision import ViTConfig
from rocket_fast.optim import LossScale
from rocket_fast.processes import StopRequest
from rocket_fast.trainer import Interrupted, NonFiniteLoss, Trainer, train


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
    torch.save(
        {**state, "format_version": 1, "skipped": 7},
        CheckpointFolder(whole.folder / "checkpoints", keep=9).step_paths()[-1],
    )
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
        trainer.fit(StopRequest())
    assert sum("cannot be read" in str(each.message) for each in warned) == 1
    assert waited[:3] == list(webdataset._WAITS)
    steps = [r for r in records(config) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert all(math.isfinite(r["loss"]) for r in steps)
    assert steps[1]["skipped_reasons"] == {}
    lost = steps[-1]["skipped_reasons"]
    assert set(lost) == {"shard cannot be read"}
    assert 40 < lost["shard cannot be read"] <= 80  # of 40, most of one epoch and all but four at most of another


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


def test_fp16_skips_what_overflows_and_resumes_bit_for_bit(tiny_config: TrainConfig, monkeypatch):
    """One step's gradients overflow: its weights stay, the loss's scale is halved, and training goes on."""
    config = replace(tiny_config, loop=replace(tiny_config.loop, precision="fp16"))
    real_step, moved = Trainer.train_step, {}

    def overflowing(self: Trainer, batch):
        handle, before = None, self.model.image_z.weight.detach().clone()
        if self.step == 3:
            handle = self.model.image_z.register_forward_hook(lambda module, args, out: PoisonedGradient.apply(out))
        output = real_step(self, batch)
        if handle is not None:
            handle.remove()
        moved[self.step] = not torch.equal(self.model.image_z.weight, before)
        return output

    monkeypatch.setattr(Trainer, "train_step", overflowing)
    whole, parts = replace(config, name="whole"), replace(config, name="parts")
    train(whole)
    steps = [r for r in records(whole) if "loss" in r]
    assert moved == {r["step"]: isinstance(r["grad_norm"], float) for r in steps}  # what is not finite is a text there
    assert not moved[4]
    assert steps[4]["loss_scale"] == steps[3]["loss_scale"] / 2
    assert steps[-1]["loss"] < steps[0]["loss"]
    train(replace(parts, loop=replace(parts.loop, max_steps=5)))
    train(parts)
    assert_same_state(final_state(whole), final_state(parts))
    assert final_state(whole)["loss_scale"] == final_state(parts)["loss_scale"]


def test_fp16_ends_where_no_scale_helps(tiny_config: TrainConfig, monkeypatch):
    monkeypatch.setattr(LossScale, "START", 4.0)
    trainer = Trainer(replace(tiny_config, loop=replace(tiny_config.loop, precision="fp16")))
    trainer.model.image_z.register_forward_hook(lambda module, args, out: PoisonedGradient.apply(out))
    with pytest.raises(NonFiniteLoss, match="not finite at step 3"):  # 4, 2, 1, and then below
        trainer.fit(type("Stop", (), {"signum": 0})())
    trainer.close()


def test_gradients_are_shortened_as_torch_does_it(tiny_config: TrainConfig):
    norms, losses = {}, {}
    for name, clip_norm in (("ours", 60.0), ("torchs", None), ("long", None)):
        config = replace(tiny_config, name=name, optim=replace(tiny_config.optim, clip_norm=clip_norm))
        trainer = Trainer(config)
        if name == "torchs":
            step, parameters = trainer.optimizer.step, list(trainer.model.parameters())

            def shorten_and_step(step=step, parameters=parameters):
                torch.nn.utils.clip_grad_norm_(parameters, 60.0)
                step()

            trainer.optimizer.step = shorten_and_step
        found = [trainer.train_step(batch).metrics for batch in trainer.loader]
        trainer.close()
        norms[name], losses[name] = ([each[key].item() for each in found] for key in ("grad_norm", "loss"))
    assert max(norms["ours"]) > 60 > min(norms["ours"])
    assert losses["ours"] == pytest.approx(losses["torchs"], rel=1e-5)
    assert losses["ours"] != pytest.approx(losses["long"], rel=1e-3)


def test_checkpoints_of_chosen_steps_stay(tiny_config: TrainConfig):
    loop = replace(tiny_config.loop, checkpoint_every=5, keep_every=4)
    train(replace(tiny_config, loop=loop, eval=EvalConfig()))
    kept = [path.name for path in CheckpointFolder(tiny_config.folder / "checkpoints", keep=1).step_paths()]
    assert kept == [f"step-{step:08d}.pt" for step in (4, 8, 10, 12)]


def test_another_configuration_in_the_same_folder_is_refused(tiny_config: TrainConfig):
    train(replace(tiny_config, loop=replace(tiny_config.loop, max_steps=1)))
    with pytest.raises(ValueError, match=r"optim.lr: 0.003 -> 0.001.*started with but for .*loop.max_steps"):
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
