"""Costs counted on the meta device against counts made another way."""

from dataclasses import replace

import pytest
import torch
from fvcore.nn import FlopCountAnalysis

from rocket_fast.models.clip import DualEncoder
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


def test_image_flops_equal_fvcores_plus_attention():
    vision = ViTConfig(image_size=64, width=64, layers=2, heads=4)
    config = replace(preset("demo"), model=replace(preset("demo").model, vision=vision))
    config = replace(config, image=replace(config.image, weak=replace(config.image.weak, size=64), strong=()))
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
    config = replace(base, model=replace(base.model, text=text), image=replace(base.image, strong=()))
    figures = cost(config)
    ours = figures.text_flops if tokens == TYPICAL_TOKENS else figures.text_flops_full
    assert ours == 2 * (counted + layers * 2 * tokens * tokens * width)
