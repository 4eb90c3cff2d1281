"""Every preset builds, and its numbers are the recipe's (the table is typed here a second time, on purpose)."""

from dataclasses import replace

import pytest
import torch

from rocket_fast.config import TrainConfig, from_plain, to_plain
from rocket_fast.losses import build_loss
from rocket_fast.models.clip import DualEncoder
from rocket_fast.models.heads import BarLIPConfig, BYOLIPConfig, SiamLIPConfig, SwALIPConfig, SwALIPPrototypesConfig
from rocket_fast.models.vision import TimmConfig, ViTConfig
from rocket_fast.optim import learning_rate
from rocket_fast.plan import cost
from rocket_fast.presets import PRESETS, overview, preset

DATA = {
    # lr, weight decay, text layers, dropout, companions' dropout, stopwords, clean, reduction, captions, strong crop
    "cc3m": (3e-3, 0.5, 6, 0.2, 0.2, 0.8, False, "avg", "txt", 224),
    "cc12m": (3e-3, 0.1, 12, 0.05, 0.1, 0.8, False, "sum", "txt", 224),
    "yfcc": (3e-3, 0.1, 12, 0.0, 0.0, 0.8, True, "sum", "txt", 224),
    "29m": (2e-3, 0.1, 12, 0.0, 0.0, 0.8, True, "sum", "several", 192),
}
VISION = {
    "rn50": TimmConfig(name="resnet50"),
    "convnext-tiny": TimmConfig(name="convnext_tiny"),
    "vits16": ViTConfig(patch_size=16, width=384, layers=12, heads=12),
    "vitb16": ViTConfig(patch_size=16, width=768, layers=12, heads=12),
    "vitb32": ViTConfig(patch_size=32, width=768, layers=12, heads=12),
    "vitl16": ViTConfig(patch_size=16, width=1024, layers=24, heads=16),
}
COMPANIONS = {
    "siamlip": SiamLIPConfig,
    "byolip": BYOLIPConfig,
    "barlip": BarLIPConfig,
    "swalip": SwALIPConfig,
    "swalip-prototypes": SwALIPPrototypesConfig,
}
GRID = [(b, d) for b in VISION for d in ("cc3m", "cc12m", "yfcc")] + [("rn50", "29m")]


def test_the_list_is_complete():
    suffixes = ("", "-clip", *(f"-{name}" for name in COMPANIONS))
    expected = {f"{b}-{d}{suffix}" for b, d in GRID for suffix in suffixes} | {
        "demo",
        "demo-clip",
        "demo-siamlip",
        "debug",
    }
    expected |= {f"{b}-{d}-fast" for b, d in GRID if b.startswith("vit")}
    assert set(PRESETS) == expected
    assert len(overview()) == 4 + 1 + len(COMPANIONS) + 2


@pytest.mark.parametrize(("backbone", "data"), GRID)
def test_improved_recipe(backbone: str, data: str):
    lr, decay, layers, dropout, _, stopwords, clean, reduction, captions, crop = DATA[data]
    config = preset(f"{backbone}-{data}")
    assert config.model.vision == VISION[backbone]
    assert (config.optim.lr, config.optim.weight_decay) == (lr, decay)
    assert (config.optim.betas, config.optim.eps) == ((0.9, 0.98), 1e-8)
    text = config.model.text
    assert (text.layers, text.width, text.heads, text.context_length) == (layers, 512, 8, 77)
    assert text.dropout == dropout
    assert config.text is not None
    assert config.text.stopword_prob == (0.9 if (backbone, data) == ("rn50", "yfcc") else stopwords)
    assert config.text.clean_lowercase == clean
    assert (config.loss.reduction, config.loss.label_smoothing) == (reduction, 0.1)
    assert config.data.captions == captions
    assert config.data.batch_size == 4096
    assert config.loop.epochs == 32
    assert (config.image.weak.size, [view.size for view in config.image.strong]) == (224, [crop, crop])
    assert (config.model.embed_dim, config.model.h_head.hidden) == (256, 4096)
    assert (config.model.temperature, config.model.h_head.temperature) == (0.07, 0.1)


@pytest.mark.parametrize(("backbone", "data"), GRID)
@pytest.mark.parametrize("suffix", COMPANIONS)
def test_companions(backbone: str, data: str, suffix: str):
    config = preset(f"{backbone}-{data}-{suffix}")
    companion = config.model.companion
    assert type(companion) is COMPANIONS[suffix]
    is_vit = isinstance(VISION[backbone], ViTConfig)
    if suffix in ("siamlip", "byolip", "barlip"):
        assert companion.separate_local == is_vit
    if suffix in ("siamlip", "byolip"):
        assert (companion.hidden, companion.out, companion.predictor_hidden) == (2048, 128, 2048)
    if suffix == "byolip":
        assert companion.momentum == 0.99
    if suffix == "barlip":
        assert (companion.hidden, companion.out) == (3000, 8192)
        assert (companion.lambda_, companion.scale) == (5e-3, 0.025)
    if suffix == "swalip":
        assert (companion.iterations, companion.epsilon, companion.weight) == (3, 0.05, 0.2)
    if suffix == "swalip-prototypes":
        assert (companion.hidden, companion.out, companion.prototypes, companion.freeze_steps) == (2048, 128, 3000, 100)
        assert config.image.strong == ()
    else:
        assert config.model.text.dropout == DATA[data][4]
        assert len(config.image.strong) == 2
    assert config.loss.label_smoothing == (0.0 if suffix.startswith("swalip") else 0.1)


@pytest.mark.parametrize(("backbone", "data"), GRID)
def test_plain_baseline(backbone: str, data: str):
    config = preset(f"{backbone}-{data}-clip")
    assert config.image.strong == ()
    assert config.text is None
    assert config.loss.label_smoothing == 0
    assert config.model.h_head is None
    assert config.model.embed_dim == 512
    assert config.optim == preset(f"{backbone}-{data}").optim


@pytest.mark.parametrize("backbone", VISION)
def test_views_are_the_recipes(backbone: str):
    config = preset(f"{backbone}-yfcc")
    weak, strong = config.image.weak, config.image.strong[0]
    assert (weak.scale, weak.flip_prob, weak.jitter_prob, weak.gray_prob, weak.blur_prob) == ((0.5, 1.0), 0, 0, 0, 0)
    assert (strong.scale, strong.flip_prob) == ((0.08, 1.0), 0.5)
    assert (strong.jitter, strong.jitter_prob) == ((0.4, 0.4, 0.4, 0.1), 0.8)
    assert (strong.gray_prob, strong.blur_prob, strong.blur_sigma) == (0.2, 0.5, (0.1, 2.0))
    assert strong.solarize_prob == 0


@pytest.mark.parametrize("backbone", ["vits16", "vitb16", "vitb32", "vitl16"])
def test_fast_looks_at_less_of_every_picture(backbone: str):
    full, fast = preset(f"{backbone}-yfcc"), preset(f"{backbone}-yfcc-fast")
    assert {view.size for view in fast.image.views} == {160}
    assert isinstance(fast.model.vision, ViTConfig)
    side = 160 // fast.model.vision.patch_size
    assert cost(fast).training_flops < 0.55 * cost(full).training_flops
    changed = replace(fast.model.vision, any_size=False, patch_keep=1.0)
    assert replace(fast.model, vision=changed) == full.model
    with torch.device("meta"):
        tower = DualEncoder(fast.model).visual.train()
        assert tower._drop_patches(torch.empty(2, side * side, tower.width)).shape[1] == round(0.75 * side * side)


def test_schedule_of_a_published_run():
    config = preset("vitb16-yfcc")
    per_epoch = 14_689_580 // 4096
    rates = [
        learning_rate(config.optim, step, steps_per_epoch=per_epoch, total_steps=32 * per_epoch)
        for step in (0, per_epoch, 32 * per_epoch - 1)
    ]
    assert rates == pytest.approx([1e-6, 3e-3, 1e-5])


@pytest.mark.parametrize("name", PRESETS)
def test_builds_and_survives_json(name: str):
    config = preset(name)
    assert from_plain(to_plain(config), TrainConfig) == config
    with torch.device("meta"):
        DualEncoder(config.model)
    build_loss(config.loss, config.model.companion)


def test_cost_of_vit_b16_is_the_published_one():
    figures = cost(preset("vitb16-yfcc"))
    assert figures.views == 3
    assert figures.image_parameters == 85_798_656
    assert figures.image_flops / 3 == pytest.approx(2 * 17.58e9, rel=0.01)  # multiply-adds as in the ViT literature
    assert figures.text_parameters == 63_428_096 - 512 * 512  # OpenAI's text tower without its projection


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"preset: got 'vitb16-yfc', expected vitb16-yfcc or"):
        preset("vitb16-yfc")
