"""Ranks, and the collectives the losses need: a differentiable all-gather and a differentiable sum.

Without a process group every function behaves as in a world of one.

How DDP's averaging is accounted for: each of W ranks computes the loss L of all ranks' samples, the same number
everywhere. Backward, the collectives give every rank ``W * dL/dx`` for its own x; its parameters thus receive W times
what its own samples contribute, and the average over ranks that DistributedDataParallel then takes is the sum of all
contributions, the gradient of one process on the concatenated batch. Parameters that act on numbers all ranks share
(a logit scale on gathered embeddings) get the full gradient on every rank, which averaging leaves as it is; those that
act before a collective (a logit scale on a rank's own rows) get W times a part, of which averaging makes the sum. So
the loss is neither scaled nor averaged by hand anywhere, and local batches may differ in size.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rocket_fast.errors import InvalidArgument, require


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


def row_counts(*tensors: Tensor) -> list[int]:
    """How many rows, samples, every rank's tensors have, in rank order; one collective.

    Raises ValueError, on all ranks alike so that none waits, where the tensors of a rank differ in their rows, or those
    of different ranks in anything else.

    To not make the host wait for the device for them, initialise the process group with a CPU backend beside CUDA's
    (``backend="cpu:gloo,cuda:nccl"``).
    """
    for tensor in tensors:
        require(isinstance(tensor, Tensor), "tensor", type(tensor), "a tensor")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if world_size() == 1 and all(shape and shape[0] == shapes[0][0] for shape in shapes):
        return [shapes[0][0]]  # without what compiled code cannot do
    own = [number for tensor in tensors for number in _described(tensor)]
    everyone = _gather_numbers(own, tensors[0].device)
    if any(rows < 0 for numbers in everyone for rows in numbers[::2]):
        raise InvalidArgument(f"tensors: got shapes {shapes} here, expected a dimension of samples on every rank")
    counts = [numbers[0] for numbers in everyone]
    together = all(rows == numbers[0] for numbers in everyone for rows in numbers[::2])
    require(
        together, "tensors", f"{[numbers[::2] for numbers in everyone]} rows by rank", "equally many in all of a rank"
    )
    alike = all(numbers[1::2] == everyone[0][1::2] for numbers in everyone)
    require(alike, "tensors", f"shapes {shapes} here", "widths and dtypes that are the same on every rank")
    return counts


def _described(tensor: Tensor) -> tuple[int, int]:
    """The number of rows, -1 for a tensor without, and a number for all that ranks must agree on."""
    rows, *width = tensor.shape if tensor.ndim else (-1,)
    kind = repr((width, tensor.dtype)).encode()
    return rows, zlib.crc32(kind)


def _gather_numbers(own: list[int], device: torch.device) -> list[list[int]]:
    """Some whole numbers of every rank, in rank order."""
    if world_size() == 1:
        return [own]
    has_cpu_backend = "cpu:" in dist.get_backend_config()
    mine = torch.tensor(own, device="cpu" if has_cpu_backend else device)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    return [numbers.tolist() for numbers in everyone]


# --- all-gather -------------------------------------------------------------------------------------------------------


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks along the first dimension, in rank order, differentiably.

    Every rank must call it, forward and backward. Shapes may differ in the first dimension only; dtypes must agree.
    The gradient of a rank's tensor is the sum over ranks of their gradients to those rows (see above). In a world of
    one the tensor itself is returned. Raises ValueError for other shapes, on every rank.
    """
    return gather_together([tensor], row_counts(tensor))[0]


def gather_together(tensors: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, ...]:
    """``gather`` for several tensors of the same samples, side by side in one collective forward and one backward.

    ``counts``: as ``row_counts`` gives them for any of the tensors. Nothing is converted: tensors of another dtype, or
    of another ``requires_grad``, travel in a collective of their own, the latter without one backward. What is returned
    may be views of one buffer.
    """
    if world_size() == 1:
        return tuple(tensors)
    kinds: dict[tuple[torch.dtype, bool], list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.requires_grad), []).append(index)
    gathered: dict[int, Tensor] = {}
    for indices in kinds.values():
        gathered |= zip(indices, _Gather.apply(counts, None, *(tensors[i] for i in indices)), strict=True)
    return tuple(gathered[i] for i in range(len(tensors)))


class AllRanks:
    """The samples of a step, spread over ranks; to be made by every rank alike.

    ``counts``: how many samples each rank has. ``own``: how many this one has, beginning at ``first_row`` of all
    ``samples`` in rank order.
    """

    def __init__(self, own: Tensor, *others: Tensor) -> None:
        """``own``: any tensor with a row for each of this rank's samples; ``others`` must have as many, on any rank."""
        self.counts = row_counts(own, *others)
        self.own = own.shape[0]
        self.first_row = sum(self.counts[: rank()])
        self.samples = sum(self.counts)
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # by id(), each kept alive with its tensor
        self._constants: dict[int, tuple[Tensor, Tensor]] = {}  # likewise, without a graph

    def require_samples(self) -> None:
        """A sample at least on every rank, for what cannot do without; raised by all ranks, so that none waits."""
        require(min(self.counts) > 0, "samples of the ranks", self.counts, "at least one on every rank")

    def gather(self, *groups: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        """All ranks' rows of every tensor of every group, as ``gather_together``; none travels twice."""
        if world_size() == 1:  # compiled code, which would be made again for every other id
            return tuple(tuple(group) for group in groups)
        wanted = [tensor for group in groups for tensor in group if id(tensor) not in self._known]
        new = [tensor for tensor in wanted if id(tensor) not in self._constants]
        here = [tensor for tensor in wanted if id(tensor) in self._constants]
        gathered = [*zip(new, gather_together(new, self.counts), strict=True)]
        if here:
            rows = [self._constants[id(tensor)][1] for tensor in here]
            gathered += zip(here, _Gather.apply(self.counts, rows, *here), strict=True)
        self._known |= {id(tensor): (tensor, everyone) for tensor, everyone in gathered}
        return tuple(tuple(self._known[id(tensor)][1] for tensor in group) for group in groups)

    def constants(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All ranks' rows of some tensors, without gradients. ``gather`` then sends nothing of them but those back."""
        everyone = gather_together([tensor.detach() for tensor in tensors], self.counts)
        if world_size() > 1:
            self._constants |= {id(tensor): (tensor, rows) for tensor, rows in zip(tensors, everyone, strict=True)}
        return everyone


class _Gather(torch.autograd.Function):
    """Rows of all ranks, unless ``known``; backward a reduce-scatter, which adds up what all ranks send to a row."""

    @staticmethod
    def forward(
        ctx: Any, counts: Sequence[int], known: Sequence[Tensor] | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.counts, ctx.shapes = counts, [tensor.shape[1:] for tensor in tensors]
        if known is not None:
            return tuple(rows.detach() for rows in known)
        everyone_MC = _all_gather(_side_by_side(tensors), counts)
        return _apart(everyone_MC, ctx.shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own_NC = _reduce_scatter(_side_by_side(gradients), ctx.counts)
        return None, None, *_apart(own_NC, ctx.shapes)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """One matrix with a row for each sample."""
    flat = [tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:])) for tensor in tensors]
    return torch.cat(flat, dim=1) if len(flat) > 1 else flat[0]


def _apart(rows_NC: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """The tensors that ``_side_by_side`` put together, as views."""
    widths = [math.prod(shape) for shape in shapes]
    parts = rows_NC.split(widths, dim=1)
    return tuple(part.view(part.shape[0], *shape) for part, shape in zip(parts, shapes, strict=True))


def _all_gather(own_NC: Tensor, counts: Sequence[int]) -> Tensor:
    """Collectives move blocks of equal shape: shorter ones are filled up, and the filling is left out afterwards."""
    most = max(counts)
    missing = most - own_NC.shape[0]
    block = torch.cat([own_NC, own_NC.new_zeros(missing, own_NC.shape[1])]) if missing else own_NC.contiguous()
    blocks = own_NC.new_empty(len(counts) * most, own_NC.shape[1])
    _single("all_gather")(blocks, block)
    if min(counts) == most:
        return blocks
    return torch.cat([block[:rows] for block, rows in zip(blocks.split(most), counts, strict=True)])


def _reduce_scatter(rows_MC: Tensor, counts: Sequence[int]) -> Tensor:
    """This rank's rows of the sum over ranks."""
    most = max(counts)
    blocks = rows_MC.contiguous()
    if min(counts) < most:
        blocks = rows_MC.new_zeros(len(counts) * most, rows_MC.shape[1])
        for block, part in zip(blocks.split(most), rows_MC.split(list(counts)), strict=True):
            block[: part.shape[0]] = part
    total = rows_MC.new_empty(most, rows_MC.shape[1])
    _single("reduce_scatter")(total, blocks)
    return total[: counts[rank()]]


def _single(collective: str) -> Any:
    """The form of a collective with one tensor for all ranks' blocks; torch 2.14 gave it another name."""
    older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}
    return getattr(dist, f"{collective}_single", None) or getattr(dist, older[collective])


# --- sums -------------------------------------------------------------------------------------------------------------


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, of equal shape and dtype, differentiably; the tensor itself in a world of one.

    For numbers that the loss is made of: every rank must use the sum in the same way. Then the gradient to the sum is
    the same everywhere, and W times it, what a rank's own part is owed by the rule above, takes no communication.
    """
    return tensor if world_size() == 1 else _Sum.apply(tensor)


def mean_over_ranks(mean: Tensor, count: int) -> Tensor:
    """The mean over all ranks' samples, differentiably, where a rank has ``count`` of them and their ``mean`` ().

    As ``sum_over_ranks``: what every rank's own samples cost is all that it takes to know the loss of all.
    """
    if world_size() == 1:
        return mean
    total, samples = sum_over_ranks(torch.stack([mean * count, mean.new_full((), count)])).unbind()
    return total / samples


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return world_size() * gradient
