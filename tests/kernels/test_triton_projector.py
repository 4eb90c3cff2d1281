"""The Triton passes of batch norm against torch in float64: in the interpreter, in a process of its own, or on a GPU.

That no configuration spills: test_compile_check.py.
"""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from rocket_fast.kernels import projector, projector_passes
from rocket_fast.kernels import triton_projector as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by triton when it is imported, for the whole process
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
everywhere = pytest.mark.parametrize("device", ["cpu" if INTERPRETED else GPU])
SHAPES = [(2, 1), (5, 3), (40, 17), (130, 33)]
# Of the largest entry: float32 sums, and rounding of the result.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_in_the_interpreter(interpreted: tuple[int, str]) -> None:
    """All of this file again, with the kernels run by Triton's interpreter on the CPU."""
    status, said = interpreted
    assert status == 0, said[-10_000:]


@pytest.fixture(autouse=True)
def small_tiles():
    """In the interpreter, tiles so small that small batches have several, and several slabs."""
    config = kernels.Config(rows=8, columns=16, slabs=4, warps=4) if INTERPRETED else kernels.CONFIG
    with mock.patch.object(kernels, "CONFIG", config):
        yield


def close(found: Tensor, expected: Tensor, tolerance: float, like: Tensor | None = None) -> None:
    """``like``: what the result is a difference of, where that is larger than it."""
    assert found.shape == expected.shape
    apart = (found.detach().double().cpu() - expected.detach().cpu()).abs().max()
    assert apart <= tolerance * max(
        float(each.detach().abs().max()) for each in (expected, *([like] * (like is not None)))
    )


@everywhere
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_every_pass(device: str, shape: tuple[int, int], dtype: torch.dtype, affine: bool, relu: bool) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x, d = (torch.randn(shape, generator=generator).mul(2).add(3).to(device, dtype) for _ in range(2))
    given = [torch.randn(shape[1], generator=generator).to(device) if affine else None for _ in range(2)]
    moments = kernels.moments(x)
    close(moments, projector_passes.moments(x.double()), 3e-6)
    mean, inverse = moments[0], torch.rsqrt(moments[1] / shape[0] + 1e-5)
    exact = (mean.double(), inverse.double(), *(None if v is None else v.double() for v in given), relu)
    known = (mean, inverse, *given, relu)
    out, expected = torch.empty_like(x), torch.empty_like(x, dtype=torch.float64)
    kernels.normalize(x, *known, out)
    projector_passes.normalize(x.double(), *exact, expected)
    close(out, expected, TOLERANCES[dtype])
    sums, right = kernels.sums(d, x, *known), projector_passes.sums(d.double(), x.double(), *exact)
    for one, other in zip(sums, right, strict=True):
        close(one, other, 3e-6, like=d.float().sum(0))
    means = right / shape[0]
    kernels.input_gradient(d, x, *known, means.float(), out)
    projector_passes.input_gradient(d.double(), x.double(), *exact, means, expected)
    close(out, expected, TOLERANCES[dtype], like=d * inverse * (1 if given[0] is None else given[0]))
    in_place = d.clone()
    kernels.input_gradient(in_place, x, *known, means.float(), in_place)
    assert in_place.equal(out)


@everywhere
def test_large_means_cost_no_digits(device: str) -> None:
    x = (3e4 + torch.randn(100, 20)).to(device)
    close(kernels.moments(x)[1], projector_passes.moments(x.double())[1], 1e-5)


@everywhere
def test_no_rows(device: str) -> None:
    x = torch.empty(0, 5, device=device)
    assert not kernels.moments(x).any()
    vector = x.new_ones(5)
    assert not kernels.sums(x, x, vector, vector, None, None, True).any()
    kernels.normalize(x, vector, vector, None, None, True, x)


@everywhere
@pytest.mark.parametrize("out", [0, 6])
def test_the_operation_takes_them_and_repeats(device: str, out: int) -> None:
    x = torch.randn(50, 20).to(device).requires_grad_()
    weight, bias = (torch.randn(20).to(device).requires_grad_() for _ in range(2))
    matrix = torch.randn(out, 20).to(device).requires_grad_()
    options = {"training": True, "momentum": 0.1, "eps": 1e-5}

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias, matrix = inputs
        state = x, weight, bias, None, None
        if not out:
            y = projector.batch_norm_relu(*state, **options)
            return y, *torch.autograd.grad(y.square().sum(), inputs[:3])
        y = projector.batch_norm_relu_linear(*state, matrix, **options)
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    inputs = (x, weight, bias, matrix)
    assert projector._passes(x) is kernels
    found, again = step(*inputs), step(*inputs)
    assert all(one.equal(other) for one, other in zip(found, again, strict=True))
    for one, other in zip(found, step(*(i.detach().double().requires_grad_() for i in inputs)), strict=True):
        close(one, other, 1e-5)
