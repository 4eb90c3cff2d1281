"""The schedule's corners against the recipe, who decays, and AdamW against its own formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rocket_fast.optim import LossScale, OptimConfig, build_optimizer, learning_rate

SCHEDULE = OptimConfig(lr=3e-3, warmup_epochs=1, start_lr=1e-6, end_lr=1e-5)


def rate(step: int, total: int = 320) -> float:
    return learning_rate(SCHEDULE, step, steps_per_epoch=10, total_steps=total)


def test_schedule_meets_the_recipe_at_its_corners():
    assert rate(0) == 1e-6
    assert rate(10) == pytest.approx(3e-3)
    assert rate(319) == pytest.approx(1e-5)
    middle = 10 + (319 - 10) / 2
    assert (rate(math.floor(middle)) + rate(math.ceil(middle))) / 2 == pytest.approx((3e-3 + 1e-5) / 2, rel=1e-6)


@given(step=st.integers(0, 318))
def test_schedule_rises_then_falls(step: int):
    assert (rate(step + 1) > rate(step)) == (step < 10)


def test_schedule_shorter_than_its_warmup_never_divides_by_zero():
    rates = [rate(step, total=3) for step in range(3)]
    assert rates == sorted(rates)
    assert learning_rate(SCHEDULE, 0, steps_per_epoch=1, total_steps=1) > 0


def test_only_parameters_with_two_dimensions_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv1d(4, 2, 1))
    optimizer = build_optimizer(OptimConfig(weight_decay=0.5), model)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.5, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": 0.5, "2.bias": 0.0,
    }  # fmt: skip


def test_one_step_equals_adamw_by_hand():
    layer = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(OptimConfig(lr=0.1, start_lr=0, end_lr=0, weight_decay=0.5), layer)
    layer.weight.grad = torch.full_like(before, 0.3)
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * 0.3 / (0.3 + 1e-8)  # bias-corrected moments of the first step
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-9, atol=0)


def test_optimizer_skips_its_update_when_told_the_gradients_are_bad():
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(OptimConfig(), layer)
    layer.weight.grad = torch.full_like(before, float("nan"))
    layer.bias.grad = torch.zeros_like(layer.bias)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(layer.weight.detach(), before)


def test_loss_scale_goes_as_torchs_scaler_does(monkeypatch):
    monkeypatch.setattr(LossScale, "GROWTH_STEPS", 3)
    ours, theirs = LossScale(torch.device("cpu")), torch.amp.GradScaler("cpu", LossScale.START, growth_interval=3)
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for step, overflowed in enumerate("oogggogggggggoog"):
        assert ours.value == theirs.get_scale()
        gradient = torch.tensor([1.0, math.inf if overflowed == "o" else 1.0])
        theirs.scale((parameter * gradient).sum()).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(torch.tensor(overflowed == "o"))
        if step == 8:  # in the middle of good steps
            state, ours = ours.state_dict(), LossScale(torch.device("cpu"))
            ours.load_state_dict(state)
    assert ours.value == theirs.get_scale() != LossScale.START


@pytest.mark.parametrize(
    ("field", "value"),
    [("clip_norm", 0), ("lr", 0), ("weight_decay", -1), ("betas", (0.9, 1.0)), ("start_lr", 1.0), ("eps", 0)],
)
def test_bad_values_are_named(field: str, value: object):
    with pytest.raises(ValueError, match=f"optim.{field}: got .*expected"):
        OptimConfig(**{field: value})
