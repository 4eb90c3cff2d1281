"""SwALIP's Triton kernels against the dense twin in float64: in the interpreter, in a process of its own, or on a GPU.

That no configuration spills: test_compile_check.py.
"""

from __future__ import annotations

import importlib
import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from rocket_fast.kernels import dispatch, reference, swalip_loss
from rocket_fast.kernels import triton_sinkhorn as kernels

operation = importlib.import_module("rocket_fast.kernels.sinkhorn")._swalip  # the package's name for it is a function

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by triton when it is imported, for the whole process
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
everywhere = pytest.mark.parametrize("device", ["cpu" if INTERPRETED else GPU])
# Gradients by their norm. The interpreter cuts bfloat16's digits off where devices round.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2**-7}
ROOMY, TINY = 64.0, 1e-3  # MiB of workspace: one band and one chunk; several of both


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_in_the_interpreter(interpreted: tuple[int, str]) -> None:
    """All of this file again, with the kernels run by Triton's interpreter on the CPU."""
    status, said = interpreted
    assert status == 0, said[-10_000:]


@pytest.fixture(autouse=True)
def small_tiles():
    """In the interpreter, tiles so small that small batches have several, and strips of several."""
    if not INTERPRETED:
        yield
        return
    sweep = kernels.Config(16, 32, 32, slabs=2, warps=4, stages=2)
    labels = kernels.Config(32, 16, 32, slabs=1, warps=4, stages=2)
    table = dict.fromkeys(kernels.CONFIGS, kernels.Configs(sweep, labels))
    with mock.patch.object(kernels, "CONFIGS", table), mock.patch.object(kernels, "PROGRAMS", 8):
        yield


def views(count: int, rows: int, width: int, dtype: torch.dtype, device: str, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count + rows + width)
    drawn = size * torch.randn(count, rows, width, generator=generator)
    return [view.clone().to(device, dtype).requires_grad_() for view in drawn]


def check(sides: list[Tensor], scale: float, tolerance: float | None = None, **options: Any) -> None:
    """Value and gradients of one half of the views and the other."""
    half, tolerance = len(sides) // 2, tolerance or TOLERANCE[sides[0].dtype]
    inputs = [*sides, torch.tensor(scale, device=sides[0].device, requires_grad=True)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    loss = swalip_loss(inputs[:half], inputs[half:-1], inputs[-1], **options)
    options.pop("workspace_mib", None)
    expected = reference.swalip_loss(exact[:half], exact[half:-1], exact[-1], **options)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance / 10, atol=5e-6)
    found, right = torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * expected, exact)
    for got, wanted, x in zip(found, right, inputs, strict=True):
        assert got.dtype == x.dtype
        assert (got.double() - wanted).norm() <= tolerance * wanted.norm() + 1e-6


@everywhere
@pytest.mark.parametrize(
    ("count", "rows", "width", "dtype", "scale", "options"),
    [
        (2, 37, 20, torch.float32, 7.0, {"workspace_mib": TINY, "iterations": 2}),
        (2, 20, 33, torch.bfloat16, 7.0, {"workspace_mib": ROOMY, "iterations": 1}),
        (2, 20, 16, torch.float16, 90.0, {"workspace_mib": TINY, "iterations": 1}),
        (3, 9, 5, torch.float32, -3.0, {"workspace_mib": ROOMY, "iterations": 1}),
        (2, 1, 3, torch.float32, 0.0, {}),
    ],
    ids=str,
)
def test_swalip_is_the_dense_one(
    device: str, count: int, rows: int, width: int, dtype: torch.dtype, scale: float, options: dict[str, Any]
) -> None:
    check(views(2 * count, rows, width, dtype, device, size=2.0), scale, **options)


@everywhere
def test_scores_whose_exponentials_overflow(device: str) -> None:
    """Rows that are not normalised: logits of thousands, where float32's numbers are 2e-4 apart."""
    check(views(4, 12, 16, torch.float32, device, size=3.0), 1.0, tolerance=2e-4, normalize=False, iterations=2)


@everywhere
def test_rows_in_parts_are_the_whole(device: str) -> None:
    """What ranks do, one after another: the same loss, rows' gradients in full and columns' in parts."""
    image, text = (torch.stack([x.detach() for x in views(2, 18, 16, torch.float32, device, size)]) for size in (1, 2))
    scale = torch.tensor(7.0, device=device)
    shared: dict[str, Any] = {"samples": 18, "epsilon": 0.05, "iterations": 1, "normalize": True, "need_grad": True}
    whole = kernels.swalip_of_rows(image, text, scale, workspace=2**26, **shared)

    class Unknown(Exception):
        """A column's sum over all parts that is not known yet."""

    totals: list[Tensor] = []

    def of_part(rows: Tensor) -> Any:
        known = iter(totals)

        def combine(lse: Tensor) -> Tensor:
            if (total := next(known, None)) is None:
                raise Unknown(lse)
            return total.clone()

        try:
            return kernels.swalip_of_rows(rows, text, scale, workspace=2**26, combine=combine, **shared)
        except Unknown as unknown:
            return unknown.args[0]

    parts = image.split([3, 15], dim=1)
    for _ in range(2 * shared["iterations"]):
        totals.append(torch.stack([of_part(part) for part in parts]).logsumexp(0))
    found = [of_part(part) for part in parts]
    torch.testing.assert_close(sum(part[0] for part in found), whole[0])
    torch.testing.assert_close(found[0][1], whole[1])
    torch.testing.assert_close(torch.cat([part[2] for part in found], dim=1), whole[2], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sum(part[3] for part in found), whole[3], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sum(part[4] for part in found), whole[4], rtol=1e-4, atol=1e-7)


@everywhere
def test_equal_calls_give_equal_bits_and_values_need_no_gradient(device: str) -> None:
    sides = views(4, 20, 16, torch.float32, device)
    first, second = (
        [
            loss := swalip_loss(sides[:2], sides[2:], 7.0, iterations=1, workspace_mib=TINY),
            *torch.autograd.grad(loss, sides),
        ]
        for _ in range(2)
    )
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(swalip_loss(sides[:2], sides[2:], 7.0, iterations=1), first[0])


@everywhere
def test_operation_is_checked(device: str) -> None:
    image, text = (
        torch.stack([x.detach() for x in views(2, 5, 4, torch.float32, device, size)]) for size in (1.0, 2.0)
    )
    scale = torch.tensor(5.0, device=device, requires_grad=True)
    arguments = (image.requires_grad_(), text.requires_grad_(), scale, 0.05, 1, True, True, 1 << 10)
    torch.library.opcheck(
        operation, arguments, test_utils=("test_schema", "test_faketensor")
    )  # the rest: as on the CPU


@everywhere
def test_the_kernels_are_what_is_tested(device: str) -> None:
    """One band and one chunk: two launches a sweep, one of labels."""
    sides = views(4, 4, 16, torch.float32, device)
    with mock.patch.object(kernels, "_launch", wraps=kernels._launch) as launch:
        swalip_loss(sides[:2], sides[2:], 7.0, iterations=3).backward()
    assert launch.call_count == 2 * 6 + 1
    assert dispatch.triton_kernels("triton_sinkhorn", sides[0].double()) is None
