"""The objectives built from configurations: totals, gradients and metrics of the original, by name."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rocket_fast.batch import CompanionOutputs, Embeddings, UnpairedOutputs
from rocket_fast.kernels import reference
from rocket_fast.losses import LossConfig, build_loss
from rocket_fast.models.heads import (
    BarLIPConfig,
    BYOLIPConfig,
    CompanionConfig,
    SiamLIPConfig,
    SwALIPConfig,
    SwALIPPrototypesConfig,
)

FIXTURES = np.load(Path(__file__).parent / "fixtures" / "reference_losses.npz")
CASES = sorted({key.split("/")[0] for key in FIXTURES})
TOLERANCE = {"rtol": 0.0, "atol": 1e-10}

COMPANIONS: dict[str, CompanionConfig] = {
    "siamlip": SiamLIPConfig(),
    "byolip": BYOLIPConfig(),
    "barlip": BarLIPConfig(lambda_=5e-3, scale=0.025),
    "swalip": SwALIPConfig(iterations=3, epsilon=0.05, weight=0.2),
    "swalip_prototypes": SwALIPPrototypesConfig(iterations=3, epsilon=0.05, weight=1.0),
}


def config_of(case: str) -> LossConfig:
    if case.startswith("cl2l"):
        _, reduction, smoothing, _ = case.split("_")
        return LossConfig(label_smoothing=float(smoothing.removeprefix("ls")), reduction=reduction)  # type: ignore[arg-type]
    if case in ("clip", "swalip_prototypes"):
        return LossConfig(label_smoothing=0.0, reduction="avg")
    return LossConfig(label_smoothing=0.0 if case == "swalip" else 0.1, reduction="sum")


def part(case: str, kind: str) -> dict[str, Tensor]:
    prefix = f"{case}/{kind}/"
    return {key.removeprefix(prefix): torch.tensor(FIXTURES[key]) for key in FIXTURES if key.startswith(prefix)}


def embeddings_of(case: str, inputs: dict[str, Tensor]) -> Embeddings:
    def weak_first(kind: str, modality: str) -> tuple[Tensor, ...]:
        """All views of one output, the weak one first, whatever the fixture calls its encoder."""
        names = sorted(
            (name for name in inputs if name.startswith(f"{kind}_{modality}")),
            key=lambda name: ("_local" in name, name),
        )
        return tuple(inputs[name] for name in names)

    companion = None
    if case in COMPANIONS:
        companion = CompanionOutputs(
            image_v=weak_first("v", "image"),
            text_v=weak_first("v", "text"),
            image_p=weak_first("p", "image"),
            text_p=weak_first("p", "text"),
            logit_scale=inputs.get("swalip_logit_scale"),
        )
    weak = "" if "z_image" in inputs else "_global"
    return Embeddings(
        image_z=inputs["z_image" + weak],
        text_z=inputs["z_text" + weak],
        logit_scale=inputs["logit_scale"],
        image_h=weak_first("h", "image"),
        text_h=weak_first("h", "text"),
        h_logit_scale=inputs.get("h_logit_scale"),
        companion=companion,
    )


@pytest.mark.parametrize("case", CASES)
def test_every_objective_equals_the_original(case: str) -> None:
    inputs = {name: value.requires_grad_() for name, value in part(case, "in").items()}
    output = build_loss(config_of(case), COMPANIONS.get(case))(embeddings_of(case, inputs))

    torch.testing.assert_close(output.total, output.metrics["loss"], rtol=0, atol=0)
    for name, expected in part(case, "out").items():
        torch.testing.assert_close(output.metrics[name], expected, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")

    gradients = torch.autograd.grad(output.total, list(inputs.values()), allow_unused=True, materialize_grads=True)
    for gradient, (name, expected) in zip(gradients, part(case, "grad").items(), strict=True):
        torch.testing.assert_close(gradient, expected, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


def some_embeddings(strong: int = 0, companion: CompanionOutputs | None = None) -> Embeddings:
    generator = torch.Generator().manual_seed(0)
    image_z, text_z, *h = (torch.randn(5, 4, generator=generator) for _ in range(2 + 2 * strong))
    scale = torch.tensor(10.0, requires_grad=True)
    return Embeddings(
        image_z=image_z,
        text_z=text_z,
        logit_scale=scale,
        image_h=tuple(h[:strong]),
        text_h=tuple(h[strong:]),
        h_logit_scale=scale if strong else None,
        companion=companion,
    )


@pytest.mark.parametrize("strong", [0, 1, 2, 3])
def test_metrics_are_detached_scalars_with_scales_as_given(strong: int) -> None:
    output = build_loss(LossConfig(), None)(some_embeddings(strong))
    assert output.total.requires_grad
    assert all(value.shape == () and not value.requires_grad for value in output.metrics.values())
    assert output.metrics["logit_scale"] == 10.0
    assert ("h_logit_scale" in output.metrics) == (strong > 0)
    assert ("clip_loss_image_local" in output.metrics) == (strong > 0)


def test_companion_hyperparameters_reach_the_loss() -> None:
    views = tuple(torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    heads = CompanionOutputs(
        image_v=views, text_v=views[::-1], image_p=views, text_p=views, logit_scale=torch.tensor(5.0)
    )
    embeddings = some_embeddings(2, heads)
    plain = build_loss(LossConfig(), None)(embeddings).total

    def added(config: CompanionConfig) -> Tensor:
        return build_loss(LossConfig(), config)(embeddings).total - plain

    torch.testing.assert_close(added(BarLIPConfig(scale=0.5)), 5 * added(BarLIPConfig(scale=0.1)))
    assert not torch.allclose(added(BarLIPConfig(lambda_=0.5)), added(BarLIPConfig(lambda_=0.1)))
    for kind in (SwALIPConfig, SwALIPPrototypesConfig):
        torch.testing.assert_close(added(kind(weight=2.0)), 4 * added(kind(weight=0.5)))
        assert not torch.allclose(added(kind(epsilon=0.5)), added(kind(epsilon=0.05)))
        assert not torch.allclose(added(kind(iterations=1)), added(kind(iterations=3)))


def views_of_pictures(count: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(count)
    v, p = torch.randn(2, count, 7, 5, generator=generator, dtype=torch.float64).unbind()
    return tuple(view.requires_grad_() for view in v), tuple(view.requires_grad_() for view in p)


def soft_cross_entropy(logits_NM: Tensor, target_NM: Tensor) -> Tensor:
    return -(target_NM * logits_NM.log_softmax(1)).sum(1).mean()


def dense_views_loss(config: CompanionConfig, v: tuple[Tensor, ...], p: tuple[Tensor, ...], scale: Tensor) -> Tensor:
    """A companion's loss of unpaired pictures as its words have it, pair by pair."""
    terms = []
    for i, j in itertools.permutations(range(len(v)), 2):
        if isinstance(config, SiamLIPConfig):
            terms.append(2 - 2 * F.cosine_similarity(p[i], v[j].detach()).mean())
        elif isinstance(config, BarLIPConfig):
            terms.append(reference.barlow_loss(v[i], v[j], lambda_=config.lambda_, scale=config.scale))
        elif isinstance(config, SwALIPConfig):
            cosines = F.normalize(v[i]) @ F.normalize(v[j]).T
            labels = reference.sinkhorn(cosines.T, epsilon=config.epsilon, iterations=config.iterations)
            terms.append(soft_cross_entropy(scale * cosines, labels))
        else:
            labels = reference.sinkhorn(p[j], epsilon=config.epsilon, iterations=config.iterations)
            terms.append(soft_cross_entropy(scale * p[i], labels))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", COMPANIONS)
def test_unpaired_pictures_add_the_companions_loss_between_their_views(name: str, count: int) -> None:
    config = COMPANIONS[name]
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    heads = CompanionOutputs(
        **dict.fromkeys(("image_v", "text_v", "image_p", "text_p"), (torch.randn(5, 4), torch.randn(5, 4))),
        logit_scale=scale,
    )
    v, p = views_of_pictures(count)
    alone = replace(some_embeddings(2, heads), h_logit_scale=scale.detach())
    beside = replace(some_embeddings(2, heads), h_logit_scale=scale, unpaired=UnpairedOutputs(image_v=v, image_p=p))
    objective = build_loss(LossConfig(), config)
    without, output = objective(alone), objective(beside)
    expected = dense_views_loss(config, v, p, scale)
    torch.testing.assert_close(output.metrics["unpaired_loss"], expected.detach(), rtol=1e-10, atol=0)
    weight = getattr(config, "weight", 1.0)
    torch.testing.assert_close(output.total.double(), without.total.double() + weight * expected, rtol=1e-6, atol=0)
    assert {name: value for name, value in output.metrics.items() if name not in ("loss", "unpaired_loss")} == {
        name: value for name, value in without.metrics.items() if name != "loss"
    }, "nothing else sees them"
    wanted = torch.autograd.grad(weight * expected, (*v, *p), allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(output.total, (*v, *p), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert any(gradient.any() for gradient in found)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"loss.label_smoothing: got 1.0, expected a number in \[0, 1\)"):
        LossConfig(label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"loss.reduction: got 'mean', expected 'avg' or 'sum'"):
        LossConfig(reduction="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"embeddings.companion: got None, expected the outputs"):
        build_loss(LossConfig(), SiamLIPConfig())(some_embeddings())
    with pytest.raises(ValueError, match=r"embeddings.h_logit_scale: got None, expected the strong head's scale"):
        build_loss(LossConfig(), SwALIPConfig())(some_embeddings())
    with pytest.raises(ValueError, match=r"embeddings.companion.logit_scale: got None, expected the prototypes' own"):
        build_loss(LossConfig(), SwALIPPrototypesConfig())(some_embeddings(companion=CompanionOutputs()))
    with pytest.raises(ValueError, match=r"companion: got 'siamlip', expected one of"):
        build_loss(LossConfig(), "siamlip")  # type: ignore[arg-type]
