"""SwALIP's and SiamLIP's losses, forward and backward, against their dense twins in the same process.

Ours is the row that pytest-benchmark times; before each of its rounds the twin takes one of its own. The median of the
rounds' ratios and the memory stand in ``extra_info`` and are printed (``-s``). Where the matrices exceed the workspace
the twin is left out: it would take tens of GiB. Without timing (``--benchmark-disable``) the sizes are tiny.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch

from rocket_fast import kernels
from rocket_fast.device import cpu_peak_bytes
from rocket_fast.kernels import reference


@dataclass(frozen=True)
class Case:
    """``views`` tensors (rows, width) on either side; ``wanted``: times faster than the twin, None without a twin."""

    loss: str
    rows: int
    width: int
    views: int
    rounds: int
    wanted: float | None = None


CASES = {
    "swalip-2048": Case("swalip_loss", 2048, 256, views=2, rounds=7, wanted=1.5),
    "swalip-16384": Case("swalip_loss", 16384, 256, views=2, rounds=1),
    "prototypes-4096": Case("swalip_prototypes_loss", 4096, 3000, views=1, rounds=7, wanted=1.0),
    "siamlip-4096": Case("siamlip_loss", 4096, 128, views=3, rounds=21, wanted=1.0),
}
LIMIT_MIB = 256  # beyond the embeddings' copies and gradients, at any number of samples


def step_of(case: Case) -> Callable[[ModuleType], Callable[[], None]]:
    """Forward and backward of a module's loss, on the same numbers for all."""
    generator = torch.Generator().manual_seed(0)
    sides = [
        [torch.randn(case.rows, case.width, generator=generator).requires_grad_() for _ in range(case.views)]
        for _ in range(2)
    ]
    if case.loss == "siamlip_loss":
        others: tuple[Any, ...] = tuple([torch.randn_like(view) for view in side] for side in sides)
    else:
        others = (torch.tensor(10.0, requires_grad=True),)
    leaves = [*sides[0], *sides[1], *others[:1]] if len(others) == 1 else [*sides[0], *sides[1]]

    def of(module: ModuleType) -> Callable[[], None]:
        def run() -> None:
            getattr(module, case.loss)(*sides, *others).backward()
            for leaf in leaves:
                leaf.grad = None

        return run

    return of


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.mark.parametrize("name", CASES)
def test_companion_losses(name: str, benchmark: Any) -> None:
    case = CASES[name]
    if benchmark.disabled:
        case = replace(case, rows=64, width=24, rounds=1)
    of = step_of(case)
    ours, dense = of(kernels), of(reference)
    times: dict[str, list[float]] = {"ours": [], "dense": []}
    peaks = {"ours": cpu_peak_bytes(ours) / 2**20}  # and a first run, which is not timed
    if case.wanted is not None:
        peaks["dense"] = cpu_peak_bytes(dense) / 2**20

    def twin() -> None:
        if case.wanted is not None:
            times["dense"].append(seconds(dense))

    benchmark.pedantic(lambda: times["ours"].append(seconds(ours)), setup=twin, rounds=case.rounds)
    info: dict[str, Any] = {
        "median_ms": {who: round(1e3 * statistics.median(each), 1) for who, each in times.items() if each},
        "peak_mib": {who: round(peak) for who, peak in peaks.items()},
    }
    if case.wanted is not None:
        ratios = [slow / fast for slow, fast in zip(times["dense"], times["ours"], strict=True)]
        info["times_faster"] = round(statistics.median(ratios), 2)
        info["wanted"] = case.wanted
    elif not benchmark.disabled:
        info["wanted"] = f"at most {LIMIT_MIB} MiB beside copies and gradients"
    benchmark.extra_info.update(info)
    print(f"\n{name}: {info}")
