"""The cost model: time, memory and communication of a training step on accelerators that need not be there.

A part of a step takes ``FLOPs / (peak x matmul) + bytes / (bandwidth x memory)``, matrix products and all else one
after the other; the two constants are calibrated (``Efficiency``, benchmarks/results/plan.md). Counts come from
``rocket_fast.plan`` (fvcore) and ``rocket_fast.volume``. Collectives run in rings at ``LINK`` of their links' speed;
that of the gradients hides behind the backward pass, the embeddings' does not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import get_args

from rocket_fast.config import TrainConfig
from rocket_fast.devices import GIB, Device
from rocket_fast.errors import require
from rocket_fast.exchange import WORKSPACE_MIB, one_sided_pays
from rocket_fast.models.attention import Checkpointing
from rocket_fast.models.heads import BarLIPConfig, SwALIPConfig
from rocket_fast.models.vision import ViTConfig
from rocket_fast.plan import TYPICAL_TOKENS, Cost, cost, unpaired_share
from rocket_fast.volume import Numbers, Part, Style, Volume, volume

LINK = 0.7
"""Part of a link's speed that collectives reach; assumed."""

HOP_SECONDS = 1e-5
"""Latency of a collective for each doubling of the number of devices, about NCCL's for small messages; assumed."""

DDP_BUCKET_MIB = 25.0
"""Gradients that DDP averages at once if not told otherwise, but for a small bucket at first."""

RESERVE = 0.08
"""Part of a device's memory that context, communication buffers and the allocator's gaps take; assumed."""

KERNELS = {False: 60, True: 30}
"""Kernels of a transformer block forward and backward, separate and compiled: counted, roughly, from its operations."""

KERNELS_A_LAYER = 4
"""The same of another layer (its own, one or two backward, an activation)."""

DECODE_SECONDS, VIEW_SECONDS = 7.4e-4, 3.3e-4
"""A core's time to decode a picture of 500 x 375, and to make a view of 224 px (benchmarks/results/loaders.md)."""

SWALIP_MATRICES, SWALIP_PASSES = 3, 30
"""Matrices of M x M that SwALIP's loss keeps of a pair of strong views, and times that it reads or writes one."""


@dataclass(frozen=True)
class Efficiency:
    """The two calibrated constants: what matrix products reach of the peak, and all else of the bandwidth."""

    matmul: float
    memory: float

    def __post_init__(self) -> None:
        for name in ("matmul", "memory"):
            value = getattr(self, name)
            require(0 < value <= 1, f"{name}_efficiency", value, "a number in (0, 1]")


COMPILED = Efficiency(matmul=0.50, memory=0.55)
"""Of compiled towers with fused attention: from ViT-S/16's published 7,716 images/s on an H100, one figure for two
constants."""

WHOLE_RUNS = Efficiency(matmul=0.40, memory=0.25)
"""Of towers run operation by operation: from open_clip's runs on hundreds of A100s and NeMo's on 8 H100s, everything
included that such a run waits for. Neither comes from this project on a GPU; see benchmarks/results/plan.md.
"""


@dataclass(frozen=True)
class Workload:
    """A configuration and its counts, made once."""

    config: TrainConfig
    cost: Cost
    volume: Volume

    @staticmethod
    def of(config: TrainConfig, *, tokens: int = TYPICAL_TOKENS) -> Workload:
        """Count; every caption has ``tokens`` tokens."""
        counted = cost(config, tokens=tokens)
        return Workload(config, counted, volume(config, tokens=counted.tokens))

    @property
    def preparing(self) -> float:
        """Seconds of a CPU core for a sample: decoding its picture (and unpaired ones beside it), making views."""
        decoded = 1 + unpaired_share(self.config)
        return decoded * DECODE_SECONDS + VIEW_SECONDS * self.volume.pixels / (3 * 224**2)

    @property
    def itemsize(self) -> int:
        """Bytes of a computed number: 2 unless the configuration asks for fp32."""
        return 4 if self.config.loop.precision == "fp32" else 2

    @property
    def checkpointing(self) -> Checkpointing:
        """The image tower's policy, or the text tower's where that has no choice."""
        vision = self.config.model.vision
        return vision.checkpointing if isinstance(vision, ViTConfig) else self.config.model.text.checkpointing

    def with_checkpointing(self, policy: Checkpointing) -> Workload:
        """The same with this policy in every tower that has a choice."""
        model = self.config.model
        vision = replace(model.vision, checkpointing=policy) if isinstance(model.vision, ViTConfig) else model.vision
        model = replace(model, vision=vision, text=replace(model.text, checkpointing=policy))
        return replace(self, config=replace(self.config, model=model))


@dataclass(frozen=True, kw_only=True)
class Machines:
    """``count`` devices, and how the towers run on them: compiled (``fused``), without attention weights in memory.

    ``efficiency``: None takes what was calibrated for that.
    """

    device: Device
    count: int = 1
    fused: bool = True
    fused_attention: bool = True
    efficiency: Efficiency | None = None

    def __post_init__(self) -> None:
        require(self.count >= 1, "gpus", self.count, "a number >= 1")

    @property
    def reached(self) -> Efficiency:
        """The constants."""
        return self.efficiency or (COMPILED if self.fused else WHOLE_RUNS)

    def seconds(self, flops: float, moved: float, itemsize: int) -> float:
        """Of so many FLOPs and bytes on each device."""
        products = flops / (self.device.flops(itemsize) * self.reached.matmul)
        return products + moved / (self.device.bandwidth * self.reached.memory)

    def sending(self, sent: float, collectives: int) -> float:
        """Seconds of collectives in which each device sends so many bytes."""
        if self.count == 1:
            return 0.0
        latency = collectives * HOP_SECONDS * math.log2(self.count)
        return latency + sent / (LINK * self.device.link(self.count))


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the end of the forward pass and in the first block's backward, the step's peak.

    ``weights``: parameters, averaged copies and, under autocast, the cast ones. ``loss``: its workspace and all ranks'
    embeddings with their gradients.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    pictures: float
    loss: float

    @property
    def total(self) -> float:
        """All together."""
        return sum(getattr(self, part.name) for part in dataclasses.fields(self))


def memory(workload: Workload, machines: Machines, per_device: int, accumulation: int = 1) -> Memory:
    """Of a step with ``per_device`` samples on each device, in ``accumulation`` micro-batches."""
    figures, loop = workload.cost, workload.config.loop
    narrow = workload.itemsize < 4
    averaged = figures.parameters if loop.weight_average is not None else 0
    kept = 4 * (figures.parameters + figures.momentum_parameters + averaged)
    shards, gathered = (machines.count, _Gathered.of(workload)) if _sharded(workload, machines) else (1, None)
    casts = 2 * narrow * (figures.parameters if gathered is None else gathered.rest)
    whole_gradients = 0.0  # beside the parts: micro-batches' are summed before ranks exchange them
    if gathered is not None:
        whole_gradients = gathered.weights(4) if accumulation == 1 else 4.0 * figures.parameters
    weights = kept / shards + casts + (0 if gathered is None else gathered.weights(workload.itemsize))
    together = 4 * (figures.views > 1)  # views of one size are put side by side
    a_pixel = 2 * 1 + 4 + together + (2 if narrow else 0)  # uint8, the next batch's too; normalised; side by side; cast
    micro = math.ceil(per_device / accumulation)
    return Memory(
        weights=weights,
        gradients=4 * figures.parameters / shards + whole_gradients,
        optimizer=8 * figures.parameters / shards,
        activations=micro * activations(workload, machines),
        pictures=workload.volume.pixels * ((a_pixel - 2) * micro + 2 * per_device),
        loss=_loss_memory(workload, machines, per_device),
    )


@dataclass(frozen=True)
class _Gathered:
    """Parameters under FSDP2: in all ``blocks``, in the ``largest`` one, in the ``rest`` of the model.

    A device has the rest whole, and two blocks at a time: the one that runs and the one that is fetched meanwhile.
    """

    blocks: int
    largest: int
    rest: int

    @staticmethod
    def of(workload: Workload) -> _Gathered:
        found = [part.blocks for part, _ in _parts(workload).values() if part.blocks is not None]
        sizes = [4 * each.width**2 + 2 * each.width * each.mlp_width for each in found]
        blocks = sum(size * each.layers for size, each in zip(sizes, found, strict=True))
        return _Gathered(blocks, max(sizes, default=0), workload.cost.parameters - blocks)

    def weights(self, itemsize: int) -> float:
        """Bytes that are whole at a time; blocks' in numbers of ``itemsize``, the rest's in float32."""
        return 2.0 * itemsize * self.largest + 4.0 * self.rest


def _sharded(workload: Workload, machines: Machines) -> bool:
    return workload.config.loop.parallel == "fsdp" and machines.count > 1


def activations(workload: Workload, machines: Machines) -> float:
    """Bytes a sample: what the towers and heads keep, and what the widest layer's backward pass has beside."""
    style, kept, working = _style(workload, machines), Numbers(), []
    for part, policy in _parts(workload).values():
        kept += part.kept
        working.append(part.working)
        if part.blocks is not None:
            kept += part.blocks.kept(policy, style) * part.blocks.layers
            working.append(part.blocks.working(policy, style))
    return kept.bytes(style.itemsize) + max(each.bytes(style.itemsize) for each in working)


def _style(workload: Workload, machines: Machines) -> Style:
    return Style(fused=machines.fused, fused_attention=machines.fused_attention, itemsize=workload.itemsize)


def _parts(workload: Workload) -> dict[str, tuple[Part, Checkpointing]]:
    counted, text = workload.volume, workload.config.model.text
    return {
        "image tower": (counted.image, workload.checkpointing),
        "text tower": (counted.text, text.checkpointing),
        "heads": (counted.heads, "none"),
    }


def _loss_memory(workload: Workload, machines: Machines, per_device: int) -> float:
    """Workspace; embeddings (theirs, gathered), their gradients and the latter in float32; the companion's."""
    exchange = _Exchange.of(workload, machines, per_device)
    row = exchange.width * exchange.views * (2 * workload.itemsize + 4)
    images, texts = (per_device if exchange.one_sided else exchange.samples) * row, exchange.samples * row
    statistics = exchange.samples * exchange.pairs * 24.0
    return WORKSPACE_MIB * 2**20 + images + texts + statistics + _companion_memory(workload, exchange)


def _companion_memory(workload: Workload, exchange: _Exchange) -> float:
    companion = workload.config.model.companion
    if isinstance(companion, BarLIPConfig):
        return 2 * exchange.views * exchange.samples * companion.out * (2.0 * workload.itemsize + 4)
    if isinstance(companion, SwALIPConfig):
        return 4.0 * SWALIP_MATRICES * (exchange.views - 1) ** 2 * exchange.samples**2
    return 0.0


# --- the loss over devices --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Exchange:
    """The contrastive loss as rocket_fast/exchange.py has it: n ``rows`` of M ``samples``, ``pairs`` of ``views``."""

    rows: int
    samples: int
    views: int
    pairs: int
    width: int
    one_sided: bool
    gradients: bool

    @staticmethod
    def of(workload: Workload, machines: Machines, rows: int) -> _Exchange:
        loss, views = workload.config.loss, workload.cost.views
        pairs, width = 1 + (views - 1) ** 2, workload.config.model.embed_dim
        samples = rows * machines.count
        pays = one_sided_pays(rows, samples, width * pairs, "cuda")
        one_sided = loss.exchange == "one_sided" or (loss.exchange == "auto" and pays)
        return _Exchange(
            rows, samples, views, pairs, width, one_sided and machines.count > 1 and loss.gather_grad, loss.gather_grad
        )

    @property
    def flops(self) -> float:
        """Products of a step on one device: four of N x M x D a pair, six without gradients across devices."""
        if not self.gradients and self.samples > self.rows:
            return 12.0 * self.rows * self.samples * self.width * self.pairs
        rows = self.rows if self.one_sided else self.samples
        return 8.0 * rows * self.samples * self.width * self.pairs

    def sent(self, itemsize: int) -> float:
        """Bytes that a device sends in a step."""
        others = self.samples - self.rows
        side = self.width * self.views * itemsize
        if not self.gradients:
            return 2.0 * others * side
        return 2.0 * others * (side + 8 * self.pairs if self.one_sided else 2 * side)

    @property
    def collectives(self) -> int:
        """How many."""
        return (5 if self.one_sided else 3) if self.gradients else 2


def _companion(workload: Workload, exchange: _Exchange) -> tuple[float, float, float]:
    """FLOPs, bytes moved, and bytes sent by the companion's loss; what its heads cost is counted with the heads."""
    companion, b = workload.config.model.companion, workload.itemsize
    samples, others = exchange.samples, exchange.samples - exchange.rows
    if isinstance(companion, BarLIPConfig):
        least = min(8.0 * samples**2 * companion.out, 6.0 * samples * companion.out**2)
        embeddings = 2 * exchange.views * companion.out
        moved = 10.0 * samples * embeddings * b
        return exchange.pairs * least, moved, 2.0 * others * embeddings * b
    if isinstance(companion, SwALIPConfig):
        strong = (exchange.views - 1) ** 2
        sent = 2.0 * others * exchange.width * (exchange.views - 1) * b * exchange.one_sided
        return 6.0 * strong * samples**2 * exchange.width, 4.0 * SWALIP_PASSES * strong * samples**2, sent
    return 0.0, 0.0, 0.0


# --- a step -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PartOfStep:
    """What one device does in a step for one part: FLOPs, bytes moved to and from its memory, bytes sent; seconds that
    the step takes longer for it.
    """

    name: str
    flops: float = 0.0
    moved: float = 0.0
    sent: float = 0.0
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A training step on ``machines``.

    ``mfu``: FLOPs that the model needs (nothing computed twice) over the peak. ``cores``: CPU cores a device that
    decoding and augmenting keep busy at this rate.
    """

    machines: Machines
    batch: int
    checkpointing: Checkpointing
    accumulation: int
    one_sided: bool
    parts: tuple[PartOfStep, ...]
    memory: Memory
    mfu: float
    cores: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(part.seconds for part in self.parts)

    @property
    def images_per_second(self) -> float:
        """Samples, each in all its views, on all devices together."""
        return self.batch / self.seconds

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.memory.total <= usable(self.machines.device.memory)

    def hours(self, samples: float) -> float:
        """For so many samples."""
        return samples / self.images_per_second / 3600


def usable(memory_bytes: float) -> float:
    """What is left of a device's memory for tensors."""
    return (1 - RESERVE) * memory_bytes


def predict(
    workload: Workload, machines: Machines, batch: int, *, accumulation: int = 1, cores: float | None = None
) -> Prediction:
    """A step on a global ``batch``, in ``accumulation`` micro-batches on each device.

    ``cores``: CPU cores a device that prepare its pictures; None: as many as it takes. Raises ``ValueError`` where a
    batch does not divide evenly.
    """
    require(
        batch % machines.count == 0 and batch >= machines.count,
        "data.batch_size",
        batch,
        f"a multiple of gpus = {machines.count}",
    )
    rows = batch // machines.count
    require(1 <= accumulation <= rows, "accumulation", accumulation, f"1 to {rows}, the samples on a device")
    exchange = _Exchange.of(workload, machines, rows)
    compute = _compute(workload, machines, rows, accumulation)
    parts = [*compute, _loss(exchange, workload, machines), *_companion_part(exchange, workload, machines)]
    parts += _communication(workload, machines, compute, accumulation)
    parts.append(_optimizer(workload, machines))
    parts += _waiting(workload, machines, parts, rows, accumulation, cores)
    seconds = sum(part.seconds for part in parts)
    peak = machines.device.flops(workload.itemsize)
    return Prediction(
        machines=machines,
        batch=batch,
        checkpointing=workload.checkpointing,
        accumulation=accumulation,
        one_sided=exchange.one_sided,
        parts=tuple(parts),
        memory=memory(workload, machines, rows, accumulation),
        mfu=rows * workload.cost.training_flops / (seconds * peak),
        cores=rows / seconds * workload.preparing,
    )


def _compute(workload: Workload, machines: Machines, rows: int, accumulation: int) -> list[PartOfStep]:
    """Towers, heads, averaged encoder: forward and backward; with accumulation one pass forward more."""
    figures, style, replays = workload.cost, _style(workload, machines), int(accumulation > 1)
    forward = {"image tower": figures.image_flops, "text tower": figures.text_flops, "heads": figures.head_flops}
    found = []
    for name, (part, policy) in _parts(workload).items():
        again = replays + (part.blocks is not None and policy == "blocks")
        moved = part.moved * (1 + replays / 3)
        if part.blocks is not None:
            moved += part.blocks.moved(policy, style, replays=replays) * part.blocks.layers
        found.append((name, (3 + again) * forward[name], moved.bytes(style.itemsize)))
    if figures.momentum_parameters:
        moved_bytes = sum(moved for _, _, moved in found) / 3
        found.append(("averaged encoder", figures.momentum_flops, moved_bytes))
    return [
        PartOfStep(
            name=name,
            flops=rows * flops,
            moved=rows * moved,
            seconds=machines.seconds(rows * flops, rows * moved, style.itemsize),
        )
        for name, flops, moved in found
    ]


def _loss(exchange: _Exchange, workload: Workload, machines: Machines) -> PartOfStep:
    """Products, and the embeddings' way there and back, which nothing hides."""
    b = workload.itemsize
    sent = exchange.sent(b) if machines.count > 1 else 0.0
    moved = 8.0 * 2 * exchange.samples * exchange.width * exchange.views * b
    seconds = machines.seconds(exchange.flops, moved, b) + machines.sending(sent, exchange.collectives)
    return PartOfStep(name="contrastive loss", flops=exchange.flops, moved=moved, sent=sent, seconds=seconds)


def _companion_part(exchange: _Exchange, workload: Workload, machines: Machines) -> list[PartOfStep]:
    flops, moved, sent = _companion(workload, exchange)
    if not flops:
        return []
    sent = sent if machines.count > 1 else 0.0
    seconds = machines.seconds(flops, moved, workload.itemsize) + machines.sending(sent, 2 * (sent > 0))
    return [PartOfStep(name="companion's loss", flops=flops, moved=moved, sent=sent, seconds=seconds)]


def _communication(
    workload: Workload, machines: Machines, compute: list[PartOfStep], accumulation: int
) -> list[PartOfStep]:
    """Gradients' all-reduce (FSDP2: all its traffic), as far as computing does not hide it; batch norms' sums."""
    if machines.count == 1:
        return []
    if _sharded(workload, machines):
        return [_gathers(workload, machines, compute, accumulation), *_norm_sums(workload, machines, accumulation)]
    sent = 2 * (machines.count - 1) / machines.count * 4.0 * workload.cost.parameters
    bucket = (workload.config.loop.bucket_mib or DDP_BUCKET_MIB) * 2**20  # the last one, which nothing hides
    whole = machines.sending(sent, math.ceil(sent / 2 / bucket))
    last = whole * min(1.0, bucket / (4.0 * workload.cost.parameters))
    backward = 2 / 3 * sum(part.seconds for part in compute) / accumulation
    reduce = PartOfStep(name="gradients' all-reduce", sent=sent, seconds=max(last, whole - backward))
    return [reduce, *_norm_sums(workload, machines, accumulation)]


def _gathers(workload: Workload, machines: Machines, compute: list[PartOfStep], accumulation: int) -> PartOfStep:
    """FSDP2: parameters are gathered for every forward and backward pass, gradients scattered once.

    All of the step's computing hides it, but for the first block's parameters.
    """
    gathered, passes = _Gathered.of(workload), 2 if accumulation == 1 else 3 * accumulation
    share = (machines.count - 1) / machines.count
    once = workload.itemsize * gathered.blocks + 4.0 * gathered.rest
    sent = share * (passes * once + 4.0 * workload.cost.parameters)
    blocks = gathered.blocks / max(1, gathered.largest)
    whole = machines.sending(sent, math.ceil((passes + 1) * blocks))
    first = machines.sending(share * workload.itemsize * gathered.largest, 1)
    hidden = sum(part.seconds for part in compute)
    return PartOfStep(name="parameters and gradients", sent=sent, seconds=max(first, whole - hidden))


def _norm_sums(workload: Workload, machines: Machines, accumulation: int) -> list[PartOfStep]:
    norms = sum(part.batch_norms for part, _ in _parts(workload).values())
    passes = 2 if accumulation == 1 else 3 * accumulation  # forward and backward; in micro-batches forward once more
    seconds = machines.sending(0.0, passes * norms)
    return [PartOfStep(name="batch norms' sums", seconds=seconds)] if norms else []


def _optimizer(workload: Workload, machines: Machines) -> PartOfStep:
    """AdamW reads four numbers and writes three; norm, averages and casts of the weights take the rest."""
    figures = workload.cost
    averaged = figures.momentum_parameters + (workload.config.loop.weight_average is not None) * figures.parameters
    casts = 6 * figures.parameters if workload.itemsize < 4 else 0
    shards = machines.count if _sharded(workload, machines) else 1
    moved = ((28.0 + 4) * figures.parameters + 12 * averaged) / shards + casts
    return PartOfStep(name="optimizer", moved=moved, seconds=machines.seconds(0, moved, workload.itemsize))


def _waiting(
    workload: Workload, machines: Machines, parts: list[PartOfStep], rows: int, accumulation: int, cores: float | None
) -> Iterator[PartOfStep]:
    """What the device waits for beside: kernels that cannot be started as fast as they end, and pictures."""
    kernels = 0
    for part, _ in _parts(workload).values():
        blocks = 0 if part.blocks is None else part.blocks.layers * KERNELS[machines.fused]
        kernels += blocks + KERNELS_A_LAYER * part.layers
    starting = machines.device.kernel_seconds * kernels * (accumulation if accumulation == 1 else 4 / 3 * accumulation)
    busy = sum(part.seconds for part in parts)
    if starting > busy:
        yield PartOfStep(name="starting kernels", seconds=starting - busy)
    if cores is not None:
        waiting = rows * workload.preparing / cores - max(busy, starting)
        if waiting > 0:
            yield PartOfStep(name="waiting for pictures", seconds=waiting)


# --- what fits --------------------------------------------------------------------------------------------------------

POLICIES: tuple[Checkpointing, ...] = get_args(Checkpointing)


def largest_batch(workload: Workload, machines: Machines, memory_bytes: float | None = None) -> int:
    """Samples on each device that fit at once, under the workload's checkpointing; 0 where none does.

    ``memory_bytes``: of the device, its own by default.
    """
    limit = usable(machines.device.memory if memory_bytes is None else memory_bytes)
    return _last(lambda rows: memory(workload, machines, rows).total <= limit)


def _last(fits: Callable[[int], bool]) -> int:
    """The largest number from 1 that fits, where smaller ones fit as well; 0 for none."""
    low, high = 0, 1
    while high < 2**24 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fitting(workload: Workload, machines: Machines, batch: int, *, cores: float | None = None) -> Prediction | None:
    """The fastest way to take this batch: any checkpointing, in as few micro-batches as fit; None if nothing fits."""
    found = []
    for policy in POLICIES:
        changed = workload.with_checkpointing(policy)
        accumulation = _least_accumulation(changed, machines, batch // machines.count, machines.device.memory)
        if accumulation is not None:
            found.append(predict(changed, machines, batch, accumulation=accumulation, cores=cores))
    return min(found, key=lambda each: each.seconds, default=None)


def _least_accumulation(workload: Workload, machines: Machines, rows: int, memory_bytes: float) -> int | None:
    """Micro-batches of equal size, as few as fit."""
    divisors = (count for count in range(1, rows + 1) if rows % count == 0)
    fits = (c for c in divisors if memory(workload, machines, rows, c).total <= usable(memory_bytes))
    return next(fits, None)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What fits by the cost model, each by itself: a smaller global batch; a checkpointing at the same batch; micro-
    batches under the same checkpointing; 0 or None where that alone does not help. ``needed``, ``available``: bytes.
    """

    needed: float
    available: float
    batch: int
    checkpointing: Checkpointing | None
    accumulation: int | None

    def __str__(self) -> str:
        """For an error message."""
        ways = []
        if self.checkpointing is not None:
            ways.append(f"checkpointing {self.checkpointing} in the towers")
        if self.accumulation is not None:
            ways.append(f"loop.accumulation {self.accumulation}")
        if self.batch:
            ways.append(f"data.batch_size {self.batch}")
        need = f"the cost model expects {self.needed / GIB:.1f} GiB of {self.available / GIB:.1f} GiB"
        return f"{need}; what should fit: {' or '.join(ways) if ways else 'nothing on this device'}"


def advice(
    config: TrainConfig, memory_bytes: float, world_size: int, *, device: Device, tokens: int = TYPICAL_TOKENS
) -> Advice:
    """For a run that does not fit: what would, on ``world_size`` devices with so many bytes each."""
    workload = Workload.of(config, tokens=tokens)
    machines = Machines(device=device, count=world_size, fused=config.loop.compile != "off")
    rows = max(1, config.data.batch_size // world_size)
    policies = POLICIES[POLICIES.index(workload.checkpointing) + 1 :]
    helping = (p for p in policies if largest_batch(workload.with_checkpointing(p), machines, memory_bytes) >= rows)
    return Advice(
        needed=memory(workload, machines, rows).total,
        available=usable(memory_bytes),
        batch=min(rows, largest_batch(workload, machines, memory_bytes)) * world_size,
        checkpointing=next(helping, None),
        accumulation=_least_accumulation(workload, machines, rows, memory_bytes),
    )


def sweep(
    workload: Workload, machines: Machines, batch: int, *, most: int = 4096, cores: float | None = None
) -> list[Prediction]:
    """The batch on 1, 2, 4 ... ``most`` devices, each in the fastest way that fits; what cannot be is left out."""
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most and batch % 2**power == 0]
    found = (fitting(workload, replace(machines, count=count), batch, cores=cores) for count in counts)
    return [each for each in found if each is not None]
