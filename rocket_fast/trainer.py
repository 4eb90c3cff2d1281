"""The training loop, to be read from ``train`` downward.

Everything random in a step is a function of (seed, step, rank) or of (seed, epoch, sample, view), so that a run resumed
from any checkpoint continues bit for bit, and the device is asked for numbers on log steps only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rocket_fast.batch import Batch, LossOutput
from rocket_fast.checkpoint import CheckpointFolder, load_checkpoint
from rocket_fast.config import TrainConfig, differences, load_config, provenance, to_plain
from rocket_fast.device import build_autocast, choose_device
from rocket_fast.distributed import is_main, rank, world_size
from rocket_fast.errors import Failed, InvalidArgument, optional_import, require
from rocket_fast.evaluation import Evaluator, SetResult, result_table
from rocket_fast.files import write_atomically
from rocket_fast.image_augment import normalize
from rocket_fast.loaders.cpu import CPULoader
from rocket_fast.losses import build_loss
from rocket_fast.metrics import JsonlLog, Stopwatch, TrainingBar
from rocket_fast.models.clip import DualEncoder
from rocket_fast.optim import build_optimizer, learning_rate, set_learning_rate
from rocket_fast.tokenizer import Tokenizer

FREE_FIELDS = (
    "out",
    "data.workers",
    "data.prefetch",
    "loop.max_steps",
    "loop.threads",
    "loop.log_every",
    "loop.checkpoint_every",
    "loop.keep_checkpoints",
)
"""Fields that may change between a run and its continuation."""


class NonFiniteLoss(Failed):
    """The loss became NaN or infinite; the weights are those before the bad step."""


class Interrupted(RuntimeError):
    """Ctrl-C or SIGTERM: the run was saved and can be continued. ``signum`` is what came."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run leaves; ``results`` is empty without evaluation sets and off the main rank."""

    folder: Path
    step: int
    results: list[SetResult]


def train(config: TrainConfig, *, resume: bool = True) -> TrainResult:
    """Train to the end, or continue what ``config.folder`` holds, then evaluate.

    Raises ``ValueError`` when the folder holds a run of another configuration (or any run, with ``resume=False``),
    ``NonFiniteLoss``, or ``Interrupted`` after saving on SIGINT or SIGTERM.
    """
    with _process_group(config), _stop_requests() as stop:
        trainer = Trainer(config, resume=resume)
        try:
            trainer.fit(stop)
            trainer.write_weights()
            results = trainer.evaluate()
        finally:
            trainer.close()
        return TrainResult(folder=config.folder, step=trainer.step, results=results)


class Trainer:
    """A run in progress: model, optimizer, loader, and the step it has reached."""

    def __init__(self, config: TrainConfig, *, resume: bool = True) -> None:
        self.config, self.console = config, optional_import("rich.console", "train").Console()
        self.device = choose_device(config.loop.device)
        self.autocast = build_autocast(config.loop.precision, self.device)
        if config.loop.threads is not None:
            torch.set_num_threads(config.loop.threads)
        self.checkpoints = CheckpointFolder(
            config.folder / "checkpoints", keep=config.loop.keep_checkpoints, report=self.say
        )
        _check_folder(config, self.checkpoints, resume=resume)
        torch.manual_seed(config.seed)
        self.tokenizer = Tokenizer(context_length=config.model.text.context_length)
        self.loader = CPULoader(
            config.data,
            config.image,
            config.text,
            self.tokenizer,
            seed=config.seed,
            rank=rank(),
            world_size=world_size(),
        )
        self.model = DualEncoder(config.model).to(self.device)
        self.objective = build_loss(config.loss, config.model.companion)
        self.optimizer = build_optimizer(config.optim, self.model)
        self.average = _average(self.model, config.loop.weight_average)
        self.evaluator = Evaluator(config, self.tokenizer)

        self.step, self.best_top1 = 0, -1.0
        self.first_bad_step = torch.full((), math.inf, device=self.device)
        self.recent_keys: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=config.loop.log_every)
        self._load()
        _record_run(config)
        self.parallel = _parallel(self.model, config, self.device)
        self.log = JsonlLog(config.folder / "metrics.jsonl", resume_step=self.step) if is_main() else None

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.config.loop.epochs * len(self.loader)

    def fit(self, stop: _StopRequest) -> None:
        """Run the steps that are left."""
        last = min(self.total_steps, self.config.loop.max_steps or self.total_steps)
        self.say(self._opening(last))
        with TrainingBar(last, self.step, enabled=is_main()) as bar:
            watch = Stopwatch()
            while self.step < last:
                self.loader.set_epoch(self.step // len(self.loader))
                for batch, waited in _timed(self.loader):
                    output = self.train_step(batch)
                    watch.add(waited=waited, samples=len(batch) * world_size())
                    bar.advance()
                    if self.step % self.config.loop.log_every == 0 or self.step == last:
                        self._log(output, watch, bar)
                    if self._agree_to_stop(stop):
                        self.save()
                        raise Interrupted(
                            f"stopped and saved at step {self.step}; the same command continues", stop.signum
                        )
                    if self.step == last:
                        break
                    if self.step % self.config.loop.checkpoint_every == 0:
                        self.save()
                self._end_of_epoch(last)

    def _agree_to_stop(self, stop: _StopRequest) -> bool:
        """Whether to stop after this step; ranks hear the signal at different steps, and agree on log steps."""
        if world_size() == 1:
            return stop.requested
        if self.step % self.config.loop.log_every:
            return False
        signum = torch.tensor(stop.signum, device=self.device)
        dist.all_reduce(signum, op=dist.ReduceOp.MAX)
        stop.signum = int(signum)
        return stop.signum > 0

    def train_step(self, batch: Batch) -> LossOutput:
        """One optimizer step; the update is skipped on the device, without asking it, when the loss is not finite."""
        self.recent_keys.append((self.step, batch.keys))
        self.model.train()
        torch.manual_seed(_step_seed(self.config.seed, self.step, rank()))
        batch = batch.to(self.device)
        images = tuple(normalize(image) for image in batch.images)
        with self.autocast:
            embeddings = self.parallel(images, batch.texts)
        output = self.objective(embeddings)
        self.optimizer.zero_grad(set_to_none=True)
        output.total.backward()
        self.model.freeze_gradients(self.step)
        self._guard(output.total.detach())
        rate = learning_rate(
            self.config.optim, self.step, steps_per_epoch=len(self.loader), total_steps=self.total_steps
        )
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.model.clamp_logit_scales_()
        self.model.update_momentum_()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        return output

    def _guard(self, loss: Tensor) -> None:
        """Remember the first step with a non-finite loss and keep the fused optimizer from using its gradients."""
        if world_size() > 1:
            dist.all_reduce(loss)
        bad = ~torch.isfinite(loss)
        self.first_bad_step = torch.where(bad, self.first_bad_step.clamp(max=self.step), self.first_bad_step)
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = torch.isfinite(self.first_bad_step).float()  # type: ignore[attr-defined]

    def _log(self, output: LossOutput, watch: Stopwatch, bar: TrainingBar) -> None:
        if torch.isfinite(self.first_bad_step):
            raise NonFiniteLoss(self._dump_non_finite(output))
        record: dict[str, Any] = {"step": self.step, "epoch": self.step / len(self.loader)}
        record |= {"loss": output.total.item()} | {name: value.item() for name, value in output.metrics.items()}
        record |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            **watch.read(),
            "skipped": sum(self.loader.skipped.values()),
        }
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
            f"the loss was not finite at step {bad_step}. Weights were not updated from that step on; the batch's keys "
            f"and all metrics are in {path}. Usual remedies: a lower optim.lr, a longer optim.warmup_epochs, "
            f"loop.precision fp32; the last good checkpoint in {self.checkpoints.folder} is untouched"
        )

    def _end_of_epoch(self, last: int) -> None:
        """Evaluate where the configuration says so; the best score so far keeps its weights in best.pt."""
        every, steps = self.config.loop.eval_every_epochs, len(self.loader)
        due = self.step == last or (every > 0 and self.step % (every * steps) == 0)
        if due and self.config.eval.sets:
            self.save(best=self._measure())
        elif self.step == last:
            self.save()

    def _measure(self) -> bool:
        top1 = self.evaluator.top1(self.evaluated_model, self.autocast) if is_main() else -1.0
        if self.log is not None:
            self.log.write({"step": self.step, "zero_shot_top1": top1, "set": self.config.eval.sets[0].name})
        improved = top1 > self.best_top1
        self.best_top1 = max(self.best_top1, top1)
        return improved

    @property
    def evaluated_model(self) -> DualEncoder:
        """The averaged weights where an average is kept, else the trained ones."""
        return self.model if self.average is None else cast(DualEncoder, self.average.module)

    def evaluate(self) -> list[SetResult]:
        """Evaluate the final weights on every set and print the table."""
        if not is_main() or not self.config.eval.sets:
            return []
        results = self.evaluator.evaluate(self.evaluated_model, self.autocast, self.config.folder)
        self.console.print(result_table(results, self.config.eval))
        pictures = ", ".join(str(self.config.folder / f"captions-{r.name}.png") for r in results)
        self.say(f"pictures: {pictures}")
        return results

    def write_weights(self) -> None:
        """Write ``weights.safetensors``: the weights to use, without what training needs beside them."""
        if is_main():
            save = optional_import("safetensors.torch", "train").save_model
            write_atomically(
                self.config.folder / "weights.safetensors", lambda temporary: save(self.evaluated_model, str(temporary))
            )

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint: everything that the next step depends on."""
        if torch.isfinite(self.first_bad_step) or not is_main():
            return  # never put a checkpoint after a bad step in the place of a good one
        state = {
            "step": self.step,
            "config": json.dumps(to_plain(self.config)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "best_top1": self.best_top1,
        }
        self.checkpoints.save(state, best=best)

    def _load(self) -> None:
        state = self.checkpoints.load_latest(map_location=self.device)
        if state is None:
            return
        self.step, self.best_top1 = state["step"], state["best_top1"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _opening(self, last: int) -> str:
        count = sum(p.numel() for p in self.model.parameters()) / 1e6
        where = f"{self.device.type} x {world_size()}, {self.autocast_name}"
        start = f"continuing at step {self.step} of {last}" if self.step else f"{last} steps"
        return (
            f"{self.config.name}: {count:.1f} M parameters on {where}; {self.loader.samples} samples, "
            f"{len(self.loader)} steps an epoch; {start}; folder {self.config.folder}"
        )

    @property
    def autocast_name(self) -> str:
        """The precision of the matrix products, for people."""
        return "bf16" if self.autocast._enabled else "fp32"

    def say(self, message: str) -> None:
        """Tell the person, once over all ranks."""
        if is_main():
            self.console.print(message, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Stop the loader's threads and close the log."""
        self.loader.close()
        if self.log is not None:
            self.log.close()


def evaluate_run(folder: Path, checkpoint: Literal["last", "best"]) -> list[SetResult]:
    """Evaluate a run's last or best checkpoint on its configuration's sets; files go into the run's folder."""
    config = load_config(folder)
    require(len(config.eval.sets) > 0, "eval.sets", config.eval.sets, "at least one set in the run's configuration")
    device = choose_device(config.loop.device)
    checkpoints = CheckpointFolder(folder / "checkpoints", keep=config.loop.keep_checkpoints)
    if checkpoint == "best":
        require(checkpoints.best_path.is_file(), "checkpoint", checkpoint, f"last: {folder} holds no best.pt")
        state: dict[str, Any] | None = load_checkpoint(checkpoints.best_path, map_location=device)
    else:
        state = checkpoints.load_latest(map_location=device)
    if state is None:
        raise InvalidArgument(f"run: got {str(folder)!r}, expected a folder with checkpoints")
    model = DualEncoder(config.model).to(device)
    average = _average(model, config.loop.weight_average)
    if average is not None:
        average.load_state_dict(state["average"])
        model = cast(DualEncoder, average.module)
    else:
        model.load_state_dict(state["model"])
    evaluator = Evaluator(config, Tokenizer(context_length=config.model.text.context_length))
    return evaluator.evaluate(model, build_autocast(config.loop.precision, device), folder)


def _step_seed(seed: int, step: int, of_rank: int) -> int:
    """A 63-bit seed for the step's dropout: three numbers mixed so that no two nearby triples collide."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + of_rank * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)


def _average(model: DualEncoder, decay: float | None) -> AveragedModel | None:
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _parallel(model: DualEncoder, config: TrainConfig, device: torch.device) -> nn.Module:
    """The model as it is called in a step: towers compiled, batch norm synchronised, gradients averaged over ranks."""
    if config.loop.compile:
        model.visual.compile()
        model.text.compile(dynamic=True)
    if world_size() == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _timed(loader: CPULoader) -> Iterator[tuple[Batch, float]]:
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
    require(resume, "out/name", str(config.folder), "a folder without a run in it, or no --no-resume to continue it")
    changed = [d for d in differences(load_config(config.folder), config) if d.split(":")[0] not in FREE_FIELDS]
    require(not changed, "config", changed, f"what {config.folder} was started with, or another --name for a new run")


def _record_run(config: TrainConfig) -> None:
    """Write the resolved configuration, and add versions, commit and command line to ``run.jsonl``."""
    if not is_main():
        return
    plain = json.dumps(to_plain(config), indent=1)
    write_atomically(config.folder / "config.json", lambda temporary: temporary.write_text(plain + "\n"))
    with open(config.folder / "run.jsonl", "a") as file:
        file.write(json.dumps(provenance()) + "\n")


@contextlib.contextmanager
def _process_group(config: TrainConfig) -> Iterator[None]:
    """Join torchrun's process group where there is one."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    device = choose_device(config.loop.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


class _StopRequest:
    """Set by the first SIGINT or SIGTERM."""

    requested = False
    signum = 0


@contextlib.contextmanager
def _stop_requests() -> Iterator[_StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request to stop after this step; a second one acts at once."""
    stop = _StopRequest()

    def note(signum: int, frame: FrameType | None) -> None:
        stop.requested, stop.signum = True, signum
        restore()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
