"""Benchmarks: ``pytest benchmarks/ --benchmark-only``. A peer is timed in the same process, the floor stands beside it.

Every result carries the machine, the versions and the commit, so that a number can be read later.
"""

import pytest
import torch

from rocket_fast.config import provenance


@pytest.fixture(autouse=True)
def _two_threads():
    """Two threads, as many as the machine the committed results come from has cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["rocket_fast"] = {k: v for k, v in provenance().items() if k != "command"}
    machine_info["torch"] = {"threads": 2, "capability": torch.backends.cpu.get_cpu_capability()}
