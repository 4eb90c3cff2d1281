"""Run by .ci/run with a fresh venv's Python, outside the source tree: the core install alone must be usable."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

import rocket_fast
from rocket_fast import kernels

root = Path(rocket_fast.__file__).parent
assert "site-packages" in root.parts, root
assert (root / "py.typed").is_file()
assert importlib.util.find_spec("kernels") is None, "a top-level package named kernels was installed"

image_ND, text_ND = torch.randn(4, 8), torch.randn(4, 8)
loss = kernels.clip_loss(image_ND, text_ND, torch.tensor(10.0))
assert torch.isfinite(loss), loss

for optional in ("tyro", "rich", "timm", "numba", "PIL"):
    assert importlib.util.find_spec(optional) is None, f"{optional} came with the core install"
command = Path(sys.executable).with_name("rocket-fast")
result = subprocess.run([command, "doctor"], capture_output=True, text=True)
assert result.returncode == 2, result
assert "pip install 'rocket-fast[train]'" in result.stderr, result
assert len(result.stderr.strip().splitlines()) == 1, result.stderr
print(f"wheel {rocket_fast.__version__}: imports, computes a loss, and names the extra it lacks")
