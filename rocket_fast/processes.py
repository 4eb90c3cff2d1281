"""What a process of a run does beside training: joins the others, listens to signals, watches that it does not hang."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from rocket_fast.device import choose_device
from rocket_fast.distributed import world_size


@contextlib.contextmanager
def process_group(wanted: str) -> Iterator[None]:
    """Join torchrun's process group where there is one; ``wanted``: the configuration's device."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    device = choose_device(wanted)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Ranks wait for the main one while it evaluates; gloo beside NCCL keeps small exchanges off the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


class StopRequest:
    """``signum`` of the first SIGINT, SIGTERM or SIGUSR2, 0 until there is one."""

    signum = 0


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM or SIGUSR2 into a request to stop after this step; a second SIGINT acts at once.

    Schedulers and launchers often send the same SIGTERM twice; SLURM sends SIGUSR2 when a job's time is nearly up.
    """
    stop = StopRequest()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}

    def note(signum: int, frame: FrameType | None) -> None:
        if stop.signum == 0:
            print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        stop.signum = stop.signum or signum
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
    """What is given has to be called more often than every so many seconds; else all stacks are written, and an end.

    It may end a twentieth earlier, counted from the last call. A rank that waits for one which hangs ends likewise;
    torchrun then ends the others.
    """

    wound = -math.inf

    def still_alive() -> None:
        nonlocal wound
        now = time.monotonic()
        if seconds and now - wound > seconds / 20:  # a thread is started each time: 1 ms
            wound = now
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)

    try:
        yield still_alive
    finally:
        faulthandler.cancel_dump_traceback_later()


def agree_to_stop(stop: StopRequest) -> bool:
    """Whether any rank was asked to stop; all learn of it in the same step."""
    stop.signum = over_ranks(stop.signum, dist.ReduceOp.MAX)
    return stop.signum > 0


def over_ranks(value: int, operation: Any = dist.ReduceOp.SUM) -> int:
    """A number combined over all ranks, exchanged between hosts."""
    if world_size() == 1:
        return value
    combined = torch.tensor(value)
    dist.all_reduce(combined, op=operation)
    return int(combined)


def count_over_ranks(own: Counter[str]) -> Counter[str]:
    """Counts added up over all ranks, exchanged between hosts."""
    if world_size() == 1:
        return own
    counts: list[Any] = [None] * world_size()
    dist.all_gather_object(counts, dict(own))
    return sum((Counter(each) for each in counts), Counter())
