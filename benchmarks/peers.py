"""Whom the losses are timed against, and how: contestants, paired rounds, memory, targets.

Serves test_contrastive.py and gpu_suite.py. A step is one forward and backward; contestants take turns, round by round,
so that whatever else a machine does meets all of them. The floor is the products alone, into memory that is already
there: nothing that does not store the similarities can do less.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import itertools
import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rocket_fast.kernels import clip_loss, multiview_clip_loss, reference, siglip_loss

OURS = "rocket_fast"
MIB = 2**20

Step = Callable[[], object]


class Unavailable(Exception):
    """A contestant that cannot run here; the message says why."""


@dataclass(frozen=True)
class Problem:
    """One size of one loss."""

    loss: Literal["clip", "siglip", "multiview"]
    rows: int
    width: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    views: int = 0
    """Strong views, K, of the multi-view loss."""

    def __str__(self) -> str:
        views = f", K={self.views}" if self.views else ""
        return f"{self.loss}, N={self.rows}, D={self.width}{views}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def pairs(self) -> int:
        """How many N x N blocks of similarities there are."""
        return 1 + self.views**2

    @property
    def products(self) -> int:
        """The fewest products of size N x N x D that give value and gradients without storing the similarities."""
        return 3 if self.loss == "siglip" else 4

    def flop(self) -> float:
        """Floating point operations of the floor."""
        return 2.0 * self.products * self.pairs * self.rows**2 * self.width


def embeddings(problem: Problem, seed: int, normalize: bool) -> Tensor:
    """(N, D), a leaf that wants its gradient."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(problem.rows, problem.width, generator=generator)
    tensor = F.normalize(raw, dim=1) if normalize else raw
    return tensor.to(problem.device, problem.dtype).requires_grad_()


def leaves(problem: Problem) -> list[Tensor]:
    """What the loss is differentiated to: embeddings, then logit scales (and SigLIP's bias)."""
    views = 2 + 2 * problem.views
    normalize = problem.loss != "multiview"
    numbers = {"clip": [1 / 0.07], "siglip": [10.0, -10.0], "multiview": [1 / 0.07, 10.0]}[problem.loss]
    return [
        *(embeddings(problem, seed, normalize) for seed in range(views)),
        *(torch.tensor(value, device=problem.device, requires_grad=True) for value in numbers),
    ]


# --- losses: ours and the peers' --------------------------------------------------------------------------------------


def _peer(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module} is not installed ({extra})") from error


def _compiled(loss: Callable) -> Callable:
    if not torch.cuda.is_available() and not (shutil.which("g++") or shutil.which("clang++")):
        raise Unavailable("torch.compile needs a C++ compiler on the CPU, and there is none")
    torch._dynamo.reset()
    return torch.compile(loss, dynamic=False)


def dense_clip(image_ND: Tensor, text_ND: Tensor, scale: Tensor) -> Tensor:
    """One product and two cross entropies: what one writes without a library."""
    logits_NN = scale * image_ND @ text_ND.T
    labels_N = torch.arange(len(image_ND), device=image_ND.device)
    return (F.cross_entropy(logits_NN, labels_N) + F.cross_entropy(logits_NN.T, labels_N)) / 2


def linear_cross_entropy(image_ND: Tensor, text_ND: Tensor, scale: Tensor, *, options: Any) -> Tensor:
    """torch's chunked cross entropy of a linear map, once in each direction."""
    labels_N = torch.arange(len(image_ND), device=image_ND.device)
    fused = partial(F.linear_cross_entropy, options=options)
    image, text = (scale * image_ND).to(image_ND.dtype), (scale * text_ND).to(text_ND.dtype)
    return (fused(image, text_ND, labels_N) + fused(text, image_ND, labels_N)) / 2


def _linear_cross_entropy(problem: Problem) -> Callable:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    return partial(linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def _inf_cl(problem: Problem) -> Callable:
    if problem.device == "cpu":
        raise Unavailable("inf-cl needs CUDA")
    flash = _peer("inf_cl", "pip install inf-cl").cal_flash_loss
    return lambda image, text, scale: (flash(image, text, scale=scale) + flash(text, image, scale=scale)).mean() / 2


def dense_multiview(image_z: Tensor, text_z: Tensor, *rest: Tensor) -> Tensor:
    """CL2L as the original computes it: two products a pair, a cross entropy and an accuracy of each."""
    *strong, scale, h_scale = rest
    half = len(strong) // 2
    image_z, text_z, *strong = (F.normalize(view) for view in (image_z, text_z, *strong))
    labels_N = torch.arange(len(image_z), device=image_z.device)

    def direction(first: Tensor, second: Tensor, scale: Tensor, smoothing: float) -> Tensor:
        logits_NN = scale * first @ second.T
        with torch.no_grad():
            logits_NN.argmax(dim=1).eq(labels_N).sum()
        return F.cross_entropy(logits_NN, labels_N, label_smoothing=smoothing)

    weak = direction(image_z, text_z, scale, 0.0) + direction(text_z, image_z, scale, 0.0)
    pairs = list(itertools.product(strong[:half], strong[half:]))
    local = sum(direction(x, y, h_scale, 0.1) + direction(y, x, h_scale, 0.1) for x, y in pairs) / len(pairs)
    return (weak + half * local) / (2 + 2 * half)


def multiview(loss: Callable, *views_and_scales: Tensor) -> Tensor:
    """``loss`` is this package's function or its dense twin."""
    image_z, text_z, *strong, scale, h_scale = views_and_scales
    half = len(strong) // 2
    views = (image_z, text_z, scale, strong[:half], strong[half:], h_scale)
    return loss(*views, label_smoothing=0.1, normalize=True)


def _open_clip(name: str) -> Callable:
    return getattr(_peer("open_clip.loss", "pip install open_clip_torch"), name)()


# Name -> a function that makes the loss (of the leaves) for a problem, or raises Unavailable.
LOSSES: dict[str, dict[str, Callable[[Problem], Callable]]] = {
    "clip": {
        OURS: lambda problem: clip_loss,
        "open_clip": lambda problem: _open_clip("ClipLoss"),
        "open_clip, torch.compile": lambda problem: _compiled(_open_clip("ClipLoss")),
        "dense": lambda problem: dense_clip,
        "dense, torch.compile": lambda problem: _compiled(dense_clip),
        "linear_cross_entropy": _linear_cross_entropy,
        "inf-cl": _inf_cl,
    },
    "siglip": {
        OURS: lambda problem: siglip_loss,
        "open_clip": lambda problem: _open_clip("SigLipLoss"),
        "open_clip, torch.compile": lambda problem: _compiled(_open_clip("SigLipLoss")),
    },
    "multiview": {
        OURS: lambda problem: partial(multiview, multiview_clip_loss),
        "dense, as the original": lambda problem: dense_multiview,
        "dense reference": lambda problem: partial(multiview, reference.multiview_clip_loss),
    },
}


# --- floors: the products alone ---------------------------------------------------------------------------------------


class _Floor:
    """Factors, and room for what the products give."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.x_ND, self.y_ND = (embeddings(problem, seed, True).detach() for seed in (0, 1))
        self.d_x_ND, self.d_y_ND = torch.empty_like(self.x_ND), torch.empty_like(self.y_ND)

    def _buffer(self, rows: int, columns: int) -> Tensor:
        return self.x_ND.new_empty(rows, columns)

    def dense(self) -> Step:
        """All similarities at once."""
        size = self.problem.rows**2 * self.x_ND.element_size()
        if size > 4 * 2**30:
            raise Unavailable(f"its similarities alone are {size / 2**30:.0f} GiB")
        s_NN = self._buffer(self.problem.rows, self.problem.rows)

        def step() -> None:
            for _ in range(self.problem.pairs):
                for _ in range(self.problem.products - 2):
                    torch.mm(self.x_ND, self.y_ND.T, out=s_NN)
                torch.mm(s_NN, self.y_ND, out=self.d_x_ND)
                torch.mm(s_NN.T, self.x_ND, out=self.d_y_ND)

        return step

    def tiled(self) -> Step:
        """Tile by tile, through one buffer that stays in the cache."""
        rows = self.problem.rows
        size = (1024, 2048) if self.problem.device == "cpu" else (4096, 4096)
        starts = list(itertools.product(range(0, rows, size[0]), range(0, rows, size[1])))
        tile = self._buffer(*size).flatten()

        def step() -> None:
            for _, (i, j) in itertools.product(range(self.problem.pairs), starts):
                x, y = self.x_ND[i : i + size[0]], self.y_ND[j : j + size[1]]
                s = tile[: len(x) * len(y)].view(len(x), len(y))
                for _ in range(self.problem.products - 2):
                    torch.mm(x, y.T, out=s)
                self.d_x_ND[i : i + size[0]].addmm_(s, y, beta=float(j > 0))
                self.d_y_ND[j : j + size[1]].addmm_(s.T, x, beta=float(i > 0))

        return step


FLOORS: dict[str, Callable[[_Floor], Step]] = {"floor, dense": _Floor.dense, "floor, tiled": _Floor.tiled}


# --- steps ------------------------------------------------------------------------------------------------------------


def step(name: str, problem: Problem) -> Step:
    """One forward and backward of the contestant, or the floor's products; warmed up, the device waited for."""
    bare = FLOORS[name](_Floor(problem)) if name in FLOORS else _differentiated(LOSSES[problem.loss][name], problem)

    def whole() -> None:
        bare()
        if problem.device != "cpu":
            torch.cuda.synchronize()

    try:
        for _ in range(2):  # what is compiled or allocated once is not timed
            whole()
    except torch.OutOfMemoryError as error:
        raise Unavailable("out of memory") from error
    except Exception as error:
        if "torch.compile" in name:
            raise Unavailable(f"torch.compile failed: {str(error).splitlines()[0][:100]}") from error
        raise
    return whole


def _differentiated(make: Callable[[Problem], Callable], problem: Problem) -> Step:
    inputs, loss = leaves(problem), make(problem)

    def run() -> None:
        for leaf in inputs:
            leaf.grad = None
        loss(*inputs).backward()

    return run


def timed(run: Step) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass
class Figures:
    """What was measured of one problem."""

    problem: Problem
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Per contestant, every round's time; round i of all of them was taken together."""
    extra_mib: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def prepare(self, names: Sequence[str]) -> dict[str, Step]:
        """The steps of those that can run here, warmed up."""
        steps = {}
        for name in names:
            try:
                steps[name] = step(name, self.problem)
                self.seconds[name] = []
            except Unavailable as reason:
                self.skipped[name] = str(reason)
        return steps

    def median(self, name: str) -> float:
        """Milliseconds."""
        return 1e3 * statistics.median(self.seconds[name])

    @property
    def floor(self) -> str | None:
        """The faster of the floors that were measured."""
        return min((name for name in FLOORS if self.seconds.get(name)), key=self.median, default=None)

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long ``slow`` takes: the median over the rounds of the round's ratio."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(one / other for one, other in pairs)


def interleaved(steps: dict[str, Step], figures: Figures, rounds: int) -> None:
    """Time all steps, ``rounds`` times, in turns."""
    for _ in range(rounds):
        for name, run in steps.items():
            figures.seconds[name].append(timed(run))


# --- memory -----------------------------------------------------------------------------------------------------------


def extra_mib(name: str, problem: Problem) -> float | None:
    """Peak memory of a step beyond its inputs and their gradients, in MiB; None where the system does not tell.

    CUDA: the allocator's peak. CPU: how far the resident set grows at its peak during one step of a fresh process that
    has done two, all memory freed by then given back; Linux resets its peak on request.
    """
    if problem.device != "cpu":
        return _cuda_extra(name, problem)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_resident_extra, name, problem, torch.get_num_threads()).result()


def _gradient_bytes(problem: Problem) -> int:
    views = 2 + 2 * problem.views
    return views * problem.rows * problem.width * problem.dtype.itemsize


def _cuda_extra(name: str, problem: Problem) -> float:
    inputs, loss = leaves(problem), LOSSES[problem.loss][name](problem)
    for _ in range(2):
        for leaf in inputs:
            leaf.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(*inputs).backward()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - _gradient_bytes(problem)) / MIB


def _resident_extra(name: str, problem: Problem, threads: int) -> float | None:
    torch.set_num_threads(threads)
    inputs, loss = leaves(problem), LOSSES[problem.loss][name](problem)
    for _ in range(2):
        for leaf in inputs:
            leaf.grad = None
        loss(*inputs).backward()
    for leaf in inputs:
        leaf.grad = None
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    loss(*inputs).backward()
    return (_status("VmHWM") - before - _gradient_bytes(problem)) / MIB


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


# --- targets: written beside a figure, never asserted -----------------------------------------------------------------


FASTER, SLOWER, MILLISECONDS, MEMORY = "times faster than", "times the time of", "ms", "MiB extra"


@dataclass(frozen=True)
class Target:
    """A figure that is wanted: one of the four kinds above, against ``peer`` where it is a ratio."""

    kind: str
    limit: float
    peer: str = ""

    def figure(self, figures: Figures) -> float | None:
        """None where it was not measured."""
        peer = figures.floor if self.peer == "floor" else self.peer
        if self.kind == MEMORY:
            return figures.extra_mib.get(OURS)
        if not figures.seconds.get(OURS) or (self.peer and not figures.seconds.get(peer or "")):
            return None
        if self.kind == MILLISECONDS:
            return figures.median(OURS)
        assert peer is not None
        return figures.ratio(peer, OURS) if self.kind == FASTER else figures.ratio(OURS, peer)

    def verdict(self, figures: Figures) -> str:
        """One line: the figure, the target, whether it is met."""
        figure = self.figure(figures)
        at_least = self.kind == FASTER
        wanted = f"target {'>=' if at_least else '<='} {self.limit:g}"
        what = f"{self.kind} {figures.floor or 'the floor' if self.peer == 'floor' else self.peer}".rstrip()
        if figure is None:
            return f"{what}: not measured ({wanted})"
        met = figure >= self.limit if at_least else figure <= self.limit
        return f"{figure:.2f} {what} ({wanted}: {'met' if met else 'MISSED'})"


def measure_memory(case: Case, figures: Figures) -> None:
    """The extra memory of those the case names, as far as they run here and the system tells it."""
    for name in case.memory:
        if name in figures.skipped:
            continue
        measured = extra_mib(name, figures.problem)
        if measured is not None:
            figures.extra_mib[name] = measured


TABLE_HEAD = ("contestant", "median ms", "of ours", "of floor", "extra MiB")


def table(figures: Figures) -> list[tuple[str, str, str, str, str]]:
    """A row per contestant as the head says: time, that as a multiple of ours and of the floor, memory or why not."""
    rows = []
    for name in [*figures.seconds, *figures.skipped]:
        if name in figures.skipped:
            rows.append((name, "-", "-", "-", figures.skipped[name]))
            continue
        measured = bool(figures.seconds[name])
        against_ours = f"{figures.ratio(name, OURS):.2f}" if measured and figures.seconds.get(OURS) else "-"
        floor = figures.floor
        against_floor = f"{figures.ratio(name, floor):.2f}" if measured and floor else "-"
        memory = figures.extra_mib.get(name)
        rows.append(
            (
                name,
                f"{figures.median(name):.2f}" if measured else "-",
                against_ours,
                against_floor,
                "-" if memory is None else f"{memory:.0f}",
            )
        )
    return rows


@dataclass(frozen=True)
class Case:
    """A problem, who takes part beside ours, how often, and what is wanted of it."""

    problem: Problem
    peers: Sequence[str]
    rounds: int
    targets: Sequence[Target] = ()
    memory: Sequence[str] = (OURS,)
    """Whose memory is measured; on the CPU each takes a process of its own."""


TO_FLOOR = Target(SLOWER, 1.20, "floor")
_BF16 = {"dtype": torch.bfloat16, "device": "cuda"}
_CUDA_PEERS = ("open_clip", "dense, torch.compile", "linear_cross_entropy", "inf-cl", *FLOORS)

CUDA_CASES = {
    "cuda-clip-32768": Case(
        Problem("clip", 32768, 512, **_BF16),
        _CUDA_PEERS,
        rounds=15,
        targets=(Target(MILLISECONDS, 9), TO_FLOOR, Target(MEMORY, 286)),  # 300 MB
        memory=(OURS, "open_clip", "linear_cross_entropy", "inf-cl"),
    ),
    "cuda-clip-4096": Case(
        Problem("clip", 4096, 512, **_BF16),
        _CUDA_PEERS,
        rounds=50,
        targets=(Target(SLOWER, 1.0, "dense, torch.compile"),),
        memory=(OURS, "open_clip"),
    ),
    "cuda-clip-8192-fp32": Case(
        Problem("clip", 8192, 512, device="cuda"), ("open_clip", *FLOORS), rounds=15, memory=(OURS, "open_clip")
    ),
    "cuda-multiview-4096": Case(
        Problem("multiview", 4096, 256, views=2, **_BF16),
        ("dense, as the original", *FLOORS),
        rounds=15,
        memory=(OURS, "dense, as the original"),
    ),
    "cuda-siglip-32768": Case(
        Problem("siglip", 32768, 512, **_BF16), ("open_clip", *FLOORS), rounds=10, memory=(OURS, "open_clip")
    ),
}
