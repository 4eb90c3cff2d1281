"""Where to compute and in which precision: chosen once, when a run is built."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from rocket_fast.batch import Batch
from rocket_fast.config import Precision
from rocket_fast.devices import Device, card_named
from rocket_fast.errors import require


def choose_device(wanted: str) -> torch.device:
    """``auto`` takes this process's CUDA device where there is one."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    require(torch.cuda.is_available(), "loop.device", wanted, "cpu or auto: torch sees no CUDA device")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def build_autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Autocast to bf16 or fp16, or a disabled one; ``auto`` takes bf16 where the hardware multiplies it natively."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_amx()
        precision = "bf16" if native else "fp32"
    narrow = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=narrow, enabled=precision != "fp32")


class DeviceCopies:
    """Moves batches to the device on a stream of their own: a copy does not wait for the step before to be computed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device, for use on the current stream."""
        if self._stream is None:
            return batch.to(self._device)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device)
        current.wait_stream(self._stream)
        for tensor in moved.tensors():
            tensor.record_stream(current)  # its memory is the other stream's, and must not be used again too early
        return moved


def compute_dtype(autocast: torch.autocast) -> torch.dtype:
    """What matrix products, and so attention, are computed in."""
    return autocast.fast_dtype if autocast._enabled else torch.float32


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most that matrix products can reach on ``device``, FLOP/s; None where that is not known."""
    if device.type != "cuda" or dtype.itemsize != 2:
        return None
    card = card_of(device)
    return None if card is None else card.bf16_flops


def card_of(device: torch.device) -> Device | None:
    """What is known of a CUDA device by its name."""
    properties = torch.cuda.get_device_properties(device)
    return card_named(properties.name, properties.total_memory)


def cpu_peak_bytes(step: Callable[[], object]) -> int:
    """The most that torch has allocated on the CPU at any time during ``step``, tensors made before not counted."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _cpu_has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
