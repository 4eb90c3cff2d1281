"""The reference kernels against numbers of the original implementation, in float64, and against their contracts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rocket_fast import kernels
from rocket_fast.kernels import reference

FIXTURES = np.load(Path(__file__).parents[1] / "fixtures" / "reference_losses.npz")
CASES = sorted({key.split("/")[0] for key in FIXTURES})
CL2L_CASES = [case for case in CASES if case.startswith("cl2l")]
TOLERANCE = {"rtol": 0.0, "atol": 1e-10}


class Case:
    """One case of the fixtures: inputs as leaves, expected outputs and gradients."""

    def __init__(self, name: str) -> None:
        arrays = {
            key.removeprefix(f"{name}/"): torch.tensor(FIXTURES[key]) for key in FIXTURES if key.startswith(name + "/")
        }
        self.inputs = {k.removeprefix("in/"): v.requires_grad_() for k, v in arrays.items() if k.startswith("in/")}
        self.grads = {k.removeprefix("grad/"): v for k, v in arrays.items() if k.startswith("grad/")}
        self.out = {k.removeprefix("out/"): v for k, v in arrays.items() if k.startswith("out/")}

    def views(self, name: str) -> tuple[Tensor, ...]:
        return tuple(self.inputs[key] for key in sorted(self.inputs) if key.startswith(name + "/"))

    def weak_and_strong(self, kind: str, modality: str, suffix: str = "") -> tuple[Tensor, ...]:
        return (self.inputs[f"{kind}_{modality}{suffix}"], *self.views(f"{kind}_{modality}_local{suffix}"))

    def check_gradients(self, loss: Tensor) -> None:
        got = torch.autograd.grad(loss, list(self.inputs.values()), allow_unused=True)
        for (name, value), grad in zip(self.inputs.items(), got, strict=True):
            grad = torch.zeros_like(value) if grad is None else grad
            torch.testing.assert_close(grad, self.grads[name], **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


def cl2l_arguments(case: Case) -> tuple:
    x = case.inputs
    strong = (case.views("h_image_local"), case.views("h_text_local"), x["h_logit_scale"])
    return (x["z_image_global"], x["z_text_global"], x["logit_scale"], *strong)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_the_fixture_has_every_objective() -> None:
    assert len(CL2L_CASES) == 16
    assert set(CASES) - set(CL2L_CASES) == {"clip", "siamlip", "byolip", "barlip", "swalip", "swalip_prototypes"}


# The fused operations and their dense twins are held to the same numbers.
both_implementations = pytest.mark.parametrize("module", [kernels, reference], ids=["fused", "dense"])


@both_implementations
def test_clip_equals_the_original(module: ModuleType) -> None:
    case = Case("clip")
    x = case.inputs
    terms = module.clip_terms(x["z_image"], x["z_text"], x["logit_scale"], normalize=True)
    close(module.clip_loss(x["z_image"], x["z_text"], x["logit_scale"], normalize=True), case.out["loss"])
    close(terms.loss, case.out["clip_loss"])
    close(terms.accuracy_image, case.out["clip_acc"])
    case.check_gradients(terms.loss)


@both_implementations
@pytest.mark.parametrize("name", CL2L_CASES)
def test_cl2l_equals_the_original(name: str, module: ModuleType) -> None:
    case = Case(name)
    _, reduction, smoothing, _ = name.split("_")
    options = {"label_smoothing": float(smoothing.removeprefix("ls")), "normalize": True}
    loss = module.multiview_clip_loss(*cl2l_arguments(case), **options, reduction=reduction)
    close(loss, case.out["loss"])
    case.check_gradients(loss)


@both_implementations
@pytest.mark.parametrize("name", ["siamlip", "byolip", "barlip", "swalip"])
def test_companions_equal_the_original(name: str, module: ModuleType) -> None:
    case = Case(name)
    smoothing = 0.0 if name == "swalip" else 0.1
    options = {"label_smoothing": smoothing, "reduction": "sum", "normalize": True}
    total = module.multiview_clip_loss(*cl2l_arguments(case), **options)
    if name == "barlip":
        loss = kernels.barlip_loss(  # its twin is of one pair
            *(case.weak_and_strong("v", m) for m in ("image", "text")), lambda_=5e-3, scale=0.025
        )
        close(loss, case.out["barlip_loss"])
        total = total + loss
    elif name == "swalip":
        strong = (case.views("h_image_local"), case.views("h_text_local"))
        loss = module.swalip_loss(*strong, case.inputs["h_logit_scale"], epsilon=0.05, iterations=3)
        close(loss, case.out["swalip_loss"])
        total = total + 0.2 * loss
    else:
        suffix = "_momentum" if name == "byolip" else ""
        predictions = [case.weak_and_strong("p", m) for m in ("image", "text")]
        targets = [case.weak_and_strong("v", m, suffix) for m in ("image", "text")]
        loss = module.siamlip_loss(*predictions, *targets)
        close(loss, case.out["siamlip_loss"])
        total = total + loss
    close(total, case.out["loss"])
    case.check_gradients(total)


@both_implementations
def test_swalip_prototypes_equals_the_original(module: ModuleType) -> None:
    case = Case("swalip_prototypes")
    x = case.inputs
    clip = module.clip_loss(x["z_image"], x["z_text"], x["logit_scale"], normalize=True)
    loss = module.swalip_prototypes_loss((x["p_image"],), (x["p_text"],), x["swalip_logit_scale"])
    close(loss, case.out["swalip_loss"])
    close(clip + loss, case.out["loss"])
    case.check_gradients(clip + loss)


# --- derivatives, independent of the fixtures -------------------------------------------------------------------------


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(count: int, *shape: int) -> list[Tensor]:
    return [random(*shape, seed=seed).requires_grad_() for seed in range(count)]


SCALE = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("strong", [0, 1, 2, 3])
@pytest.mark.parametrize("reduction", ["avg", "sum"])
def test_gradcheck_of_cl2l(strong: int, reduction: kernels.Reduction) -> None:
    views = leaves(2 + 2 * strong, 3, 4)

    def loss(scale: Tensor, h_scale: Tensor, *views: Tensor) -> Tensor:
        image_h, text_h = views[2 : 2 + strong], views[2 + strong :]
        options = {"label_smoothing": 0.1, "reduction": reduction, "normalize": True}
        return kernels.multiview_clip_loss(views[0], views[1], scale, image_h, text_h, h_scale, **options)

    assert torch.autograd.gradcheck(loss, (SCALE, SCALE.detach().clone().requires_grad_(strong > 0), *views))


def test_gradcheck_of_the_companions() -> None:
    first, second, third, fourth = leaves(4, 3, 4)
    assert torch.autograd.gradcheck(lambda prediction: kernels.negative_cosine_loss(prediction, second), first)
    assert torch.autograd.gradcheck(kernels.barlow_loss, (first, second))

    # The labels move with the inputs but carry no gradient, so numerical differences must hold them still.
    labels = kernels.sinkhorn(third)

    def prototypes(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rocket_fast.kernels.reference.sinkhorn", lambda *_, **__: labels)
            return reference.swalip_prototypes_loss((image,), (text,), scale)

    assert torch.autograd.gradcheck(prototypes, (first, second, SCALE))

    square = kernels.sinkhorn(random(3, 3, seed=9))

    def swalip(a: Tensor, b: Tensor, c: Tensor, d: Tensor, scale: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rocket_fast.kernels.reference.sinkhorn", lambda *_, **__: square)
            return reference.swalip_loss((a, b), (c, d), scale)

    assert torch.autograd.gradcheck(swalip, (first, second, third, fourth, SCALE))


def test_targets_get_no_gradient() -> None:
    prediction, target = leaves(2, 5, 3)
    kernels.negative_cosine_loss(prediction, target).backward()
    assert prediction.grad is not None
    assert target.grad is None
    assert not kernels.sinkhorn(prediction).requires_grad


# --- properties at any shape ------------------------------------------------------------------------------------------

sizes = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(n=sizes, d=sizes, strong=st.integers(0, 3), smoothing=st.floats(0, 0.9), seed=st.integers(0, 10**6))
def test_cl2l_is_the_weighted_mean_of_its_pairs(n: int, d: int, strong: int, smoothing: float, seed: int) -> None:
    image_z, text_z, *rest = (random(n, d, seed=seed + i) for i in range(2 + 2 * strong))
    image_h, text_h = rest[:strong], rest[strong:]
    pairs = [kernels.clip_loss(x, y, 3.0, label_smoothing=smoothing) for x in image_h for y in text_h]
    expected = kernels.clip_loss(image_z, text_z, 7.0)
    if pairs:
        expected = (expected + strong * torch.stack(pairs).mean()) / (1 + strong)
    arguments = (image_z, text_z, 7.0, image_h, text_h, 3.0)
    got = kernels.multiview_clip_loss(*arguments, label_smoothing=smoothing)
    torch.testing.assert_close(got, expected)
    doubled = kernels.multiview_clip_loss(*arguments, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(doubled, 2 * expected)


@settings(max_examples=40, deadline=None)
@given(n=sizes, d=sizes, smoothing=st.floats(0, 0.99), seed=st.integers(0, 10**6))
def test_clip_against_its_definition(n: int, d: int, smoothing: float, seed: int) -> None:
    image, text = random(n, d, seed=seed), random(n, d, seed=seed + 1)
    x, y = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    logits = 10.0 * x @ y.T
    target = (1 - smoothing) * torch.eye(n, dtype=torch.float64) + smoothing / n
    expected_image = -(target * logits.log_softmax(1)).sum(1).mean()
    expected_text = -(target * logits.log_softmax(0)).sum(0).mean()
    terms = kernels.clip_terms(image, text, 10.0, label_smoothing=smoothing, normalize=True)
    torch.testing.assert_close(terms.loss_image, expected_image)
    torch.testing.assert_close(terms.loss_text, expected_text)
    assert terms.loss.shape == terms.accuracy_image.shape == terms.accuracy_text.shape == ()
    assert 0 <= terms.accuracy_image <= 100
    already = kernels.clip_loss(x, y, 10.0, label_smoothing=smoothing)
    torch.testing.assert_close(already, terms.loss)


def test_accuracy_counts_each_direction() -> None:
    image = torch.eye(4)
    text = torch.eye(4)[[0, 1, 2, 2]] * torch.tensor([[1.0], [1.0], [1.0], [2.0]])
    terms = kernels.clip_terms(image, text, 1.0)  # image 2 prefers text 3, text 3 prefers image 2
    assert (terms.accuracy_image.item(), terms.accuracy_text.item()) == (50.0, 75.0)
    assert not terms.accuracy_image.requires_grad


@settings(max_examples=40, deadline=None)
@given(n=sizes, m=sizes, epsilon=st.floats(0.02, 2), seed=st.integers(0, 10**6))
def test_sinkhorn_balances(n: int, m: int, epsilon: float, seed: int) -> None:
    scores = random(n, m, seed=seed).clamp(-1, 1)
    assignments = kernels.sinkhorn(scores, epsilon=epsilon)
    assert assignments.min() >= 0
    torch.testing.assert_close(assignments.sum(dim=1), torch.ones(n, dtype=torch.float64))
    mild = kernels.sinkhorn(scores, epsilon=2.0, iterations=200)
    torch.testing.assert_close(mild.sum(dim=0), torch.full((m,), n / m, dtype=torch.float64))


def test_sinkhorn_survives_scores_whose_exponentials_overflow() -> None:
    scores = 100 * random(5, 7, dtype=torch.float32)
    assignments = kernels.sinkhorn(scores, epsilon=0.05)
    assert assignments.isfinite().all()
    torch.testing.assert_close(assignments.sum(dim=1), torch.ones(5))


@pytest.mark.parametrize("strong", [0, 1, 2])
def test_companions_weigh_all_pairs_alike(strong: int) -> None:
    image, text, image_v, text_v = ([random(4, 3, seed=10 * i + j) for j in range(1 + strong)] for i in range(4))
    pairs = [(0, 0), *((i, j) for i in range(1, 1 + strong) for j in range(1, 1 + strong))]
    assert len(pairs) == 1 + strong**2

    def mean(loss: Callable[[int, int], Tensor]) -> Tensor:
        return torch.stack([loss(i, j) for i, j in pairs]).mean()

    def cosine(i: int, j: int) -> Tensor:
        from_image = kernels.negative_cosine_loss(image[i], text_v[j])
        return (from_image + kernels.negative_cosine_loss(text[j], image_v[i])) / 2

    close(kernels.siamlip_loss(image, text, image_v, text_v), mean(cosine))
    close(kernels.barlip_loss(image, text), mean(lambda i, j: kernels.barlow_loss(image[i], text[j])))
    prototypes = kernels.swalip_prototypes_loss
    close(prototypes(image, text, 5.0), mean(lambda i, j: prototypes((image[i],), (text[j],), 5.0)))


def test_barlow_of_identical_whitened_features_is_zero() -> None:
    features = torch.linalg.qr(random(8, 3)).Q * 8**0.5
    assert kernels.barlow_loss(features, features).abs() < 1e-12
    assert kernels.barlow_loss(features, -features, scale=1.0).item() == pytest.approx(3 * 4)


def test_swalip_with_three_views_averages_all_teachers() -> None:
    images, texts = [random(4, 3, seed=i) for i in range(3)], [random(4, 3, seed=10 + i) for i in range(3)]
    both = []
    for i, j in [(0, 1), (0, 2), (1, 2)]:  # each image pair with each text pair, both ways round
        for k, l in [(0, 1), (0, 2), (1, 2)]:  # noqa: E741
            both.append(kernels.swalip_loss((images[i], images[j]), (texts[k], texts[l]), 5.0))
    torch.testing.assert_close(kernels.swalip_loss(images, texts, 5.0), torch.stack(both).mean())


# --- precision --------------------------------------------------------------------------------------------------------


def objectives(dtype: torch.dtype) -> dict[str, Tensor]:
    a, b, c, d = (random(6, 5, seed=i, dtype=torch.bfloat16).to(dtype) for i in range(4))
    return {
        "clip": kernels.clip_loss(a, b, 100.0, label_smoothing=0.1),
        "cl2l": kernels.multiview_clip_loss(a, b, 14.3, (c,), (d,), 10.0),
        "siamlip": kernels.siamlip_loss((a, c), (b, d), (c, a), (d, b)),
        "barlip": kernels.barlip_loss((a, c), (b, d)),
        "swalip": kernels.swalip_loss((a, c), (b, d), 10.0),
        "swalip_prototypes": kernels.swalip_prototypes_loss((a, c), (b, d), 10.0),
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_inputs_are_computed_with_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    expected = objectives(torch.float64)
    if dtype == torch.float16:  # bfloat16 values of this size are exact in float16 too
        assert torch.equal(
            random(6, 5, dtype=torch.bfloat16).half().double(), random(6, 5, dtype=torch.bfloat16).double()
        )
    with torch.autocast("cpu", enabled=autocast):
        got = objectives(dtype)
    for name, value in got.items():
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_gradients_come_back_in_the_inputs_dtype() -> None:
    image = random(4, 3, dtype=torch.bfloat16).requires_grad_()
    scale = torch.tensor([10.0], requires_grad=True)
    kernels.clip_loss(image, random(4, 3, seed=1, dtype=torch.bfloat16), scale).backward()
    assert image.grad is not None
    assert image.grad.dtype == torch.bfloat16
    assert scale.grad is not None
    assert scale.grad.shape == (1,)


# --- errors -----------------------------------------------------------------------------------------------------------

X = torch.randn(4, 3)
cl2l = kernels.multiview_clip_loss
ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "shape": (
        lambda: kernels.clip_loss(X, X[:, :2], 1.0),
        r"text_MD: got \(4, 2\), expected a shape \(M, 3\), as wide as image_ND",
    ),
    "rank": (lambda: kernels.clip_loss(X[0], X[0], 1.0), r"image_ND: got \(3,\), expected a shape \(N, D\)"),
    "empty": (lambda: kernels.clip_loss(X[:0], X[:0], 1.0), r"image_ND: got \(0, 3\), expected .* N >= 1"),
    "dtype": (
        lambda: kernels.clip_loss(X, X.half(), 1.0),
        "text_MD: got torch.float16, expected the dtype of image_ND, torch.float32",
    ),
    "integers": (lambda: kernels.clip_loss(X.long(), X.long(), 1.0), "image_ND: got torch.int64, expected float16"),
    "device": (
        lambda: kernels.clip_loss(X, X.to("meta"), 1.0),
        "text_MD: got device.*meta.*, expected the device of image_ND, cpu",
    ),
    "scale": (lambda: kernels.clip_loss(X, X, torch.ones(2)), r"logit_scale: got .*\(2,\).*, expected one value"),
    "smoothing": (
        lambda: kernels.clip_loss(X, X, 1.0, label_smoothing=1.0),
        r"label_smoothing: got 1.0, expected a number in \[0, 1\)",
    ),
    "negative": (lambda: kernels.clip_loss(X, X, 1.0, label_smoothing=-0.1), "label_smoothing: got -0.1, expected"),
    "nan": (lambda: kernels.clip_loss(X, X, 1.0, label_smoothing=float("nan")), "label_smoothing: got nan, expected"),
    "smoothing of none": (lambda: cl2l(X, X, 1.0, label_smoothing=2.0), "label_smoothing: got 2.0, expected"),
    "reduction": (
        lambda: cl2l(X, X, 1.0, reduction="mean"),  # type: ignore[arg-type]
        "reduction: got 'mean', expected one of .*avg.*sum",
    ),
    "views": (
        lambda: cl2l(X, X, 1.0, (X, X), (X,), 1.0),
        r"len\(text_h\): got 1, expected 2, the number of views in image_h",
    ),
    "view shape": (
        lambda: cl2l(X, X, 1.0, (X, X), (X, X[:2]), 1.0),
        r"text_h\[1\]: got \(2, 3\), expected the shape of image_h\[0\], \(4, 3\)",
    ),
    "no h scale": (lambda: cl2l(X, X, 1.0, (X,), (X,)), "h_logit_scale: got None, expected a scale"),
    "h batch": (
        lambda: cl2l(X, X, 1.0, (X[:2],), (X[:2],), 1.0),
        r"image_h\[0\]: got \(2, 3\), expected a shape \(4, D\)",
    ),
    "cosine": (lambda: kernels.negative_cosine_loss(X, X[:, :2]), r"target_NP: got \(4, 2\), expected the shape"),
    "siamlip": (lambda: kernels.siamlip_loss((), (), (), ()), r"len\(image_p\): got 0, expected at least 1"),
    "siamlip targets": (lambda: kernels.siamlip_loss((X,), (X,), (X,), ()), r"len\(text_v\): got 0, expected 1"),
    "barlip": (lambda: kernels.barlip_loss((X,), (X,), lambda_=-1.0), "lambda_: got -1.0, expected a number >= 0"),
    "barlip scale": (lambda: kernels.barlow_loss(X, X, scale=0.0), "scale: got 0.0, expected a number > 0"),
    "swalip": (
        lambda: kernels.swalip_loss((X,), (X,), 1.0),
        r"len\(image_h\): got 1, expected at least 2 strong views",
    ),
    "epsilon": (lambda: kernels.sinkhorn(X, epsilon=0.0), "epsilon: got 0.0, expected a number > 0"),
    "iterations": (lambda: kernels.sinkhorn(X, iterations=0), "iterations: got 0, expected a number >= 1"),
    "sinkhorn": (lambda: kernels.sinkhorn(X[0]), r"scores_NM: got \(3,\), expected a shape \(N, M\)"),
    "prototypes": (
        lambda: kernels.swalip_prototypes_loss((X,), (X.double(),), 1.0),
        r"text_p\[0\]: got torch.float64, expected the dtype of image_p\[0\]",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_value_and_expectation(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.system
def test_importing_the_kernels_needs_torch_only() -> None:
    optional = [
        "numba",
        "triton",
        "xformers",
        "cv2",
        "PIL",
        "simplejpeg",
        "tyro",
        "rich",
        "timm",
        "torchvision",
        "ftfy",
    ]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({optional}, None)); import rocket_fast.kernels as k; k.clip_loss"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
