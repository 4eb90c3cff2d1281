"""The configuration of a run as one tree of dataclasses, its JSON, and the record of what exactly was run."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import platform
import subprocess
import sys
import types
import typing
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from rocket_fast.errors import require
from rocket_fast.image_augment import ImageAugmentConfig
from rocket_fast.loaders.base import DataConfig
from rocket_fast.losses import LossConfig
from rocket_fast.models.attention import AttentionName
from rocket_fast.models.clip import CLIPConfig
from rocket_fast.models.heads import MLPHeadConfig, SwALIPConfig
from rocket_fast.models.vision import ConvStemViTConfig, ViTConfig
from rocket_fast.optim import OptimConfig
from rocket_fast.profiling import profile_steps
from rocket_fast.text_augment import TextAugmentConfig
from rocket_fast.version import __version__

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Compile = Literal["off", "towers", "step"]
Parallel = Literal["ddp", "fsdp"]
Tracker = Literal["tensorboard", "wandb"]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train, on what, and how often to look."""

    epochs: int = 32
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after so many steps although the schedule is longer (a dry run); None trains all epochs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA where there is one."""
    precision: Precision = "auto"
    """Autocast type; auto takes bf16 where the hardware multiplies it natively (CUDA sm_80+, CPUs with AMX). fp16, for
    older cards, scales the loss and skips a step whose gradients overflow."""
    attention: AttentionName = "auto"
    """Backend of the transformers' attention; auto takes the first that can (`rocket-fast doctor` says why)."""
    accumulation: int = 1
    """Micro-batches that a process embeds one after the other; loss and gradients are those of the whole batch, for one
    forward pass more and one micro-batch's activations. Batch norm takes each micro-batch's own statistics."""
    parallel: Parallel = "ddp"
    """How several processes hold the model: ddp, whole in each; fsdp, parameters, gradients and AdamW's moments in
    parts (FSDP2; with accumulation gradients are whole), for towers that do not fit otherwise."""
    bucket_mib: float | None = None
    """MiB of gradients that ddp averages over processes at once, beside the rest of the backward pass; None is torch's,
    1 and then 25. Larger buckets wait less often for a slow network, but nothing hides the last one (`rocket-fast plan`
    predicts both)."""
    compile: Compile = "off"
    """What torch.compile compiles: nothing; the towers; or all of the forward pass and, on one process, the loss too.
    The optimizer is torch's fused kernel in any case. With fsdp it is each transformer block."""
    compile_fallback: bool = False
    """Run what torch.compile cannot compile as it is, instead of ending with its error."""
    threads: int | None = None
    """Torch's CPU threads; None takes every core."""
    log_every: int = 20
    """Steps between log records."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is written at the end and on Ctrl-C or SIGTERM as well."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay on disk."""
    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this are written and stay on disk; None keeps the latest only."""
    eval_every_epochs: int = 1
    """Epochs between zero-shot evaluations (the best score keeps best.pt); 0 evaluates at the end only."""
    weight_average: float | None = None
    """Decay per step of an exponential moving average of the weights, used for evaluation; None keeps none."""
    hang_timeout_s: float = 3600.0
    """Seconds from a step to the next, more than a checkpoint takes to write, after which a process writes to stderr
    where all its threads are, and ends; 0 waits on."""
    track: tuple[Tracker, ...] = ()
    """Where records go beside metrics.jsonl: tensorboard, wandb (the extra `track`)."""
    profile: str | None = None
    """START:STOP, such as 10:15: profile these steps into profile-START-STOP.json (a trace) and .txt; None does not."""

    def __post_init__(self) -> None:
        require(self.device in ("auto", "cpu", "cuda"), "loop.device", self.device, "auto, cpu or cuda")
        for name, kind in (("precision", Precision), ("compile", Compile), ("parallel", Parallel)):
            value = getattr(self, name)
            require(value in get_args(kind), f"loop.{name}", value, f"one of {get_args(kind)}")
        names = get_args(AttentionName)
        require(self.attention in names, "loop.attention", self.attention, f"one of {names}")
        require(self.epochs >= 1, "loop.epochs", self.epochs, "a number >= 1")
        require(
            self.max_steps is None or self.max_steps >= 1, "loop.max_steps", self.max_steps, "a number >= 1 or None"
        )
        require(self.threads is None or self.threads >= 1, "loop.threads", self.threads, "a number >= 1 or None")
        require(self.accumulation >= 1, "loop.accumulation", self.accumulation, "a number >= 1")
        bucket = self.bucket_mib
        require(bucket is None or 0 < bucket < math.inf, "loop.bucket_mib", bucket, "a positive number or None")
        require(self.log_every >= 1, "loop.log_every", self.log_every, "a number >= 1")
        require(self.checkpoint_every >= 1, "loop.checkpoint_every", self.checkpoint_every, "a number >= 1")
        require(self.keep_checkpoints >= 1, "loop.keep_checkpoints", self.keep_checkpoints, "a number >= 1")
        every = self.keep_every
        require(every is None or every >= 1, "loop.keep_every", every, "a number >= 1 or None")
        require(self.eval_every_epochs >= 0, "loop.eval_every_epochs", self.eval_every_epochs, "a number >= 0")
        require(self.hang_timeout_s >= 0, "loop.hang_timeout_s", self.hang_timeout_s, "a number >= 0")
        decay = self.weight_average
        require(decay is None or 0 < decay < 1, "loop.weight_average", decay, "a number between 0 and 1, or None")
        trackers = get_args(Tracker)
        known = set(self.track) <= set(trackers) and len(set(self.track)) == len(self.track)
        require(known, "loop.track", self.track, f"some of {trackers}, each once")
        if self.profile is not None:
            profile_steps(self.profile)


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A zero-shot test: pictures in shards, whose captions are the class names."""

    name: str
    """How the result is called."""
    shards: tuple[str, ...]
    """Tar files or patterns; a sample's class is its caption, the classes are all captions that occur."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts, each with one {} for the class name; their embeddings are averaged."""

    def __post_init__(self) -> None:
        require(len(self.shards) > 0, f"shards of evaluation set {self.name}", self.shards, "at least one pattern")
        for template in self.templates:
            require(template.count("{}") == 1, f"template of {self.name}", template, "a text with one {}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to measure; see EvalSet."""

    sets: tuple[EvalSet, ...] = ()
    """Zero-shot tests, the first of which picks the best checkpoint."""
    batch_size: int = 512
    """Pictures encoded at once."""
    z_weight: float = 0.5
    """Weight w of head z in the reported score w cos(z) + (1 - w) cos(h); eval.json has all of 0, 0.1 ... 1."""
    pixel_baseline: bool = False
    """Also classify by the nearest neighbour on 16 x 16 pixels (data must fit in memory)."""

    def __post_init__(self) -> None:
        names = [each.name for each in self.sets]
        require(len(set(names)) == len(names), "eval.sets", names, "a name of its own for each set")
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "a number >= 1")
        on_grid = 0 <= self.z_weight <= 1 and abs(10 * self.z_weight - round(10 * self.z_weight)) < 1e-9
        require(on_grid, "eval.z_weight", self.z_weight, "one of 0, 0.1, 0.2 ... 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run."""

    name: str
    """Name of the run; its folder is out/name."""
    out: Path = Path("runs")
    """Folder that holds the runs."""
    seed: int = 0
    """Seed of initialisation, order, augmentation and dropout."""
    data: DataConfig
    """The training pairs and their batches."""
    image: ImageAugmentConfig
    """The views of a picture."""
    text: TextAugmentConfig | None = None
    """The augmentation of captions; None leaves them as they are."""
    model: CLIPConfig
    """The towers and their heads."""
    loss: LossConfig
    """The contrastive loss."""
    optim: OptimConfig
    """The optimizer and its schedule."""
    loop: LoopConfig
    """Length, device, log and checkpoints."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured."""

    def __post_init__(self) -> None:
        require(self.name not in ("", ".", "..") and "/" not in self.name, "name", self.name, "a plain folder name")
        require(self.seed >= 0, "seed", self.seed, "a number >= 0")
        self._check_views()

    def _check_views(self) -> None:
        """The parts must fit each other: views, heads, picture sizes."""
        strong, head = len(self.image.strong), self.model.h_head
        expected = "a head for the strong views (or no image.strong)"
        require(head is not None or strong == 0, "model.h_head", head, expected)
        expected = "strong views to train head h on (or model.h_head None)"
        require(strong > 0 or not isinstance(head, MLPHeadConfig), "image.strong", self.image.strong, expected)
        self._check_unpaired()
        pairs = strong >= 2 or not isinstance(self.model.companion, SwALIPConfig)
        require(pairs, "image.strong", f"{strong} strong views", "2 or more, for SwALIP to label one by another")
        vision = self.model.vision
        sizes = {"image.weak.size": self.image.weak.size}
        sizes |= {f"image.strong.{number}.size": view.size for number, view in enumerate(self.image.strong)}
        for name, size in sizes.items():
            if isinstance(vision, ViTConfig) and vision.any_size:
                expected = f"a multiple of model.vision.patch_size = {vision.patch_size}"
                require(size % vision.patch_size == 0, name, size, expected)
            elif isinstance(vision, ViTConfig | ConvStemViTConfig):
                side = vision.image_size
                require(size == side, name, size, f"model.vision.image_size = {side}")

    def _check_unpaired(self) -> None:
        """Unpaired pictures need somebody who learns from them, and views to compare."""
        if not self.data.unpaired:
            return
        learns = self.model.companion is not None
        require(learns, "model.companion", None, "a companion to learn from data.unpaired (or no data.unpaired)")
        strong, expected = len(self.image.strong), "2 or more, for the companion to compare in data.unpaired's pictures"
        require(strong >= 2, "image.strong", f"{strong} strong views", expected)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.out / self.name


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as JSON values; each dataclass carries its class name under ``class``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(value: Any, kind: Any = TrainConfig, where: str = "config") -> Any:
    """Rebuild what ``to_plain`` wrote, checked against the type ``kind``; ``where`` names the place in errors."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if value is None and types.NoneType in options:
        return None
    if isinstance(value, dict):
        classes = {option.__name__: option for option in options if isinstance(option, type)}
        name = str(value.get("class"))
        require(name in classes, f"{where}.class", name, f"one of {sorted(classes)}")
        return _dataclass_from_plain(value, classes[name], where)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list):
            kinds = typing.get_args(option)
            repeated = len(kinds) == 2 and kinds[1] is Ellipsis
            each = [kinds[0]] * len(value) if repeated else kinds
            require(len(each) == len(value), where, value, f"{len(each)} values")
            return tuple(from_plain(v, k, f"{where}.{i}") for i, (v, k) in enumerate(zip(value, each, strict=True)))
        if option is Path:
            return Path(value)
    return value


def _dataclass_from_plain(value: dict[str, Any], kind: type, where: str) -> Any:
    hints = _type_hints(kind)
    fields = {name: v for name, v in value.items() if name != "class"}
    unknown = sorted(set(fields) - set(hints))
    require(not unknown, where, unknown, f"only fields of {kind.__name__}: {sorted(hints)}")
    return kind(**{name: from_plain(v, hints[name], f"{where}.{name}") for name, v in fields.items()})


@functools.cache
def _type_hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def load_config(folder: Path) -> TrainConfig:
    """The configuration a run wrote into its folder, an earlier version's too."""
    path = folder / "config.json"
    require(path.is_file(), "run", str(folder), "a run's folder, with its config.json")
    plain = json.loads(path.read_text())
    if isinstance(plain["loop"].get("compile"), bool):  # there was one mode, as long as checkpoints had format 1
        plain["loop"]["compile"] = "towers" if plain["loop"]["compile"] else "off"
    return from_plain(plain)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Lines ``field: old -> new`` for every leaf in which two configurations differ."""

    def leaves(value: Any, at: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for name, item in value.items() for k, v in leaves(item, f"{at}.{name}".lstrip(".")).items()}
        return {at: value}

    before, after = leaves(to_plain(old), ""), leaves(to_plain(new), "")
    names = [*before, *(name for name in after if name not in before)]
    return [f"{n}: {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def provenance() -> dict[str, Any]:
    """Versions, git commit and command line: what a reader needs to run the same again."""
    packages = (
        "torch",
        "numpy",
        "triton",
        "xformers",
        "timm",
        "numba",
        "pillow",
        "simplejpeg",
        "tyro",
        "nvidia-dali-cuda130",
    )
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "rocket_fast": __version__,
        "git_commit": _git_commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }


def _git_commit() -> str | None:
    """Commit of the source tree this package runs from, ``+changes`` if it was edited; None for an installed wheel."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        inside_tree = git("ls-files", "--error-unmatch", __file__)
        changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + changed if inside_tree else None
    except (OSError, subprocess.SubprocessError):
        return None
