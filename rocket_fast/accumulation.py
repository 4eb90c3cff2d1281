"""One step on a batch that does not fit: embed it part by part, take the loss of the whole, replay for the gradients.

Contrastive losses do not add up over micro-batches, each sample's negatives being all others. So the micro-batches are
embedded without a graph, the loss and its gradients to all embeddings are taken once, and each micro-batch is embedded
again, with the same random numbers, to carry its embeddings' gradients to the parameters. That costs one forward more
and keeps one micro-batch's activations. Source: GradCache (Gao et al. 2021).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rocket_fast.batch import Embeddings, LossOutput
from rocket_fast.errors import require

MicroBatch = TypeVar("MicroBatch")


def cached_step(
    embed: Callable[[MicroBatch], Embeddings],
    micro_batches: Sequence[MicroBatch],
    objective: Callable[[Embeddings], LossOutput],
    *,
    model: nn.Module | None = None,
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
) -> LossOutput:
    """Forward and backward of a whole batch: ``.grad`` of every parameter grows by what one pass over all would give.

    Exact but for batch norm, which normalises with each micro-batch's own statistics. Gradients are added once, those
    of the logit scales too; what draws from torch's default generators, as dropout does, draws the same in the replay.
    Autocast may be the caller's or within ``embed``.

    Args:
        embed: from a micro-batch to its embeddings, with a graph where gradients are enabled. Called twice for each, so
            it must do the same both times but for what ``model`` takes care of.
        micro_batches: of any sizes; over several ranks, of any number, unless the model itself communicates.
        objective: from the embeddings of all micro-batches, in their order, to the loss; over ranks, one that follows
            rocket_fast/distributed.py, as ``rocket_fast.losses.Objective`` does.
        model: what ``embed`` runs. Its batch norms update their running statistics once, not twice, and if it has
            ``no_sync``, as DistributedDataParallel does, ranks exchange gradients in the last backward only.
        no_sync: makes the context in which backward exchanges nothing; by default ``model``'s.

    Returns:
        The objective's output, ``total`` detached: its gradients are where they belong.

    Raises:
        ValueError: no micro-batches, or embeddings whose structure differs between them.
    """
    require(len(micro_batches) > 0, "micro_batches", micro_batches, "at least one")
    without_sync: Any = no_sync or getattr(model, "no_sync", contextlib.nullcontext)
    states, embedded = [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(_RandomState())
            embedded.append(embed(micro_batch))
    torch.clear_autocast_cache()  # older torches keep weights cast without a graph, and would drop their gradients
    with without_sync():
        output, gradients = _loss_and_gradients(embedded, objective)
    after = _RandomState()
    with _running_statistics_kept(model):
        for index, (micro_batch, state) in enumerate(zip(micro_batches, states, strict=True)):
            last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if last else without_sync():
                state.restore()
                _backward(_tensors(embed(micro_batch)), gradients[index])
    after.restore()
    return output


def _loss_and_gradients(
    embedded: Sequence[Embeddings], objective: Callable[[Embeddings], LossOutput]
) -> tuple[LossOutput, list[list[Tensor | None]]]:
    """The loss, and for each micro-batch the gradients of its embeddings' tensors; the last one has those of scales."""
    per_micro_batch = [_tensors(embeddings) for embeddings in embedded]
    count = len(per_micro_batch[0])
    for tensors in per_micro_batch:
        require(len(tensors) == count, "embeddings", f"{len(tensors)} tensors", f"{count}, as the first micro-batch's")
    one_a_batch = [name.endswith("logit_scale") for name in _names(embedded[0])]
    leaves = [
        (parts[-1].clone() if shared else torch.cat(parts)).requires_grad_()
        for shared, *parts in zip(one_a_batch, *per_micro_batch, strict=True)
    ]
    with torch.enable_grad():
        output = objective(_with_tensors(embedded[0], iter(leaves)))
        output.total.backward()  # parameters that the objective itself uses get theirs here
    whole = [leaf.grad for leaf in leaves]
    gradients: list[list[Tensor | None]] = [[] for _ in embedded]
    for index, gradient in enumerate(whole):
        parts = [tensors[index] for tensors in per_micro_batch]
        if gradient is None or one_a_batch[index]:
            split: Sequence[Tensor | None] = [*[None] * (len(parts) - 1), gradient]
        else:
            split = gradient.split([len(part) for part in parts])
        for own, part in zip(gradients, split, strict=True):
            own.append(part)
    return dataclasses.replace(output, total=output.total.detach()), gradients


def _backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    pairs = [
        (output, gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if output.requires_grad and gradient is not None
    ]
    torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])


# --- what must be the same both times ---------------------------------------------------------------------------------


class _RandomState:
    """Torch's generators as they are now: the CPU's and, if CUDA is in use, all devices' (kept on the host)."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@contextlib.contextmanager
def _running_statistics_kept(model: nn.Module | None) -> Iterator[None]:
    """Let batch norms normalise as ever and leave their running statistics, which have seen the batch, alone."""
    norms = [] if model is None else [module for module in model.modules() if isinstance(module, _BatchNorm)]
    counted = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    momenta, counts = [norm.momentum for norm in norms], [count.clone() for count in counted]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, before in zip(counted, counts, strict=True):
            count.copy_(before)


# --- embeddings as a row of tensors -----------------------------------------------------------------------------------


def _tensors(part: Any) -> list[Tensor]:
    """All tensors of an ``Embeddings`` or a part of one, in order."""
    if part is None or isinstance(part, Tensor):
        return [] if part is None else [part]
    inner = part if isinstance(part, tuple) else [getattr(part, field.name) for field in dataclasses.fields(part)]
    return [tensor for each in inner for tensor in _tensors(each)]


def _names(part: Any, name: str = "") -> list[str]:
    """The fields that ``_tensors`` come from."""
    if part is None or isinstance(part, Tensor):
        return [] if part is None else [name]
    if isinstance(part, tuple):
        return [found for each in part for found in _names(each, name)]
    return [found for field in dataclasses.fields(part) for found in _names(getattr(part, field.name), field.name)]


def _with_tensors(part: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with other tensors."""
    if part is None or isinstance(part, Tensor):
        return None if part is None else next(tensors)
    if isinstance(part, tuple):
        return tuple(_with_tensors(each, tensors) for each in part)
    names = [field.name for field in dataclasses.fields(part)]
    return dataclasses.replace(part, **{name: _with_tensors(getattr(part, name), tensors) for name in names})
