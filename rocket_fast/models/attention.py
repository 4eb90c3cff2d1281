"""Attention, and the pre-norm transformer block that both towers are built of.

Shapes: B batch, L tokens, W width (of all heads together), H heads, E width of one head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SHORT_ON_CPU = 64
"""Up to this length two plain products beat torch's fused CPU attention, whose backward is slow on short sequences."""


def attention(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention with scale 1/sqrt(E): three (B, H, L, E) of one floating-point dtype to one, of the same."""
    if q_BHLE.device.type == "cpu" and q_BHLE.shape[-2] <= SHORT_ON_CPU:
        return _short_attention(q_BHLE, k_BHLE, v_BHLE, causal=causal)
    return F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, is_causal=causal)


def _short_attention(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, *, causal: bool) -> Tensor:
    length, width = q_BHLE.shape[-2:]
    scores_BHLL = (q_BHLE * width**-0.5) @ k_BHLE.transpose(-1, -2)
    if causal:
        future_LL = torch.full((length, length), -torch.inf, dtype=scores_BHLL.dtype).triu(1)
        scores_BHLL = scores_BHLL + future_LL
    return scores_BHLL.softmax(dim=-1).to(v_BHLE.dtype) @ v_BHLE


class TransformerBlock(nn.Module):
    """Pre-norm block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``; q, k and v come from one matrix product.

    The towers initialise its weights, each by its own rule.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        norm_eps: float,
        activation: Callable[[Tensor], Tensor],
        causal: bool,
    ) -> None:
        super().__init__()
        self.heads, self.activation, self.causal = heads, activation, causal
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x_BLW: Tensor) -> Tensor:
        """(B, L, W) to (B, L, W)."""
        x_BLW = x_BLW + self.proj(self._attend(self.norm1(x_BLW)))
        return x_BLW + self.fc2(self.activation(self.fc1(self.norm2(x_BLW))))

    def _attend(self, x_BLW: Tensor) -> Tensor:
        q_BHLE, k_BHLE, v_BHLE = self.qkv(x_BLW).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return attention(q_BHLE, k_BHLE, v_BHLE, causal=self.causal).transpose(1, 2).flatten(2)


def run_block(block: nn.Module, x_BLW: Tensor, *, checkpointing: bool) -> Tensor:
    """``block(x)``; with ``checkpointing`` its activations are computed again in the backward pass instead of kept."""
    return checkpoint(block, x_BLW, use_reentrant=False) if checkpointing else block(x_BLW)
