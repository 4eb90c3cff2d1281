"""Attention by several backends, and the pre-norm transformer block that both towers are built of.

Shapes: B batch, L tokens, W width (of all heads together), H heads, E width of one head; T tokens of all captions
together, packed without padding.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rocket_fast.batch import PackedText
from rocket_fast.errors import optional_import, require
from rocket_fast.kernels.packed_attention import packed_attention, xformers_attention

SHORT_ON_CPU = 64
"""Up to this length two plain products beat torch's fused CPU attention, whose backward is slow on short sequences."""

AttentionName = Literal["auto", "xformers", "flash", "varlen", "torch"]
"""xformers and flash-attention: the packages' kernels; varlen: ``torch.nn.attention.varlen``; torch: torch's fused
attention on rows of one length, on the CPU plain products where they are short. All but auto, which chooses."""


# --- how captions and rows lie ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedLayout:
    """Where T packed tokens are in their captions.

    ``lengths_B``: tokens of each caption; ``start_B1``: int32 (B + 1,), its first token's number, then T; ``last_B``:
    its last token's number. ``position_T``: a token's position in its caption. ``longest``: tokens of the longest.
    """

    lengths_B: Tensor
    start_B1: Tensor
    last_B: Tensor
    position_T: Tensor
    longest: int

    @staticmethod
    def of(text: PackedText) -> PackedLayout:
        """The layout of packed captions; made on their device without waiting for it."""
        count, device = text.tokens.shape[0], text.tokens.device
        start_B1 = F.pad(text.lengths.cumsum(0), (1, 0))
        first_T = torch.repeat_interleave(start_B1[:-1], text.lengths, output_size=count)
        return PackedLayout(
            lengths_B=text.lengths,
            start_B1=start_B1.int(),
            last_B=start_B1[1:] - 1,
            position_T=torch.arange(count, device=device) - first_T,
            longest=text.longest,
        )

    def padded(self, attend: Callable[[Tensor], Tensor], x_TC: Tensor) -> Tensor:
        """``attend`` from rows (B, L, C) to rows (B, L, W), given and taking packed tokens (T, C) and (T, W)."""
        column_L = torch.arange(self.longest, device=x_TC.device)
        token_BL = (self.start_B1[:-1, None] + column_L).clamp(max=x_TC.shape[0] - 1)
        out_BLW = attend(x_TC.index_select(0, token_BL.flatten()).view(*token_BL.shape, -1))
        place_T = torch.repeat_interleave(
            torch.arange(token_BL.shape[0], device=x_TC.device) * self.longest - self.start_B1[:-1],
            self.lengths_B,
            output_size=x_TC.shape[0],
        ) + torch.arange(x_TC.shape[0], device=x_TC.device)
        return out_BLW.flatten(0, 1).index_select(0, place_T)


# --- backends ---------------------------------------------------------------------------------------------------------


class Attention:
    """Torch's own attention, which runs everywhere, and the interface of all backends.

    Softmax with scale 1/sqrt(E). q, k and v come side by side, as one matrix product makes them.
    """

    name: AttentionName = "torch"

    def rows(self, qkv_BL3HE: Tensor, *, causal: bool) -> Tensor:
        """(B, L, 3, H, E) to (B, L, W), every row by itself."""
        q_BHLE, k_BHLE, v_BHLE = qkv_BL3HE.permute(2, 0, 3, 1, 4)
        return attention(q_BHLE, k_BHLE, v_BHLE, causal=causal).transpose(1, 2).flatten(2)

    def packed(self, qkv_T3HE: Tensor, layout: PackedLayout) -> Tensor:
        """(T, 3, H, E) to (T, W), causal, every caption by itself."""
        if qkv_T3HE.device.type == "cpu":
            return packed_attention(qkv_T3HE, layout.lengths_B)
        shape = qkv_T3HE.shape[1:]

        def attend(rows_BLC: Tensor) -> Tensor:
            return self.rows(rows_BLC.unflatten(-1, shape), causal=True)

        return layout.padded(attend, qkv_T3HE.flatten(1))


class _RowsEndToEnd(Attention):
    """A backend with one kernel, for sequences that lie end to end; rows of one length do, too."""

    def rows(self, qkv_BL3HE: Tensor, *, causal: bool) -> Tensor:
        batch, length = qkv_BL3HE.shape[:2]
        start_B1 = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=qkv_BL3HE.device)
        return self.sequences(qkv_BL3HE.flatten(0, 1), start_B1, length, causal=causal).unflatten(0, (batch, length))

    def packed(self, qkv_T3HE: Tensor, layout: PackedLayout) -> Tensor:
        return self.sequences(qkv_T3HE, layout.start_B1, layout.longest, causal=True)

    def sequences(self, qkv_T3HE: Tensor, start_B1: Tensor, longest: int, *, causal: bool) -> Tensor:
        """(T, 3, H, E) to (T, W)."""
        raise NotImplementedError


class XformersAttention(_RowsEndToEnd):
    """xformers' memory-efficient attention under its block-diagonal masks."""

    name: AttentionName = "xformers"

    def sequences(self, qkv_T3HE: Tensor, start_B1: Tensor, longest: int, *, causal: bool) -> Tensor:
        return xformers_attention(qkv_T3HE, start_B1, longest, causal=causal)


class VarlenAttention(_RowsEndToEnd):
    """``torch.nn.attention.varlen``."""

    name: AttentionName = "varlen"

    def __init__(self) -> None:
        self.attend = optional_import("torch.nn.attention.varlen", "gpu").varlen_attn
        # torch 2.10 had a flag, later ones have a window to the left.
        flag = "is_causal" in inspect.signature(self.attend).parameters
        self.causal: dict[str, Any] = {"is_causal": True} if flag else {"window_size": (-1, 0)}

    def sequences(self, qkv_T3HE: Tensor, start_B1: Tensor, longest: int, *, causal: bool) -> Tensor:
        q, k, v = qkv_T3HE.unbind(1)
        return self.attend(q, k, v, start_B1, start_B1, longest, longest, **self.causal if causal else {}).flatten(1)


class FlashAttention(_RowsEndToEnd):
    """The flash-attn package."""

    name: AttentionName = "flash"

    def __init__(self) -> None:
        self.attend = optional_import("flash_attn", "gpu").flash_attn_varlen_qkvpacked_func

    def sequences(self, qkv_T3HE: Tensor, start_B1: Tensor, longest: int, *, causal: bool) -> Tensor:
        return self.attend(qkv_T3HE, start_B1, longest, causal=causal).flatten(1)


@dataclass(frozen=True)
class AttentionChoice:
    """A backend, and why it."""

    name: AttentionName
    reason: str

    def build(self) -> Attention:
        """The backend itself."""
        kinds = (Attention, XformersAttention, VarlenAttention, FlashAttention)
        return next(kind for kind in kinds if kind.name == self.name)()


def choose_attention(
    device_type: str, dtype: torch.dtype, head_width: int, *, requested: AttentionName = "auto"
) -> AttentionChoice:
    """The backend for a tower, once and for all: the first that can of xformers, flash, varlen, torch.

    Args:
        device_type: "cuda" or "cpu".
        dtype: what q, k and v are: autocast's dtype where it is on.
        head_width: E.
        requested: a backend by name, or "auto".

    Raises:
        ValueError: the requested backend cannot, with the reason.
    """
    names = get_args(AttentionName)
    require(requested in names, "attention", requested, f"one of {names}")
    obstacles = {name: _obstacle(name, device_type, dtype, head_width) for name in names if name != "auto"}
    if requested != "auto":
        obstacle = obstacles[requested]
        require(obstacle is None, "attention", requested, f"auto or a backend that can: {obstacle}")
        return AttentionChoice(requested, "asked for")
    name = next(name for name, obstacle in obstacles.items() if obstacle is None)
    better = itertools.takewhile(lambda item: item[0] != name, obstacles.items())
    return AttentionChoice(name, "; ".join(f"{other}: {obstacle}" for other, obstacle in better) or "first choice")


def _obstacle(name: str, device_type: str, dtype: torch.dtype, head_width: int) -> str | None:
    """Why a backend cannot be taken, or None."""
    if name == "torch":
        return None
    if device_type != "cuda":
        return f"has no {device_type.upper()} operators"
    module = {"xformers": "xformers", "flash": "flash_attn", "varlen": "torch.nn.attention.varlen"}[name]
    if not _installed(module):
        return f"{module} is not installed"
    if name != "xformers" and dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    if dtype == torch.float64:
        return "takes 32 and 16 bits, not torch.float64"
    if head_width % 8 or head_width > 256:
        return f"takes heads of 8, 16 ... 256 numbers, not {head_width}"
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def attention(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, *, causal: bool) -> Tensor:
    """Torch's softmax attention, scale 1/sqrt(E): three (B, H, L, E) of one dtype to one of the same."""
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


# --- the block --------------------------------------------------------------------------------------------------------


class TransformerBlock(nn.Module):
    """Pre-norm block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``; q, k and v come from one matrix product.

    The towers initialise its weights, each by its own rule. ``attend`` is the backend of attention.
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
        self.attend = Attention()
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
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        return self.attend.rows(qkv, causal=self.causal) if layout is None else self.attend.packed(qkv, layout)


def use_attention(
    model: nn.Module, device: torch.device, dtype: torch.dtype, *, requested: AttentionName = "auto"
) -> list[AttentionChoice]:
    """Choose the backend of every transformer block of a model that computes on ``device`` in ``dtype``.

    Returns the choices, of different heads' widths. Raises ``ValueError`` as ``choose_attention`` does.
    """
    chosen: dict[int, tuple[AttentionChoice, Attention]] = {}
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            head_width = module.qkv.in_features // module.heads
            if head_width not in chosen:
                choice = choose_attention(device.type, dtype, head_width, requested=requested)
                chosen[head_width] = choice, choice.build()
            module.attend = chosen[head_width][1]
    return [choice for choice, _ in chosen.values()]


# --- gradient checkpointing -------------------------------------------------------------------------------------------

Checkpointing = Literal["none", "cheap", "blocks"]
"""What the backward pass computes again: nothing; everything of a block but its matrix products and attention, which
leaves two thirds of the activations' memory at hardly any cost; whole blocks, which leaves a fifth of it and costs a
fifth to a third of the time (measured on ViT-S/16)."""

_DEAR = {
    *("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "torch_attn._varlen_attn"),
    *("rocket_fast.packed_attention", "rocket_fast.xformers_attention"),
    *(f"aten._scaled_dot_product_{kind}" for kind in ("flash_attention", "efficient_attention", "cudnn_attention")),
    "aten._scaled_dot_product_flash_attention_for_cpu",
}
"""Operations whose results "cheap" keeps."""


def require_checkpointing(argument: str, value: str) -> None:
    """One of the policies."""
    require(value in get_args(Checkpointing), argument, value, f"one of {get_args(Checkpointing)}")


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(op).rsplit(".", 1)[0]
    return CheckpointPolicy.MUST_SAVE if name in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(
    block: nn.Module, x: Tensor, layout: PackedLayout | None = None, *, checkpointing: Checkpointing
) -> Tensor:
    """``block(x)``; what ``checkpointing`` names is computed again in the backward pass instead of kept."""
    if checkpointing == "none":
        return block(x, layout)
    if checkpointing == "blocks":
        return checkpoint(block, x, layout, use_reentrant=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, x, layout, use_reentrant=False, context_fn=contexts)
