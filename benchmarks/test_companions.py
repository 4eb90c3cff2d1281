"""The projector block forward and backward against torch's layers in a row and against its matrix products alone.

All in one process, in turns. What is compared is everything but the products: by torch's profiler, and as the
difference from the products alone. Memory kept for backward is counted where autograd saves it. Without timing
(``--benchmark-disable``) the sizes are tiny.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

from rocket_fast.models.heads import MLPHead

ROWS, WIDTHS, ROUNDS = 4096, (512, 4096, 4096, 256), 15


def kept_mib(step: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> float:
    """Activations that a forward pass keeps: its saved tensors but for input and parameters, each once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *parameters)}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = step(x)
    assert out.requires_grad
    return sum(sizes.values()) / 2**20


def products_and_rest(step: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds of a step in matrix products, and in everything else."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    times = [
        (event.key in ("aten::mm", "aten::addmm"), event.self_cpu_time_total / 1e3) for event in profile.key_averages()
    ]
    return sum(time for product, time in times if product), sum(time for product, time in times if not product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projector(dtype: torch.dtype, benchmark: Any) -> None:
    if benchmark.disabled:
        rows, widths, rounds = 64, (8, 32, 32, 4), 1
    else:
        rows, widths, rounds = ROWS, WIDTHS, ROUNDS
    torch.manual_seed(0)
    head = MLPHead(*widths).to(dtype)
    models = {
        "ours": head,
        "torch": nn.Sequential(*copy.deepcopy(list(head))),
        "products": nn.Sequential(*(nn.Linear(a, b, bias=False, dtype=dtype) for a, b in pairwise(widths))),
    }
    x = torch.randn(rows, widths[0], dtype=dtype).requires_grad_()
    upstream = torch.randn(rows, widths[-1], dtype=dtype)

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            models[name].zero_grad()
            models[name](x).backward(upstream)

        return run

    steps, seconds = {name: step(name) for name in models}, {name: [] for name in models}
    for each in steps.values():
        each()

    def others() -> None:
        for name in ("torch", "products"):
            seconds[name].append(peers.timed(steps[name]))

    benchmark.pedantic(lambda: seconds["ours"].append(peers.timed(steps["ours"])), setup=others, rounds=rounds)
    median = {name: round(1e3 * statistics.median(each), 2) for name, each in seconds.items()}
    differences = {
        name: 1e3 * statistics.median(a - b for a, b in zip(seconds[name], seconds["products"], strict=True))
        for name in ("ours", "torch")
    }
    profiled: dict[str, list[tuple[float, float]]] = {"ours": [], "torch": []}
    for name in ("ours", "torch") * min(rounds, 9):
        profiled[name].append(products_and_rest(steps[name]))
    medians = {
        name: [round(statistics.median(part), 2) for part in zip(*each, strict=True)] for name, each in profiled.items()
    }
    kept = {name: kept_mib(models[name], x, list(models[name].parameters())) for name in ("ours", "torch")}
    benchmark.extra_info.update(
        median_ms=median, difference_ms=differences, products_and_rest_ms=medians, kept_mib=kept
    )
    print(f"\n{dtype}: {benchmark.extra_info}")
    assert kept["ours"] <= 0.51 * kept["torch"] or benchmark.disabled
