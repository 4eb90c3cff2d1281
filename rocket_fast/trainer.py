"""The training loop, to be read from ``train`` downward.

Everything random in a step is a function of (seed, step, rank) or of (seed, epoch, sample, view), so that a run resumed
from any checkpoint continues bit for bit, and the device is asked for numbers on log steps only.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rocket_fast.accumulation import cached_step
from rocket_fast.batch import Batch, Embeddings, LossOutput
from rocket_fast.checkpoint import CheckpointFolder, load_checkpoint
from rocket_fast.config import TrainConfig, differences, load_config, provenance, to_plain
from rocket_fast.device import DeviceCopies, build_autocast, card_of, choose_device, compute_dtype, peak_flops
from rocket_fast.distributed import is_main, rank, world_size
from rocket_fast.errors import Failed, InvalidArgument, optional_import, require
from rocket_fast.evaluation import Checkpoint, Evaluation, Evaluator, headline, output_path, result_table
from rocket_fast.export import SavedModel
from rocket_fast.files import remove_leftovers, write_atomically
from rocket_fast.image_augment import normalize
from rocket_fast.loaders.base import Loader
from rocket_fast.loaders.choose import open_loader
from rocket_fast.losses import build_loss
from rocket_fast.metrics import StepClock, Stopwatch, TrainingBar
from rocket_fast.models.attention import use_attention
from rocket_fast.models.clip import DualEncoder
from rocket_fast.optim import LossScale, build_optimizer, learning_rate, restore_optimizer, set_learning_rate
from rocket_fast.parallel import StepModel, averaged_model, compile_advice, compile_loss, is_compile_error, whole_tensor
from rocket_fast.plan import cost
from rocket_fast.predict import advice
from rocket_fast.processes import (
    StopRequest,
    agree_to_stop,
    count_over_ranks,
    over_ranks,
    process_group,
    stop_requests,
    watchdog,
)
from rocket_fast.profiling import ProfileWindow
from rocket_fast.sharded import ShardedFolders, prepare_optimizer, tensors_of
from rocket_fast.sinks import RunLog, require_trackers
from rocket_fast.tokenizer import Tokenizer

FREE_FIELDS = (
    "out",
    "data.workers",
    "data.prefetch",
    "data.strict",
    "loop.max_steps",
    "loop.threads",
    "loop.log_every",
    "loop.checkpoint_every",
    "loop.keep_checkpoints",
    "loop.keep_every",
    "loop.compile_fallback",
    "loop.hang_timeout_s",
    "loop.track",
    "loop.profile",
)
"""Fields that may change between a run and its continuation."""


class NonFiniteLoss(Failed):
    """The loss became NaN or infinite; the weights are those before the bad step."""


class Interrupted(RuntimeError):
    """Ctrl-C, SIGTERM or SIGUSR2: the run was saved and can be continued. ``signum`` is what came."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run leaves; ``evaluation`` is None without evaluation sets and off the main rank."""

    folder: Path
    step: int
    evaluation: Evaluation | None


def train(config: TrainConfig, *, resume: bool = True) -> TrainResult:
    """Train to the end, or continue what ``config.folder`` holds, then evaluate.

    Raises ``ValueError`` when the folder holds a run of another configuration (or any run, with ``resume=False``),
    ``NonFiniteLoss``, or ``Interrupted`` after saving on SIGINT, SIGTERM or SIGUSR2.
    """
    with process_group(config.loop.device), stop_requests() as stop:
        trainer = Trainer(config, resume=resume)
        try:
            trainer.fit(stop)
            trainer.write_weights()
            evaluation = trainer.evaluate()
        finally:
            trainer.close()
        return TrainResult(folder=config.folder, step=trainer.step, evaluation=evaluation)


class Trainer:
    """A run in progress: model, optimizer, loader, and the step it has reached."""

    def __init__(self, config: TrainConfig, *, resume: bool = True) -> None:
        self.config, self.console = config, optional_import("rich.console", "train").Console()
        require_trackers(config.loop.track)
        self.device = choose_device(config.loop.device)
        self.autocast = build_autocast(config.loop.precision, self.device)
        if config.loop.threads is not None:
            torch.set_num_threads(config.loop.threads)
        self.checkpoints = CheckpointFolder(
            config.folder / "checkpoints",
            keep=config.loop.keep_checkpoints,
            keep_every=config.loop.keep_every,
            report=self.say,
            sharded=ShardedFolders() if config.loop.parallel == "fsdp" else None,
        )
        _check_folder(config, self.checkpoints, resume=resume)
        torch.manual_seed(config.seed)
        self.tokenizer = Tokenizer(context_length=config.model.text.context_length)
        own, parts = config.data.batch_size // world_size(), config.loop.accumulation
        expected = f"1, or at most {own // 2}: a process has {own} samples, and a micro-batch needs two"
        require(parts == 1 or 2 * parts <= own, "loop.accumulation", parts, expected)
        alone = config.data.unpaired_batch // world_size()
        expected = f"a smaller number: a process has {alone} unpaired pictures, and a micro-batch needs two"
        require(
            not config.data.unpaired or 2 * parts <= alone, "data.unpaired_ratio", config.data.unpaired_ratio, expected
        )
        self.loader, self.loading = open_loader(
            config.data,
            config.image,
            config.text,
            self.tokenizer,
            seed=config.seed,
            rank=rank(),
            world_size=world_size(),
            device=self.device,
            dtype=compute_dtype(self.autocast),
        )
        self.model = DualEncoder(config.model).to(self.device)
        self.attention = use_attention(
            self.model, self.device, compute_dtype(self.autocast), requested=config.loop.attention
        )
        self.objective = build_loss(config.loss, config.model.companion)
        self.average = averaged_model(self.model, config.loop.weight_average)
        dtype = compute_dtype(self.autocast)
        self.parallel = StepModel(self.model, self.average, config.loop, self.device, dtype, self.say)
        compile_loss(self.objective, config.loop)
        self.optimizer = build_optimizer(config.optim, self.model)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.loss_scale = LossScale(self.device) if self.autocast_name == "fp16" else None
        self.copies = DeviceCopies(self.device)
        self.evaluator = Evaluator(config, self.tokenizer)

        self.step, self.saved_step, self.measured_step, self.best_top1 = 0, -1, -1, -1.0
        self.skipped_in_index = Counter(self.loader.skipped)  # the same on every rank; the rest is each rank's own
        self.skipped: Counter[str] = Counter()
        self.skipped_before: Counter[str] = Counter()
        self.clock = StepClock(self.device)
        self.first_bad_step = torch.full((), math.inf, device=self.device)
        self.recent_keys: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=config.loop.log_every)
        self._load()
        _require_same_step(self.step)
        if is_main():
            remove_leftovers(config.folder)
        _record_run(config)
        window = config.loop.profile if is_main() else None
        self.profile = ProfileWindow(window, config.folder, self.device, report=self.say)
        self.log = RunLog(config, resume_step=self.step) if is_main() else None
        self.peak_images_per_s = _peak_images_per_s(config, self.device, self.autocast) if is_main() else None

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.config.loop.epochs * len(self.loader)

    def fit(self, stop: StopRequest) -> None:
        """Run the steps that are left; at the end a checkpoint of the last step is on disk."""
        last = min(self.total_steps, self.config.loop.max_steps or self.total_steps)
        self.say(self._opening(last))
        with TrainingBar(last, self.step, enabled=is_main(), console=self.console) as bar:
            self._evaluate_if_due()  # one that a kill took away
            while self.step < last:
                self.loader.set_epoch(self.step // len(self.loader))
                self._run_epoch(last, stop, bar)
                self._evaluate_if_due()
        self._finish_saving()
        if self.saved_step != self.step:
            self.save(needed=True)
        if self.loader.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.loader.skipped.most_common())
            self.say(f"samples skipped: {reasons}")

    def _run_epoch(self, last: int, stop: StopRequest, bar: TrainingBar) -> None:
        """The rest of the current epoch, up to step ``last``."""
        watch = Stopwatch()
        with watchdog(self.config.loop.hang_timeout_s) as still_alive:
            self._run_steps(last, stop, bar, watch, still_alive)

    def _run_steps(
        self, last: int, stop: StopRequest, bar: TrainingBar, watch: Stopwatch, still_alive: Callable[[], None]
    ) -> None:
        for batch, waited in _timed(self.loader):
            with watch.left_out():
                self.profile.before(self.step + 1)
            try:
                output = self.train_step(batch)
            except torch.OutOfMemoryError as error:
                raise Failed(self._out_of_memory()) from error
            except Exception as error:
                if self.config.loop.compile == "off" or not is_compile_error(error):
                    raise
                raise Failed(compile_advice(error)) from error
            with watch.left_out():
                self.profile.after(self.step)
            watch.add(waited=waited, samples=len(batch) * world_size())
            still_alive()  # not before an epoch's first step, in which ranks wait for the main one's evaluation
            bar.advance()
            stopping = agree_to_stop(stop)
            loop = self.config.loop
            saving = any(self.step % every == 0 for every in (loop.checkpoint_every, loop.keep_every) if every)
            ending = self.step == last or self.step % len(self.loader) == 0
            if stopping or saving or ending or self.step % self.config.loop.log_every == 0:
                self._log(output, watch, bar)  # which is also what keeps a bad step out of every checkpoint
            if stopping:
                self.save(needed=True)
                raise Interrupted(f"stopped and saved at step {self.step}; the same command continues", stop.signum)
            if self.step == last:
                return
            if saving:
                self.save()
                watch = Stopwatch()  # the time it took says nothing of images per second

    def train_step(self, batch: Batch) -> LossOutput:
        """One optimizer step; one whose loss or gradients are not finite is skipped without asking the device."""
        self.clock.mark()
        self.recent_keys.append((self.step + 1, batch.keys))
        if not self.model.training:  # setting the mode of every module takes longer than all else that the loop does
            self.model.train()
        _seed(_step_seed(self.config.seed, self.step, rank()), self.device)
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.loop.accumulation == 1:
            output = self._loss(self._embed(self.copies(batch)))
            self.clock.mark()
            output.total.backward()
        else:
            self.clock.mark()  # forward and backward take turns: all of it counts as backward
            micro_batches = [self.copies(part) for part in batch.split(self.config.loop.accumulation)]
            output = cached_step(
                self._embed,
                micro_batches,
                self._loss,
                model=self.model,
                no_sync=self.parallel.no_sync if world_size() > 1 else None,
            )
        self.parallel.average_gradients()
        self.clock.mark()
        self.model.freeze_gradients(self.step)
        self._guard(output.metrics)
        self.learning_rate = learning_rate(
            self.config.optim, self.step, steps_per_epoch=len(self.loader), total_steps=self.total_steps
        )
        set_learning_rate(self.optimizer, self.learning_rate)
        self.optimizer.step()
        self.model.clamp_logit_scales_()
        self.model.update_momentum_()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        self.clock.mark()
        return output

    def _embed(self, batch: Batch) -> Embeddings:
        images, unpaired = (tuple(normalize(image) for image in views) for views in (batch.images, batch.unpaired))
        with self.autocast:
            return self.parallel(images, batch.texts, unpaired)

    def _loss(self, embeddings: Embeddings) -> LossOutput:
        """The objective's output; what is differentiated is scaled, in fp16."""
        output = self.objective(embeddings)
        if self.loss_scale is None:
            return output
        return replace(output, total=output.total * self.loss_scale.value)

    def _out_of_memory(self) -> str:
        """What happened, and what would fit by the cost model, where the card is known."""
        card = card_of(self.device)
        total = torch.cuda.get_device_properties(self.device).total_memory
        reserved = torch.cuda.max_memory_reserved(self.device)
        hint = "try a smaller data.batch_size, or checkpointing in the towers" if card is None else ""
        if card is not None:
            hint = str(advice(self.config, total, world_size(), device=card))
        return (
            f"out of memory at step {self.step + 1}: {reserved / 2**30:.1f} of {total / 2**30:.1f} GiB taken. {hint}. "
            "The last checkpoint is whole; the batch size cannot change within a run"
        )

    def _guard(self, metrics: dict[str, Tensor]) -> None:
        """Remember the first step whose loss or gradients are not finite, and keep the fused optimizer from them.

        Both are the same on every rank: the loss is of the gathered batch, the gradients are averaged. In fp16
        they may overflow now and then, which costs a step (averages of the weights move on) and halves the loss's
        scale; a loss that is not finite, or a scale below 1, is as bad as ever. Adds ``grad_norm`` (before clipping)
        and ``loss_scale`` to the metrics.
        """
        norm = whole_tensor(nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None]))
        loss, scale = metrics["loss"], None
        skipped = bad = ~torch.isfinite(loss + norm)
        if self.loss_scale is not None:
            scale = metrics["loss_scale"] = self.loss_scale.value
            norm = norm / scale
            self.loss_scale.update(skipped)
            bad = ~torch.isfinite(loss) | (self.loss_scale.value < 1)
        metrics["grad_norm"] = norm
        self.first_bad_step = torch.where(bad, self.first_bad_step.clamp(max=self.step + 1), self.first_bad_step)
        if self.config.optim.clip_norm is not None:  # the optimizer divides by it while it reads the gradients anyway
            shortened = (norm / self.config.optim.clip_norm).clamp(min=1)
            scale = shortened if scale is None else scale * shortened
        self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        found = skipped | torch.isfinite(self.first_bad_step)
        self.optimizer.found_inf = found.float()  # type: ignore[attr-defined]

    def _log(self, output: LossOutput, watch: Stopwatch, bar: TrainingBar) -> None:
        if torch.isfinite(self.first_bad_step):
            raise NonFiniteLoss(self._dump_non_finite(output))
        record: dict[str, Any] = {"step": self.step, "epoch": self.step / len(self.loader), "time": time.time()}
        record |= {name: value.item() for name, value in output.metrics.items()}
        record |= {f"{name}_raw": math.log(record[name]) for name in tuple(record) if name.endswith("logit_scale")}
        record |= {"lr": self.learning_rate, **watch.read(self.clock.read())}
        if self.peak_images_per_s is not None:
            record["mfu"] = record["images_per_s"] / self.peak_images_per_s
        self.skipped = self.skipped_before + count_over_ranks(self.loader.skipped - self.skipped_in_index)
        skipped = self.skipped_in_index + self.skipped
        record |= {"skipped": skipped.total(), "skipped_reasons": dict(skipped.most_common())}
        bar.show(record)
        if self.log is not None:
            self.log.write(record)

    def _dump_non_finite(self, output: LossOutput) -> str:
        bad_step = int(self.first_bad_step.item())
        keys = [keys for step, keys in self.recent_keys if step == bad_step]
        dump = {
            "step": bad_step,
            "noticed_at_step": self.step,
            "metrics_when_noticed": {name: str(value.item()) for name, value in output.metrics.items()},
            "keys": keys[0] if keys else [],
            "non_finite_parameters": [n for n, p in self.model.named_parameters() if not torch.isfinite(p).all()],
        }
        path = self.config.folder / f"nonfinite-rank{rank()}.json"
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(dump, indent=1)))
        return (
            f"the loss or a gradient was not finite at step {bad_step}. Weights were not updated from that step on; "
            f"the batch's keys and all metrics are in {path}; the checkpoints in {self.checkpoints.folder} are from "
            "before. Usual remedies: a lower optim.lr, a longer optim.warmup_epochs, loop.precision fp32"
        )

    def _evaluate_if_due(self) -> None:
        """Between the epochs that the configuration names: a checkpoint, then the first set's score, for best.pt.

        The end of the schedule is left to ``evaluate``.
        """
        every = self.config.loop.eval_every_epochs * len(self.loader)
        if not self.config.eval.sets or not every or self.step % every or self.step in (0, self.total_steps):
            return
        if self.measured_step != self.step:
            self.save()  # evaluating may take long, and a kill must not cost the steps before
            model = self.evaluated_model()
            self._keep_if_best(-1.0 if model is None else self.evaluator.top1(model, self.autocast))

    def _keep_if_best(self, top1: float) -> None:
        """Note the score of this step's weights, and keep them in best.pt if no earlier ones were better."""
        if self.log is not None:
            self.log.write({"step": self.step, "zero_shot_top1": top1, "set": self.config.eval.sets[0].name})
        top1 = self.parallel.mains(top1)
        before, improved = self.best_top1, top1 > self.best_top1
        self.best_top1, self.measured_step = max(before, top1), self.step
        self.save(best=improved, needed=self.step == self.total_steps)
        if self.saved_step != self.step:
            self.best_top1 = before  # best.pt is still the one before

    def evaluated_model(self) -> DualEncoder | None:
        """The averaged weights where an average is kept, else the trained ones; None off the main rank."""
        return self.parallel.whole(self.model if self.average is None else cast(DualEncoder, self.average.module))

    def evaluate(self) -> Evaluation | None:
        """Evaluate the present weights on every set and print the table; at the end of the schedule, keep the best.

        None without evaluation sets and off the main rank.
        """
        if not self.config.eval.sets:
            return None
        folder, evaluation, top1 = self.config.folder, None, -1.0
        model = self.evaluated_model()
        if model is not None:
            evaluation = self.evaluator.evaluate(model, self.autocast, folder, checkpoint="last", step=self.step)
            self.console.print(result_table(evaluation, self.config.eval))
            self.say("pictures: " + ", ".join(str(output_path(folder, "last", each.name)) for each in evaluation.sets))
            top1 = headline(evaluation, self.config.eval)
        if self.step == self.total_steps and self.measured_step != self.step:
            self._keep_if_best(top1)
        return evaluation

    def write_weights(self) -> None:
        """Write ``weights.safetensors``: the weights to use, without what training needs beside them."""
        model = self.evaluated_model()
        if model is not None:
            save = optional_import("safetensors.torch", "train").save_model
            path = self.config.folder / "weights.safetensors"
            write_atomically(path, lambda temporary: save(model, str(temporary)))

    def save(self, *, best: bool = False, needed: bool = False) -> None:
        """Begin to write a checkpoint: everything that the next step depends on. A ``best`` one is waited for.

        A disk that is full or away for a while must not end a run: that is said, and the next time tried again. Only
        one that is ``needed``, the run's last, is waited for and raises ``Failed``.
        """
        if torch.isfinite(self.first_bad_step) or not (is_main() or self.parallel.sharded):
            return  # never put a checkpoint after a bad step in the place of a good one
        self._finish_saving()
        state = {
            "step": self.step,
            "measured_step": self.measured_step,
            "skipped": dict(self.skipped),
            "config": json.dumps(to_plain(self.config)),
            "loader": self.loader.state_dict(),
            "loss_scale": None if self.loss_scale is None else self.loss_scale.state_dict(),
            "best_top1": self.best_top1,
        }
        tensors = None
        if self.checkpoints.sharded is None:
            state |= {name: module.state_dict() for name, module in self._modules.items()}
            state |= {"optimizer": self.optimizer.state_dict(), "average": state.get("average")}
        else:
            self.parallel.agree_on_buffers(*self._modules.values())
            tensors = tensors_of(self._modules, self.optimizer, self.model)
        self.checkpoints.begin(state, tensors, best=best)
        self.saved_step = self.step
        if best or needed:
            self._finish_saving(needed=needed)

    def _finish_saving(self, *, needed: bool = False) -> None:
        """Wait for the checkpoint that is being written, and learn whether it is there."""
        try:
            self.checkpoints.wait()
        except Failed as error:
            if needed:
                raise
            self.saved_step = -1
            self.say(f"{error}; the checkpoints before it are whole, and training goes on")

    @property
    def _modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds the weights of."""
        return {"model": self.model} | ({} if self.average is None else {"average": self.average})

    def _load(self) -> None:
        state = self.checkpoints.load_latest(map_location=self.device, tensors=self._tensors_to_fill)
        if state is None:
            return
        self.step, self.saved_step, self.measured_step = state["step"], state["step"], state["measured_step"]
        self.best_top1, self.skipped = state["best_top1"], Counter(state["skipped"])
        self.skipped_before = Counter(self.skipped)
        self.loader.load_state_dict(state["loader"])
        if self.loss_scale is not None:
            self.loss_scale.load_state_dict(state["loss_scale"])
        if self.checkpoints.sharded is None:
            for name, module in self._modules.items():
                module.load_state_dict(state[name])
            restore_optimizer(self.optimizer, state["optimizer"])

    def _tensors_to_fill(self, names: set[str]) -> dict[str, Tensor]:
        """This run's tensors that a sharded checkpoint holds under ``names``."""
        prepare_optimizer(self.optimizer, self.model, names)
        return tensors_of(self._modules, self.optimizer, self.model)

    def _opening(self, last: int) -> str:
        count = sum(p.numel() for p in self.model.parameters()) / 1e6
        attention = "/".join(dict.fromkeys(choice.name for choice in self.attention))
        where = f"{self.device.type} x {world_size()}{' (FSDP2)' * self.parallel.sharded}, {self.autocast_name}"
        where += f", attention by {attention}" if attention else ""
        where += ", compiled in the first steps, which take long" if self.config.loop.compile != "off" else ""
        where += f", pictures by {self.loading.name} ({self.loading.reason})"
        start = f"continuing at step {self.step} of {last}" if self.step else f"{last} steps"
        if self.step >= last:
            start = f"already trained to step {self.step}, evaluating"
        return (
            f"{self.config.name}: {count:.1f} M parameters on {where}; {self.loader.samples} samples, "
            f"{len(self.loader)} steps an epoch; {start}; folder {self.config.folder}"
        )

    @property
    def autocast_name(self) -> str:
        """The precision of the matrix products, for people."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(compute_dtype(self.autocast), "fp32")

    def say(self, message: str) -> None:
        """Tell the person, once over all ranks."""
        if is_main():
            self.console.print(message, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Stop the loader's threads, write a profile that was begun, and close the log."""
        self.loader.close()
        self.profile.close()
        self.checkpoints.close()
        if self.log is not None:
            self.log.close()


def load_run(folder: Path, checkpoint: Checkpoint, device: torch.device) -> tuple[DualEncoder, int]:
    """The weights to use of a run's last or best checkpoint, averaged ones where the run keeps an average; their step.

    Raises ``ValueError`` for a folder without such a checkpoint.
    """
    config = load_config(folder)
    checkpoints = CheckpointFolder(folder / "checkpoints", keep=config.loop.keep_checkpoints)
    if checkpoint == "best":
        require(checkpoints.best_path.exists(), "checkpoint", checkpoint, f"last: {folder} holds no best one")
        state: dict[str, Any] | None = load_checkpoint(checkpoints.best_path, map_location=device)
    else:
        state = checkpoints.load_latest(map_location=device)
    if state is None:
        raise InvalidArgument(f"run: got {str(folder)!r}, expected a folder with checkpoints")
    model = DualEncoder(config.model).to(device)
    average = averaged_model(model, config.loop.weight_average)
    if average is not None:
        average.load_state_dict(state["average"])
        model = cast(DualEncoder, average.module)
    else:
        model.load_state_dict(state["model"])
    return model, state["step"]


def saved_run(folder: Path, checkpoint: Checkpoint) -> SavedModel:
    """A run's last or best model as it is exported: on the CPU, with the size and the weight of its evaluation."""
    config = load_config(folder)
    model, _ = load_run(folder, checkpoint, torch.device("cpu"))
    return SavedModel(model=model.eval(), image_size=config.image.weak.size, z_weight=config.eval.z_weight)


def evaluate_run(folder: Path, checkpoint: Checkpoint) -> Evaluation:
    """Evaluate a run's last or best checkpoint on its configuration's sets; files go into the run's folder."""
    config = load_config(folder)
    require(len(config.eval.sets) > 0, "eval.sets", config.eval.sets, "at least one set in the run's configuration")
    device = choose_device(config.loop.device)
    model, step = load_run(folder, checkpoint, device)
    autocast = build_autocast(config.loop.precision, device)
    use_attention(model, device, compute_dtype(autocast), requested=config.loop.attention)
    evaluator = Evaluator(config, Tokenizer(context_length=config.model.text.context_length))
    return evaluator.evaluate(model, autocast, folder, checkpoint=checkpoint, step=step)


def _step_seed(seed: int, step: int, of_rank: int) -> int:
    """A 63-bit seed for the step's dropout: three numbers mixed so that no two nearby triples collide."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + of_rank * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)


def _seed(seed: int, device: torch.device) -> None:
    """Seed the default generators of host and device; ``torch.manual_seed`` takes half a millisecond for all kinds."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _peak_images_per_s(config: TrainConfig, device: torch.device, autocast: torch.autocast) -> float | None:
    """Images a second of all devices at their peak, where that is known: what an MFU of 1 would be."""
    peak = peak_flops(device, compute_dtype(autocast))
    return None if peak is None else world_size() * peak / cost(config).training_flops


def _timed(loader: Loader) -> Iterator[tuple[Batch, float]]:
    """Batches with the seconds that the loop waited for each."""
    iterator = iter(loader)
    while True:
        start = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - start


def _check_folder(config: TrainConfig, checkpoints: CheckpointFolder, *, resume: bool) -> None:
    """Refuse a folder that holds checkpoints of another run (of any run, unless ``resume``)."""
    if not checkpoints.step_paths():
        return
    require(resume, "out/name", str(config.folder), "a folder without a run in it, or --resume to continue this one")
    changed = [d for d in differences(load_config(config.folder), config) if d.split(":")[0] not in FREE_FIELDS]
    free = f"but for {', '.join(FREE_FIELDS)}"
    require(not changed, "config", changed, f"what {config.folder} was started with {free}; or another --name")


def _record_run(config: TrainConfig) -> None:
    """Write the resolved configuration, and add versions, commit and command line to ``run.jsonl``."""
    if not is_main():
        return
    plain = json.dumps(to_plain(config), indent=1)
    write_atomically(config.folder / "config.json", lambda temporary: temporary.write_text(plain + "\n"))
    with open(config.folder / "run.jsonl", "a") as file:
        file.write(json.dumps(provenance()) + "\n")


def _require_same_step(step: int) -> None:
    """Ranks that read different checkpoints (a disk of their own, a damaged file) would train nonsense."""
    least, most = over_ranks(step, dist.ReduceOp.MIN), over_ranks(step, dist.ReduceOp.MAX)
    if least != most:
        raise Failed(f"the processes found checkpoints of steps {least} to {most}: do they share the run's folder?")
