"""Costs counted on the meta device against counts made another way."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from fvcore.nn import FlopCountAnalysis

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
from rocket_fast.models.text import TextConfig, TextTower
from rocket_fast.models.vision import ViTConfig, build_vision
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


def test_image_flops_equal_fvcores_plus_attention():
    vision = ViTConfig(image_size=64, width=64, layers=2, heads=4)
    base = preset("demo")
    image = replace(base.image, weak=replace(base.image.weak, size=64), strong=())
    config = replace(base, model=replace(base.model, vision=vision, h_head=None), image=image)
    counter = FlopCountAnalysis(build_vision(vision).eval(), torch.zeros(1, 3, 64, 64)).unsupported_ops_warnings(False)
    counts = counter.by_operator()  # multiply-adds; fvcore leaves out scaled dot product attention
    tokens = 1 + (64 // 16) ** 2
    attention = 2 * 2 * tokens * tokens * 64
    ours = cost(config).image_flops
    assert ours == pytest.approx(2 * (counts["linear"] + counts["conv"]) + 2 * attention, rel=1e-3)


@pytest.mark.parametrize("tokens", [TYPICAL_TOKENS, 77])
def test_text_flops_equal_fvcores_plus_attention(tokens: int):
    width, layers = 64, 3
    tower = TextTower(TextConfig(vocab_size=50, width=width, layers=layers, heads=4)).eval()
    embedded = torch.zeros(1, tokens, width)
    counted = sum(
        FlopCountAnalysis(block, embedded).unsupported_ops_warnings(False).by_operator()["linear"]
        for block in tower.blocks
    )
    base = preset("demo")
    text = TextConfig(width=width, layers=layers, heads=4)
    model = replace(base.model, text=text, h_head=None)
    config = replace(base, model=model, image=replace(base.image, strong=()))
    figures = cost(config)
    ours = figures.text_flops if tokens == TYPICAL_TOKENS else figures.text_flops_full
    assert ours == 2 * (counted + layers * 2 * tokens * tokens * width)
