"""One command on a CUDA machine: every operation checked against float64 and timed against its peers and the hardware.

    python benchmarks/gpu_suite.py                       # writes benchmarks/results/gpu-NAME.json and .md
    python benchmarks/gpu_suite.py --device cpu --small  # the same way through at tiny sizes, for a machine without one

Needs torch and triton; peers that are not installed become rows that say so. Ends within ``--budget`` seconds: a row
that would not fit any more is skipped and says so. Exit status: 0, or 1 where a check failed, or 2 without CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peers
import photos
import torch
import torch.nn.functional as F
from peers import CUDA_CASES, OURS, Case, Figures, Problem, leaves
from torch import Tensor

from rocket_fast.config import provenance
from rocket_fast.errors import MissingExtra
from rocket_fast.image_augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ViewConfig,
    ViewParams,
    draw,
    recipe_augment,
    strong_view,
    weak_view,
)
from rocket_fast.kernels import (
    clip_loss,
    clip_terms,
    log_sum_exp,
    multiview_clip_loss,
    reference,
    siglip_loss,
    swalip_loss,
)
from rocket_fast.kernels.projector import batch_norm_relu, batch_norm_relu_linear

BUDGET = 220.0
"""Seconds for everything, of the four minutes that the suite may take."""


@dataclass
class Result:
    """One row of the report."""

    kind: str
    name: str
    status: str = "ok"
    """ok, FAILED or skipped."""
    figures: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Row:
    """Something to run: how long it may take at most is an estimate, used to not begin what would not end in time."""

    kind: str
    name: str
    run: Callable[[Machine], Result]
    seconds: float


class Skip(Exception):
    """A row that cannot run here; the message says why."""


@dataclass(frozen=True)
class Machine:
    """Where the suite runs."""

    device: str
    small: bool

    def size(self, rows: int) -> int:
        return max(1, rows // 64) if self.small else rows

    def width(self, width: int) -> int:
        return min(width, 24) if self.small else width

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def empty_cache(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()


# --- exact values and gradients: float64, a block of rows at a time ---------------------------------------------------

# Which texts belong to a block of images: a float64 matrix (rows of the block, M) of zeros and ones.
PositivesOf = Callable[[slice], Tensor]


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Rows a quarter of a GiB at a time."""
    step = max(1, 2**25 // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass
class Gradients:
    """A loss and its derivatives."""

    value: Tensor
    image: Tensor
    text: Tensor
    scale: Tensor

    def named(self) -> dict[str, Tensor]:
        return {"value": self.value, "d image": self.image, "d text": self.text, "d scale": self.scale}


def exact_contrastive(
    x_ND: Tensor,
    y_MD: Tensor,
    s: Tensor,
    weight_N: Tensor,
    weight_M: Tensor,
    positives: PositivesOf | None = None,
    smoothing: float = 0.0,
) -> Gradients:
    """Weighted sum of rows' and columns' cross-entropies (without positives: of their log-sum-exps), all float64."""
    lse_N = x_ND.new_empty(len(x_ND))
    lse_M, count_M = y_MD.new_full((len(y_MD),), -torch.inf), y_MD.new_zeros(len(y_MD))
    for block in blocks(len(x_ND), len(y_MD)):
        logits = s * x_ND[block] @ y_MD.T
        lse_N[block] = logits.logsumexp(1)
        lse_M = torch.logaddexp(lse_M, logits.logsumexp(0))
        if positives is not None:
            count_M += positives(block).sum(0)
    value = weight_N @ lse_N + weight_M @ lse_M
    d_x_ND, d_y_MD, d_s = torch.empty_like(x_ND), torch.zeros_like(y_MD), torch.zeros_like(s)
    for block in blocks(len(x_ND), len(y_MD)):
        logits = s * x_ND[block] @ y_MD.T
        weight = weight_N[block, None]
        gradient = weight * (logits - lse_N[block, None]).exp() + weight_M * (logits - lse_M).exp()
        if positives is not None:
            here = positives(block)
            of_row, of_column = here / here.sum(1, keepdim=True).clamp_min(1), here / count_M.clamp_min(1)
            target = weight * ((1 - smoothing) * of_row + smoothing / len(y_MD))
            target += weight_M * ((1 - smoothing) * of_column + smoothing / len(x_ND))
            value = value - (target * logits).sum()
            gradient -= target
        d_x_ND[block] = s * gradient @ y_MD
        d_y_MD += s * gradient.T @ x_ND[block]
        d_s += (gradient * logits).sum() / s
    return Gradients(value, d_x_ND, d_y_MD, d_s)


def exact_sigmoid(x_ND: Tensor, y_MD: Tensor, s: Tensor, bias: float) -> Gradients:
    """SigLIP's loss with positives on the diagonal, all float64."""
    value, d_s = torch.zeros_like(s), torch.zeros_like(s)
    d_x_ND, d_y_MD = torch.empty_like(x_ND), torch.zeros_like(y_MD)
    for block in blocks(len(x_ND), len(y_MD)):
        cosines = x_ND[block] @ y_MD.T
        sign = torch.full_like(cosines, -1.0)
        sign.diagonal(block.start).fill_(1)
        margin = sign * (s * cosines + bias)
        value += F.softplus(-margin).sum() / len(x_ND)
        gradient = -sign * torch.sigmoid(-margin) / len(x_ND)
        d_x_ND[block] = s * gradient @ y_MD
        d_y_MD += s * gradient.T @ x_ND[block]
        d_s += (gradient * cosines).sum()
    return Gradients(value, d_x_ND, d_y_MD, d_s)


# --- checks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One operation at one size. Images are noisy copies of their texts, so that neither all nor none are right."""

    op: str
    """clip, log_sum_exp, siglip."""
    rows: int
    columns: int
    width: int
    dtype: torch.dtype
    scale: float = 1 / 0.07
    smoothing: float = 0.0
    normalize: bool = False
    row_offset: int = 0
    captions: int = 0
    """Positives an image, as ``targets`` (N, K); 0 takes the diagonal."""
    one_direction: bool = False
    """The loss image to text alone, whose gradient is not that of both."""
    autocast: bool = False
    """float32 embeddings, multiplied in ``dtype`` under autocast."""

    def __str__(self) -> str:
        extras = {"e": self.smoothing, "offset": self.row_offset, "captions": self.captions}
        extra = [f"{name}={value:g}" for name, value in extras.items() if value] + ["raw"] * self.normalize
        extra += ["image to text"] * self.one_direction + ["autocast"] * self.autocast
        extra += [f"s={self.scale:g}"] if self.scale > 20 else []
        sizes = f"{self.op} {self.rows} x {self.columns}, D={self.width}, {str(self.dtype).removeprefix('torch.')}"
        return ", ".join([sizes, *extra])

    def sized(self, machine: Machine) -> Check:
        """The same, as large as the run wants it."""
        sizes = {name: machine.size(getattr(self, name)) for name in ("rows", "columns")}
        offset = machine.size(abs(self.row_offset)) if self.row_offset else 0
        offset = offset if self.row_offset > 0 else -offset
        return replace(self, **sizes, width=machine.width(self.width), row_offset=offset)

    def tensors(self, machine: Machine) -> tuple[Tensor, Tensor, Tensor]:
        """Images, texts, scale: leaves."""
        generator = torch.Generator().manual_seed(0)
        text = torch.randn(self.columns, self.width, generator=generator)
        image = text[torch.arange(self.row_offset, self.row_offset + self.rows) % self.columns]
        image = image + 5 * torch.randn(self.rows, self.width, generator=generator)
        if not self.normalize:
            image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        rounded = (side.to(machine.device, self.dtype) for side in (image, text))
        factors = ((side.float() if self.autocast else side).requires_grad_() for side in rounded)
        return (*factors, torch.tensor(self.scale, device=machine.device, requires_grad=True))

    def targets(self, machine: Machine) -> Tensor | None:
        """Image i belongs to texts i, i + 1, ..."""
        if not self.captions:
            return None
        return (torch.arange(self.rows)[:, None] + torch.arange(self.captions)).to(machine.device) % self.columns

    def positives(self, machine: Machine) -> PositivesOf:
        chosen = self.targets(machine)

        def of(block: slice) -> Tensor:
            out = torch.zeros(block.stop - block.start, self.columns, device=machine.device, dtype=torch.float64)
            if chosen is None:
                out.diagonal(block.start + self.row_offset).fill_(1)
                return out
            return out.scatter_(1, chosen[block], 1.0)

        return of

    def weights(self, machine: Machine) -> tuple[Tensor, Tensor]:
        """log_sum_exp's upstream gradients, float32."""
        generator = torch.Generator().manual_seed(1)
        sizes = (self.rows, self.columns)
        weight_N, weight_M = (torch.rand(size, generator=generator).to(machine.device) / size for size in sizes)
        return weight_N, weight_M

    def clip_weights(self, machine: Machine) -> tuple[Tensor, Tensor]:
        """The loss is the mean over rows and over columns that have positives; float64."""
        positives = self.positives(machine)
        has_N = torch.cat([positives(block).sum(1) for block in blocks(self.rows, self.columns)]) > 0
        has_M = sum(positives(block).sum(0) for block in blocks(self.rows, self.columns)) > 0
        if self.one_direction:
            return has_N.double() / has_N.sum(), torch.zeros_like(has_M).double()
        return has_N.double() / (2 * has_N.sum()), has_M.double() / (2 * has_M.sum())


SIGLIP_BIAS = -10.0


def ours(check: Check, machine: Machine) -> Gradients:
    image, text, scale = check.tensors(machine)
    if check.op == "siglip":
        value = siglip_loss(image, text, scale, SIGLIP_BIAS, normalize=check.normalize)
    elif check.op == "log_sum_exp":
        lse_N, lse_M = log_sum_exp(image, text, scale, normalize=check.normalize)
        weight_N, weight_M = check.weights(machine)
        value = weight_N @ lse_N + weight_M @ lse_M
    else:
        options = {"label_smoothing": check.smoothing, "row_offset": check.row_offset, "normalize": check.normalize}
        with torch.autocast(machine.device, check.dtype, enabled=check.autocast):
            if check.one_direction:
                value = clip_terms(image, text, scale, **options).loss_image
            else:
                value = clip_loss(image, text, scale, targets=check.targets(machine), **options)
    return _differentiated(value, image, text, scale)


def eager(check: Check, machine: Machine) -> Gradients:
    """The same in plain torch, similarities in the inputs' dtype."""
    with torch.autocast(machine.device, check.dtype, enabled=check.autocast):
        value, *leaves = _eager_loss(check, machine)
    return _differentiated(value, *leaves)


def _eager_loss(check: Check, machine: Machine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image, text, scale = check.tensors(machine)
    x, y = (F.normalize(side, dim=1) if check.normalize else side for side in (image, text))
    logits = scale * x @ y.T
    if check.op == "siglip":
        sign = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
        value = -F.logsigmoid(sign * (logits + SIGLIP_BIAS)).sum() / len(x)
    elif check.op == "log_sum_exp":
        weight_N, weight_M = check.weights(machine)
        value = (weight_N * logits.logsumexp(1)).sum() + (weight_M * logits.logsumexp(0)).sum()
    else:
        value = _eager_clip(check, machine, logits)
    return value, image, text, scale


def _eager_clip(check: Check, machine: Machine, logits: Tensor) -> Tensor:
    cross_entropy = partial(F.cross_entropy, label_smoothing=check.smoothing)
    if check.captions == 0:  # rows and columns with a positive
        row, column = max(0, -check.row_offset), max(0, check.row_offset)
        count = min(check.rows - row, check.columns - column)
        index = torch.arange(count, device=logits.device)
        of_rows = cross_entropy(logits[row : row + count], index + column)
        of_columns = cross_entropy(logits.T[column : column + count], index + row)
        return of_rows if check.one_direction else (of_rows + of_columns) / 2
    positives = check.positives(machine)(slice(0, check.rows)).to(logits.dtype)
    soft, soft_T = (side / side.sum(1, keepdim=True) for side in (positives, positives.T))
    return (cross_entropy(logits, soft) + cross_entropy(logits.T, soft_T)) / 2


def exact(check: Check, machine: Machine) -> Gradients:
    """float64 from the same rounded inputs."""
    image, text, scale = (tensor.detach().double().requires_grad_() for tensor in check.tensors(machine))
    x, y = (F.normalize(side, dim=1) if check.normalize else side for side in (image, text))
    with torch.no_grad():
        if check.op == "siglip":
            found = exact_sigmoid(x, y, scale, SIGLIP_BIAS)
        elif check.op == "log_sum_exp":
            found = exact_contrastive(x, y, scale, *(weight.double() for weight in check.weights(machine)))
        else:
            weights = check.clip_weights(machine)
            found = exact_contrastive(x, y, scale, *weights, check.positives(machine), check.smoothing)
    torch.autograd.backward([x, y], [found.image, found.text])
    return replace(found, image=image.grad, text=text.grad)


def _differentiated(value: Tensor, image: Tensor, text: Tensor, scale: Tensor) -> Gradients:
    value.backward()
    assert image.grad is not None
    assert text.grad is not None
    assert scale.grad is not None
    return Gradients(value.detach(), image.grad, text.grad, scale.grad)


def errors(got: Gradients, truth: Gradients) -> dict[str, float]:
    """Relative to the truth, norm by norm; numbers below a thousandth are taken as such."""
    result = {}
    for (name, one), other in zip(got.named().items(), truth.named().values(), strict=True):
        size = other.norm().clamp_min(1e-3 if other.ndim == 0 else 0.0)
        result[name] = float((one.double() - other).norm() / size)
    return result


# Errors that pass in any case: rounding the result to its own dtype, and sums of float32 numbers.
FREE = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4, torch.float32: 5e-7}
# What passes where plain torch, in whose error times 1.1 ours must be, does not fit the memory.
ALONE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 5e-6}


def bounds(check: Check, eager_errors: dict[str, float] | None) -> dict[str, float]:
    """The largest errors that pass."""
    limits = {}
    for name in ("value", "d image", "d text", "d scale"):
        dtype = check.dtype if name in ("d image", "d text") else torch.float32
        if eager_errors is None:
            limits[name] = ALONE[dtype]
        else:
            limits[name] = max(1.1 * eager_errors[name], FREE[dtype])
    return limits


def run_check(check: Check, machine: Machine) -> Result:
    check = check.sized(machine)
    truth, note = exact(check, machine), ""
    found = errors(ours(check, machine), truth)
    machine.empty_cache()
    try:
        plain = errors(eager(check, machine), truth)
    except torch.OutOfMemoryError:
        plain, note = None, "plain torch is out of memory; fixed bounds"
    limits = bounds(check, plain)
    passed = all(found[name] <= limits[name] for name in limits)  # also False for NaN
    figures = {"ours": found, "plain torch": plain, "bounds": limits}
    return Result("check", str(check), "ok" if passed else "FAILED", figures, note)


def run_accuracy_check(check: Check, machine: Machine) -> Result:
    """How often the largest logit is the positive's, the first of equals; every text and image is there twice."""
    check = check.sized(machine)
    image, text, scale = (tensor.detach() for tensor in check.tensors(machine))
    image, text = (side[torch.arange(len(side), device=side.device) // 2] for side in (image, text))
    got = clip_terms(image, text, scale, row_offset=check.row_offset)
    x, y, column = image.double(), text.double(), torch.arange(check.rows, device=image.device) + check.row_offset
    known = (column >= 0) & (column < check.columns)
    right_N = [(x[block] @ y.T).argmax(1) == column[block] for block in blocks(check.rows, check.columns)]
    right_M = [(y[block] @ x.T).argmax(1) for block in blocks(check.columns, check.rows)]
    row = torch.arange(check.columns, device=image.device) - check.row_offset
    exact = {
        "image": 100 * float((torch.cat(right_N) & known).sum() / known.sum()),
        "text": 100 * float((torch.cat(right_M) == row).sum() / known.sum()),
    }
    found = {"image": float(got.accuracy_image), "text": float(got.accuracy_text)}
    # Logits that differ in float32's last digits may change places: a few in ten thousand.
    passed = all(abs(found[side] - exact[side]) <= 0.05 for side in exact)
    figures = {"ours": found, "float64": exact}
    return Result("check", f"accuracy of equals, {check}", "ok" if passed else "FAILED", figures)


def run_multiview_check(dtype: torch.dtype, machine: Machine) -> Result:
    """CL2L, K = 2: pair by pair in float64."""
    problem = Problem("multiview", machine.size(4096), machine.width(256), dtype, machine.device, views=2)

    def differentiated(loss: Callable, inputs: list[Tensor]) -> dict[str, Tensor]:
        value = loss(*inputs)
        value.backward()
        gradients = torch.cat([leaf.grad.flatten().double() for leaf in inputs[:6]])
        return {"value": value.detach(), "d views": gradients, "d scales": torch.stack([s.grad for s in inputs[6:]])}

    inputs = leaves(problem)
    exact_inputs = [leaf.detach().double().requires_grad_() for leaf in inputs]
    truth = differentiated(exact_multiview, exact_inputs)
    rows: dict[str, dict[str, float]] = {}
    for name, loss in (("ours", partial(peers.multiview, multiview_clip_loss)), ("plain torch", peers.dense_multiview)):
        found = differentiated(loss, leaves(problem))
        rows[name] = {key: float((found[key].double() - truth[key]).norm() / truth[key].norm()) for key in truth}
    free = {"value": FREE[torch.float32], "d views": FREE[dtype], "d scales": FREE[torch.float32]}
    limits = {key: max(1.1 * rows["plain torch"][key], free[key]) for key in truth}
    passed = all(rows["ours"][key] <= limits[key] for key in truth)
    return Result("check", str(problem), "ok" if passed else "FAILED", {**rows, "bounds": limits})


def exact_multiview(image_z: Tensor, text_z: Tensor, *rest: Tensor) -> Tensor:
    """CL2L from ``exact_contrastive``; smoothing 0.1 on the strong pairs."""
    *strong, scale, h_scale = rest
    half = len(strong) // 2
    pairs = [(image_z, text_z, scale, 1.0, 0.0)]
    pairs += [(x, y, h_scale, 1 / half, 0.1) for x in strong[:half] for y in strong[half:]]
    return sum(_ExactPair.apply(*pair) for pair in pairs) / (1 + half)


class _ExactPair(torch.autograd.Function):
    """One pair of views: normalised here, differentiated by ``exact_contrastive``."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, s: Tensor, factor: float, smoothing: float) -> Tensor:
        with torch.enable_grad():
            sides = [side.detach().requires_grad_() for side in (image, text)]
            x, y = (F.normalize(side, dim=1) for side in sides)
        weight = x.new_full((len(x),), factor / (2 * len(x)))

        def diagonal(block: slice) -> Tensor:
            out = x.new_zeros(block.stop - block.start, len(x))
            out.diagonal(block.start).fill_(1)
            return out

        found = exact_contrastive(x.detach(), y.detach(), s, weight, weight, diagonal, smoothing)
        torch.autograd.backward([x, y], [found.image, found.text])
        ctx.save_for_backward(*(side.grad for side in sides), found.scale)
        return found.value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*(upstream * gradient for gradient in ctx.saved_tensors), None, None)


# --- repeatability, launches ------------------------------------------------------------------------------------------


def run_repeat(problem: Problem, machine: Machine) -> Result:
    """Value and gradients of four runs, memory between them full of other numbers: the same bits."""
    problem = adapted(problem, machine)

    def once() -> list[Tensor]:
        inputs = leaves(problem)
        value = peers.LOSSES[problem.loss][OURS](problem)(*inputs)
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in inputs)]

    first = once()
    different = 0
    for _ in range(3):
        torch.full((64 * 2**20 // 8,), torch.nan, device=machine.device, dtype=torch.float64)
        different += any(not torch.equal(one, other) for one, other in zip(first, once(), strict=True))
    return Result("repeatable", str(problem), "FAILED" if different else "ok", {"runs that differ": different})


def run_launches(problem: Problem, most: tuple[int, int], machine: Machine) -> Result:
    """Kernels that the forward and the backward put on the device; copies and fills count as well."""
    if machine.device != "cuda":
        raise Skip("launches are counted on CUDA only")
    problem = adapted(problem, machine)
    inputs, loss = leaves(problem), peers.LOSSES[problem.loss][OURS](problem)
    device_events(lambda: loss(*inputs).backward())  # compiles kernels and wakes the profiler
    for leaf in inputs:
        leaf.grad = None
    value: list[Tensor] = []
    kernels = [device_events(lambda: value.append(loss(*inputs))), device_events(lambda: value[0].backward())]
    counts = [len(names) for names in kernels]
    passed = counts[0] <= most[0] and counts[1] <= most[1]
    figures = {"forward": counts[0], "backward": counts[1], "at most": list(most), "kernels": kernels}
    return Result("launches", str(problem), "ok" if passed else "FAILED", figures)


def device_events(run: Callable[[], object]) -> list[str]:
    """Names of what ``run`` puts on the CUDA device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def adapted(problem: Problem, machine: Machine) -> Problem:
    return replace(problem, rows=machine.size(problem.rows), width=machine.width(problem.width), device=machine.device)


# --- ceilings and timings ---------------------------------------------------------------------------------------------


def median_seconds(run: Callable[[], object], machine: Machine) -> float:
    """Ten rounds, after two that are not counted."""

    def synced() -> None:
        run()
        machine.synchronize()

    for _ in range(2):
        synced()
    return sorted(peers.timed(synced) for _ in range(10))[5]


def run_gemm(dtype: torch.dtype, shape: tuple[int, int, int], machine: Machine) -> Result:
    """What the matrix units do, in TFLOP/s: (n, k) times (k, m)."""
    n, k, m = (machine.size(size) for size in shape)
    a = torch.randn(n, k, device=machine.device).to(dtype)
    b = torch.randn(m, k, device=machine.device).to(dtype)
    out = a.new_empty(n, m)
    seconds = median_seconds(lambda: torch.mm(a, b.T, out=out), machine)
    name = f"product {n} x {k} x {m}, {str(dtype).removeprefix('torch.')}"
    return Result("ceiling", name, figures={"TFLOP/s": 2e-12 * n * k * m / seconds, "dtype": str(dtype)})


def run_copy(machine: Machine) -> Result:
    """What the memory does, in GB/s, reading and writing."""
    a = torch.ones(machine.size(2**28), device=machine.device)
    b = torch.empty_like(a)
    seconds = median_seconds(lambda: b.copy_(a), machine)
    return Result("ceiling", f"copy of {a.nbytes / 2**20:.0f} MiB", figures={"GB/s": 2e-9 * a.nbytes / seconds})


def run_timing(case: Case, machine: Machine) -> Result:
    """Ours and the peers in turns, their memory, the targets."""
    names = [name for name in case.peers if not (machine.small and "compile" in name)]
    case = replace(case, problem=adapted(case.problem, machine), rounds=2 if machine.small else case.rounds)
    if machine.small:
        case = replace(case, memory=())
    figures = Figures(case.problem)
    steps = figures.prepare([*names, OURS])
    peers.interleaved(steps, figures, case.rounds)
    del steps
    machine.empty_cache()
    peers.measure_memory(case, figures)
    found = {
        "median ms": {name: figures.median(name) for name in figures.seconds},
        "extra MiB": figures.extra_mib,
        "skipped": figures.skipped,
        "dtype": str(case.problem.dtype),
        "TFLOP/s": 1e-9 * case.problem.flop() / figures.median(OURS),  # of the floor's products
        "targets": [target.verdict(figures) for target in case.targets],
        "table": [peers.TABLE_HEAD, *peers.table(figures)],
    }
    return Result("time", str(case.problem), figures=found)


# --- views ------------------------------------------------------------------------------------------------------------


def view_kernels(machine: Machine) -> tuple[Any, Any]:
    """The modules of the CPU's kernel and of Triton's, where both run."""
    try:
        from rocket_fast.kernels import augment, triton_augment
    except MissingExtra as missing:
        raise Skip(str(missing)) from None
    if machine.device != "cuda" and not triton_augment.INTERPRETED:
        raise Skip("the kernel for views runs on CUDA only (and with TRITON_INTERPRET=1)")
    return augment, triton_augment


def drawn_views(config: ViewConfig, views: int) -> list[ViewParams]:
    """Parameters of views that are whole pictures already."""
    side = config.size
    drawn = (draw(config, side, side, np.random.default_rng((0, index))) for index in range(views))
    return [replace(one, window=(0.0, 0.0, float(side), float(side)), warp=(1.0, 0.0, 0.0, 1.0)) for one in drawn]


def run_views_check(config: ViewConfig, machine: Machine) -> Result:
    """Grey levels before normalisation: within one of the CPU's."""
    augment, triton_augment = view_kernels(machine)
    config = replace(config, size=machine.width(config.size))
    params, side = drawn_views(config, machine.size(128)), config.size
    pictures = np.random.default_rng(0).integers(0, 256, (len(params), 3, side, side), dtype=np.uint8)
    pictures //= np.arange(1, 4, dtype=np.uint8)[np.arange(len(params)) % 3, None, None, None]  # some are dark
    expected = np.empty_like(pictures)
    for picture, one, out in zip(pictures, params, expected, strict=True):
        augment.render_view(np.ascontiguousarray(picture.transpose(1, 2, 0)), one, out)
    images = torch.from_numpy(pictures).to(machine.device)
    normal = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    got = triton_augment.augment_batch(images, params, **normal, out_dtype=FP32).double().cpu()
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in normal.values())
    apart = ((got * std + mean) * 255 - torch.from_numpy(expected)).abs()
    figures = {"levels apart, at most": float(apart.max()), "share apart": float((apart > 0.5).double().mean())}
    passed = figures["levels apart, at most"] < 1.001  # also False for NaN
    return Result("views", f"as on the CPU, {side} pixels", "ok" if passed else "FAILED", figures)


def run_loader_check(machine: Machine) -> Result:
    """Batches of the loader cpu+gpu are the CPU loader's: weak views within rounding, strong ones within 3 levels.

    What the crop's rounding to whole levels becomes in a colour matrix; on photographs 2 (loaders/gpu_views.py).
    """
    view_kernels(machine)
    from rocket_fast.loaders.base import DataConfig
    from rocket_fast.loaders.cpu import CPULoader
    from rocket_fast.loaders.gpu_views import GPUViewsLoader
    from rocket_fast.tokenizer import Tokenizer

    count, mean, std = machine.size(256), *(torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    apart, same = [0.0] * 3, True
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path, _ = photos.shard("small", count=count, folder=Path(folder), real=False)
        data = DataConfig(train=(str(path),), batch_size=count)
        arguments = data, recipe_augment(machine.width(224)), None, Tokenizer()
        expected = stack.enter_context(contextlib.closing(CPULoader(*arguments, seed=0)))
        got = stack.enter_context(
            contextlib.closing(GPUViewsLoader(*arguments, seed=0, device=torch.device(machine.device)))
        )
        for a, b in zip(expected, got, strict=True):
            same = same and a.keys == b.keys and torch.equal(a.valid, b.valid)
            for number, (x, y) in enumerate(zip(a.images, b.images, strict=True)):
                apart[number] = max(apart[number], float(((y.cpu() * std + mean) * 255 - x).abs().max()))
    figures = {"weak, levels apart": apart[0], "strong, levels apart": max(apart[1:])}
    passed = same and apart[0] < 0.001 and max(apart[1:]) < 3
    return Result("views", f"loader cpu+gpu as on the CPU, {count} pictures", "ok" if passed else "FAILED", figures)


def run_views_timing(name: str, config: ViewConfig, machine: Machine) -> Result:
    """uint8 to bfloat16, parameters on the device: bytes that must be moved, a second."""
    _, triton_augment = view_kernels(machine)
    config = replace(config, size=machine.width(config.size))
    params, side = drawn_views(config, machine.size(1024)), config.size
    images = torch.randint(0, 256, (len(params), 3, side, side), dtype=torch.uint8, device=machine.device)
    packed = triton_augment.pack_params(params, side, side).to(machine.device)
    normal = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    seconds = median_seconds(lambda: triton_augment.augment_batch(images, packed, **normal), machine)
    figures = {"ms": 1e3 * seconds, "GB/s": 1e-9 * (images.nbytes + 2 * images.numel()) / seconds}
    return Result("views", f"{len(params)} {name} views, {side} pixels", figures=figures)


# --- batch norm, ReLU and the linear layer after them -----------------------------------------------------------------


def norm_inputs(rows: int, width: int, out: int, dtype: torch.dtype, machine: Machine) -> list[Tensor]:
    """x, weight and bias of the norm, matrix of the layer after it: leaves."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, width), dtype), ((width,), FP32), ((width,), FP32), ((out, width), dtype)
    drawn = [torch.randn(shape, generator=generator).to(machine.device, kind) for shape, kind in shapes]
    drawn[0] += 3
    return [tensor.requires_grad_() for tensor in drawn]


def run_norm_check(dtype: torch.dtype, machine: Machine) -> Result:
    """Output and gradients against torch's layers in float64."""
    rows, width, out = machine.size(4096), machine.width(3001), machine.width(256)
    inputs = norm_inputs(rows, width, out, dtype, machine)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    x, weight, bias, matrix = inputs
    options = {"training": True, "momentum": 0.1, "eps": 1e-5}
    found = batch_norm_relu_linear(x, weight, bias, None, None, matrix, **options)
    x, weight, bias, matrix = exact
    expected = F.linear(F.relu(F.batch_norm(x, None, None, weight, bias, training=True)), matrix)
    upstream = torch.randn_like(expected)
    mine = found.detach(), *torch.autograd.grad(found, inputs, upstream.to(dtype))
    right = expected.detach(), *torch.autograd.grad(expected, exact, upstream)
    names = ("value", "d x", "d weight", "d bias", "d matrix")
    figures = {n: float((a.double() - b).norm() / b.norm()) for n, a, b in zip(names, mine, right, strict=True)}
    passed = all(error < {BF16: 1e-2, FP16: 2e-3, FP32: 1e-5}[dtype] for error in figures.values())  # False for NaN
    return Result("projector", f"as in float64, {str(dtype)[6:]}", "ok" if passed else "FAILED", figures)


def run_norm_timing(dtype: torch.dtype, machine: Machine) -> Result:
    """Norm and ReLU, forward and backward, beside torch's; bytes that ours must move, a second."""
    rows, width = machine.size(4096), machine.width(4096)
    x, weight, bias, _ = norm_inputs(rows, width, 1, dtype, machine)
    upstream, running = torch.randn_like(x), (torch.zeros_like(weight), torch.ones_like(bias))
    options = {"training": True, "momentum": 0.1, "eps": 1e-5}

    def ours() -> Tensor:
        return batch_norm_relu(x, weight, bias, *running, **options)

    def plain() -> Tensor:
        return F.relu(F.batch_norm(x, *running, weight, bias, **options), inplace=True)

    def step(forward: Callable[[], Tensor]) -> float:
        return median_seconds(lambda: torch.autograd.grad(forward(), (x, weight, bias), upstream), machine)

    seconds, theirs = step(ours), step(plain)
    figures = {"ms": 1e3 * seconds, "torch ms": 1e3 * theirs, "GB/s": 8e-9 * x.nbytes / seconds}
    return Result("projector", f"{rows} x {width}, {str(dtype)[6:]}", figures=figures)


# --- SwALIP -----------------------------------------------------------------------------------------------------------


def swalip_inputs(rows: int, width: int, dtype: torch.dtype, machine: Machine) -> list[Tensor]:
    """Two views of images, of texts, and the scale: leaves."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(rows, width, generator=generator)
    drawn = [sample + torch.randn(rows, width, generator=generator) for _ in range(4)]
    views = [F.normalize(view, dim=1).to(machine.device, dtype).requires_grad_() for view in drawn]
    return [*views, torch.tensor(10.0, device=machine.device, requires_grad=True)]


def run_swalip_check(dtype: torch.dtype, machine: Machine) -> Result:
    """Value and gradients against the dense twin in float64, and once more for equal bits."""
    inputs = swalip_inputs(machine.size(3001), machine.width(257), dtype, machine)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]

    def differentiated(loss: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
        value = loss(leaves[:2], leaves[2:4], leaves[4])
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    mine, again = (differentiated(swalip_loss, inputs) for _ in range(2))
    right = differentiated(reference.swalip_loss, exact)
    names = ("value", "d image 0", "d image 1", "d text 0", "d text 1", "d scale")
    figures = {n: float((a.double() - b).norm() / b.norm()) for n, a, b in zip(names, mine, right, strict=True)}
    bound = {BF16: 1e-2, FP32: 3e-5}[dtype]
    passed = all(error < bound for error in figures.values()) and all(map(torch.equal, mine, again))  # False for NaN
    return Result("swalip", f"as in float64, {str(dtype)[6:]}", "ok" if passed else "FAILED", figures)


def run_swalip_timing(rows: int, dtype: torch.dtype, machine: Machine) -> Result:
    """Forward and backward beside the dense twin in float32, where its matrices are no more than 64 MiB each."""
    rows, width = machine.size(rows), machine.width(512)
    inputs = swalip_inputs(rows, width, dtype, machine)

    def step(loss: Callable[..., Tensor], leaves: list[Tensor]) -> float:
        run = lambda: torch.autograd.grad(loss(leaves[:2], leaves[2:4], leaves[4]), leaves)  # noqa: E731
        return median_seconds(run, machine)

    seconds = step(swalip_loss, inputs)
    figures = {"ms": 1e3 * seconds, "products TFLOP/s": 4 * 2e-12 * 11 * rows * rows * width / seconds}
    if rows <= 4096:
        dense = [tensor.detach().float().requires_grad_() for tensor in inputs]
        figures["dense ms"] = 1e3 * step(reference.swalip_loss, dense)
    return Result("swalip", f"{rows} x {width}, {str(dtype)[6:]}", figures=figures)


# --- the list ---------------------------------------------------------------------------------------------------------

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CHECKS = (
    Check("clip", 32768, 32768, 512, BF16),
    Check("clip", 8192, 8192, 512, FP32),
    Check("clip", 8192, 8192, 512, FP32, scale=100.0),
    Check("clip", 8192, 8192, 768, FP16),
    Check("clip", 8192, 8192, 512, BF16, smoothing=0.1, normalize=True),
    Check("clip", 8192, 8192, 512, FP16, scale=100.0, normalize=True),
    Check("clip", 8192, 8192, 1024, BF16, scale=100.0),
    Check("clip", 4096, 16384, 512, BF16, row_offset=4096),
    Check("clip", 5003, 4999, 513, FP32, smoothing=0.1, normalize=True),
    Check("clip", 4999, 5003, 100, BF16),
    Check("clip", 8192, 8192, 512, BF16, captions=3),
    Check("clip", 8192, 8192, 512, FP32, captions=3, smoothing=0.1, normalize=True),
    Check("clip", 16384, 4096, 512, BF16, row_offset=-4096, smoothing=0.1),
    Check("clip", 8192, 8192, 512, BF16, one_direction=True),
    Check("clip", 8192, 8192, 512, BF16, autocast=True),
    Check("clip", 8192, 8192, 512, BF16, autocast=True, captions=2, smoothing=0.1),
    Check("log_sum_exp", 8192, 12288, 512, FP32),
    Check("log_sum_exp", 8192, 12288, 512, BF16, normalize=True),
    Check("siglip", 32768, 32768, 512, BF16, scale=10.0),
    Check("siglip", 8192, 8192, 768, FP32, scale=10.0, normalize=True),
    Check("clip", 65600, 65600, 256, BF16),
)
ACCURACIES = (
    Check("clip", 8192, 8192, 512, BF16),
    Check("clip", 8192, 8192, 512, FP16),
    Check("clip", 8192, 8192, 512, FP32),
    Check("clip", 12288, 8192, 512, BF16, row_offset=-1024),
)
REPEATED = (
    Problem("clip", 32768, 512, BF16),
    Problem("clip", 4099, 512, FP32),
    Problem("siglip", 16384, 512, BF16),
    Problem("multiview", 4096, 256, FP16, views=2),
)
# At most so many for forward and backward.
LAUNCHES = {
    Problem("clip", 4096, 512, BF16): (8, 10),
    Problem("clip", 4096, 512, FP32): (8, 10),
    Problem("multiview", 4096, 256, BF16, views=2): (16, 20),
}
GEMMS = (
    (BF16, (8192, 8192, 8192)),
    (BF16, (32768, 512, 32768)),
    (FP32, (8192, 512, 8192)),
    (torch.float64, (8192, 512, 8192)),
)
CHECKED_VIEWS = tuple(replace(strong_view(size), solarize_prob=0.2, erase_prob=0.2) for size in (224, 225))
TIMED_VIEWS = {
    "weak": weak_view(),
    "strong": strong_view(),
    "strong, sharp": replace(strong_view(), blur_prob=0.0),
    "strong, blurred": replace(strong_view(), blur_prob=1.0),
}


def rows() -> list[Row]:
    """Everything, the quick and the decisive first."""
    result = [Row("ceiling", "product", partial(run_gemm, *gemm), 5) for gemm in GEMMS]
    result += [Row("ceiling", "copy", run_copy, 2)]
    result += [Row("check", str(check), partial(run_check, check), 15) for check in CHECKS[:-1]]
    result += [Row("check", f"accuracy {check}", partial(run_accuracy_check, check), 10) for check in ACCURACIES]
    result += [Row("check", "multiview", partial(run_multiview_check, dtype), 10) for dtype in (BF16, FP32)]
    result += [Row("repeatable", str(problem), partial(run_repeat, problem), 5) for problem in REPEATED]
    result += [Row("launches", str(p), partial(run_launches, p, most), 5) for p, most in LAUNCHES.items()]
    result += [
        Row("views", f"as on the CPU, {view.size}", partial(run_views_check, view), 30) for view in CHECKED_VIEWS
    ]
    result += [Row("views", "loader cpu+gpu as on the CPU", run_loader_check, 30)]
    result += [Row("views", name, partial(run_views_timing, name, view), 5) for name, view in TIMED_VIEWS.items()]
    result += [Row("projector", f"as in float64, {str(d)[6:]}", partial(run_norm_check, d), 10) for d in (BF16, FP32)]
    result += [Row("projector", str(d)[6:], partial(run_norm_timing, d), 5) for d in (BF16, FP32)]
    result += [Row("swalip", f"as in float64, {str(d)[6:]}", partial(run_swalip_check, d), 10) for d in (BF16, FP32)]
    result += [
        Row("swalip", f"{rows}, {str(dtype)[6:]}", partial(run_swalip_timing, rows, dtype), 5)
        for rows, dtype in ((4096, BF16), (16384, BF16), (4096, FP32))
    ]
    result += [Row("time", name, partial(run_timing, case), 40) for name, case in CUDA_CASES.items()]
    result += [Row("check", str(check), partial(run_check, check), 40) for check in CHECKS[-1:]]
    return result


# --- running and reporting --------------------------------------------------------------------------------------------


def run_row(row: Row, machine: Machine, left: float) -> Result:
    """One row's result; what goes wrong in it is a result too."""
    start = time.perf_counter()
    if left < row.seconds:
        return Result(row.kind, row.name, "skipped", note=f"{left:.0f} s are left and it may take {row.seconds:.0f}")
    try:
        result = row.run(machine)
    except (Skip, peers.Unavailable) as reason:
        result = Result(row.kind, row.name, "skipped", note=str(reason))
    except torch.OutOfMemoryError:
        result = Result(row.kind, row.name, "skipped", note="out of memory")
    except Exception as error:  # the other rows still have something to say
        lines = str(error).strip().splitlines() or [""]
        result = Result(row.kind, row.name, "FAILED", note=f"{type(error).__name__}: {lines[0][:200]}")
    machine.empty_cache()
    result.seconds = time.perf_counter() - start
    return result


def add_shares(results: list[Result]) -> None:
    """Our speed as a share of the fastest measured product of the same dtype, or of the copy where memory decides."""
    moved = [result for result in results if "GB/s" in result.figures]
    for copy in (result.figures["GB/s"] for result in moved if result.kind == "ceiling"):
        for figures in (result.figures for result in moved if result.kind in ("views", "projector")):
            figures["of the copy"] = figures["GB/s"] / copy
    ceilings: dict[str, float] = {}
    for figures in (result.figures for result in results if "dtype" in result.figures):
        dtype, speed = figures["dtype"], figures["TFLOP/s"]
        if "targets" not in figures:
            ceilings[dtype] = max(speed, ceilings.get(dtype, 0.0))
        elif dtype in ceilings:
            figures["of the ceiling"] = speed / ceilings[dtype]


def run_all(selected: list[Row], machine: Machine, budget: float) -> list[Result]:
    start, results = time.perf_counter(), []
    with progress(len(selected)) as advance:
        for row in selected:
            results.append(run_row(row, machine, budget - (time.perf_counter() - start)))
            advance(results[-1])
    return results


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[Result], None]]:
    """A bar where rich is installed, a line per row elsewhere; what failed is always a line."""

    def line(result: Result) -> str:
        return f"{result.status:8}{result.kind:11}{result.name}  {result.note}  ({result.seconds:.1f} s)"

    try:
        from rich.progress import Progress
    except ImportError:
        yield lambda result: print(line(result), flush=True)
        return
    with Progress() as bar:
        task = bar.add_task("gpu suite", total=total)

        def advance(result: Result) -> None:
            if result.status == "FAILED":
                bar.console.print(line(result), markup=False)
            bar.update(task, advance=1, description=result.kind)

        yield advance


def describe(machine: Machine) -> dict[str, Any]:
    """The hardware and the software, as far as torch knows them."""
    about: dict[str, Any] = {"device": platform.processor() or platform.machine(), **provenance()}
    if machine.device == "cuda":
        device = torch.cuda.get_device_properties(0)
        about |= {
            "device": device.name,
            "capability": f"{device.major}.{device.minor}",
            "memory GiB": round(device.total_memory / 2**30, 1),
            "multiprocessors": device.multi_processor_count,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return about


def markdown(about: dict[str, Any], results: list[Result]) -> str:
    """The report for people; everything else is in the JSON beside it."""
    versions = {name: version for name, version in about["versions"].items() if version}
    parts = [
        f"# GPU suite: {about['device']}",
        f"Commit {about['git_commit']}, Python {about['python']}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ("" if "cuda" not in about else f", CUDA {about['cuda']}")
        + f". {sum(r.seconds for r in results):.0f} s. Errors are relative, ours / plain torch's in the same dtype.",
    ]
    for kind in dict.fromkeys(result.kind for result in results if result.kind != "time"):
        parts.append(f"## {kind}\n\n| | | |\n|---|---|---|")
        parts[-1] += "".join(f"\n| {r.name} | {r.status} | {_brief(r)} |" for r in results if r.kind == kind)
    for result in results:
        if result.kind == "time":
            parts.append(f"## time: {result.name}\n\n{_timing(result)}")
    return "\n\n".join(parts) + "\n"


def _brief(result: Result) -> str:
    figures = result.figures
    if "bounds" in figures:
        plain = figures["plain torch"] or {}
        cells = [f"{k} {v:.1e} / {plain[k]:.1e}" if plain else f"{k} {v:.1e}" for k, v in figures["ours"].items()]
        return "; ".join(cells + [result.note] * bool(result.note))
    shown = {k: v for k, v in figures.items() if k not in ("kernels", "dtype")}
    cells = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()]
    return ", ".join(cells) or result.note


def _timing(result: Result) -> str:
    if "table" not in result.figures:
        return f"{result.status}: {result.note}"
    head, *body = result.figures["table"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    speed = f"{result.figures['TFLOP/s']:.4g} TFLOP/s of the floor's products"
    if "of the ceiling" in result.figures:
        speed += f", {100 * result.figures['of the ceiling']:.0f}% of the fastest product above"
    return "\n".join(lines) + "\n\n" + "; ".join([speed, *result.figures["targets"]]) + "."


def write(folder: Path, machine: Machine, about: dict[str, Any], results: list[Result]) -> Path:
    """The JSON and the Markdown; the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = ("gpu" if machine.device == "cuda" else "cpu") + ("-small" if machine.small else "")
    name = f"{kind}-" + re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    record = {"about": about, "results": [asdict(result) for result in results]}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    report = folder / f"{name}.md"
    report.write_text(markdown(about, results))
    return report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--only", default="", help="kinds or names that contain this")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu --small runs the same way through at tiny sizes", file=sys.stderr)
        return 2
    machine = Machine(options.device, options.small)
    selected = [row for row in rows() if options.only in f"{row.kind} {row.name}"]
    torch.set_float32_matmul_precision("highest")  # float32 means float32, for the peers too
    results = run_all(selected, machine, options.budget)
    add_shares(results)
    report = write(options.output, machine, describe(machine), results)
    counts = {status: sum(r.status == status for r in results) for status in ("ok", "FAILED", "skipped")}
    print(f"{report}: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
