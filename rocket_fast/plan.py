"""What a configuration costs before anything is run: parameters and FLOPs per sample, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rocket_fast.config import TrainConfig
from rocket_fast.models.clip import DualEncoder

TYPICAL_TOKENS = 16
"""Tokens of a web caption with both ends, rounded up: the length that the text tower's work is stated for."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters, and forward FLOPs (2 per multiply-add) of one sample in all its views; training takes thrice that."""

    image_parameters: int
    text_parameters: int
    head_parameters: int
    image_flops: int
    text_flops: int
    text_flops_full: int
    views: int

    @property
    def parameters(self) -> int:
        """All trained and averaged parameters."""
        return self.image_parameters + self.text_parameters + self.head_parameters

    @property
    def training_flops(self) -> int:
        """Forward and backward of one sample with captions of typical length."""
        return 3 * (self.image_flops + self.text_flops)


def cost(config: TrainConfig) -> Cost:
    """Count without allocating anything; the heads' FLOPs (under 1% of any published preset's) are left out."""
    with torch.device("meta"):
        model = DualEncoder(config.model).eval()
        sizes = [config.image.weak.size, *(view.size for view in config.image.strong)]
        image = sum(_flops(model.visual, torch.empty(1, 3, size, size)) for size in sizes)
    image_count, text_count = _count(model.visual), _count(model.text)
    text = config.model.text
    return Cost(
        image_parameters=image_count,
        text_parameters=text_count,
        head_parameters=_count(model) - image_count - text_count,
        image_flops=image,
        text_flops=len(sizes) * _transformer_flops(text.layers, text.width, min(TYPICAL_TOKENS, text.context_length)),
        text_flops_full=len(sizes) * _transformer_flops(text.layers, text.width, text.context_length),
        views=len(sizes),
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _flops(module: nn.Module, sample: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(sample)
    return counter.get_total_flops()


def _transformer_flops(layers: int, width: int, tokens: int) -> int:
    """Forward FLOPs of one caption: 12 width^2 weights a layer, and the two products of (uncropped) attention."""
    return layers * tokens * (2 * 12 * width * width + 4 * tokens * width)
