"""The fused contrastive losses against their dense twins in float64, and against their own promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rocket_fast import kernels
from rocket_fast.device import cpu_peak_bytes
from rocket_fast.kernels import contrastive, positives, reference, sigmoid, tiled

F64 = {"rtol": 1e-11, "atol": 1e-11}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def terms_and_gradients(
    terms: Callable[..., kernels.ClipTerms], inputs: Sequence[Tensor], **options: Any
) -> dict[str, Tensor]:
    """Both losses, both accuracies, and the gradients of an uneven mixture of the losses."""
    inputs = [leaf(x) for x in inputs]
    found = terms(*inputs, **options)
    gradients = torch.autograd.grad(0.3 * found.loss_image + found.loss_text, inputs)
    names = ("d_image", "d_text", "d_scale")
    return {
        "loss_image": found.loss_image.detach(),
        "loss_text": found.loss_text.detach(),
        "accuracy_image": found.accuracy_image,
        "accuracy_text": found.accuracy_text,
        **dict(zip(names, gradients, strict=True)),
    }


def check(inputs: Sequence[Tensor], workspace_mib: float = 64, **options: Any) -> None:
    got = terms_and_gradients(kernels.clip_terms, inputs, workspace_mib=workspace_mib, **options)
    expected = terms_and_gradients(reference.clip_terms, inputs, **options)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **F64, msg=lambda m, name=name: f"{name}: {m}")


# --- values and gradients ---------------------------------------------------------------------------------------------

TINY_WORKSPACE = 2e-3  # MiB: many tiles even of small problems


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    d=st.integers(1, 20),
    scale=st.sampled_from([1.0, 14.3, 100.0]),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    normalize=st.booleans(),
    workspace=st.sampled_from([64.0, TINY_WORKSPACE, 1e-6]),
    data=st.data(),
)
def test_any_shape_equals_the_dense_twin(
    n: int, m: int, d: int, scale: float, smoothing: float, normalize: bool, workspace: float, data: st.DataObject
) -> None:
    offset = data.draw(st.integers(1 - n, m - 1))
    seed = data.draw(st.integers(0, 1000))
    inputs = (random(n, d, seed=seed), random(m, d, seed=seed + 1), torch.tensor(scale, dtype=torch.float64))
    check(inputs, workspace, label_smoothing=smoothing, row_offset=offset, normalize=normalize)


@pytest.mark.parametrize("rows", [1, 7, 63, 64, 65, 127, 129, 200, 1100])
@pytest.mark.parametrize("columns", [200, 2100])
def test_tile_borders(rows: int, columns: int) -> None:
    inputs = (random(rows, 16), random(columns, 16, seed=1), torch.tensor(9.0, dtype=torch.float64))
    check(inputs, label_smoothing=0.1, row_offset=columns - rows)


ADVERSARIAL: dict[str, tuple[Tensor, Tensor]] = {
    "all opposite": (torch.ones(9, 4).double(), -torch.ones(9, 4).double()),
    "all equal": (torch.ones(9, 4).double(), torch.ones(9, 4).double()),
    "one-hot": (torch.eye(9).double(), torch.eye(9).double()),
    "zero vectors": (
        random(9, 4) * torch.arange(9)[:, None].fmod(2),
        random(9, 4, seed=1) * (torch.arange(9)[:, None] > 3),
    ),
    "far apart": (random(9, 4) * 10.0 ** torch.arange(-4, 5)[:, None], random(9, 4, seed=1)),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("workspace", [64.0, TINY_WORKSPACE])
def test_adversarial_logits(name: str, scale: float, normalize: bool, workspace: float) -> None:
    image, text = ADVERSARIAL[name]
    if name == "zero vectors" and normalize:
        return  # the derivative of normalising zero is 1e12: tested below, relative to that
    check((image, text, torch.tensor(scale, dtype=torch.float64)), workspace, normalize=normalize, label_smoothing=0.1)


def test_zero_vectors_normalise_as_torch_does() -> None:
    image, text = ADVERSARIAL["zero vectors"]
    found = terms_and_gradients(kernels.clip_terms, (image, text, torch.tensor(10.0).double()), normalize=True)
    expected = terms_and_gradients(reference.clip_terms, (image, text, torch.tensor(10.0).double()), normalize=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("shape", [(65, 65, 24), (200, 200, 513), (900, 1000, 512)], ids=str)
def test_error_is_no_larger_than_eager_torch(dtype: torch.dtype, scale: float, shape: tuple[int, int, int]) -> None:
    """Against float64 on the same rounded inputs; the eager loss in the inputs' dtype is what people have now."""
    n, m, d = shape
    image = F.normalize(random(n, d), dim=1).to(dtype)
    text = F.normalize(random(m, d, seed=1)[:m] + torch.cat([image.double(), image.double()])[:m], dim=1).to(dtype)
    scale_0 = torch.tensor(scale)

    def eager(image: Tensor, text: Tensor, scale: Tensor, **_: Any) -> kernels.ClipTerms:
        logits = scale.to(dtype) * image @ text.T
        label = torch.arange(n)
        loss_text = F.cross_entropy(logits.T[:n], label)
        zero = torch.zeros(())
        return kernels.ClipTerms(
            loss_image=F.cross_entropy(logits, label), loss_text=loss_text, accuracy_image=zero, accuracy_text=zero
        )

    exact = terms_and_gradients(reference.clip_terms, (image.double(), text.double(), scale_0.double()))
    ours = terms_and_gradients(kernels.clip_terms, (image, text, scale_0))
    peers = terms_and_gradients(eager, (image, text, scale_0))
    for name, value in exact.items():
        if name.startswith("accuracy"):
            continue
        error, peer = ((x[name].double() - value).norm() / value.norm() for x in (ours, peers))
        # Single roundings are nobody's fault; those of the scale's gradient, a difference of sums, weigh more.
        allowed = 1e-6 if name == "d_scale" else 5e-7
        assert error <= max(1.1 * peer, allowed, torch.finfo(ours[name].dtype).eps / 2), name


def test_large_logits_neither_overflow_nor_vanish() -> None:
    image, text = torch.eye(6) * 30, -torch.eye(6) * 30
    for workspace in (64, TINY_WORKSPACE):
        found = terms_and_gradients(kernels.clip_terms, (image, text, torch.tensor(100.0)), workspace_mib=workspace)
        torch.testing.assert_close(found["loss_image"], torch.tensor(90000.0) + torch.tensor(5.0).log())
        assert all(value.isfinite().all() for value in found.values())


# --- positives other than by position ---------------------------------------------------------------------------------


def sparse(dense: Tensor, layout: str) -> Tensor:
    return dense.to_sparse_coo() if layout == "coo" else dense.to_sparse_csr()


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    form=st.sampled_from(["one", "some", "coo", "csr"]),
    smoothing=st.sampled_from([0.0, 0.2]),
    normalize=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_targets_equal_the_dense_twin(n: int, m: int, form: str, smoothing: float, normalize: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if form in ("one", "some"):
        shape = (n,) if form == "one" else (n, 3)
        targets = torch.randint(-1, m, shape, generator=generator, dtype=torch.int32)
        targets.view(-1)[0] = 0
    else:
        dense = torch.rand(n, m, generator=generator) * (torch.rand(n, m, generator=generator) > 0.6)
        dense[0, 0] = 1.0
        targets = sparse(dense, form)
    inputs = (random(n, 5, seed=seed), random(m, 5, seed=seed + 1), torch.tensor(7.0, dtype=torch.float64))
    check(inputs, 1e-3, targets=targets, label_smoothing=smoothing, normalize=normalize)


def test_diagonal_targets_are_the_default() -> None:
    inputs = (random(9, 4), random(9, 4, seed=1), torch.tensor(5.0, dtype=torch.float64))
    by_position = terms_and_gradients(kernels.clip_terms, inputs, label_smoothing=0.1)
    for targets in (torch.arange(9), torch.eye(9).to_sparse_coo(), torch.eye(9).to_sparse_csr()):
        named = terms_and_gradients(kernels.clip_terms, inputs, label_smoothing=0.1, targets=targets)
        for name, value in by_position.items():
            torch.testing.assert_close(named[name], value, **F64)


def test_duplicate_captions_share_their_image_side() -> None:
    """Two images with one caption: its column's target is half and half, no image is punished for the other."""
    image = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    text = torch.eye(3, dtype=torch.float64)[[0, 1]]
    terms = kernels.clip_terms(image, text, 50.0, targets=torch.tensor([0, 0, 1]))
    assert terms.loss_image < 1e-9
    assert terms.loss_text.item() == pytest.approx(torch.tensor(2.0).log().item() / 2)  # of two columns one is shared
    assert (terms.accuracy_image.item(), terms.accuracy_text.item()) == (100.0, 100.0)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 12), m=st.integers(1, 12), workspace=st.sampled_from([64.0, 1e-5, 1e-4]), data=st.data())
def test_of_equal_logits_the_first_is_the_pick(n: int, m: int, workspace: float, data: st.DataObject) -> None:
    offset = data.draw(st.integers(1 - n, m - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    image = torch.randint(0, 2, (n, 2), generator=generator).double()
    text = torch.randint(0, 2, (m, 2), generator=generator).double()
    check((image, text, torch.tensor(1.0, dtype=torch.float64)), workspace, row_offset=offset)


def test_collapsed_embeddings_are_not_right() -> None:
    terms = kernels.clip_terms(torch.ones(50, 3), torch.ones(50, 3), 10.0)
    assert terms.accuracy_image.item() == pytest.approx(2.0)


# --- many views -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [0, 1, 2, 3])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("workspace", [64.0, TINY_WORKSPACE])
def test_cl2l_equals_the_dense_twin(views: int, normalize: bool, workspace: float) -> None:
    z = [random(11, 6, seed=seed) for seed in range(2)]
    h = [random(11, 4, seed=2 + seed) for seed in range(2 * views)]
    scales = [torch.tensor(9.0).double(), torch.tensor(4.0).double()]

    def run(function: Callable[..., Tensor], **options: Any) -> tuple[Tensor, ...]:
        inputs = [leaf(x) for x in (*z, *h, *scales)]
        image_h, text_h = inputs[2 : 2 + views], inputs[2 + views : 2 + 2 * views]
        loss = function(
            *inputs[:2], inputs[-2], image_h, text_h, inputs[-1], label_smoothing=0.1, normalize=normalize, **options
        )
        return loss, *torch.autograd.grad(loss, inputs, allow_unused=True)

    got = run(kernels.multiview_clip_loss, workspace_mib=workspace)
    for ours, dense in zip(got, run(reference.multiview_clip_loss), strict=True):
        torch.testing.assert_close(ours, dense, **F64)


def test_every_pair_has_its_own_smoothing_and_scale() -> None:
    z = [random(7, 5, seed=seed) for seed in range(2)]
    image_h, text_h = ([random(7, 5, seed=seed + i) for seed in range(2)] for i in (10, 20))
    scale_22 = leaf(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double())
    smoothing = [[0.0, 0.1], [0.2, 0.3]]
    terms = kernels.multiview_clip_terms(
        *z, 5.0, image_h, text_h, scale_22, label_smoothing=smoothing, weak_label_smoothing=0.4
    )
    weak = reference.clip_loss(*z, 5.0, label_smoothing=0.4)
    pairs = [
        reference.clip_loss(image_h[i], text_h[j], scale_22[i, j], label_smoothing=smoothing[i][j])
        for i, j in itertools.product(range(2), repeat=2)
    ]
    expected = (weak + 2 * torch.stack(pairs).mean()) / 3
    torch.testing.assert_close(terms.reduce("avg"), expected, **F64)
    got, want = (torch.autograd.grad(loss, scale_22)[0] for loss in (terms.reduce("avg"), expected))
    torch.testing.assert_close(got, want, **F64)


# --- sigmoid ----------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 30),
    m=st.integers(1, 30),
    offset=st.integers(-40, 40),
    normalize=st.booleans(),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    bias=st.sampled_from([-10.0, 0.0, 30.0]),
    workspace=st.sampled_from([64.0, 1e-4]),
    seed=st.integers(0, 1000),
)
def test_siglip_equals_the_dense_twin(
    n: int, m: int, offset: int, normalize: bool, scale: float, bias: float, workspace: float, seed: int
) -> None:
    values = (random(n, 6, seed=seed), random(m, 6, seed=seed + 1), torch.tensor(scale), torch.tensor(bias))

    def run(function: Callable[..., Tensor], **options: Any) -> tuple[Tensor, ...]:
        inputs = [leaf(x.double()) for x in values]
        loss = function(*inputs, row_offset=offset, normalize=normalize, **options)
        return loss, *torch.autograd.grad(3 * loss, inputs)

    got = run(kernels.siglip_loss, workspace_mib=workspace)
    for ours, dense in zip(got, run(reference.siglip_loss), strict=True):
        torch.testing.assert_close(ours, dense, **F64)


# --- what can be asked for --------------------------------------------------------------------------------------------


def some_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "image_ND": random(40, 12, dtype=dtype),
        "text_MD": random(40, 12, seed=1, dtype=dtype),
        "logit_scale": torch.tensor(8.0),
    }


LOSSES: dict[str, Callable[..., Tensor]] = {
    "clip": kernels.clip_loss,
    "clip normalised": lambda *a, **k: kernels.clip_loss(*a, normalize=True, label_smoothing=0.1, **k),
    "clip targets": lambda *a, **k: kernels.clip_loss(*a, targets=torch.arange(len(a[0])).flip(0), **k),
    "cl2l": lambda image, text, scale: kernels.multiview_clip_loss(
        image, text, scale, (image, 2 * image), (text, -text), scale + 1
    ),
    "siglip": lambda *a, **k: kernels.siglip_loss(*a, -3.0, **k),
    "log-sum-exp": lambda *a, **k: sum(part.square().mean() for part in kernels.log_sum_exp(*a, **k)),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
@pytest.mark.parametrize("differentiated", list(itertools.product([False, True], repeat=3)), ids=str)
def test_any_side_may_need_a_gradient(loss: Callable[..., Tensor], differentiated: tuple[bool, ...]) -> None:
    values = list(some_inputs().values())
    whole = [leaf(x) for x in values]
    expected = loss(*whole)
    gradients = torch.autograd.grad(expected, whole)
    inputs = [x.clone().requires_grad_(needed) for x, needed in zip(values, differentiated, strict=True)]
    got = loss(*inputs)
    assert torch.equal(got, expected)
    assert got.requires_grad == any(differentiated)
    if any(differentiated):
        got.backward()
    for x, needed, gradient in zip(inputs, differentiated, gradients, strict=True):
        assert (x.grad is not None) == needed
        if needed:
            torch.testing.assert_close(x.grad, gradient)
    with torch.no_grad():
        assert torch.equal(loss(*whole), expected)


@every_loss
def test_inputs_stay_as_they_are_and_results_repeat(loss: Callable[..., Tensor]) -> None:
    inputs = [leaf(x) for x in (random(1500, 24, dtype=torch.float32), random(1500, 24, seed=1, dtype=torch.float32))]
    inputs.append(leaf(torch.tensor(8.0)))
    before = [x.detach().clone() for x in inputs]
    runs = [torch.autograd.grad(loss(*inputs), inputs) for _ in range(3)]
    for x, value in zip(inputs, before, strict=True):
        assert torch.equal(x, value)
    for gradients in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, runs[0], strict=True))


@every_loss
def test_memory_layout_does_not_matter(loss: Callable[..., Tensor]) -> None:
    image, text, scale = some_inputs().values()
    strided = torch.empty(80, 24)[::2, ::2].copy_(image)
    transposed = text.T.contiguous().T
    assert not strided.is_contiguous()
    torch.testing.assert_close(loss(strided, transposed, scale), loss(image, text, scale))
    expanded = text[:1].expand(40, 12)
    torch.testing.assert_close(loss(image, expanded, scale), loss(image, expanded.contiguous(), scale))


@every_loss
def test_checkpointing_changes_nothing(loss: Callable[..., Tensor]) -> None:
    for reentrant in (False, True):
        inputs = [leaf(x) for x in some_inputs().values()]
        plain = loss(*inputs)
        again = checkpoint(loss, *inputs, use_reentrant=reentrant)
        assert torch.equal(plain, again)
        again.backward()
        for x, gradient in zip(inputs, torch.autograd.grad(plain, inputs), strict=True):
            assert torch.equal(x.grad, gradient)


@every_loss
def test_one_graph_under_compile(loss: Callable[..., Tensor]) -> None:
    inputs, others = ([leaf(x) for x in some_inputs().values()] for _ in range(2))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    plain = loss(*others)
    torch.testing.assert_close(compiled, plain)
    for got, expected in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(plain, others), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_one_graph_under_inductor() -> None:
    inputs = [leaf(x) for x in some_inputs().values()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(kernels.clip_loss, fullgraph=True)(*inputs)
        plain = kernels.clip_loss(*inputs)
    torch.testing.assert_close(compiled, plain)


@every_loss
def test_second_derivatives_are_refused(loss: Callable[..., Tensor]) -> None:
    inputs = [leaf(x) for x in some_inputs().values()]
    gradient = torch.autograd.grad(loss(*inputs), inputs[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradient.sum().backward()


def test_autocast_takes_the_products_factors_in_its_dtype() -> None:
    image, text, scale = some_inputs().values()
    rounded = kernels.clip_loss(image.bfloat16(), text.bfloat16(), scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for pair in ((image, text), (image.bfloat16(), text), (image, text.half())):
            got = kernels.clip_loss(*pair, scale)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, rounded, rtol=1e-2, atol=1e-2)
        assert torch.equal(kernels.clip_loss(image, text, scale), rounded)
        assert kernels.clip_loss(image.double(), text.double(), scale).dtype == torch.float64


def test_a_bias_changes_nothing_and_learns_nothing() -> None:
    inputs = [leaf(x) for x in some_inputs().values()]
    bias = leaf(torch.tensor(-10.0))
    loss = kernels.clip_loss(*inputs, logit_bias=bias)
    assert torch.equal(loss, kernels.clip_loss(*inputs))
    assert torch.autograd.grad(loss, bias)[0] == 0
    torch.testing.assert_close(loss, reference.clip_loss(*inputs, logit_bias=bias))


def test_reduction_sums_or_averages_directions() -> None:
    inputs = some_inputs().values()
    torch.testing.assert_close(kernels.clip_loss(*inputs, reduction="sum"), 2 * kernels.clip_loss(*inputs))


@every_loss
def test_a_gradient_scaler_may_multiply_the_loss(loss: Callable[..., Tensor]) -> None:
    for factor in (2.0**16, -1.0, 0.0):
        inputs = [leaf(x) for x in some_inputs(torch.bfloat16).values()]
        plain = torch.autograd.grad(loss(*inputs), inputs)
        scaled = torch.autograd.grad(factor * loss(*inputs), inputs)
        for a, b in zip(scaled, plain, strict=True):
            torch.testing.assert_close(a, (factor * b.double()).to(a.dtype), rtol=1e-2, atol=1e-6 * abs(factor))


# --- memory -----------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("workspace_mib", [0.25, 1.0])
def test_no_matrix_of_similarities_is_made(workspace_mib: float) -> None:
    x, y = random(2000, 8, dtype=torch.float32), random(2000, 8, seed=1, dtype=torch.float32)
    scale, workspace = torch.tensor([[9.0]]), int(workspace_mib * 2**20)
    options = {"row_offset": 0, "normalize": True, "workspace": workspace}
    with Allocations() as made, torch.no_grad():
        lse_image, lse_text, *_ = tiled.contrastive_forward(
            x[None], y[None], scale, smoothing=[0.1], diagonal=True, **options
        )
        arguments = (x[None], y[None], scale, lse_image, lse_text, lse_image.float(), lse_text.float())
        needs = {"need_image": True, "need_text": True}
        tiled.contrastive_backward(*arguments, smoothing=[0.1], diagonal=True, **needs, **options)
        tiled.sigmoid_forward_backward(x, y, scale[0, 0], scale[0, 0], need_grad=True, **options)
    # Two buffers share the workspace; nothing else may come near 2000 x 2000 numbers.
    assert workspace / 4 < made.largest <= workspace / 2


@every_loss
def test_nothing_quadratic_is_saved_for_backward(loss: Callable[..., Tensor]) -> None:
    inputs = [leaf(x) for x in (random(900, 8, dtype=torch.float32), random(900, 8, seed=1, dtype=torch.float32))]
    saved = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss(*inputs, leaf(torch.tensor(8.0)))
    assert 0 < sum(saved) < 900 * 900 / 4


# --- how people use it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_under_autocast_are_those_without(smoothing: float) -> None:
    image, text, targets = random(9, 16), random(7, 16, seed=1), torch.randint(7, (9,))
    rounded = [side.bfloat16().float() for side in (image, text)]
    options = {"targets": targets, "label_smoothing": smoothing, "normalize": True}
    sides = [leaf(side.float()) for side in (image, text)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = kernels.clip_loss(*sides, 3.0, **options)
        loss.backward()  # within, as some trainers do
    expected_sides = [leaf(side) for side in rounded]
    expected = kernels.clip_loss(*expected_sides, 3.0, **options)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for side, other in zip(sides, expected_sides, strict=True):
        torch.testing.assert_close(side.grad, other.grad, rtol=2e-2, atol=2e-4)  # gradients of 16-bit factors


def test_a_loss_may_be_changed_in_place() -> None:
    x, y = (leaf(random(6, 4, seed=seed)) for seed in (0, 1))
    for loss in (
        lambda: kernels.clip_loss(x, y, 3.0),
        lambda: kernels.siglip_loss(x, y, 3.0, -2.0),
        lambda: kernels.clip_terms(x, y, 3.0).loss_image,
        lambda: kernels.multiview_clip_terms(x, y, 3.0, [x], [y], 3.0).loss_text,
    ):
        (expected,) = torch.autograd.grad(loss() / 4, x)
        value = loss()
        value /= 4
        torch.testing.assert_close(torch.autograd.grad(value, x)[0], expected)


def test_views_of_other_precision() -> None:
    x, y = random(6, 4), random(6, 4, seed=1)
    both = kernels.multiview_clip_loss(x.float(), y.float(), 3.0, [x], [y], 3.0)
    torch.testing.assert_close(both, kernels.multiview_clip_loss(x, y, 3.0, [x], [y], 3.0), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        kernels.multiview_clip_loss(x.float(), y.bfloat16(), 3.0, [x.float()], [y.bfloat16()], 3.0)


def test_sizes_and_scales_that_change_compile_few_times() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(module: Any, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    def all_losses(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        views = [x, y]
        return (
            kernels.clip_loss(x, y, scale)
            + kernels.siglip_loss(x, y, scale, -2.0)
            + kernels.multiview_clip_loss(x, y, scale, views, views, scale)
            + kernels.clip_loss(x, y, scale, targets=torch.arange(x.shape[0]))
        )

    compiled = torch.compile(all_losses, backend=backend, fullgraph=True)
    for rows in (5, 6, 9, 12, 17, 30):
        compiled(leaf(random(rows, 8)), leaf(random(rows, 8)), torch.tensor(3.0))
    assert len(graphs) <= 3
    graphs.clear()
    scaled = torch.compile(lambda x, scale: kernels.clip_loss(x, x, scale), backend=backend, fullgraph=True)
    for scale in (10.0, 11.0, 12.0, 13.0):
        scaled(random(5, 8), scale)
    assert len(graphs) <= 3


def test_shapes_can_be_asked_without_data() -> None:
    x = torch.empty(8, 4, device="meta", requires_grad=True)
    kernels.clip_loss(x, x, 3.0).backward()
    assert x.grad.shape == x.shape
    with FakeTensorMode():
        x = torch.empty(8, 4, requires_grad=True)
        assert kernels.clip_loss(x, x, torch.ones(())).shape == ()
        assert kernels.clip_loss(x, x, torch.ones(()), targets=torch.zeros(8, dtype=torch.int64)).shape == ()
        assert kernels.siglip_loss(x, x, torch.ones(()), torch.ones(())).shape == ()


@pytest.mark.parametrize(("scale", "bias"), [(40.0, -25.0), (100.0, -60.0)])
def test_sure_sigmoids_do_not_cancel(scale: float, bias: float) -> None:
    image = F.normalize(random(512, 64), dim=1)
    text = F.normalize(image + 0.05 * random(512, 64, seed=1), dim=1)
    exact = reference.siglip_loss(image, text, scale, bias)
    torch.testing.assert_close(
        kernels.siglip_loss(image.float(), text.float(), scale, bias).double(), exact, rtol=2e-5, atol=0
    )


def test_memory_is_the_workspace_and_what_the_docstring_says() -> None:
    """Peak of allocations beyond inputs and gradients, many rows against few."""
    rows, columns, width = 4096, 64, 256
    side = 4 * rows * width

    def peak(dtype: torch.dtype, **options: Any) -> int:
        x, y = (leaf(torch.randn(size, width, dtype=dtype)) for size in (rows, columns))
        return cpu_peak_bytes(lambda: kernels.clip_loss(x, y, 3.0, workspace_mib=0.25, **options).backward())

    slack = 2 * 2**20
    assert peak(torch.float32) < side + slack  # the gradient
    assert peak(torch.float32, normalize=True) < 3 * side + slack  # and a copy, and its gradient
    assert peak(torch.bfloat16) < 2.5 * side + slack  # copy and gradient in float32, the gradient in 16 bits


# --- operations -------------------------------------------------------------------------------------------------------


def test_operations_pass_opcheck() -> None:
    image, text, scale = (leaf(x) for x in (random(2, 5, 3), random(2, 7, 3, seed=1), random(2, 2).abs()))
    lse = contrastive.forward_operation(image, text, scale, [0.1] * 4, 1, True, True, 1 << 16)[:2]
    for diagonal in (True, False):
        options = (1, diagonal, True)
        torch.library.opcheck(contrastive.forward_operation, (image, text, scale, [0.1] * 4, *options, 1 << 16))
        arguments = (
            image.detach(),
            text.detach(),
            scale.detach(),
            *(x.detach() for x in lse),
            *(x.detach() for x in lse),
        )
        torch.library.opcheck(contrastive.backward_operation, (*arguments, [0.1] * 4, *options, True, True, 1 << 16))
    inputs = [x.detach() for x in (image, text, scale)]
    torch.library.opcheck(contrastive._whole_operation, (image, text, scale, [0.1] * 4, 1, True, True))
    torch.library.opcheck(contrastive._whole_operation, (*inputs, [0.1] * 4, 1, True, False))
    made = [x.detach() for x in contrastive._whole_operation(image, text, scale, [0.1] * 4, 1, True, True)[2:]]
    for d_losses in (torch.full((2, 2, 2), 0.5).double(), random(2, 2, 2)):
        torch.library.opcheck(contrastive._rescale, (d_losses, *made, *inputs, [0.1] * 4, 1, True))
    torch.library.opcheck(
        positives.pair_products, (image[0], text[0], torch.tensor([0, 0, 2]), torch.tensor([1, 6, 0]), 64)
    )
    bias = leaf(torch.tensor(1.0).double())
    torch.library.opcheck(
        sigmoid._forward_backward, (image[0], text[0], leaf(scale[0, 0]), bias, 0, True, True, 1 << 16)
    )


# --- errors -----------------------------------------------------------------------------------------------------------

X, Y = torch.randn(4, 3), torch.randn(6, 3)
clip, siglip, cl2l = kernels.clip_loss, kernels.siglip_loss, kernels.multiview_clip_loss
ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "not a tensor": (lambda: clip([[1.0]], X, 1.0), "image_ND: got <class 'list'>, expected a tensor"),  # type: ignore[arg-type]
    "width": (lambda: clip(X, X[:, :2], 1.0), r"text_MD: got \(4, 2\), expected a shape \(M, 3\)"),
    "dtype": (lambda: clip(X, X.half(), 1.0), "text_MD: got torch.float16, expected the dtype of image_ND"),
    "device": (lambda: clip(X, X.to("meta"), 1.0), "text_MD: got device.*meta.*, expected the device of image_ND, cpu"),
    "no columns": (lambda: clip(X[:, :0], X[:, :0], 1.0), r"image_ND: got \(4, 0\), expected .* D >= 1"),
    "infinite scale": (lambda: clip(X, X, float("inf")), "logit_scale: got inf, expected a finite number"),
    "no scale": (lambda: clip(X, X, None), "logit_scale: got None, expected a finite number"),  # type: ignore[arg-type]
    "nan scale": (lambda: clip(X, X, torch.tensor(float("nan"))), "logit_scale: got nan, expected finite values"),
    "scale's device": (
        lambda: clip(X, X, torch.tensor(1.0, device="meta")),
        "logit_scale: got device.*meta.*, expected the device of the embeddings, cpu",
    ),
    "bias": (lambda: clip(X, X, 1.0, logit_bias=float("nan")), "logit_bias: got nan, expected a finite number"),
    "offset": (lambda: clip(X, Y, 1.0, row_offset=6), "row_offset: got 6, expected -3 to 5"),
    "negative offset": (lambda: clip(X, Y, 1.0, row_offset=-4), "row_offset: got -4, expected -3 to 5"),
    "reduction": (lambda: clip(X, X, 1.0, reduction="mean"), "reduction: got 'mean', expected one of"),  # type: ignore[arg-type]
    "workspace": (
        lambda: clip(X, X, 1.0, workspace_mib=0),
        "workspace_mib: got 0, expected a finite number of MiB > 0",
    ),
    "targets and offset": (
        lambda: clip(X, Y, 1.0, row_offset=1, targets=torch.arange(4)),
        "row_offset: got 1, expected 0 beside targets",
    ),
    "targets' type": (lambda: clip(X, Y, 1.0, targets=[0, 1, 2, 3]), "targets: got <class 'list'>, expected a tensor"),  # type: ignore[arg-type]
    "targets' rows": (
        lambda: clip(X, Y, 1.0, targets=torch.arange(3)),
        r"targets: got \(3,\), expected a shape \(4,\)",
    ),
    "targets' dtype": (lambda: clip(X, Y, 1.0, targets=torch.ones(4)), "targets: got torch.float32, expected integers"),
    "target too large": (
        lambda: clip(X, Y, 1.0, targets=torch.tensor([0, 1, 6, 2])),
        "targets: got '6 among its values', expected texts' numbers below 6",
    ),
    "target too small": (
        lambda: clip(X, Y, 1.0, targets=torch.tensor([0, -2, 3, 2])),
        "targets: got '-2 among its values', expected texts' numbers >= 0, or -1",
    ),
    "no target": (
        lambda: clip(X, Y, 1.0, targets=torch.full((4,), -1)),
        "targets: got '-1 only', expected at least one",
    ),
    "sparse shape": (
        lambda: clip(X, Y, 1.0, targets=torch.eye(4).to_sparse_coo()),
        r"targets: got \(4, 4\), expected a sparse tensor of shape \(4, 6\)",
    ),
    "negative weight": (
        lambda: clip(X, X, 1.0, targets=(-torch.eye(4)).to_sparse_coo()),
        r"targets: got tensor\(\[-1., .*\]\), expected finite weights >= 0",
    ),
    "no weight": (
        lambda: clip(X, X, 1.0, targets=torch.zeros(4, 4).to_sparse_coo()),
        "targets: got 'no weight > 0', expected at least one positive",
    ),
    "a matrix of 0 and 1": (
        lambda: clip(X, X, 1.0, targets=torch.eye(4).long()),
        r"targets: got 'a shape \(4, 4\), as many columns as texts', expected .* targets\.to_sparse\(\)",
    ),
    "a wide matrix": (
        lambda: clip(*torch.randn(2, 9, 3), 1.0, targets=torch.full((9, 9), 2)),
        r"targets: got 'a shape \(9, 9\), as many columns as texts'",
    ),
    "boolean scale": (lambda: clip(X, X, True), "logit_scale: got True, expected a finite number"),
    "negative scale": (lambda: clip(X, X, -1.0), "logit_scale: got -1.0, expected an inverse temperature >= 0"),
    "negative tensor": (
        lambda: siglip(X, X, torch.tensor(-1.0), 0.0),
        r"logit_scale: got tensor\(-1.\), expected an inv",
    ),
    "sparse embeddings": (lambda: clip(X.to_sparse(), X, 1.0), "image_ND: got torch.sparse_coo, expected a dense"),
    "8-bit embeddings": (
        lambda: clip(X, X.to(torch.float8_e5m2), 1.0),
        "text_MD: got torch.float8_e5m2, expected float16, bfloat16, float32 or float64",
    ),
    "forward derivative": (
        lambda: torch.func.jvp(lambda x: siglip(X, x, 1.0, 0.0), (X,), (X,)),
        "text_MD: got 'a tensor with a tangent .*backward only",
    ),
    "swapped arguments": (lambda: clip(X, X, torch.randn(90, 90)), "logit_scale: got 'a tensor of shape"),
    "cl2l rows": (lambda: cl2l(X, Y, 1.0), r"text_z: got \(6, 3\), expected a shape \(4, 3\)"),
    "cl2l scales": (
        lambda: cl2l(X, X, 1.0, (X, X), (X, X), torch.ones(3)),
        r"h_logit_scale: got .*\(3,\).*, expected one value or \(2, 2\)",
    ),
    "cl2l smoothing": (
        lambda: cl2l(X, X, 1.0, (X, X), (X, X), 1.0, label_smoothing=[[0.1, 0.1]]),
        r"label_smoothing: got \[\[0.1, 0.1\]\], expected a number or 2 x 2 of them",
    ),
    "siglip bias": (lambda: siglip(X, X, 1.0, float("inf")), "logit_bias: got inf, expected a finite number"),
    "siglip scale": (lambda: siglip(X, X, torch.ones(2), 0.0), r"logit_scale: got .*\(2,\).*, expected one value"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_value_and_expectation(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_errors_stay_short() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing: got tensor\(.*\.\.\., expected a number in") as caught:
        clip(X, X, 1.0, label_smoothing=torch.randn(30, 30))  # type: ignore[arg-type]
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_compiled_code_takes_sparse_targets(layout: str) -> None:
    """Not in its graphs, which know none, but around them."""
    dense = torch.eye(4) + torch.diag(torch.full((3,), 0.5), 1)
    targets = dense.to_sparse_coo() if layout == "coo" else dense.to_sparse_csr()
    x = X.clone().requires_grad_()
    compiled = torch.compile(lambda x: clip(x, X, 2.0, targets=targets), backend="eager")
    for loss in (compiled(x), clip(x, X, 2.0, targets=targets)):
        loss.backward()
    eager = torch.autograd.grad(clip(x, X, 2.0, targets=targets), x)[0]
    torch.testing.assert_close(x.grad, 2 * eager)
