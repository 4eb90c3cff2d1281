"""Benchmarks: ``pytest benchmarks/ --benchmark-only``. A peer is timed in the same process, the floor stands beside it.

Every result carries the machine, the versions and the commit, so that a number can be read later.
"""

import sys
from pathlib import Path

import pytest
import torch

from rocket_fast.config import provenance

sys.path.insert(0, str(Path(__file__).parent))  # peers.py, which gpu_suite.py uses as well

SUMMARY = pytest.StashKey[list]()


@pytest.fixture(autouse=True)
def _two_threads():
    """Two threads, as many as the machine the committed results come from has cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def summary(request):
    """Where a benchmark of several contestants leaves (figures, targets) for the table at the end."""
    return request.config.stash.setdefault(SUMMARY, [])


def pytest_terminal_summary(terminalreporter, config):
    import peers

    for figures, targets in config.stash.get(SUMMARY, []):
        terminalreporter.section(str(figures.problem))
        for name, *numbers in (peers.TABLE_HEAD, *peers.table(figures)):
            terminalreporter.write_line(f"{name:26}" + "".join(f"{number:>11}" for number in numbers))
        for target in targets:
            terminalreporter.write_line(target.verdict(figures))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["rocket_fast"] = {k: v for k, v in provenance().items() if k != "command"}
    machine_info["torch"] = {"threads": 2, "capability": torch.backends.cpu.get_cpu_capability()}
