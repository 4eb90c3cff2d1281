"""What every launcher of Triton kernels needs. Importing this file needs triton."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from rocket_fast.errors import optional_import

triton: Any = optional_import("triton", "gpu")

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors: ``TRITON_INTERPRET=1`` was set before the import."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](...)``, in the one place where compile_check.py listens."""
    kernel[grid](*args, **options)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on ``x``'s device, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def architecture(device: torch.device) -> int:
    """Whose pinned configurations to take: 80, 90 or 100, or 0 for every other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    known = {(8, 0): 80, (9, 0): 90, (10, 0): 100, (10, 3): 100}  # others share the name but not the shared memory
    return known.get((major, minor), 0)
