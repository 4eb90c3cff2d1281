"""What a configuration costs before anything is run: parameters and FLOPs per sample, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rocket_fast.config import TrainConfig
from rocket_fast.models.clip import DualEncoder

TYPICAL_TOKENS = 16
"""Tokens of a web caption with both ends, rounded up: the length that the text tower's work is stated for."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters, and forward FLOPs (2 per multiply-add) of one sample in all its views.

    ``head_*``: heads z and h and the companion's. ``momentum_*``: BYOLIP's averaged encoder, whose parameters are not
    trained and which has no backward pass; 0 elsewhere. Texts have TYPICAL_TOKENS tokens, except in
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

    @property
    def parameters(self) -> int:
        """All trained parameters."""
        return self.image_parameters + self.text_parameters + self.head_parameters

    @property
    def training_flops(self) -> int:
        """Forward and backward, which is twice the forward, of one sample with captions of typical length."""
        return 3 * (self.image_flops + self.text_flops + self.head_flops) + self.momentum_flops


def cost(config: TrainConfig) -> Cost:
    """Count without allocating anything; what the losses do between samples is left out."""
    sizes = [config.image.weak.size, *(view.size for view in config.image.strong)]
    with torch.device("meta"):
        model = DualEncoder(config.model).eval()
        pictures = [torch.empty(1, 3, size, size) for size in sizes]
        image_flops = _flops(lambda: [model.visual(picture) for picture in pictures])
        features = [torch.empty(1, model.visual.width)] * len(sizes), [torch.empty(1, model.text.width)] * len(sizes)
        head_flops = _flops(lambda: _run_heads(model, *features))
        projector_flops = _flops(lambda: _run_momentum_projectors(model, *features))
    text = config.model.text
    text_flops = len(sizes) * _transformer_flops(text.layers, text.width, min(TYPICAL_TOKENS, text.context_length))
    image_count, text_count = _count(model.visual), _count(model.text)
    return Cost(
        image_parameters=image_count,
        text_parameters=text_count,
        head_parameters=_count(model, trained=True) - image_count - text_count,
        momentum_parameters=0 if model.momentum is None else _count(model.momentum),
        image_flops=image_flops,
        text_flops=text_flops,
        text_flops_full=len(sizes) * _transformer_flops(text.layers, text.width, text.context_length),
        head_flops=head_flops,
        momentum_flops=0 if model.momentum is None else image_flops + text_flops + projector_flops,
        views=len(sizes),
    )


def _count(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def _run_heads(model: DualEncoder, image_features: list[Tensor], text_features: list[Tensor]) -> None:
    """What DualEncoder.forward does after the towers: z on the weak view, h on the strong ones, a companion on all."""
    model.image_z(image_features[0])
    model.text_z(text_features[0])
    for head, features in ((model.image_h, image_features), (model.text_h, text_features)):
        if head is not None:
            for view in features[1:]:
                head(view)
    if model.companion is not None:
        model.companion(image_features, text_features)


def _run_momentum_projectors(model: DualEncoder, image_features: list[Tensor], text_features: list[Tensor]) -> None:
    if model.momentum is not None:
        model.momentum.image_projector(image_features)
        model.momentum.text_projector(text_features)


def _transformer_flops(layers: int, width: int, tokens: int) -> int:
    """Forward FLOPs of one caption: 12 width^2 weights a layer, and the two products of (uncropped) attention."""
    return layers * tokens * (2 * 12 * width * width + 4 * tokens * width)
