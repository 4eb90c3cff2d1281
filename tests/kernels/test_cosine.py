"""SiamLIP's loss against the dense twin in float64: torch here, Triton's kernels in its interpreter and on a GPU."""

import importlib.util
import os
from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rocket_fast import kernels
from rocket_fast.kernels import cosine, dispatch, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by triton when it is imported, for the whole process
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
everywhere = pytest.mark.parametrize("device", ["cpu", GPU])
# The interpreter cuts bfloat16's digits off where devices round.
BF16 = 2**-7 if INTERPRETED else 2**-8
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: BF16, torch.float16: 5e-4}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
def test_in_the_interpreter(interpreted: tuple[int, str]) -> None:
    """All of this file again, with the kernels run by Triton's interpreter on the CPU."""
    status, said = interpreted
    assert status == 0, said[-10_000:]


Views = Sequence[Tensor]


def four(views: int, rows: int, width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Views, ...]:
    """Predictions of images and texts, then their targets: 1 + K tensors each."""
    generator = torch.Generator().manual_seed(views + rows + width)
    x = torch.randn(4, views, rows, width, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-1, 1, rows, dtype=torch.float64)[:, None]  # rows of all lengths
    return tuple([view.to(device, dtype).requires_grad_() for view in group.clone()] for group in x)


def check(groups: tuple[Views, ...]) -> None:
    predictions = [*groups[0], *groups[1]]
    tolerance, smallest = TOLERANCE[predictions[0].dtype], torch.finfo(predictions[0].dtype).smallest_normal
    exact = tuple([view.detach().double().requires_grad_() for view in group] for group in groups)
    loss, expected = kernels.siamlip_loss(*groups), reference.siamlip_loss(*exact)
    close = {"rtol": min(tolerance, 2e-6), "atol": min(tolerance, 2e-6)}  # inputs are the same numbers
    torch.testing.assert_close(loss.double(), expected, **close)
    found = torch.autograd.grad(3 * loss, predictions)
    wanted = torch.autograd.grad(3 * expected, [*exact[0], *exact[1]])
    views, rows = len(groups[0]), len(predictions[0])
    for got, right, prediction in zip(found, wanted, [*exact[0], *exact[1]], strict=True):
        assert got.dtype == predictions[0].dtype
        # A row's gradient is the difference of two sums of unit vectors, over its length.
        size_N = 3 * views / (rows * (1 + (views - 1) ** 2)) / prediction.detach().norm(dim=1)
        assert ((got.double() - right).norm(dim=1) <= tolerance * size_N + smallest).all()


@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 70))
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@everywhere
def test_value_and_gradient_are_the_dense_ones(
    device: str, dtype: torch.dtype, views: int, rows: int, width: int
) -> None:
    check(four(views, rows, width, dtype, device))


@everywhere
def test_rows_wider_than_a_program_holds(device: str) -> None:
    check(four(2, 2, 3000, torch.float32, device))
    check(four(1, 2, 9000, torch.float32, device))


@everywhere
def test_one_pair_and_a_row_of_zeros(device: str) -> None:
    prediction, target = (x[0] for x in four(1, 5, 3, torch.float32, device)[:2])
    with torch.no_grad():
        target[1] = 0
    loss = kernels.negative_cosine_loss(prediction, target)
    expected = reference.negative_cosine_loss(prediction, target)
    torch.testing.assert_close(loss, expected)
    (got,), (right,) = (torch.autograd.grad(x, prediction) for x in (loss, expected))
    torch.testing.assert_close(got, right)
    loss = kernels.negative_cosine_loss(prediction, target)
    assert torch.autograd.grad(loss, target, allow_unused=True) == (None,)


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter's process")
def test_the_kernels_are_what_is_tested() -> None:
    from rocket_fast.kernels import triton_cosine

    x = four(3, 4, 5, torch.float32)
    with mock.patch.object(triton_cosine, "_launch", wraps=triton_cosine._launch) as launch:
        kernels.siamlip_loss(*x).backward()
    assert launch.call_count == 2
    assert dispatch.triton_kernels("triton_cosine", x[0][0].double()) is None


def test_what_is_kept() -> None:
    """Views side by side, and their norms."""
    kept: list[int] = []
    x = four(3, 64, 32, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda y: y):
        kernels.siamlip_loss(*x)
    assert sorted(kept) == [6 * 64, 6 * 64, 6 * 64 * 32, 6 * 64 * 32]


def test_repeatable_inputs_kept_refused_twice_compiled_and_checked() -> None:
    groups = four(3, 9, 30, torch.float32)
    views = [view for group in groups for view in group]
    before = [view.detach().clone() for view in views]
    loss = lambda *x: kernels.siamlip_loss(x[:3], x[3:6], x[6:9], x[9:])  # noqa: E731
    first, second = (torch.autograd.grad(loss(*views), views[:6]) for _ in range(2))
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))
    assert all(view.equal(old) for view, old in zip(views, before, strict=True))
    (gradient,) = torch.autograd.grad(loss(*views), views[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradient.sum().backward()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*views), loss(*views))
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(*views)
    torch.testing.assert_close(inside, loss(*views))
    p, v = torch.randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_(), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.library.opcheck(cosine._forward, (p, v))
    p = p.detach()
    torch.library.opcheck(cosine._backward, (torch.tensor(0.5).double(), p, v, p.norm(dim=-1), v.norm(dim=-1)))
