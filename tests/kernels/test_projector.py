"""Batch norm, ReLU and the linear layers about them against torch's modules in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rocket_fast.kernels import projector, projector_passes
from rocket_fast.kernels.projector import batch_norm_relu, batch_norm_relu_linear

TRAINING: dict[str, Any] = {"training": True, "momentum": 0.2, "eps": 1e-4}


@pytest.fixture(params=["numba", "torch"])
def passes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both implementations for the CPU."""
    if request.param == "numba":
        pytest.importorskip("numba")
        yield
        return
    with mock.patch.object(projector, "_numba", return_value=None):
        yield


class Case:
    """A norm and the linear layers about it, filled at random; ``mean`` and ``spread`` are x's."""

    def __init__(
        self, rows: int, width: int, out: int = 0, *, affine: bool = True, biased: bool = True, relu: bool = True,
        mean: float = 1.0, spread: float = 2.0,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(rows + 31 * width)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.relu = relu
        self.x = mean + spread * draw(rows, width)
        self.leaves = {
            "weight": draw(width) if affine else None,
            "bias": draw(width) if affine else None,
            "linear_bias": draw(width) if biased else None,
            "matrix": draw(out, width) if out else None,
            "vector": draw(out) if out and biased else None,
        }
        self.upstream = draw(rows, out or width)

    def inputs(self, dtype: torch.dtype, parameters: torch.dtype) -> dict[str, Tensor | None]:
        leaves = {"x": self.x, **self.leaves}
        narrow = ("x", "matrix", "vector")
        kinds = {name: dtype if name in narrow else parameters for name in leaves}
        return {name: None if leaf is None else leaf.to(kinds[name]).requires_grad_() for name, leaf in leaves.items()}

    def ours(self, dtype: torch.dtype = torch.float64, group: Any = None) -> dict[str, Tensor]:
        """Output, gradients and running buffers."""
        parameters = dtype if dtype == torch.float64 else torch.float32
        inputs = self.inputs(dtype, parameters)
        width = self.x.shape[1]
        running = torch.full((width,), 0.5, dtype=parameters), torch.full((width,), 1.5, dtype=parameters)
        out = apply(inputs, running, relu=self.relu, group=group, **TRAINING)
        return self.outcome(out, inputs, running)

    def plain(self, like: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """The same of torch's modules in float64, from inputs rounded as ours."""
        inputs = {
            name: None if leaf is None else leaf.detach().double().requires_grad_()
            for name, leaf in self.inputs(like, like if like == torch.float64 else torch.float32).items()
        }
        norm = nn.BatchNorm1d(self.x.shape[1], momentum=TRAINING["momentum"], eps=TRAINING["eps"]).double()
        norm.running_mean.fill_(0.5)
        norm.running_var.fill_(1.5)
        x = inputs["x"] if inputs["linear_bias"] is None else inputs["x"] + inputs["linear_bias"]
        options = (norm.running_mean, norm.running_var, inputs["weight"], inputs["bias"], True, 0.2, 1e-4)
        y = F.batch_norm(x, *options)
        y = y.relu() if self.relu else y
        out = y if inputs["matrix"] is None else F.linear(y, inputs["matrix"], inputs["vector"])
        return self.outcome(out, inputs, (norm.running_mean, norm.running_var))

    def outcome(self, out: Tensor, inputs: dict[str, Tensor | None], running: tuple[Tensor, ...]) -> dict[str, Tensor]:
        given = {name: leaf for name, leaf in inputs.items() if leaf is not None}
        gradients = torch.autograd.grad(out, list(given.values()), self.upstream.to(out.dtype))
        found = {f"d {name}": gradient for name, gradient in zip(given, gradients, strict=True)}
        return {"out": out.detach(), "running_mean": running[0], "running_var": running[1], **found}


def apply(inputs: dict[str, Tensor | None], running: Any, **options: Any) -> Tensor:
    state = inputs["x"], inputs["weight"], inputs["bias"], *running
    options["linear_bias"] = inputs["linear_bias"]
    if inputs["matrix"] is None:
        return batch_norm_relu(*state, **options)
    return batch_norm_relu_linear(*state, inputs["matrix"], inputs["vector"], **options)


def require_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        if name == "d linear_bias":
            assert not found[name].any(), "exactly zero, where torch has rounding errors"
            continue
        size = max(float(right.norm()), 1e-3 * right.numel() ** 0.5)
        assert float((found[name].double() - right).norm()) <= tolerance * size, name


@given(st.integers(2, 80), st.integers(1, 70), st.sampled_from([0, 1, 9]), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_values_gradients_and_buffers(rows: int, width: int, out: int, affine: bool, biased: bool, relu: bool) -> None:
    case = Case(rows, width, out, affine=affine, biased=biased, relu=relu)
    require_close(case.ours(), case.plain(), 1e-9)
    with mock.patch.object(projector, "_numba", return_value=None):
        require_close(case.ours(), case.plain(), 1e-9)


@pytest.mark.parametrize("out", [0, 24], ids=["norm", "with linear"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str
)
def test_other_precisions(dtype: torch.dtype, tolerance: float, out: int, passes: None) -> None:
    case = Case(700, 130, out)
    found = case.ours(dtype)
    require_close(found, case.plain(dtype), tolerance)
    assert found["out"].dtype == found["d x"].dtype == dtype
    assert found["d weight"].dtype == torch.float32


def test_large_means_cost_no_digits(passes: None) -> None:
    """Sums of squares without a shift would leave nothing of the variance; torch's float32 error is the measure."""
    case = Case(1000, 20, mean=3e4, spread=0.5, biased=False)
    expected, found = case.plain(torch.float32), case.ours(torch.float32)
    require_close({"running_var": found["running_var"]}, {"running_var": expected["running_var"]}, 1e-6)
    assert (found["out"].double() - expected["out"]).abs().max() < 1e-2  # x itself is rounded to 0.002


def test_several_threads_and_pieces_change_nothing(passes: None) -> None:
    case = Case(900, 260, 5)
    torch.set_num_threads(1)
    alone = case.ours(torch.float32)
    torch.set_num_threads(3)
    try:
        together = case.ours(torch.float32)
        with mock.patch.object(projector, "PIECE_BYTES", 1):  # 256 rows at a time
            pieces = case.ours(torch.float32)
    finally:
        torch.set_num_threads(1)
    for name in ("running_mean", "running_var"):
        assert alone[name].equal(together[name])
    require_close(pieces, {name: value.double() for name, value in alone.items()}, 1e-6)


def test_memory_layouts_inputs_and_repeats(passes: None) -> None:
    """Views of any strides; nothing but the buffers is written; equal calls give equal bits."""
    case = Case(60, 34, 7)
    wide = torch.empty(68, 60, dtype=torch.float64)
    x = wide[::2].T
    x.copy_(case.x)
    assert not x.is_contiguous()
    inputs = case.inputs(torch.float64, torch.float64)
    before = {name: leaf.detach().clone() for name, leaf in inputs.items() if leaf is not None}
    expected = case.outcome(apply(inputs, (None, None), **TRAINING), inputs, (x, x))
    assert all(inputs[name].equal(leaf) for name, leaf in before.items())
    inputs["x"] = x.detach().requires_grad_()
    upstream = case.upstream.T.contiguous().T
    again = apply(inputs, (None, None), **TRAINING)
    assert again.equal(expected["out"])
    assert torch.autograd.grad(again, inputs["x"], upstream)[0].equal(expected["d x"])


def test_nans_are_not_hidden(passes: None) -> None:
    x = torch.randn(40, 3)
    x[5, 1] = torch.nan
    y = batch_norm_relu(x, None, None, None, None, **TRAINING)
    assert y.isnan().all(0).tolist() == [False, True, False]


def test_evaluation_is_torchs(passes: None) -> None:
    norm = nn.BatchNorm1d(6)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var)
    norm.eval()
    x, shift, matrix = torch.randn(1, 6), torch.randn(6), torch.randn(4, 6)
    state = norm.weight, norm.bias, norm.running_mean, norm.running_var
    options = {"training": False, "momentum": 0.1, "eps": norm.eps, "linear_bias": shift}
    expected = F.relu(norm(x + shift))
    torch.testing.assert_close(batch_norm_relu(x, *state, **options), expected)
    torch.testing.assert_close(batch_norm_relu_linear(x, *state, matrix, **options), expected @ matrix.T)
    assert norm.running_mean is state[2]


def kept(step: Any) -> list[Tensor]:
    """What autograd saves in ``step``."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        step()
    return found


@pytest.mark.parametrize("out", [0, 32])
def test_what_is_kept_for_backward(out: int) -> None:
    """x, and vectors: neither the pre-activation, nor a mask, nor the linear layer's input."""
    inputs = Case(512, 64, out).inputs(torch.float32, torch.float32)
    found = kept(lambda: apply(inputs, (None, None), **TRAINING))
    large = {tensor.data_ptr() for tensor in found if tensor.numel() >= 512 * 32}
    assert large == {inputs["x"].data_ptr()}


def test_autocast_converts_the_matrix_and_keeps_no_copy() -> None:
    inputs = Case(64, 40, 12).inputs(torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert {tensor.dtype for tensor in kept(lambda: apply(inputs, (None, None), **TRAINING))} == {torch.float32}
        out = apply(inputs, (None, None), **TRAINING)
        expected = F.linear(apply({**inputs, "matrix": None}, (None, None), **TRAINING), inputs["matrix"])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected + inputs["vector"], rtol=0.02, atol=0.1)
    out.sum().backward()
    assert inputs["matrix"].grad.dtype == torch.float32
    assert inputs["vector"].grad.dtype == torch.float32


@pytest.mark.parametrize("out", [0, 5])
def test_compiled_and_refused_twice(out: int) -> None:
    case = Case(20, 11, out)
    inputs = case.inputs(torch.float64, torch.float64)
    leaves = [leaf for leaf in inputs.values() if leaf is not None]
    running = [torch.zeros(11, dtype=torch.float64), torch.ones(11, dtype=torch.float64)]
    others = [buffer.clone() for buffer in running]
    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    found, expected = compiled(inputs, running, **TRAINING), apply(inputs, others, **TRAINING)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(running, others)
    upstream = case.upstream
    gradients = [torch.autograd.grad(each, leaves, upstream) for each in (found, expected)]
    torch.testing.assert_close(*gradients)
    (gradient,) = torch.autograd.grad(apply(inputs, running, **TRAINING), inputs["x"], upstream, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradient.sum().backward()


def test_operations_are_what_torch_expects() -> None:
    x, d, matrix = torch.randn(9, 4), torch.randn(9, 4), torch.randn(3, 4)
    mean, inverse, means = torch.randn(4), torch.rand(4), torch.randn(2, 4)
    known = x, mean, inverse, torch.randn(4), None, True
    torch.library.opcheck(projector._moments, (x,))
    torch.library.opcheck(projector._normalize, known)
    torch.library.opcheck(projector._normalize_linear, (*known, matrix, torch.randn(3)))
    torch.library.opcheck(projector._sums, (d, *known))
    torch.library.opcheck(projector._input_gradient, (d, *known, means))
    torch.library.opcheck(projector._input_gradient_, (d.clone(), *known, means))
    for need in (True, False):
        torch.library.opcheck(projector._linear_backward, (torch.randn(9, 3), *known, matrix, need))


def test_bad_arguments_are_named() -> None:
    x, vector = torch.randn(4, 3), torch.randn(3)
    with pytest.raises(ValueError, match=r"x_NC: got 'a shape \(1, 3\)', expected at least 2 rows in training"):
        batch_norm_relu(x[:1], None, None, None, None, **TRAINING)
    with pytest.raises(ValueError, match="x_NC: got "):
        batch_norm_relu(x[0], None, None, None, None, **TRAINING)
    with pytest.raises(ValueError, match=r"weight: got \(2,\), expected a shape \(3,\)"):
        batch_norm_relu(x, vector[:2], None, None, None, **TRAINING)
    with pytest.raises(ValueError, match="running_var: got "):
        batch_norm_relu(x, None, None, vector, None, **TRAINING)
    with pytest.raises(ValueError, match="momentum: got 2"):
        batch_norm_relu(x, None, None, None, None, **{**TRAINING, "momentum": 2})
    with pytest.raises(ValueError, match="eps: got 0"):
        batch_norm_relu(x, None, None, None, None, **{**TRAINING, "eps": 0.0})
    with pytest.raises(ValueError, match="matrix_MC: got "):
        batch_norm_relu_linear(x, None, None, None, None, torch.randn(5, 2), **TRAINING)
    with pytest.raises(ValueError, match=r"matrix_MC: got torch.float64, expected the dtype of x_NC"):
        batch_norm_relu_linear(x, None, None, None, None, torch.randn(5, 3).double(), **TRAINING)


def test_passes_agree_in_the_plain_implementation() -> None:
    x = torch.randn(300, 5)
    found = projector_passes.moments(x)
    torch.testing.assert_close(found, torch.stack([x.mean(0), x.var(0, correction=0) * 300]), rtol=1e-5, atol=1e-5)
