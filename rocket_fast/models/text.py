"""The text tower: CLIP's causal transformer (Radford et al. 2021, section 2.4), read at end-of-text.

Shapes: B captions, T tokens of all of them together, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rocket_fast.batch import PackedText
from rocket_fast.errors import InvalidArgument, require
from rocket_fast.models.attention import (
    Checkpointing,
    PackedLayout,
    TransformerBlock,
    require_checkpointing,
    run_block,
)

Activation = Literal["gelu", "quick_gelu"]


def require_activation(argument: str, name: str) -> None:
    """Refuse a name that ``ACTIVATIONS`` does not have."""
    require(name in get_args(Activation), argument, name, f"one of {get_args(Activation)}")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A causal pre-norm transformer; its MLPs are 4 times as wide."""

    vocab_size: int = 49408
    """Number of token ids; CLIP's byte-pair vocabulary has 49408."""
    context_length: int = 77
    """Longest caption in tokens, start and end included."""
    width: int = 512
    """Width of the tokens and of the features."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 8
    """Attention heads of each block."""
    activation: Activation = "quick_gelu"
    """What stands between the two layers of each MLP; CLIP's own models have QuickGELU, most of open_clip's GELU."""
    dropout: float = 0.0
    """Dropout on each block's input, in training, on strong views only."""
    checkpointing: Checkpointing = "none"
    """What the backward pass computes again instead of keeping."""

    def __post_init__(self) -> None:
        require(self.vocab_size >= 1, "text.vocab_size", self.vocab_size, "a number >= 1")
        require(self.context_length >= 1, "text.context_length", self.context_length, "a number >= 1")
        require(self.layers >= 1, "text.layers", self.layers, "a number >= 1")
        require(self.heads >= 1, "text.heads", self.heads, "a number >= 1")
        fits = self.width >= 1 and self.width % self.heads == 0
        require(fits, "text.width", self.width, f"a positive multiple of heads = {self.heads}")
        require_activation("text.activation", self.activation)
        require(0 <= self.dropout < 1, "text.dropout", self.dropout, "a number in [0, 1)")
        require_checkpointing("text.checkpointing", self.checkpointing)


class TextTower(nn.Module):
    """Captions to features, (B, W): the last block's output at each caption's last token, normalised.

    Initialised as CLIP's text tower, with N layers: normal, with standard deviations .02 (token embedding), .01
    (positions), W^-1/2 (q, k, v), (2W)^-1/2 (first MLP layer), (2NW)^-1/2 (the two layers that add to the residual
    stream); attention biases 0, MLP biases as ``nn.Linear``'s.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.width
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        activation = ACTIVATIONS[config.activation]
        blocks = [
            TransformerBlock(
                config.width, config.heads, 4 * config.width, norm_eps=1e-5, activation=activation, causal=True
            )
            for _ in range(config.layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.width, eps=1e-5)

        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in blocks:
            _initialize_block(block, config.width, config.layers)

    def forward(self, text: PackedText, *, dropout_from: int | None = None) -> Tensor:
        """Features (B, W), computed on real tokens only.

        ``dropout_from``: strong views begin at this token, and have dropout in training; None: there are none. Raises
        ``ValueError`` where a caption is longer than the context length.
        """
        limit = self.config.context_length
        if text.longest > limit:  # formatting the message only now keeps the compiled tower general in lengths
            raise InvalidArgument(
                f"text: got a caption of {text.longest} tokens, expected at most context_length = {limit}"
            )
        layout = PackedLayout.of(text)
        x_TW = self.token_embedding(text.tokens) + F.embedding(layout.position_T, self.positional_embedding)
        for block in self.blocks:
            x_TW = self._dropout(x_TW, dropout_from)
            x_TW = run_block(block, x_TW, layout, checkpointing=self.config.checkpointing)
        return self.norm(x_TW.index_select(0, layout.last_B))

    def _dropout(self, x_TW: Tensor, dropout_from: int | None) -> Tensor:
        """Dropout on the tokens of strong views."""
        if dropout_from is None or not self.config.dropout or not self.training:
            return x_TW
        weak, strong = x_TW[:dropout_from], x_TW[dropout_from:]
        return torch.cat([weak, F.dropout(strong, self.config.dropout)])


def _initialize_block(block: TransformerBlock, width: int, layers: int) -> None:
    residual_std = (2 * layers * width) ** -0.5
    nn.init.normal_(block.qkv.weight, std=width**-0.5)
    nn.init.normal_(block.fc1.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(block.proj.weight, std=residual_std)
    nn.init.normal_(block.fc2.weight, std=residual_std)
    nn.init.zeros_(block.qkv.bias)
    nn.init.zeros_(block.proj.bias)


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``: the approximation of GELU that CLIP's models were trained with.

    As SiLU of another scale: one fused derivative, and one array less is kept for it.
    """
    return F.silu(1.702 * x) / 1.702


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}
