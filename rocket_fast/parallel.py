"""The model as a step calls it: compiled, its batch norms synchronised, and spread over processes by DDP or FSDP2.

Both engines average gradients over ranks, which is what the losses count on (rocket_fast/distributed.py). FSDP2 cannot
shard numbers without a dimension, the temperatures: every rank keeps those, and their gradients are averaged here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rocket_fast.batch import Embeddings, PackedText
from rocket_fast.config import Compile, LoopConfig
from rocket_fast.distributed import is_main, world_size
from rocket_fast.models.attention import TransformerBlock
from rocket_fast.models.clip import DualEncoder
from rocket_fast.models.heads import MLPHead

BACKEND = "inductor"
"""What torch.compile hands graphs to."""


class StepModel:
    """``model`` made ready for training as ``loop`` says, in place; ``average``, if any, is sharded like it.

    To be made before the optimizer: with FSDP2 parameters become others, ``DTensor`` of which each rank holds a part.
    ``dtype``: what autocast multiplies in. ``say`` is told what the person should know.
    """

    def __init__(
        self,
        model: DualEncoder,
        average: AveragedModel | None,
        loop: LoopConfig,
        device: torch.device,
        dtype: torch.dtype,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.sharded = model, loop.parallel == "fsdp" and world_size() > 1
        if loop.parallel == "fsdp" and not self.sharded:
            say("loop.parallel fsdp: one process holds all of the model")
        _synchronize_batch_norm(model, device, say)
        _compile(model, loop.compile, say, by_block=self.sharded)
        self._called: nn.Module = model
        if self.sharded:
            mesh = init_device_mesh(device.type, (world_size(),))
            for each in (model, average.module if average is not None else None):
                if each is not None:
                    _shard(cast(DualEncoder, each), mesh, dtype)
        elif world_size() > 1:
            # Not static_graph: torch then does not find the tensors of a dataclass, and averages no gradients (2.14).
            # Parameters without gradients are not looked for in any case, nor is a reentrant checkpoint ever used.
            options: dict[str, Any] = {"bucket_cap_mb": loop.bucket_mib, "gradient_as_bucket_view": True}
            self._called = DistributedDataParallel(model, **options)

    def __call__(
        self, images: tuple[Tensor, ...], texts: tuple[PackedText, ...], unpaired: tuple[Tensor, ...] = ()
    ) -> Embeddings:
        """As the model's ``forward``."""
        return cast(Embeddings, self._called(images, texts, unpaired))

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within, backward passes add to this rank's own gradients and exchange nothing."""
        if isinstance(self._called, DistributedDataParallel):
            with self._called.no_sync():
                yield
        elif isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                self.model.set_requires_gradient_sync(True)
        else:
            yield

    def average_gradients(self) -> None:
        """Average over ranks what the engine leaves alone. To be called after the step's last backward."""
        if not self.sharded:
            return
        gradients = [p.grad for p in self.model.parameters() if p.ndim == 0 and p.grad is not None]
        together = torch.stack(gradients)
        dist.all_reduce(together)
        torch._foreach_copy_(gradients, list((together / world_size()).unbind()))

    def whole(self, model: DualEncoder) -> DualEncoder | None:
        """``model``, this one or its average, with all of its parameters on one device, for the main rank; else None.

        Every rank has to call it. Without FSDP2 that is the model itself, with it a copy.
        """
        if not self.sharded:
            return model if is_main() else None
        self.agree_on_buffers(model)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not is_main():
            return None
        copy = DualEncoder(model.config)
        copy.load_state_dict(state)
        for block, own in zip(_blocks(copy), _blocks(model), strict=True):
            block.attend = own.attend
        return copy.to(model.logit_scale.device)

    def agree_on_buffers(self, *modules: nn.Module) -> None:
        """Under FSDP2 give every rank the main one's buffers, which are those that are kept; DDP does in every step.

        They differ where batch norm is not synchronised, and no training step reads them.
        """
        for buffer in (buffer for module in modules for buffer in module.buffers()) if self.sharded else ():
            dist.broadcast(buffer, src=0)

    def mains(self, number: float) -> float:
        """Under FSDP2, where all ranks decide about checkpoints, the main rank's number; else one's own."""
        if not self.sharded:
            return number
        numbers = [number]
        dist.broadcast_object_list(numbers, src=0)
        return numbers[0]


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over ranks, each of which has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _blocks(model: nn.Module) -> list[TransformerBlock]:
    return [module for module in model.modules() if isinstance(module, TransformerBlock)]


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, for work on each number by itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def averaged_model(model: DualEncoder, decay: float | None) -> AveragedModel | None:
    """An exponential moving average of all of ``model``, buffers too; None without a ``decay``."""
    if decay is None:
        return None
    update = get_ema_multi_avg_fn(decay)

    def update_own_parts(averages: Sequence[Tensor], tensors: Sequence[Tensor], updates: Tensor | int) -> None:
        update([own_part(tensor) for tensor in averages], [own_part(tensor) for tensor in tensors], updates)

    return AveragedModel(model, multi_avg_fn=update_own_parts, use_buffers=True)


def _synchronize_batch_norm(model: DualEncoder, device: torch.device, say: Callable[[str], None]) -> None:
    """Have batch norms normalise by all ranks' samples."""
    if world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, MLPHead):
            module.synchronized = True
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        say("the image tower's batch norm takes each process's own statistics: torch synchronises it on CUDA only")


def _compile(model: DualEncoder, mode: Compile, say: Callable[[str], None], *, by_block: bool) -> None:
    """Compile the towers, or everything from pictures to embeddings; ``by_block`` where FSDP2's hooks are between.

    Captions' lengths change from step to step: their graphs are made for any.
    """
    if mode == "off":
        return
    encoders = [each for each in (model, model.momentum) if each is not None]
    if by_block:
        for block in (block for each in encoders for block in _blocks(each)):
            block.compile(backend=BACKEND, dynamic=True)
        if not _blocks(model.visual):
            say("the image tower runs uncompiled: with FSDP2 transformer blocks are compiled, and it has none")
    elif mode == "step":
        model.compile(backend=BACKEND, dynamic=True)
    else:
        for each in encoders:
            each.visual.compile(backend=BACKEND)
            each.text.compile(backend=BACKEND, dynamic=True)


def compile_loss(objective: nn.Module, loop: LoopConfig) -> None:
    """Compile the loss too, where ``loop`` asks for all of the step; between several processes' it exchanges."""
    if loop.compile != "off":
        torch._dynamo.config.suppress_errors = loop.compile_fallback
    if loop.compile == "step" and world_size() == 1:
        objective.compile(backend=BACKEND, dynamic=True)


def is_compile_error(error: Exception) -> bool:
    """Whether torch.compile could not do it; not where the compiled code itself is wrong, or memory ran out."""
    found = torch._dynamo.exc
    own = isinstance(error, found.TorchDynamoException) and not isinstance(error, found.TorchRuntimeError)
    return own and not isinstance(error.__cause__, torch.OutOfMemoryError)


def compile_advice(error: Exception) -> str:
    """What to do about it."""
    reason = " ".join(str(error).strip().splitlines()[:2])
    return (
        f"torch.compile failed: {type(error).__name__}: {reason}. Train with --loop.compile off, or with "
        "--loop.compile-fallback to run as it is what cannot be compiled"
    )


def _shard(model: DualEncoder, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Spread parameters over the mesh: each transformer block and each tower is gathered by itself when it runs.

    A block's matrices are gathered in ``dtype``: autocast would make narrow copies of all of them, which live until the
    backward pass. Gradients are summed in float32, and norms, which are computed in it, gathered in it.
    """
    policy = MixedPrecisionPolicy()
    if dtype.itemsize == 2:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 knows no channels_last
    towers = [tower for each in (model, model.momentum) if each is not None for tower in (each.visual, each.text)]
    for tower in towers:
        for block in _blocks(tower):
            if dtype.itemsize == 2:
                fully_shard([block.norm1, block.norm2], mesh=mesh)
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(tower, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p.ndim == 0})
