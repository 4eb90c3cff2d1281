"""SwALIP's losses block by block, with plain exponentials and by logarithms, against the dense twins in float64."""

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rocket_fast import kernels
from rocket_fast.device import cpu_peak_bytes
from rocket_fast.kernels import reference

sinkhorn = importlib.import_module("rocket_fast.kernels.sinkhorn")  # the package's name for it is a function

KEPT, TINY = 64.0, 1e-6  # MiB of workspace: all matrices held; a row at a time


def views(count: int, rows: int, columns: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count + rows + columns)
    tensors = size * torch.randn(count, rows, columns, generator=generator, dtype=torch.float64)
    return [tensor.clone().to(dtype).requires_grad_() for tensor in tensors]


def check(name: str, sides: Sequence[Tensor], scale: float, tolerance: float, **options: Any) -> None:
    """Value and gradients of ``name`` of one half of the views and the other, against the twin's."""
    inputs = [*sides, torch.tensor(scale, dtype=torch.float64).to(sides[0].dtype).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    half = len(sides) // 2
    loss = getattr(kernels, name)(inputs[:half], inputs[half:-1], inputs[-1], **options)
    options.pop("workspace_mib", None)
    expected = getattr(reference, name)(exact[:half], exact[half:-1], exact[-1], **options)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    found, wanted = torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * expected, exact)
    # Gradients are differences of probabilities and labels, the scale's one of mean scores: exact to so many digits.
    floor = 1e-3 * max(1.0, *(x.detach().abs().max().item() for x in exact[:-1]))
    for got, right, x in zip(found, wanted, inputs, strict=True):
        assert got.dtype == x.dtype
        assert torch.isfinite(got).all()
        assert (got.double() - right).norm() <= max(tolerance, 2 * torch.finfo(x.dtype).eps) * (right.norm() + floor)


@given(
    st.integers(2, 3), st.integers(1, 30), st.integers(1, 9), st.integers(1, 4), st.sampled_from([KEPT, TINY, 0.01]),
    st.booleans(), st.sampled_from([0.0, 7.0, -3.0, 90.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_swalip_is_the_dense_one(
    count: int, rows: int, width: int, iterations: int, workspace: float, normalize: bool, scale: float
) -> None:
    """Rows that are not normalised have products of up to a hundred, and take logarithms."""
    options = {"iterations": iterations, "normalize": normalize, "workspace_mib": workspace}
    check("swalip_loss", views(2 * count, rows, width, size=2.0), scale, 1e-9, **options)


@given(
    st.integers(1, 3), st.integers(1, 30), st.integers(1, 40), st.integers(1, 4), st.sampled_from([KEPT, TINY]),
    st.sampled_from([0.3, 50.0]), st.sampled_from([0.0, 7.0, -3.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_prototypes_are_the_dense_ones(
    count: int, rows: int, prototypes: int, iterations: int, workspace: float, size: float, scale: float
) -> None:
    options = {"iterations": iterations, "workspace_mib": workspace}
    check("swalip_prototypes_loss", views(2 * count, rows, prototypes, size=size), scale, 1e-9, **options)


@pytest.mark.parametrize("name", ["swalip_loss", "swalip_prototypes_loss"])
@pytest.mark.parametrize("scale", [10.0, 90.0], ids=["bounded", "by logarithms"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)], ids=str
)
def test_other_precisions(name: str, scale: float, dtype: torch.dtype, tolerance: float) -> None:
    """At the smallest temperature of labels that is in use; float16's range is none of their affair."""
    sides = [F.normalize(x.detach(), dim=1).to(dtype).requires_grad_() for x in views(4, 300, 32)]
    check(name, sides, scale, tolerance, epsilon=0.05 if name == "swalip_loss" else 0.01, workspace_mib=0.3)


@pytest.mark.parametrize("name", ["swalip_loss", "swalip_prototypes_loss"])
def test_both_ways_agree_and_a_block_more_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = views(4, 257, 20)
    sides = [x.detach().div(6).requires_grad_() for x in sides]
    arguments = (sides[:2], sides[2:], 8.0)
    bounded = [getattr(kernels, name)(*arguments, epsilon=0.5, workspace_mib=size) for size in (KEPT, 0.02, TINY)]
    monkeypatch.setattr(sinkhorn, "LIMIT", -1.0)
    logarithms = [getattr(kernels, name)(*arguments, epsilon=0.5, workspace_mib=size) for size in (KEPT, 0.02, TINY)]
    for other in (*bounded[1:], *logarithms):
        torch.testing.assert_close(other, bounded[0], rtol=1e-12, atol=0)


def test_scores_whose_exponentials_overflow() -> None:
    """Scores of hundreds over 0.05, in float32; the dense twin says the same of the very same numbers."""
    sides = [100 * x.detach().float() for x in views(4, 20, 12)]
    for name in ("swalip_loss", "swalip_prototypes_loss"):
        options: dict[str, Any] = {"normalize": False} if name == "swalip_loss" else {}
        loss = getattr(kernels, name)(sides[:2], sides[2:], 1.0, **options)
        expected = getattr(reference, name)(sides[:2], sides[2:], 1.0, **options)
        assert torch.isfinite(loss)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def test_no_matrix_beyond_the_workspace() -> None:
    """Peak of allocations: inputs' copies and gradients, and the workspace, whether it holds the matrices or not."""
    rows, width = 768, 8
    sides = views(4, rows, width, torch.float32)
    embeddings = 4 * rows * width * 4
    for mib in (1.0, 8.0):  # two matrices are 4.5 MiB
        loss = lambda m=mib: kernels.swalip_loss(sides[:2], sides[2:], 10.0, workspace_mib=m).backward()  # noqa: E731
        assert cpu_peak_bytes(loss) < 8 * embeddings + mib * 2**20 + 2**18
    scores = views(2, rows, 512, torch.float32)
    size = scores[0].numel() * 4
    peak = cpu_peak_bytes(lambda: kernels.swalip_prototypes_loss(scores[:1], scores[1:], 10.0).backward())
    assert peak < 2 * 2 * size + 8 * 2**20  # gradients, twice while they are handed out; blocks of the cache's size


@pytest.mark.parametrize("name", ["swalip_loss", "swalip_prototypes_loss"])
def test_repeatable_inputs_kept_refused_twice_and_compiled(name: str) -> None:
    sides, scale = views(4, 9, 30, torch.float32), torch.tensor(7.0, requires_grad=True)
    before = [x.detach().clone() for x in sides]
    loss = lambda *tensors: getattr(kernels, name)(tensors[:2], tensors[2:4], tensors[4])  # noqa: E731
    first, second = (torch.autograd.grad(loss(*sides, scale), [*sides, scale]) for _ in range(2))
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))
    assert all(x.equal(old) for x, old in zip(sides, before, strict=True))
    (gradient,) = torch.autograd.grad(loss(*sides, scale), sides[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradient.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(loss(*sides, scale), loss(*sides, scale.item()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*sides, scale), loss(*sides, scale))
    again = torch.autograd.grad(compiled(*sides, scale), [*sides, scale])
    for got, expected in zip(again, first, strict=True):
        torch.testing.assert_close(got, expected)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(*sides, scale)
    torch.testing.assert_close(inside, loss(*sides, scale))


@pytest.mark.parametrize("needed", [True, False])
def test_operations_are_checked(needed: bool) -> None:
    image, text = (torch.stack([x.detach() for x in pair]).requires_grad_(needed) for pair in
                   (views(2, 5, 4), views(2, 5, 4, size=2.0)))  # fmt: skip
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=needed)
    torch.library.opcheck(sinkhorn._swalip, (image, text, scale, 0.05, 3, True, needed, 1 << 10))
    torch.library.opcheck(sinkhorn._prototypes, (image, text, scale, 0.05, 3, needed, 1 << 10))


@pytest.mark.parametrize("name", ["swalip_loss", "swalip_prototypes_loss"])
def test_what_cannot_be_used_is_named(name: str) -> None:
    loss, x = getattr(kernels, name), torch.ones(3, 2)
    scale = "h_logit_scale" if name == "swalip_loss" else "logit_scale"
    cases = [
        (((x, x), (x, x), torch.tensor(float("nan"))), {}, f"{scale}: got nan, expected finite values"),
        (((x, x), (x, x), float("inf")), {}, f"{scale}: got inf, expected a finite number"),
        (((x, x), (x, x), 1.0), {"epsilon": 0.0}, "epsilon: got 0.0, expected a number > 0"),
        (((x, x), (x, x), 1.0), {"iterations": 0}, "iterations: got 0, expected a number >= 1"),
        (((x, x), (x, x), 1.0), {"iterations": 1.5}, "iterations: got 1.5, expected an integer"),
        (((x, x), (x, x), 1.0), {"workspace_mib": 0}, "workspace_mib: got 0, expected a finite number of MiB > 0"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            loss(*arguments, **options)
