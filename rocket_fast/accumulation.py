"""One step on a batch that does not fit: embed it part by part, take the loss of the whole, replay for the gradients.

Contrastive losses do not add up over micro-batches, each sample's negatives being all others. So the micro-batches are
embedded without a graph, the loss and its gradients to all embeddings are taken once, and each micro-batch is embedded
again, with the same random numbers, to carry its embeddings' gradients to the parameters. That costs one forward more
and keeps one micro-batch's activations. Source: GradCache (Gao et al. 2021).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rocket_fast.errors import require

MicroBatch = TypeVar("MicroBatch")
Embedded = TypeVar("Embedded")
Output = TypeVar("Output")

SHARED_FIELDS = ("logit_scale", "logit_bias")
"""Endings of the names of fields that are one for all samples, of whatever shape."""


def cached_step(
    embed: Callable[[MicroBatch], Embedded],
    micro_batches: Iterable[MicroBatch],
    objective: Callable[[Embedded], Output],
    *,
    model: nn.Module | None = None,
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
) -> Output:
    """Forward and backward of a whole batch: ``.grad`` of every parameter grows by what one pass over all would give.

    Exact but for batch norm, which normalises with each micro-batch's own statistics. Gradients are added once, those
    of the logit scales too; what draws from torch's default generators, as dropout does, draws the same in the replay.
    Autocast may be the caller's or within ``embed``::

        def embed(batch):  # a tuple, list, dict or dataclass of tensors, nested as you like
            image, text = model(batch.pixels, batch.tokens)
            return {"image": image, "text": text, "logit_scale": model.logit_scale.exp()}

        def objective(whole):  # the same, of all samples
            return clip_loss(whole["image"], whole["text"], whole["logit_scale"], normalize=True)

        optimizer.zero_grad()
        loss = cached_step(embed, batch.split(256), objective, model=model)
        optimizer.step()

    Args:
        embed: from a micro-batch to its embeddings, with a graph where gradients are enabled: tensors, or None, in
            tuples, lists, dicts and dataclasses. Tensors have a row for each sample, but those without a dimension and
            fields whose names end in ``logit_scale`` or ``logit_bias``, which are one for all. Called twice for each,
            so it must do the same both times but for what ``model`` takes care of.
        micro_batches: of any sizes; over several ranks, of any number, unless the model itself communicates.
        objective: from the embeddings of all micro-batches, in their order, to the loss: a tensor (), or a dataclass
            with such a ``total`` as ``rocket_fast.batch.LossOutput``. Over ranks, one that follows
            rocket_fast/distributed.py, as ``rocket_fast.losses.Objective`` does.
        model: what ``embed`` runs. Its batch norms update their running statistics once, not twice, and if it has
            ``no_sync``, as DistributedDataParallel does, ranks exchange gradients in the last backward only.
        no_sync: makes the context in which backward exchanges nothing; by default ``model``'s.

    Returns:
        The objective's output, the loss detached: its gradients are where they belong.

    Raises:
        ValueError: no micro-batches, embeddings of other types or whose structure differs between micro-batches, an
            objective that gives no loss, gradients that are disabled or embeddings that have none, and parameters of a
            ``model`` with ``no_sync`` in the objective itself: ranks would not average their gradients.
    """
    micro_batches = list(micro_batches)
    require(len(micro_batches) > 0, "micro_batches", micro_batches, "at least one")
    require(torch.is_grad_enabled(), "torch.is_grad_enabled()", False, "a step outside no_grad and inference_mode")
    without_sync: Any = no_sync or getattr(model, "no_sync", None)
    states, embedded = [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(_RandomState())
            embedded.append(embed(micro_batch))
    torch.clear_autocast_cache()  # older torches keep weights cast without a graph, and would drop their gradients
    averaged = model if without_sync else None
    without_sync = without_sync or contextlib.nullcontext
    with without_sync():
        output, gradients = _loss_and_gradients(embedded, objective, averaged)
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
    embedded: Sequence[Embedded], objective: Callable[[Embedded], Output], averaged: nn.Module | None
) -> tuple[Output, list[list[Tensor | None]]]:
    """The loss, and for each micro-batch the gradients of its embeddings' tensors; the last one has those of scales.

    ``averaged``: whose gradients ranks average.
    """
    per_micro_batch = [_tensors(embeddings) for embeddings in embedded]
    names = _names(embedded[0])
    for embeddings, tensors in zip(embedded, per_micro_batch, strict=True):
        expected = f"{len(names)}, as the first micro-batch's"
        require(_names(embeddings) == names, "embeddings", f"{len(tensors)} tensors", expected)
    shared = [
        name.endswith(SHARED_FIELDS) or tensor.ndim == 0 for name, tensor in zip(names, per_micro_batch[0], strict=True)
    ]
    leaves = [
        (parts[-1].clone() if one else torch.cat(parts)).requires_grad_(parts[0].is_floating_point())
        for one, *parts in zip(shared, *per_micro_batch, strict=True)
    ]
    output = objective(_with_tensors(embedded[0], iter(leaves)))
    total = output if isinstance(output, Tensor) else getattr(output, "total", None)
    fits = isinstance(total, Tensor) and (total is output or dataclasses.is_dataclass(output))
    require(fits, "objective", type(output), "a loss, or a dataclass with one as its total")
    assert isinstance(total, Tensor)
    require(total.numel() == 1, "objective", f"a loss of shape {tuple(total.shape)}", "one number")
    require(total.requires_grad, "objective", "a loss without a graph", "one that depends on the embeddings")
    if averaged is not None:
        _require_none_of(averaged, total)
    total.backward()  # parameters that the objective itself uses get theirs here
    gradients: list[list[Tensor | None]] = [[] for _ in embedded]
    for index, leaf in enumerate(leaves):
        parts = [tensors[index] for tensors in per_micro_batch]
        if leaf.grad is None or shared[index]:
            split: Sequence[Tensor | None] = [*[None] * (len(parts) - 1), leaf.grad]
        else:
            split = leaf.grad.split([len(part) for part in parts])
        for own, part in zip(gradients, split, strict=True):
            own.append(part)
    detached = total.detach()
    return (detached if output is total else dataclasses.replace(output, total=detached)), gradients  # type: ignore


def _require_none_of(model: nn.Module, loss: Tensor) -> None:
    """That the loss does not use parameters of ``model`` but through its embeddings."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        used = names.get(id(getattr(node, "variable", None)))
        require(used is None, "objective", used, "no parameter of the model itself; embed can return what is needed")
        waiting += [following for following, _ in node.next_functions]


def _backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    pairs = [
        (output, gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if output.requires_grad and gradient is not None
    ]
    require(len(pairs) > 0, "embed", "embeddings that need no gradient", "at least one with a graph to parameters")
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


def _children(part: Any, name: str) -> list[tuple[str, Any]]:
    """What a tuple, list, dict or dataclass holds, with the names of the fields it is in."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return [(field.name, getattr(part, field.name)) for field in dataclasses.fields(part)]
    if isinstance(part, dict):
        return [(str(key), value) for key, value in part.items()]
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return list(zip(part._fields, part, strict=True))
    known = isinstance(part, tuple | list)
    require(known, f"embed: {name}" if name else "embed", type(part), "tensors in tuples, lists, dicts or dataclasses")
    return [(name, value) for value in part]


def _tensors(part: Any, name: str = "") -> list[Tensor]:
    """All tensors of an embedding, in order."""
    if part is None or isinstance(part, Tensor):
        return [] if part is None else [part]
    return [tensor for inner, value in _children(part, name) for tensor in _tensors(value, inner)]


def _names(part: Any, name: str = "") -> list[str]:
    """The fields that ``_tensors`` come from."""
    if part is None or isinstance(part, Tensor):
        return [] if part is None else [name]
    return [found for inner, value in _children(part, name) for found in _names(value, inner)]


def _with_tensors(part: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with other tensors."""
    if part is None or isinstance(part, Tensor):
        return None if part is None else next(tensors)
    values = [_with_tensors(value, tensors) for _, value in _children(part, "")]
    if isinstance(part, dict):
        return type(part)(zip(part, values, strict=True))
    if isinstance(part, tuple | list):
        return type(part)(*values) if hasattr(part, "_fields") else type(part)(values)
    names = [field.name for field in dataclasses.fields(part)]
    return dataclasses.replace(part, **dict(zip(names, values, strict=True)))
