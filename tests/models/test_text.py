import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from rocket_fast.batch import PackedText
from rocket_fast.models.clip import encode_captions
from rocket_fast.models.text import TextConfig, TextTower, quick_gelu

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

CONFIG = TextConfig(vocab_size=50, context_length=16, width=12, layers=2, heads=3)


def build_tower(config: TextConfig = CONFIG) -> TextTower:
    torch.manual_seed(0)
    return TextTower(config).double()


def captions(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [[48, *torch.randint(1, 48, (length - 2,), generator=generator).tolist(), 49] for length in lengths]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 16), min_size=1, max_size=5))
def test_neighbours_and_padding_do_not_change_a_caption(lengths):
    tower, ids = build_tower(), captions(*lengths)
    together = tower(PackedText.from_ids(ids))
    alone = torch.cat([tower(PackedText.from_ids([caption])) for caption in ids])
    torch.testing.assert_close(together, alone)


def test_rows_padded_to_the_context_give_the_same_features():
    """Padding is cut, whatever ids it has: features equal those of the full-width rows computed in the open."""
    tower, ids = build_tower(), captions(3, 9, 5)
    rows = torch.zeros(3, 16, dtype=torch.int64)
    for row, caption in zip(rows, ids, strict=True):
        row[: len(caption)] = torch.tensor(caption)
    x = tower.token_embedding(rows) + tower.positional_embedding
    for block in tower.blocks:
        x = block(x)
    expected = tower.norm(x)[torch.arange(3), torch.tensor([2, 8, 4])]
    torch.testing.assert_close(tower(PackedText.from_padded(rows)), expected)
    torch.testing.assert_close(tower(PackedText.from_ids(ids)), expected)


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="only the source tree has the benchmarks")
def test_outputs_and_gradients_are_those_of_the_padded_tower(monkeypatch):
    """Of the plain tower that benchmarks time ours against, on 77 tokens a caption, in float32."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from plain import PlainText, padded

    tower = TextTower(TextConfig(vocab_size=50, width=64, layers=3, heads=4))
    plain, views = PlainText(tower), [captions(3, 40, 9, 12), captions(77, 2, 5, 30)]
    texts = [PackedText.from_ids(view) for view in views]
    upstream = torch.randn(2, 4, 64)
    results = []
    for features in (
        lambda: torch.stack(encode_captions(tower, texts)),
        lambda: torch.stack([plain(padded(text, 77)) for text in texts]),
    ):
        tower.zero_grad()
        out = features()
        (out * upstream).sum().backward()
        results.append([out.detach(), *(parameter.grad for parameter in tower.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_int32_tokens_are_taken():
    tower, text = build_tower(), PackedText.from_ids(captions(4, 6))
    narrow = dataclasses.replace(text, tokens=text.tokens.int())
    torch.testing.assert_close(tower(narrow), tower(text))


def test_compiled_once_for_all_caption_lengths():
    counter, tower = CompileCounter(), build_tower()
    compiled = torch.compile(tower, backend=counter, dynamic=True)
    for longest in (6, 9, 7, 12, 15, 3, 11):
        text = PackedText.from_ids(captions(2, longest, 4))
        torch.testing.assert_close(compiled(text), tower(text))
    assert counter.frame_count <= 3
    torch._dynamo.reset()


def test_gradients_are_the_same_every_time_on_several_threads():
    """Advanced indexing would add up positions' gradients in whatever order threads come; no run could be repeated."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    tower = TextTower(TextConfig(vocab_size=50, context_length=16, width=128, layers=1, heads=2))
    text = PackedText.from_ids(captions(*[4 + i % 12 for i in range(600)]))
    gradients = []
    for _ in range(8):
        tower.zero_grad()
        tower(text).square().sum().backward()
        gradients.append([p.grad.clone() for p in tower.parameters()])
    torch.set_num_threads(threads)
    for again in gradients[1:]:
        assert all(map(torch.equal, gradients[0], again))


def test_a_caption_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match=r"text: got a caption of 17 tokens, expected at most context_length = 16"):
        build_tower()(PackedText.from_ids(captions(17)))


def test_dropout_acts_on_strong_views_in_training_only():
    tower = build_tower(dataclasses.replace(CONFIG, dropout=0.5))
    text = PackedText.from_ids(captions(4, 8))
    tower.eval()
    plain = tower(text)
    torch.testing.assert_close(tower(text, dropout_from=0), plain)
    tower.train()
    torch.testing.assert_close(tower(text), plain)
    first, second = tower(text, dropout_from=0), tower(text, dropout_from=0)
    assert not torch.allclose(first, plain)
    assert not torch.allclose(first, second)


def test_weak_views_have_no_dropout_beside_strong_ones():
    tower = build_tower(dataclasses.replace(CONFIG, dropout=0.5)).train()
    weak, strong = PackedText.from_ids(captions(4, 8)), PackedText.from_ids(captions(5, 7))
    found = encode_captions(tower, [weak, strong])
    torch.testing.assert_close(found[0], tower(weak))
    assert not torch.allclose(found[1], tower(strong))


def test_dropout_acts_on_each_blocks_input():
    tower = build_tower(dataclasses.replace(CONFIG, dropout=0.5)).train()
    zeroed = []
    for block in tower.blocks:
        block.register_forward_pre_hook(lambda _, inputs: zeroed.append((inputs[0] == 0).double().mean().item()))
    tower(PackedText.from_ids(captions(*[16] * 32)), dropout_from=0)
    assert zeroed == pytest.approx([0.5, 0.5], abs=0.03)


def test_checkpointing_changes_no_value_and_no_gradient():
    text = PackedText.from_ids(captions(4, 8))
    results = []
    for checkpointing in ("none", "cheap", "blocks"):
        tower = build_tower(dataclasses.replace(CONFIG, dropout=0.3, checkpointing=checkpointing))
        torch.manual_seed(1)
        features = tower(text, dropout_from=0)
        features.square().sum().backward()
        results.append([features.detach(), *(parameter.grad for parameter in tower.parameters())])
    for plain, *recomputed in zip(*results, strict=True):
        for other in recomputed:
            torch.testing.assert_close(plain, other)


def test_gradients_reach_every_parameter():
    tower = build_tower()
    tower(PackedText.from_ids(captions(16, 5))).pow(3).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0 or name.endswith("bias"), name


def test_initialisation_is_that_of_clip():
    torch.manual_seed(0)
    tower = TextTower(TextConfig(vocab_size=500, width=128, layers=3, heads=2))
    block = tower.blocks[1]
    expected = {
        tower.token_embedding.weight: 0.02,
        tower.positional_embedding: 0.01,
        block.qkv.weight: 128**-0.5,
        block.proj.weight: (2 * 3 * 128) ** -0.5,
        block.fc1.weight: (2 * 128) ** -0.5,
        block.fc2.weight: (2 * 3 * 128) ** -0.5,
    }
    for weight, std in expected.items():
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert block.qkv.bias.abs().max() == 0
    assert block.proj.bias.abs().max() == 0


def test_quick_gelu():
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 0), ("context_length", 0), ("width", 13), ("layers", 0), ("heads", 0), ("dropout", 1.0)],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=rf"text\.{field}: got {value}"):
        dataclasses.replace(CONFIG, **{field: value})


def test_the_activation_is_chosen():
    text = PackedText.from_ids([[1, 2, 3]])
    features = {}
    for name in ("gelu", "quick_gelu"):
        torch.manual_seed(0)
        features[name] = TextTower(TextConfig(vocab_size=9, width=8, layers=1, heads=2, activation=name))(text)
    assert not torch.equal(features["gelu"], features["quick_gelu"])
    with pytest.raises(ValueError, match=r"text\.activation: got 'relu', expected one of"):
        TextConfig(activation="relu")
