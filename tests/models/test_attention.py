import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rocket_fast.batch import PackedText
from rocket_fast.device import cpu_peak_bytes
from rocket_fast.kernels.packed_attention import packed_attention
from rocket_fast.models import attention as module
from rocket_fast.models.attention import (
    Attention,
    PackedLayout,
    TransformerBlock,
    attention,
    choose_attention,
    run_block,
    use_attention,
)


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
    for checkpointing in ("none", "cheap", "blocks"):
        x = torch.ones(2, 5, 12, dtype=torch.float64).cumsum(1).requires_grad_()
        layer.zero_grad()
        y = run_block(layer, x, checkpointing=checkpointing)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.qkv.weight.grad.clone()))
    for plain, *recomputed in zip(*results, strict=True):
        for other in recomputed:
            torch.testing.assert_close(plain, other)


# --- backends ---------------------------------------------------------------------------------------------------------


class EndToEnd(module._RowsEndToEnd):
    """What xformers, flash and varlen do, in plain torch."""

    name = "flash"

    def sequences(self, qkv_T3HE, start_B1, longest, *, causal):
        assert start_B1.dtype == torch.int32
        lengths = start_B1.diff().tolist()
        assert max(lengths) == longest
        parts = []
        for part in qkv_T3HE.split(lengths):
            q, k, v = part.permute(1, 2, 0, 3)
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(0, 1).flatten(1))
        return torch.cat(parts)


class Padded(Attention):
    """What torch's attention does on CUDA: packed tokens to rows and back."""

    def packed(self, qkv_T3HE, layout):
        shape = qkv_T3HE.shape[1:]
        return layout.padded(lambda rows: self.rows(rows.unflatten(-1, shape), causal=True), qkv_T3HE.flatten(1))


def layout_of(*lengths):
    return PackedLayout.of(PackedText.from_ids([[1] * length for length in lengths]))


@pytest.mark.parametrize("backend", [EndToEnd(), Padded()], ids=["end to end", "padded"])
def test_backends_agree(backend):
    layout = layout_of(3, 1, 9, 5)
    qkv = torch.randn(18, 3, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(backend.packed(qkv, layout), packed_attention(qkv, layout.lengths_B))
    rows = torch.randn(5, 7, 3, 2, 4, dtype=torch.float64)
    for causal in (False, True):
        torch.testing.assert_close(backend.rows(rows, causal=causal), Attention().rows(rows, causal=causal))


def test_a_layout_says_where_tokens_are():
    layout = layout_of(3, 1, 2)
    assert layout.start_B1.tolist() == [0, 3, 4, 6]
    assert layout.last_B.tolist() == [2, 3, 5]
    assert layout.position_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert layout.longest == 3


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("installed", "arguments", "name", "reason"),
    [
        ("xformers flash_attn", ("cuda", BF16, 64), "xformers", "first choice"),
        ("xformers flash_attn", ("cpu", FP32, 64), "torch", "xformers: has no CPU operators; flash: has no CPU"),
        ("flash_attn", ("cuda", BF16, 64), "flash", "xformers: xformers is not installed"),
        ("torch.nn.attention.varlen", ("cuda", BF16, 64), "varlen", "flash: flash_attn is not installed"),
        ("xformers", ("cuda", FP32, 64), "xformers", "first choice"),
        (
            "flash_attn torch.nn.attention.varlen",
            ("cuda", FP32, 64),
            "torch",
            "takes bfloat16 and float16, not torch.f",
        ),
        ("xformers flash_attn", ("cuda", BF16, 36), "torch", "takes heads of 8, 16 ... 256 numbers, not 36"),
        ("xformers", ("cuda", torch.float64, 64), "torch", "takes 32 and 16 bits, not torch.float64"),
        ("", ("cuda", BF16, 64), "torch", "varlen: torch.nn.attention.varlen is not installed"),
    ],
)
def test_the_first_backend_that_can_is_taken(monkeypatch, installed, arguments, name, reason):
    monkeypatch.setattr(module, "_installed", lambda wanted: wanted in installed.split())
    choice = choose_attention(*arguments)
    assert choice.name == name
    assert reason in choice.reason


def test_a_backend_can_be_asked_for_and_refused_with_the_reason():
    assert choose_attention("cpu", FP32, 64, requested="torch").reason == "asked for"
    with pytest.raises(
        ValueError, match="attention: got 'xformers', expected auto or a backend that can: has no CPU op"
    ):
        choose_attention("cpu", FP32, 64, requested="xformers")
    with pytest.raises(ValueError, match="attention: got 'fast', expected one of"):
        choose_attention("cpu", FP32, 64, requested="fast")


def test_every_block_of_a_model_gets_its_backend():
    model = torch.nn.Sequential(block(), block(causal=True))
    model[0].attend = None
    (choice,) = use_attention(model, torch.device("cpu"), FP32)
    assert choice.name == "torch"
    assert all(isinstance(layer.attend, Attention) for layer in model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["xformers", "flash", "varlen", "torch"])
def test_backends_agree_on_cuda(name):
    try:
        backend = choose_attention("cuda", BF16, 64, requested=name).build()
    except ValueError as reason:
        pytest.skip(str(reason))
    lengths = (5, 1, 77, 13)
    packed = torch.randn(sum(lengths), 3, 2, 64)
    rows = torch.randn(5, 50, 3, 2, 64)
    exact = (
        packed_attention(packed.bfloat16().double(), torch.tensor(lengths)),
        Attention().rows(rows.bfloat16().double(), causal=False),
    )
    layout = PackedLayout.of(PackedText.from_ids([[1] * length for length in lengths]).to("cuda"))
    found = backend.packed(packed.cuda().bfloat16(), layout), backend.rows(rows.cuda().bfloat16(), causal=False)
    for got, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double().cpu(), wanted, rtol=2e-2, atol=2e-2)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        return func(*args, **(kwargs or {}))


def test_cheap_checkpointing_repeats_no_product_and_keeps_less():
    products, memory = {}, {}
    layer = TransformerBlock(64, 4, 256, norm_eps=1e-6, activation=F.gelu, causal=False)
    for checkpointing in ("none", "cheap", "blocks"):

        def step(checkpointing=checkpointing):
            x = torch.randn(8, 40, 64, requires_grad=True)
            for _ in range(4):
                x = run_block(layer, x, checkpointing=checkpointing)
            x.sum().backward()

        with Products() as counted:
            step()
        products[checkpointing], memory[checkpointing] = counted.count, cpu_peak_bytes(step)
    assert products["none"] == products["cheap"] < products["blocks"]
    assert memory["blocks"] < memory["cheap"] < memory["none"]
