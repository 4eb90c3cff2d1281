"""Ranks, and the one collective the losses need: a differentiable all-gather.

Without a process group every function behaves as in a world of one.

How DDP's averaging is accounted for: each of W ranks computes the loss L of the whole gathered batch. The backward of
``gather`` adds up what all ranks send to a row, so a rank's embeddings receive ``W * dL/dembeddings``, and its
parameters W times what its own samples contribute; the average over ranks that DistributedDataParallel then takes is
the sum of all contributions, the gradient of one process on the concatenated batch. Parameters that act on the loss
directly (the logit scales) get the full gradient on every rank, which averaging leaves as it is. So the loss is
neither scaled nor averaged by hand anywhere, and local batches may differ in size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes training together."""
    return dist.get_world_size() if _initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes logs and checkpoints."""
    return rank() == 0


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks along the first dimension, in rank order, differentiably.

    Every rank must call it, forward and backward. Shapes may differ in the first dimension only; dtypes must agree.
    The gradient of a rank's tensor is the sum over ranks of their gradients to those rows (see above). In a world of
    one the tensor itself is returned.

    The row counts are exchanged first. To not make the host wait for the device for them, initialise the process group
    with a CPU backend beside CUDA's (``backend="cpu:gloo,cuda:nccl"``).
    """
    if world_size() == 1:
        return tensor
    return _Gather.apply(tensor, _row_counts(tensor))


def _row_counts(tensor: Tensor) -> list[int]:
    has_cpu_backend = "cpu:" in dist.get_backend_config()
    count = torch.tensor([tensor.shape[0]], device="cpu" if has_cpu_backend else tensor.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    return [int(n) for n in counts]


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """Collectives move blocks of equal shape: fill up with zero rows."""
    missing = rows - tensor.shape[0]
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor.contiguous()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        block = _padded(tensor, max(counts))
        blocks = [torch.empty_like(block) for _ in counts]
        dist.all_gather(blocks, block)
        return torch.cat([block[:rows] for block, rows in zip(blocks, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        blocks = [_padded(block, max(ctx.counts)) for block in grad.split(ctx.counts)]
        total = torch.empty_like(blocks[0])
        dist.reduce_scatter(total, blocks)
        return total[: ctx.counts[rank()]], None
