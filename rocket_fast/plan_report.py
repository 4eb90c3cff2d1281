"""``rocket-fast plan``: the cost model's figures as tables of 80 columns, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rocket_fast.config import TrainConfig, to_plain
from rocket_fast.devices import GIB, known_device
from rocket_fast.errors import optional_import, require
from rocket_fast.files import write_atomically
from rocket_fast.predict import (
    POLICIES,
    Efficiency,
    Machines,
    Memory,
    Prediction,
    Workload,
    fitting,
    largest_batch,
    memory,
    predict,
    sweep,
    usable,
)

SAMPLES = {"cc3m": 3_318_333, "cc12m": 12_423_374, "yfcc": 14_689_580, "29m": 30_431_287}
"""Pairs of the recipes' data as published (Sharma et al. 2018, Changpinyo et al. 2021, OpenAI's list of YFCC100M; all
three); what can still be downloaded is less."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to predict beside the configuration; fields as the command's options."""

    preset: str
    gpu: str = "h100"
    gpus: int = 8
    tokens: int
    samples: int | None = None
    cores: float | None = None
    matmul_efficiency: float | None = None
    memory_efficiency: float | None = None
    sweep: bool = False
    picture: Path | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        require(self.samples is None or self.samples >= 1, "samples", self.samples, "a number >= 1")
        require(self.cores is None or self.cores > 0, "cores", self.cores, "a number > 0")
        expected = "a file name that ends with .png or .svg"
        drawable = self.picture is None or self.picture.suffix in (".png", ".svg")
        require(drawable, "picture", str(self.picture), expected)

    def machines(self, config: TrainConfig) -> Machines:
        """On which towers are compiled where the configuration compiles them."""
        machines = Machines(device=known_device(self.gpu), count=self.gpus, fused=config.loop.compile != "off")
        reached = machines.reached
        efficiency = Efficiency(self.matmul_efficiency or reached.matmul, self.memory_efficiency or reached.memory)
        return replace(machines, efficiency=efficiency)

    @property
    def known_samples(self) -> int | None:
        """Those given, or the published number of the preset's data."""
        data = [count for name, count in SAMPLES.items() if name in self.preset.split("-")]
        return self.samples if self.samples is not None else next(iter(data), None)


def run_plan(request: PlanRequest, config: TrainConfig, console: Console) -> None:
    """Predict, print, and write what was asked for."""
    if request.picture is not None:
        optional_import("matplotlib", "report")  # before anything is counted
    machines = request.machines(config)
    workload = Workload.of(config, tokens=request.tokens)
    context = config.model.text.context_length
    require(request.tokens <= context, "tokens", request.tokens, f"at most model.text.context_length = {context}")
    parts = config.loop.accumulation
    prediction = predict(workload, machines, config.data.batch_size, accumulation=parts, cores=request.cores)
    if not prediction.fits:  # as configured; then the fastest way that does, if there is one
        prediction = fitting(workload, machines, config.data.batch_size, cores=request.cores) or prediction
    console.print(_step_table(config, prediction))
    console.print(_summary(request, config, prediction))
    console.print(_memory_table(workload, machines, config.data.batch_size))
    wanted = request.sweep or request.picture is not None
    rows = sweep(workload, machines, config.data.batch_size, cores=request.cores) if wanted else []
    if rows:
        console.print(_sweep_table(rows, _all_samples(request, config)))
    if request.picture is not None:
        _draw(rows, config, request.picture)
        console.print(f"picture: {request.picture}", highlight=False, soft_wrap=True, markup=False)
    if request.json is not None:
        figures = {"prediction": record(prediction), "sweep": [record(each) for each in rows]}
        text = json.dumps(figures, indent=1) + "\n"
        write_atomically(request.json, lambda temporary: temporary.write_text(text))


def record(prediction: Prediction) -> dict[str, Any]:
    """All figures as JSON values: bytes, seconds, FLOPs, images (samples) per second."""
    own = {name: getattr(prediction, name) for name in ("seconds", "images_per_second", "fits")}
    return to_plain(prediction) | own | {"memory_total": prediction.memory.total}


def _all_samples(request: PlanRequest, config: TrainConfig) -> float | None:
    return None if request.known_samples is None else float(request.known_samples * config.loop.epochs)


# --- tables -----------------------------------------------------------------------------------------------------------


def _step_table(config: TrainConfig, prediction: Prediction) -> Table:
    machines = prediction.machines
    title = f"{config.name} on {machines.count} x {machines.device.name}: a step of {prediction.batch} samples"
    table = Table(title=title)
    table.add_column("on each GPU")
    for name in ("TFLOP", "GB moved", "GB sent", "ms", "%"):
        table.add_column(name, justify="right")
    for part in prediction.parts:
        amounts = (_amount(part.flops / 1e12), _amount(part.moved / 1e9), _amount(part.sent / 1e9))
        share = f"{100 * part.seconds / prediction.seconds:.1f}"
        table.add_row(part.name, *amounts, _amount(1e3 * part.seconds), share)
    return table


def _amount(value: float) -> str:
    """Three digits, or nothing for nothing."""
    if value == 0:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _summary(request: PlanRequest, config: TrainConfig, prediction: Prediction) -> Table:
    machines, table = prediction.machines, Table(show_header=False)
    reached = machines.reached
    rate, count = prediction.images_per_second, machines.count
    how = f"{'compiled' if machines.fused else 'not compiled'}, {_way(prediction)}"
    rows = {
        "samples per second": f"{rate:,.0f}, {rate / count:,.0f} a GPU; {config_views(config)} each",
        "step, MFU": f"{1e3 * prediction.seconds:,.1f} ms, {100 * prediction.mfu:.1f}% of the dense peak",
        "how": f"{how}; captions of {request.tokens} tokens",
        "CPU cores a GPU": f"{prediction.cores:.1f} busy with decoding and augmenting",
        "efficiency assumed": f"{reached.matmul:.2f} of products' peak, {reached.memory:.2f} of the bandwidth",
    }
    samples = request.known_samples
    if samples is None:
        rows["a million samples"] = f"{prediction.hours(1e6):.2f} hours (--samples N for epochs)"
    else:
        epoch = prediction.hours(samples)
        total = epoch * config.loop.epochs
        rows["an epoch"] = f"{epoch:.2f} hours, of {samples:,} samples"
        rows[f"{config.loop.epochs} epochs"] = f"{total:,.1f} hours, {total * count:,.0f} GPU hours"
    for subject, figure in rows.items():
        table.add_row(subject, figure)
    return table


def config_views(config: TrainConfig) -> str:
    """How many views a sample has, in words."""
    views = len(config.image.views)
    return f"{views} views" if views > 1 else "one view"


def _memory_table(workload: Workload, machines: Machines, batch: int) -> Table:
    """What a step takes under every checkpointing, and the most that fits at once."""
    rows = batch // machines.count
    available = usable(machines.device.memory) / GIB
    table = Table(title=f"{rows} samples on each GPU, of {available:.1f} GiB", min_width=58)
    policies = [(policy, workload.with_checkpointing(policy)) for policy in POLICIES]
    table.add_column("checkpointing")
    for policy, _ in policies:
        table.add_column(policy, justify="right")
    parts = [memory(changed, machines, rows) for _, changed in policies]
    for each in dataclasses.fields(Memory):
        table.add_row(f"{each.name}, GiB", *(f"{getattr(part, each.name) / GIB:.2f}" for part in parts))
    table.add_row("together, GiB", *(f"{part.total / GIB:.1f}" for part in parts), end_section=True)
    table.add_row("largest batch a GPU", *(f"{largest_batch(changed, machines):,}" for _, changed in policies))
    return table


def _way(prediction: Prediction) -> str:
    """How the memory is made to suffice."""
    parts = f" in {prediction.accumulation} micro-batches" if prediction.accumulation > 1 else ""
    lack = "" if prediction.fits else ", which does not fit"
    return f"checkpointing {prediction.checkpointing}{parts}{lack}"


def _sweep_table(rows: Sequence[Prediction], samples: float | None) -> Table:
    table = Table(title=f"the same {rows[0].batch} samples a step, each in the fastest way that fits")
    for name in ("GPUs", "ms a step", "samples/s", "efficiency", "GiB", "hours"):
        table.add_column(name, justify="right")
    table.add_column("checkpointing")
    table.caption = "efficiency: samples/s a GPU beside the best row's"
    best = max(each.images_per_second / each.machines.count for each in rows)
    for each in rows:
        rate, count = each.images_per_second, each.machines.count
        way = each.checkpointing + (f", {each.accumulation} parts" if each.accumulation > 1 else "")
        hours = "" if samples is None else f"{each.hours(samples):,.1f}"
        efficiency = f"{100 * rate / count / best:.0f}%"
        row = (f"{1e3 * each.seconds:,.1f}", f"{rate:,.0f}", efficiency, f"{each.memory.total / GIB:.1f}", hours)
        table.add_row(str(count), *row, way)
    return table


# --- the picture ------------------------------------------------------------------------------------------------------

_KINDS = {
    "towers, heads": ("image tower", "text tower", "heads", "averaged encoder"),
    "losses": ("contrastive loss", "companion's loss"),
    "communication": ("gradients' all-reduce", "batch norms' sums"),
    "optimizer": ("optimizer",),
    "starting kernels": ("starting kernels",),
    "pictures": ("waiting for pictures",),
}
_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9c6b4e", "#97bbf5")


def _draw(rows: Sequence[Prediction], config: TrainConfig, path: Path) -> None:
    """Samples per second over GPUs beside the ideal, and where a step's time goes."""
    figures = optional_import("matplotlib.figure", "report")
    figure = figures.Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = [each.machines.count for each in rows]
    rates = [each.images_per_second for each in rows]
    best = max(rate / count for rate, count in zip(rates, counts, strict=True))
    ideal = [best * count for count in counts]
    left.loglog(counts, ideal, color="#999999", linestyle="--", linewidth=1, label="ideal")
    left.loglog(counts, rates, color=_COLOURS[0], marker="o", markersize=4, label="predicted")
    left.set(xlabel="GPUs", ylabel="samples per second", title="throughput", xticks=counts, xticklabels=counts)
    left.minorticks_off()
    left.grid(alpha=0.25)
    left.legend(frameon=False)
    bottom = [0.0] * len(rows)
    for (kind, names), colour in zip(_KINDS.items(), _COLOURS, strict=True):
        shares = [100 * sum(p.seconds for p in each.parts if p.name in names) / each.seconds for each in rows]
        if not any(shares):
            continue
        right.bar(range(len(rows)), shares, bottom=bottom, color=colour, label=kind, width=0.8)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    right.set(xlabel="GPUs", ylabel="% of a step", title="where a step's time goes", ylim=(0, 100))
    right.set_xticks(range(len(rows)), [str(count) for count in counts])
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (left, right):
        axes.tick_params(axis="x", labelrotation=60, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    name = rows[0].machines.device.name
    figure.suptitle(f"{config.name}, {rows[0].batch} samples a step on 1 to {counts[-1]} x {name} (cost model)")
    kind = path.suffix.removeprefix(".")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=130))
