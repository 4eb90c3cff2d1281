"""The contrastive losses, forward and backward, against every peer in the same process and the floor of products.

Ours is the row that pytest-benchmark times; before each of its rounds every peer takes one of its own. Medians, ratios
(the median over rounds of a round's ratio), memory and the targets stand in the table at the end and in ``extra_info``.
Without timing (``--benchmark-disable``) the sizes are tiny.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peers
import pytest
import torch
from peers import CUDA_CASES, FASTER, FLOORS, MEMORY, OURS, SLOWER, TO_FLOOR, Case, Figures, Problem, Target

CLIP_PEERS = ("open_clip", "open_clip, torch.compile", "dense", "linear_cross_entropy", *FLOORS)

CPU = {
    "clip-8192": Case(
        Problem("clip", 8192, 512),
        CLIP_PEERS,
        rounds=7,
        targets=(Target(FASTER, 2.2, "open_clip"), TO_FLOOR, Target(MEMORY, 128)),
        memory=(OURS, "open_clip", "linear_cross_entropy"),
    ),
    "clip-32768": Case(
        Problem("clip", 32768, 512), ("floor, tiled",), rounds=2, targets=(TO_FLOOR, Target(MEMORY, 256))
    ),
    "clip-256": Case(Problem("clip", 256, 256), CLIP_PEERS, rounds=200, targets=(Target(SLOWER, 1.0, "dense"),)),
    "multiview-2048": Case(
        Problem("multiview", 2048, 256, views=2),
        ("dense, as the original", "dense reference", *FLOORS),
        rounds=15,
        targets=(Target(FASTER, 2.5, "dense, as the original"), TO_FLOOR),
        memory=(OURS, "dense, as the original"),
    ),
    "siglip-8192": Case(
        Problem("siglip", 8192, 512),
        ("open_clip", "open_clip, torch.compile", *FLOORS),
        rounds=7,
        memory=(OURS, "open_clip"),
    ),
}


def tiny(case: Case) -> Case:
    """The same way through in a moment: small, once, and no compiler."""
    names = [name for name in case.peers if "compile" not in name]
    return replace(case, problem=replace(case.problem, rows=96, width=24), peers=names, rounds=1, memory=())


def run(benchmark: Any, case: Case, figures: Figures) -> None:
    """Time peers and ours in turns, then take the memory."""
    steps = figures.prepare([*case.peers, OURS])
    ours = steps.pop(OURS)

    def others() -> None:
        peers.interleaved(steps, figures, rounds=1)

    benchmark.pedantic(lambda: figures.seconds[OURS].append(peers.timed(ours)), setup=others, rounds=case.rounds)
    peers.measure_memory(case, figures)


def record(benchmark: Any, case: Case, figures: Figures) -> None:
    benchmark.group = str(figures.problem)
    benchmark.extra_info.update(
        median_ms={name: round(figures.median(name), 4) for name, rounds in figures.seconds.items() if rounds},
        extra_mib={name: round(value, 1) for name, value in figures.extra_mib.items()},
        skipped=figures.skipped,
        targets=[target.verdict(figures) for target in case.targets],
    )


@pytest.mark.parametrize("name", [*CPU, *CUDA_CASES])
def test_contrastive(name: str, benchmark: Any, summary: list) -> None:
    case = (CPU | CUDA_CASES)[name]
    if name in CUDA_CASES and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = tiny(case) if benchmark.disabled else case
    figures = Figures(case.problem)
    run(benchmark, case, figures)
    record(benchmark, case, figures)
    if not benchmark.disabled:
        summary.append((figures, case.targets))


def test_memory_is_measured_in_a_process_of_its_own(benchmark: Any) -> None:
    """32 MiB of similarities are seen where they are made."""
    problem = Problem("clip", 2048, 16)
    dense = benchmark.pedantic(peers.extra_mib, ("dense", problem), rounds=1)
    assert dense is None or dense > 32
