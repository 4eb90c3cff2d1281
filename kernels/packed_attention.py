"""Causal attention over captions that lie end to end, without padding them to one length.

Shapes: T tokens of B captions, H heads, E width of one head; L the longest caption of a bucket of b.

On the CPU captions of about equal length form buckets, and a bucket is two plain products forward and four backward:
torch's fused CPU attention is slow on short rows, and a batch's longest caption costs its own length alone. On CUDA
xformers' kernels take the row as it is. Softmaxes are made again in the backward pass instead of kept. Both operations
are opaque to torch.compile, so lengths may change from step to step and nothing is compiled again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rocket_fast.errors import optional_import, require
from rocket_fast.kernels.contrastive import refuse_second_derivative
from rocket_fast.kernels.dispatch import without_autocast

# A bucket takes captions of at least this part of its longest one's length: at most 7 buckets up to 77 tokens, a tenth
# of their rows padding; attention itself is a hundredth of the tower's work at these lengths.
SHORTEST = 0.7


class _Bucket(NamedTuple):
    """Captions of about one length.

    ``token_bL``: the number of the token at each place, the caption's last one where there is none. ``real_bL``:
    whether there is one.
    """

    token_bL: Tensor
    real_bL: Tensor


def _buckets(lengths_B: Tensor) -> Iterator[_Bucket]:
    """The captions from the longest to the shortest."""
    start_B = lengths_B.cumsum(0) - lengths_B
    length_B, order_B = lengths_B.sort(descending=True, stable=True)
    lengths = length_B.tolist()
    first = 0
    while first < len(lengths):
        longest = lengths[first]
        within = itertools.takewhile(lambda length: length >= SHORTEST * longest, lengths[first:])  # noqa: B023
        last = first + sum(1 for _ in within)
        position_L = torch.arange(longest)
        length_b1 = length_B[first:last, None]
        start_b1 = start_B[order_B[first:last]][:, None]
        yield _Bucket(start_b1 + torch.minimum(position_L, length_b1 - 1), position_L < length_b1)
        first = last


def _gathered(qkv_T3HE: Tensor, bucket: _Bucket) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a bucket, (b, H, L, E) each."""
    rows = qkv_T3HE.flatten(1).index_select(0, bucket.token_bL.flatten())
    q, k, v = rows.view(*bucket.token_bL.shape, *qkv_T3HE.shape[1:]).permute(2, 0, 3, 1, 4)
    return q, k, v


def _softmax(q_bHLE: Tensor, k_bHLE: Tensor) -> Tensor:
    """Attention weights (b, H, L, L). Places beyond a caption's end come after all of its own: no token sees them."""
    length, width = q_bHLE.shape[-2:]
    future_LL = torch.full((length, length), -torch.inf, dtype=q_bHLE.dtype).triu(1)
    scores_bHLL = torch.matmul(q_bHLE * width**-0.5, k_bHLE.mT).add_(future_LL)
    return torch.softmax(scores_bHLL, -1, dtype=torch.promote_types(q_bHLE.dtype, torch.float32)).to(q_bHLE.dtype)


@torch.library.custom_op("rocket_fast::packed_attention", mutates_args=(), device_types="cpu")
def _packed_attention(qkv_T3HE: Tensor, lengths_B: Tensor) -> Tensor:
    """Outputs (T, H * E)."""
    with without_autocast("cpu"):
        out_TW = qkv_T3HE.new_empty(qkv_T3HE.shape[0], qkv_T3HE[0, 0].numel())
        for bucket in _buckets(lengths_B):
            q, k, v = _gathered(qkv_T3HE, bucket)
            out_bLW = (_softmax(q, k) @ v).transpose(1, 2).flatten(2)
            out_TW.index_copy_(0, bucket.token_bL[bucket.real_bL], out_bLW[bucket.real_bL])
        return out_TW


@_packed_attention.register_fake
def _(qkv_T3HE: Tensor, lengths_B: Tensor) -> Tensor:
    return qkv_T3HE.new_empty(qkv_T3HE.shape[0], qkv_T3HE.shape[2] * qkv_T3HE.shape[3])


@torch.library.custom_op("rocket_fast::packed_attention_backward", mutates_args=(), device_types="cpu")
def _packed_attention_backward(d_out_TW: Tensor, qkv_T3HE: Tensor, lengths_B: Tensor) -> Tensor:
    """Gradient to queries, keys and values."""
    with without_autocast("cpu"):
        d_qkv_T3HE = torch.empty_like(qkv_T3HE, memory_format=torch.contiguous_format)
        heads, width = qkv_T3HE.shape[2:]
        for bucket in _buckets(lengths_B):
            q, k, v = _gathered(qkv_T3HE, bucket)
            softmax_bHLL = _softmax(q, k)
            d_out_bLW = d_out_TW.index_select(0, bucket.token_bL.flatten()).view(*bucket.token_bL.shape, -1)
            d_out_bLW = d_out_bLW.masked_fill(~bucket.real_bL[..., None], 0)
            d_out_bHLE = d_out_bLW.unflatten(2, (heads, width)).transpose(1, 2)
            d_softmax_bHLL = d_out_bHLE @ v.mT
            d_scores_bHLL = torch.ops.aten._softmax_backward_data(d_softmax_bHLL, softmax_bHLL, -1, softmax_bHLL.dtype)
            d_scores_bHLL *= width**-0.5
            parts = (d_scores_bHLL @ k, d_scores_bHLL.mT @ q, softmax_bHLL.mT @ d_out_bHLE)
            d_bL3HE = torch.stack(parts, dim=3).permute(0, 2, 3, 1, 4)
            d_qkv_T3HE.index_copy_(0, bucket.token_bL[bucket.real_bL], d_bL3HE[bucket.real_bL])
        return d_qkv_T3HE


@_packed_attention_backward.register_fake
def _(d_out_TW: Tensor, qkv_T3HE: Tensor, lengths_B: Tensor) -> Tensor:
    return qkv_T3HE.new_empty(qkv_T3HE.shape)


def _keep_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, d_out_TW: Tensor) -> tuple[Tensor, None]:
    return _packed_attention_backward(d_out_TW, *ctx.saved_tensors), None


def _keep_nothing(ctx: Any, inputs: tuple, output: Tensor) -> None:
    pass


_packed_attention.register_autograd(_differentiate, setup_context=_keep_inputs)
_packed_attention_backward.register_autograd(refuse_second_derivative, setup_context=_keep_nothing)


def packed_attention(qkv_T3HE: Tensor, lengths_B: Tensor) -> Tensor:
    """Causal softmax attention with scale 1/sqrt(E) within each of B captions that lie end to end, on the CPU.

    Args:
        qkv_T3HE: floating point (T, 3, H, E): queries, keys and values of all tokens.
        lengths_B: integers (B,), how many tokens belong to each caption, at least one; they sum up to T.

    Returns:
        (T, H * E), in the dtype of the input. First derivatives only; softmaxes in float32 at least.

    Raises:
        ValueError: shapes that do not fit, lengths that do not sum up to T.
    """
    shape = tuple(qkv_T3HE.shape)
    require(len(shape) == 4 and shape[1] == 3, "qkv_T3HE", shape, "a shape (T, 3, H, E)")
    require(qkv_T3HE.is_floating_point(), "qkv_T3HE", qkv_T3HE.dtype, "a floating point dtype")
    if not torch.compiler.is_compiling():
        fits = lengths_B.ndim == 1 and int(lengths_B.sum()) == shape[0] and bool((lengths_B > 0).all())
        require(fits, "lengths_B", lengths_B.tolist(), f"numbers >= 1 that sum up to T = {shape[0]}")
    return _packed_attention(qkv_T3HE, lengths_B)


# --- xformers ---------------------------------------------------------------------------------------------------------


def _xformers_mask(start_B1: Tensor, longest: int, causal: bool) -> Any:
    """Its block-diagonal mask from what the device knows already, so that the host does not wait for lengths."""
    bias = optional_import("xformers.ops.fmha.attn_bias", "gpu")
    info = bias._SeqLenInfo(seqstart=start_B1, max_seqlen=longest, min_seqlen=1, seqstart_py=[0])
    kind = bias.BlockDiagonalCausalMask if causal else bias.BlockDiagonalMask
    return kind(q_seqinfo=info, k_seqinfo=info)


@torch.library.custom_op("rocket_fast::xformers_attention", mutates_args=())
def _xformers_attention(qkv_T3HE: Tensor, start_B1: Tensor, longest: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Outputs (T, H, E) and log-sum-exps (1, H, T)."""
    fmha = optional_import("xformers.ops.fmha", "gpu")
    q, k, v = (part[None] for part in qkv_T3HE.unbind(1))
    mask = _xformers_mask(start_B1, longest, causal)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, mask)
    return out[0], lse


@_xformers_attention.register_fake
def _(qkv_T3HE: Tensor, start_B1: Tensor, longest: int, causal: bool) -> tuple[Tensor, Tensor]:
    tokens, _, heads, width = qkv_T3HE.shape
    return qkv_T3HE.new_empty(tokens, heads, width), qkv_T3HE.new_empty(1, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("rocket_fast::xformers_attention_backward", mutates_args=())
def _xformers_attention_backward(
    d_out_THE: Tensor, out_THE: Tensor, lse: Tensor, qkv_T3HE: Tensor, start_B1: Tensor, longest: int, causal: bool
) -> Tensor:
    """Gradient to queries, keys and values."""
    fmha = optional_import("xformers.ops.fmha", "gpu")
    q, k, v = (part[None] for part in qkv_T3HE.unbind(1))
    mask = _xformers_mask(start_B1, longest, causal)
    gradients = fmha.memory_efficient_attention_backward(d_out_THE[None], out_THE[None], lse, q, k, v, mask)
    return torch.stack([gradient[0] for gradient in gradients], dim=1)


@_xformers_attention_backward.register_fake
def _(
    d_out_THE: Tensor, out_THE: Tensor, lse: Tensor, qkv_T3HE: Tensor, start_B1: Tensor, longest: int, causal: bool
) -> Tensor:
    return qkv_T3HE.new_empty(qkv_T3HE.shape)


def _keep_xformers(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv_T3HE, start_B1, ctx.longest, ctx.causal = inputs
    ctx.save_for_backward(*output, qkv_T3HE, start_B1)
    ctx.mark_non_differentiable(output[1])


def _differentiate_xformers(ctx: Any, d_out_THE: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
    d_qkv = _xformers_attention_backward(d_out_THE.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.causal)
    return d_qkv, None, None, None


_xformers_attention.register_autograd(_differentiate_xformers, setup_context=_keep_xformers)
_xformers_attention_backward.register_autograd(refuse_second_derivative, setup_context=_keep_nothing)


def xformers_attention(qkv_T3HE: Tensor, start_B1: Tensor, longest: int, *, causal: bool) -> Tensor:
    """Attention within each of B sequences that lie end to end, by xformers' CUDA kernels; scale 1/sqrt(E).

    Args:
        qkv_T3HE: (T, 3, H, E) on CUDA, float32, bfloat16 or float16, E a multiple of 8: queries, keys and values.
        start_B1: int32 (B + 1,), where each sequence begins, and T; on the same device.
        longest: the longest sequence's length.
        causal: whether tokens see none after them.

    Returns:
        (T, H * E), in the dtype of the input. First derivatives only.
    """
    return _xformers_attention(qkv_T3HE, start_B1, longest, causal)[0].flatten(1)
