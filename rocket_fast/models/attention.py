"""Attention, and the pre-norm transformer block that both towers are built of.

Shapes: B batch, L tokens, W width (of all heads together), H heads, E width of one head; T tokens of all captions
together, packed without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rocket_fast.batch import PackedText

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


@dataclass(frozen=True)
class PackedLayout:
    """Where T packed tokens stand in padded rows (B, L): everything but attention runs on the packed ones.

    ``token_BL``: number of the packed token at a place, any token's where there is none. ``place_T``: a token's place
    in the flattened rows. ``position_T``: its position in its caption. ``last_B``: each caption's last token's number.
    """

    token_BL: Tensor
    place_T: Tensor
    position_T: Tensor
    last_B: Tensor

    @staticmethod
    def of(text: PackedText) -> PackedLayout:
        """The layout of packed captions; made on their device without waiting for it."""
        count, device = text.tokens.shape[0], text.tokens.device
        end_B = text.lengths.cumsum(0)
        start_B = end_B - text.lengths
        caption_T = torch.repeat_interleave(text.lengths, output_size=count)
        position_T = torch.arange(count, device=device) - start_B[caption_T]
        column_L = torch.arange(text.longest, device=device)
        return PackedLayout(
            token_BL=(start_B[:, None] + column_L).clamp(max=count - 1),
            place_T=caption_T * text.longest + position_T,
            position_T=position_T,
            last_B=end_B - 1,
        )

    def pad(self, x_TW: Tensor) -> Tensor:
        """(T, W) to (B, L, W)."""
        return x_TW.index_select(0, self.token_BL.flatten()).view(*self.token_BL.shape, -1)

    def pack(self, x_BLW: Tensor) -> Tensor:
        """(B, L, W) to (T, W)."""
        return x_BLW.flatten(0, 1).index_select(0, self.place_T)


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

    def forward(self, x: Tensor, layout: PackedLayout | None = None) -> Tensor:
        """(B, L, W) to (B, L, W); or, given the layout of causal rows, packed (T, W) to (T, W)."""
        x = x + self.proj(self._attend(self.norm1(x), layout))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))

    def _attend(self, x: Tensor, layout: PackedLayout | None) -> Tensor:
        qkv_BLW = self.qkv(x) if layout is None else layout.pad(self.qkv(x))
        q_BHLE, k_BHLE, v_BHLE = qkv_BLW.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out_BLW = attention(q_BHLE, k_BHLE, v_BHLE, causal=self.causal).transpose(1, 2).flatten(2)
        return out_BLW if layout is None else layout.pack(out_BLW)


def run_block(block: nn.Module, x: Tensor, layout: PackedLayout | None = None, *, checkpointing: bool) -> Tensor:
    """``block(x)``; with ``checkpointing`` its activations are computed again in the backward pass instead of kept."""
    return checkpoint(block, x, layout, use_reentrant=False) if checkpointing else block(x, layout)
