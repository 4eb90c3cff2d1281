import pytest
import torch
from torch.nn import functional as F

from rocket_fast.models.attention import TransformerBlock, attention, run_block


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 7, 65])  # below and above SHORT_ON_CPU
def test_attention_is_softmax_of_scaled_products(causal, length):
    q, k, v = torch.randn(3, 2, 3, length, 5, dtype=torch.float64)
    scores = q @ k.transpose(-1, -2) / 5**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(attention(q, k, v, causal=causal), scores.softmax(-1) @ v)


def block(causal: bool = False) -> TransformerBlock:
    return TransformerBlock(12, 3, 20, norm_eps=1e-6, activation=F.gelu, causal=causal).double()


def test_causal_block_sees_no_later_token():
    causal = block(causal=True)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(causal(x)[:, :4], causal(changed)[:, :4])
    assert not torch.allclose(block()(x)[:, :4], block()(changed)[:, :4])


def test_heads_do_not_mix_samples_or_channels():
    """A permutation of the heads, undone by the output projection, changes nothing."""
    original, permuted = block(), block()
    order = torch.arange(12).view(3, 4)[[2, 0, 1]].flatten()
    state = original.state_dict()
    state["qkv.weight"] = original.qkv.weight.view(3, 12, 12)[:, order].reshape(36, 12)
    state["qkv.bias"] = original.qkv.bias.view(3, 12)[:, order].reshape(36)
    state["proj.weight"] = original.proj.weight[:, order]
    permuted.load_state_dict(state)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(original(x), permuted(x))


def test_checkpointing_changes_no_value_and_no_gradient():
    layer = block()
    results = []
    for checkpointing in (False, True):
        x = torch.ones(2, 5, 12, dtype=torch.float64).cumsum(1).requires_grad_()
        layer.zero_grad()
        y = run_block(layer, x, checkpointing=checkpointing)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.qkv.weight.grad.clone()))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)
