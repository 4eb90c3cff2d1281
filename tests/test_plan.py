"""Costs as fvcore counts them against counts made another way."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from fvcore.nn import parameter_count

from rocket_fast.__main__ import main
from rocket_fast.config import TrainConfig
from rocket_fast.models.clip import CLIPConfig, DualEncoder
from rocket_fast.models.heads import (
    BarLIPConfig,
    BYOLIPConfig,
    CompanionConfig,
    MLPHeadConfig,
    SharedHeadConfig,
    SiamLIPConfig,
    SwALIPPrototypesConfig,
)
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import ViTConfig
from rocket_fast.plan import TYPICAL_TOKENS, cost
from rocket_fast.presets import preset


def test_parameters_equal_the_built_model():
    config = preset("demo")
    model = DualEncoder(config.model)
    figures = cost(config)
    assert figures.parameters == sum(p.numel() for p in model.parameters())
    assert figures.views == len(config.image.views)


def tiny(views: int = 3, **options: object) -> TrainConfig:
    """Demo pictures in so many views, an image tower of width 16 and a text tower of width 24."""
    base = preset("demo")
    model = CLIPConfig(
        vision=ViTConfig(image_size=32, width=16, layers=1, heads=2),
        text=TextConfig(vocab_size=50, width=24, layers=1, heads=2),
        embed_dim=8,
        **options,
    )
    image = replace(base.image, weak=replace(base.image.weak, size=32), strong=base.image.strong[:1] * (views - 1))
    return replace(base, model=model, image=replace(image, strong=tuple(replace(v, size=32) for v in image.strong)))


def mlp(*widths: int) -> int:
    """FLOPs of a chain of linear layers on one row."""
    return sum(2 * a * b for a, b in pairwise(widths))


Z = mlp(16, 8) + mlp(24, 8)
H = mlp(16, 32, 32, 8) + mlp(24, 32, 32, 8)
SIAM_PROJECTORS, SIAM_PREDICTORS = mlp(16, 10, 6) + mlp(24, 10, 6), 2 * mlp(6, 12, 6)
SIAM = {"hidden": 10, "out": 6, "predictor_hidden": 12}


@pytest.mark.parametrize(
    ("companion", "flops"),
    [
        (None, 0),
        (SiamLIPConfig(**SIAM), 3 * (SIAM_PROJECTORS + SIAM_PREDICTORS)),
        (BYOLIPConfig(**SIAM, separate_local=True), 3 * (SIAM_PROJECTORS + SIAM_PREDICTORS)),
        (BarLIPConfig(hidden=10, out=14), 3 * (mlp(16, 10, 10, 14) + mlp(24, 10, 10, 14))),
        (SwALIPPrototypesConfig(hidden=10, out=6, prototypes=9), mlp(16, 10, 6, 9) + mlp(24, 10, 6, 9)),
    ],
)
def test_heads_count_once_a_view_and_an_averaged_encoder_without_backward(
    companion: CompanionConfig | None, flops: int
):
    config = tiny(h_head=MLPHeadConfig(hidden=32), companion=companion)
    model, figures = DualEncoder(config.model), cost(config)
    assert figures.head_flops == Z + 2 * H + flops
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert figures.parameters == trained
    forward = figures.image_flops + figures.text_flops
    if isinstance(companion, BYOLIPConfig):
        assert figures.momentum_parameters == sum(p.numel() for p in model.momentum.parameters())
        assert figures.momentum_flops == forward + 3 * SIAM_PROJECTORS
    else:
        assert (figures.momentum_parameters, figures.momentum_flops) == (0, 0)
    assert figures.training_flops == 3 * (forward + figures.head_flops) + figures.momentum_flops


@pytest.mark.parametrize("name", ["vits16-yfcc", "vits16-yfcc-siamlip", "vits16-yfcc-byolip", "vits16-yfcc-swalip"])
def test_unpaired_pictures_count_with_the_samples_they_are_beside(name: str):
    config = preset(name)
    if name == "vits16-yfcc":
        config = tiny(h_head=MLPHeadConfig(hidden=32), companion=BarLIPConfig(hidden=10, out=14))
    strong, views = len(config.image.strong), len(config.image.views)
    alone = cost(config)
    beside = cost(replace(config, data=replace(config.data, unpaired=("pictures",), unpaired_ratio=2)))
    share = strong / 2  # views of unpaired pictures to a sample
    assert beside.image_flops == round(alone.image_flops * (1 + share / views))
    width, companion = config.model.vision.width, config.model.companion
    projector = mlp(width, companion.hidden, companion.out) if isinstance(companion, SiamLIPConfig) else 0
    predictor = mlp(companion.out, companion.predictor_hidden, companion.out) if projector else 0
    heads = {"vits16-yfcc": mlp(16, 10, 10, 14), "vits16-yfcc-swalip": mlp(width, 4096, 4096, 256)}
    assert beside.head_flops - alone.head_flops == share * heads.get(name, projector + predictor)
    assert beside.text_flops == alone.text_flops
    if alone.momentum_flops:
        own = beside.image_flops - alone.image_flops + share * projector
        assert beside.momentum_flops - alone.momentum_flops == own
    assert beside.training_flops > alone.training_flops


def test_head_z_alone_and_shared():
    assert cost(tiny(views=1, h_head=None)).head_flops == Z
    assert cost(tiny(h_head=SharedHeadConfig())).head_flops == 3 * Z


def test_the_command_states_the_averaged_encoder_apart(capsys: pytest.CaptureFixture[str]):
    assert main(["presets", "vits16-yfcc-byolip"]) == 0
    text = capsys.readouterr().out
    assert "89.6 M parameters, not trained" in text
    assert "1 x averaged encoder's" in text
    assert main(["presets", "vits16-yfcc-barlip"]) == 0
    assert "averaged encoder" not in capsys.readouterr().out


def transformer(layers: int, width: int, tokens: int) -> int:
    """FLOPs of one sequence: 12 width^2 weights a layer, and the two products of (uncropped) attention."""
    return layers * tokens * (2 * 12 * width * width + 4 * tokens * width)


def analytic(config: TrainConfig) -> tuple[int, int, int, int]:
    """FLOPs of all views: pictures, captions of typical length and of full length; parameters."""
    vision, text, views = config.model.vision, config.model.text, config.image.views
    assert isinstance(vision, ViTConfig)
    pictures = 0
    for view in views:
        patches = (view.size // vision.patch_size) ** 2
        pictures += 2 * patches * 3 * vision.patch_size**2 * vision.width
        pictures += transformer(vision.layers, vision.width, 1 + round(vision.patch_keep * patches))
    captions = [len(views) * transformer(text.layers, text.width, n) for n in (TYPICAL_TOKENS, text.context_length)]
    weights = sum(part.layers * 12 * part.width**2 for part in (vision, text)) + text.vocab_size * text.width
    weights += 3 * vision.patch_size**2 * vision.width + (vision.width + text.width) * config.model.embed_dim
    mlps = sum(width * 4096 + 4096**2 + 4096 * 256 for width in (vision.width, text.width)) * (len(views) > 1)
    return pictures, *captions, weights + mlps


@pytest.mark.parametrize("name", ["vits16-yfcc", "vitb16-yfcc", "vitb16-yfcc-fast", "vitb32-cc3m-clip"])
def test_counts_agree_with_the_formulas(name: str):
    """To 2%, packed text included; biases, norms and positions are what the formulas leave out."""
    config = preset(name)
    figures, (pictures, typical, full, parameters) = cost(config), analytic(config)
    assert figures.image_flops == pytest.approx(pictures, rel=0.02)
    assert figures.text_flops == pytest.approx(typical, rel=0.02)
    assert figures.text_flops_full == pytest.approx(full, rel=0.02)
    assert figures.parameters == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize("name", ["debug", "rn50-cc3m-siamlip"])
def test_parameters_are_those_fvcore_counts(name: str):
    config = preset(name)
    with torch.device("meta"):
        model = DualEncoder(config.model)
    assert cost(config).parameters == parameter_count(model)[""]


def test_checkpointing_counts_as_none():
    config = tiny(h_head=None, views=1)
    vision = replace(config.model.vision, checkpointing="blocks")
    text = replace(config.model.text, checkpointing="cheap")
    assert cost(replace(config, model=replace(config.model, vision=vision, text=text))) == cost(config)
