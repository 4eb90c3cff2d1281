"""What a configuration costs before it is run: parameters and FLOPs per sample, counted by fvcore on the model itself.

One forward pass of one sample on the CPU, with weights that nobody has initialised, is traced; matrix products,
convolutions and attention count, norms and everything else elementwise do not.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rocket_fast.batch import PackedText
from rocket_fast.config import TrainConfig
from rocket_fast.errors import optional_import, require
from rocket_fast.models.clip import CLIPConfig, DualEncoder
from rocket_fast.models.heads import SiamLIPHeads
from rocket_fast.models.text import TextTower
from rocket_fast.models.vision import ViTConfig

TYPICAL_TOKENS = 16
"""Tokens of a web caption with both ends, rounded up: the length that the text tower's work is stated for."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters, and forward FLOPs (2 per multiply-add) of one sample in all its views.

    A sample's share of the unpaired pictures beside it, their strong views, is counted with it.
    ``head_*``: heads z and h and the companion's. ``momentum_*``: BYOLIP's averaged encoder, whose parameters are not
    trained and which has no backward pass; 0 elsewhere. Texts have ``tokens`` tokens, except in
    ``text_flops_full``.
    """

    image_parameters: int
    text_parameters: int
    head_parameters: int
    momentum_parameters: int
    image_flops: int
    text_flops: int
    text_flops_full: int
    head_flops: int
    momentum_flops: int
    views: int
    tokens: int

    @property
    def parameters(self) -> int:
        """All trained parameters."""
        return self.image_parameters + self.text_parameters + self.head_parameters

    @property
    def training_flops(self) -> int:
        """Forward and backward, which is twice the forward, of one sample with captions of that length."""
        return 3 * (self.image_flops + self.text_flops + self.head_flops) + self.momentum_flops


def cost(config: TrainConfig, *, tokens: int = TYPICAL_TOKENS) -> Cost:
    """Count, for captions of ``tokens`` tokens; what the losses do between samples is left out."""
    require(tokens >= 1, "tokens", tokens, "a number >= 1")
    sizes = [config.image.weak.size, *(view.size for view in config.image.strong)]
    with torch.device("meta"):
        model = DualEncoder(without_checkpointing(config.model)).eval()
    momentum_count = 0 if model.momentum is None else _count(model.momentum)
    trained_count = _count(model, trained=True)
    projectors = [] if model.momentum is None else [model.momentum.image_projector, model.momentum.text_projector]
    model.momentum = None  # as large as the towers, and counted by them
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.requires_grad_(False).zero_()  # whatever is there may be slow to compute with
    share, strong = unpaired_share(config), sizes[1:]
    image_flops = round(
        sum(
            (sizes.count(size) + share * strong.count(size)) * _image_flops(model, size)
            for size in dict.fromkeys(sizes)
        )
    )
    tokens = min(tokens, config.model.text.context_length)
    text_flops = len(sizes) * _text_flops(model.text, tokens)
    features = [
        *(torch.zeros(1, model.visual.width) for _ in sizes),
        *(torch.zeros(1, model.text.width) for _ in sizes),
    ]
    alone = [torch.zeros(1, model.visual.width) for _ in strong]
    projector_flops = 0.0
    if projectors:
        assert isinstance(model.companion, SiamLIPHeads)
        projector_flops = _flops(_Projectors(model.companion), features)
        if share:
            projector_flops += share * _flops(_UnpairedProjector(model.companion), alone)
    return Cost(
        image_parameters=_count(model.visual),
        text_parameters=_count(model.text),
        head_parameters=trained_count - _count(model.visual) - _count(model.text),
        momentum_parameters=momentum_count,
        image_flops=image_flops,
        text_flops=text_flops,
        text_flops_full=len(sizes) * _text_flops(model.text, config.model.text.context_length),
        head_flops=_flops(Heads(model), features)
        + (round(share * _flops(UnpairedHeads(model), alone)) if share else 0),
        momentum_flops=image_flops + text_flops + round(projector_flops) if projectors else 0,
        views=len(sizes),
        tokens=tokens,
    )


def unpaired_share(config: TrainConfig) -> float:
    """Unpaired pictures to each sample of a batch."""
    return config.data.unpaired_batch / config.data.batch_size


def without_checkpointing(config: CLIPConfig) -> CLIPConfig:
    """The same model without checkpointing, which tracing does not see through."""
    vision, text = config.vision, dataclasses.replace(config.text, checkpointing="none")
    if isinstance(vision, ViTConfig):
        vision = dataclasses.replace(vision, checkpointing="none")
    return dataclasses.replace(config, vision=vision, text=text)


def _count(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _image_flops(model: DualEncoder, size: int) -> int:
    if isinstance(model.config.vision, ViTConfig):
        model.visual.train()  # where patches may be dropped
    return _flops(model.visual, [torch.zeros(1, 3, size, size)])


def _text_flops(tower: TextTower, tokens: int) -> int:
    return _flops(_Packed(tower, tokens), [torch.zeros(tokens, dtype=torch.int64)])


class _Packed(nn.Module):
    """The text tower on one packed caption of so many tokens."""

    def __init__(self, tower: TextTower, tokens: int) -> None:
        super().__init__()
        self.tower, self.lengths = tower, torch.tensor([tokens])

    def forward(self, tokens_T: Tensor) -> Tensor:
        return self.tower(PackedText(tokens=tokens_T, lengths=self.lengths, longest=tokens_T.shape[0]))


class Heads(nn.Module):
    """What DualEncoder.forward does after the towers: z on the weak view, h on the strong ones, a companion on all."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, *features: Tensor) -> list[Tensor]:
        """Features of all image views, then of all text views."""
        views, model = len(features) // 2, self.model
        image, text = features[:views], features[views:]
        found = [model.image_z(image[0]), model.text_z(text[0])]
        for head, own in ((model.image_h, image), (model.text_h, text)):
            found += [] if head is None else [head(view) for view in own[1:]]
        outputs = None if model.companion is None else model.companion(image, text)
        return found + list(_tensors(outputs))


class UnpairedHeads(nn.Module):
    """What DualEncoder.forward does after the towers with unpaired pictures."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, *features: Tensor) -> list[Tensor]:
        """Features of all strong views."""
        return list(_tensors(self.model.of_unpaired(features)))


class _UnpairedProjector(nn.Module):
    """What BYOLIP's averaged encoder has for them beside the tower."""

    def __init__(self, heads: SiamLIPHeads) -> None:
        super().__init__()
        self.image = heads.image_projector

    def forward(self, *features: Tensor) -> list[Tensor]:
        """As ``UnpairedHeads``."""
        return list(self.image.of_strong(features))


class _Projectors(nn.Module):
    """What BYOLIP's averaged encoder has beside the towers."""

    def __init__(self, heads: SiamLIPHeads) -> None:
        super().__init__()
        self.image, self.text = heads.image_projector, heads.text_projector

    def forward(self, *features: Tensor) -> list[Tensor]:
        """As ``Heads``."""
        views = len(features) // 2
        return [*self.image(features[:views]), *self.text(features[views:])]


def _tensors(outputs: Any) -> Iterator[Tensor]:
    for field in dataclasses.fields(outputs) if outputs is not None else ():
        value = getattr(outputs, field.name)
        yield from value if isinstance(value, tuple) else [value] if isinstance(value, Tensor) else []


# --- fvcore -----------------------------------------------------------------------------------------------------------


def _flops(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """2 for each multiply-add that fvcore counts."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch says about tracing
        counting = optional_import("fvcore.nn", "train").FlopCountAnalysis(module, tuple(inputs))
        counting.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        for norm in ("batch_norm", "layer_norm"):
            counting.set_op_handle(f"aten::{norm}", lambda inputs, outputs: 0)
        counting.set_op_handle("aten::scaled_dot_product_attention", _fused_attention)
        counting.set_op_handle("rocket_fast::packed_attention", _packed_attention)
        return 2 * int(counting.total())


def _fused_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of two products: (B, H, L, E) queries with as many keys, weights with as many values."""
    batch, heads, length, width = inputs[0].type().sizes()
    return 2 * batch * heads * length * inputs[1].type().sizes()[2] * width


def _packed_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """The same of (T, 3, H, E) in captions of equal length, masked places counted."""
    tokens, _, heads, width = inputs[0].type().sizes()
    (captions,) = inputs[1].type().sizes()
    return 2 * tokens * (tokens // captions) * heads * width
