"""The examples of the losses in other trainers: short, and they run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks/examples"
NEEDS = {
    "open_clip_step": "open_clip",
    "slip_dict_loss": "torch",
    "hf_clip": "transformers",
    "lightning_step": "lightning",
}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="only the source tree has the examples")


def test_examples_are_all_here_and_fit_a_screen() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(NEEDS)
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name


@pytest.mark.system
@pytest.mark.parametrize("name", NEEDS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    """Each asserts by itself that its loss falls, or equals its peer's."""
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed; the test extra brings it")
    command = [sys.executable, FOLDER / f"{name}.py"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "->" in result.stdout
