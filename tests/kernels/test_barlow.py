"""Barlow's loss through Gram matrices and through tiles of C, against the dense twin in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rocket_fast import kernels
from rocket_fast.device import cpu_peak_bytes
from rocket_fast.kernels import barlow, reference


def pair(samples: int, features: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples + features)
    x = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    y = 0.5 * x + torch.randn(samples, features, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


def check(samples: int, features: int, dtype: torch.dtype, tolerance: float, **options: Any) -> None:
    sides = pair(samples, features, dtype)
    exact = tuple(side.detach().double().requires_grad_() for side in sides)
    loss = kernels.barlow_loss(*sides, **options)
    options.pop("workspace_mib", None)
    expected = reference.barlow_loss(*exact, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    found, wanted = torch.autograd.grad(3 * loss, sides), torch.autograd.grad(3 * expected, exact)
    for got, right, side in zip(found, wanted, sides, strict=True):
        assert got.dtype == side.dtype
        assert (got.double() - right).norm() <= max(tolerance, 2 * torch.finfo(dtype).eps) * right.norm()


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1e-6, 64.0]))
@settings(max_examples=40, deadline=None)
def test_value_and_gradients_are_the_dense_ones(samples: int, features: int, workspace: float) -> None:
    check(samples, features, torch.float64, 1e-10, workspace_mib=workspace, lambda_=0.02, scale=0.3)


@pytest.mark.parametrize("shape", [(64, 300), (300, 64)], ids=["by samples", "by features"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)], ids=str)
def test_other_precisions(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    check(*shape, dtype, tolerance)


def test_no_matrix_of_features_is_made() -> None:
    """Peak of allocations beyond the inputs: the workspace and two gradients, twice while they are handed out."""
    x, y = pair(32, 2048, torch.float32)
    most = cpu_peak_bytes(lambda: kernels.barlow_loss(x, y, workspace_mib=0.25).backward())
    assert most < 5 * x.numel() * 4 + 2**19 < 2048 * 2048 * 4


def test_repeatable_refused_twice_compiled_and_checked() -> None:
    x, y = pair(9, 30)
    gradients = [torch.autograd.grad(kernels.barlow_loss(x, y), x)[0] for _ in range(2)]
    assert gradients[0].equal(gradients[1])
    (gradient,) = torch.autograd.grad(kernels.barlow_loss(x, y), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradient.sum().backward()
    torch.library.opcheck(barlow._forward_backward, (x, y, 0.01, 0.5, True, 1 << 12))
    torch.library.opcheck(barlow._forward_backward, (x.detach(), y.detach(), 0.01, 0.5, False, 1 << 12))
    compiled = torch.compile(kernels.barlow_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), kernels.barlow_loss(x, y))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(kernels.barlow_loss(x, y), reference.barlow_loss(x, y))


def test_products_of_half_precision_are_written_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's way, with a product of the CPU's: straight into whole rows, through a copy into columns or a sum."""
    x, y = (side.detach().bfloat16() for side in pair(6, 4))
    into: list[Tensor | None] = []

    def product(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        into.append(out)
        made = a.to(out_dtype) @ b.to(out_dtype)
        return made if out is None else out.copy_(made)

    sides = barlow._Sides(x, y)
    sides.narrow = True
    expected, whole = x.float() @ y.float().T, torch.ones(8, 8)
    monkeypatch.setattr(torch, "mm", product)
    rows, columns = whole[:6, :6].clone(), whole[1:7, 2:]
    for out, options in ((rows, {}), (columns, {}), (columns, {"add": True})):
        sides.put(out, x, y.T, **options)
    assert into[0] is rows
    assert into[1:] == [None, None]
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(columns, 2 * expected)
