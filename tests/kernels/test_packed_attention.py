"""Packed attention against every caption by itself, in value and gradient."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rocket_fast.kernels import packed_attention as module
from rocket_fast.kernels.packed_attention import packed_attention, xformers_attention


def one_by_one(qkv_T3HE: Tensor, lengths: list[int]) -> Tensor:
    parts = []
    for caption in qkv_T3HE.split(lengths):
        q, k, v = caption.permute(1, 2, 0, 3)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        parts.append((scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(parts)


def leaf(lengths: list[int], heads: int = 2, width: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(lengths))
    return torch.randn(sum(lengths), 3, heads, width, generator=generator).to(dtype).requires_grad_()


def check(lengths: list[int], dtype: torch.dtype, tolerance: float, **shape: int) -> None:
    qkv = leaf(lengths, dtype=dtype, **shape)
    exact = qkv.detach().double().requires_grad_()
    out, expected = packed_attention(qkv, torch.tensor(lengths)), one_by_one(exact, lengths)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (got,) = torch.autograd.grad(out, qkv, upstream.to(dtype))
    (wanted,) = torch.autograd.grad(expected, exact, upstream.to(dtype).double())
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@given(st.lists(st.integers(1, 80), min_size=1, max_size=12), st.integers(1, 3), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_every_caption_attends_by_itself(lengths: list[int], heads: int, width: int) -> None:
    check(lengths, torch.float64, 1e-10, heads=heads, width=width)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-2)], ids=str)
def test_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    check([5, 1, 77, 13, 30, 2], dtype, tolerance, heads=2, width=16)


def test_large_scores_neither_overflow_nor_lose_the_row() -> None:
    qkv = (100 * leaf([9, 4]).detach()).requires_grad_()
    assert packed_attention(qkv, torch.tensor([9, 4])).isfinite().all()


def test_buckets_hold_every_token_once_and_little_padding() -> None:
    lengths = torch.arange(1, 78)[torch.randperm(77)]
    buckets = list(module._buckets(lengths))
    tokens = torch.cat([bucket.token_bL[bucket.real_bL] for bucket in buckets])
    assert tokens.sort().values.equal(torch.arange(int(lengths.sum())))
    assert len(buckets) <= 12
    assert sum(bucket.real_bL.numel() for bucket in buckets) < 1.2 * lengths.sum()


def test_operations_pass_opcheck_and_compile_once() -> None:
    lengths = torch.tensor([5, 1, 8])
    qkv = leaf([5, 1, 8])
    torch.library.opcheck(module._packed_attention, (qkv, lengths))
    upstream = torch.randn(14, 8, dtype=torch.float64)
    torch.library.opcheck(module._packed_attention_backward, (upstream, qkv.detach(), lengths))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(packed_attention, backend=backend, fullgraph=True, dynamic=True)
    for sizes in itertools.permutations([5, 2, 9, 30], 2):
        compiled(leaf(list(sizes)), torch.tensor(sizes))
    assert len(graphs) == 1


def test_equal_calls_give_equal_bits_and_second_derivatives_are_refused() -> None:
    qkv, lengths = leaf([5, 1, 8, 20], dtype=torch.float32), torch.tensor([5, 1, 8, 20])

    def gradient(create_graph: bool = False) -> Tensor:
        return torch.autograd.grad(packed_attention(qkv, lengths).square().sum(), qkv, create_graph=create_graph)[0]

    assert gradient().equal(gradient())
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradient(create_graph=True).sum().backward()


def test_errors_name_argument_value_and_expectation() -> None:
    qkv = leaf([5, 1])
    with pytest.raises(ValueError, match=r"qkv_T3HE: got \(6, 2, 2, 4\), expected a shape \(T, 3, H, E\)"):
        packed_attention(qkv[:, :2], torch.tensor([5, 1]))
    with pytest.raises(ValueError, match=r"lengths_B: got \[5, 2\], expected numbers >= 1 that sum up to T = 6"):
        packed_attention(qkv, torch.tensor([5, 2]))
    with pytest.raises(ValueError, match=r"lengths_B: got \[6, 0\], expected numbers >= 1"):
        packed_attention(qkv, torch.tensor([6, 0]))
    with pytest.raises(ValueError, match=r"qkv_T3HE: got torch.int64, expected a floating point dtype"):
        packed_attention(torch.ones(6, 3, 2, 4, dtype=torch.int64), torch.tensor([6]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_xformers_equals_one_by_one(causal: bool) -> None:
    pytest.importorskip("xformers")
    lengths = [5, 1, 77, 13]
    qkv = leaf(lengths, width=64, dtype=torch.bfloat16).detach().cuda().requires_grad_()
    start = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().cuda()
    out = xformers_attention(qkv, start, 77, causal=causal)
    exact = qkv.detach().double().requires_grad_()
    if causal:
        expected = one_by_one(exact, lengths)
    else:
        expected = torch.cat(
            [F.scaled_dot_product_attention(*part.permute(1, 2, 0, 3)).transpose(0, 1).flatten(1)
             for part in exact.split(lengths)]
        )  # fmt: skip
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    got, wanted = torch.autograd.grad(out.sum(), qkv)[0], torch.autograd.grad(expected.sum(), exact)[0]
    torch.testing.assert_close(got.double(), wanted, rtol=3e-2, atol=3e-2)
