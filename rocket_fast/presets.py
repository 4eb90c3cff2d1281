"""The recipes by name. Each preset is a table row read by one function; a derived preset edits another's result.

Numbers are those of the original implementation's published runs (Fini et al. 2023); ``<backbone>-<data>`` is the
improved recipe (CL2L), a suffix makes it the plain baseline or adds a self-supervised companion.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

from rocket_fast.config import EvalConfig, EvalSet, LoopConfig, TrainConfig
from rocket_fast.errors import require
from rocket_fast.image_augment import ImageAugmentConfig, ViewConfig, plain_augment, recipe_augment
from rocket_fast.loaders.base import DataConfig
from rocket_fast.losses import LossConfig
from rocket_fast.models.clip import CLIPConfig
from rocket_fast.models.heads import (
    BarLIPConfig,
    BYOLIPConfig,
    CompanionConfig,
    MLPHeadConfig,
    SiamLIPConfig,
    SwALIPConfig,
    SwALIPPrototypesConfig,
)
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import (
    VIT_B16,
    VIT_B32,
    VIT_L16,
    VIT_S16,
    ConvStemViTConfig,
    TimmConfig,
    VisionConfig,
    ViTConfig,
)
from rocket_fast.optim import OptimConfig
from rocket_fast.text_augment import TextAugmentConfig

BACKBONES: dict[str, VisionConfig] = {
    "rn50": TimmConfig(name="resnet50"),
    "vits16": VIT_S16,
    "vitb16": VIT_B16,
    "vitb32": VIT_B32,
    "vitl16": VIT_L16,
    "convnext-tiny": TimmConfig(name="convnext_tiny"),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One row of the recipe's table: what depends on the training data."""

    lr: float
    weight_decay: float
    text_layers: int
    text_dropout: float
    companion_text_dropout: float
    stopword_prob: float
    clean: bool
    reduction_sum: bool
    several_captions: bool
    strong_size: int


SOURCES = {
    "cc3m": Source(
        lr=3e-3, weight_decay=0.5, text_layers=6, text_dropout=0.2, companion_text_dropout=0.2,
        stopword_prob=0.8, clean=False, reduction_sum=False, several_captions=False, strong_size=224,
    ),
    "cc12m": Source(
        lr=3e-3, weight_decay=0.1, text_layers=12, text_dropout=0.05, companion_text_dropout=0.1,
        stopword_prob=0.8, clean=False, reduction_sum=True, several_captions=False, strong_size=224,
    ),
    "yfcc": Source(
        lr=3e-3, weight_decay=0.1, text_layers=12, text_dropout=0.0, companion_text_dropout=0.0,
        stopword_prob=0.8, clean=True, reduction_sum=True, several_captions=False, strong_size=224,
    ),
    "29m": Source(
        lr=2e-3, weight_decay=0.1, text_layers=12, text_dropout=0.0, companion_text_dropout=0.0,
        stopword_prob=0.8, clean=True, reduction_sum=True, several_captions=True, strong_size=192,
    ),
}  # fmt: skip


def improved(backbone: str, data: str) -> TrainConfig:
    """CL2L: one weak and two strong views, heads z and h, label smoothing on the strong pairs."""
    source = SOURCES[data]
    stopword_prob = 0.9 if (backbone, data) == ("rn50", "yfcc") else source.stopword_prob
    return TrainConfig(
        name=f"{backbone}-{data}",
        data=DataConfig(
            train=(f"data/{data}/*.tar",),
            batch_size=4096,
            workers=8,
            captions="several" if source.several_captions else "txt",
        ),
        image=recipe_augment(size=224, strong_size=source.strong_size),
        text=TextAugmentConfig(stopword_prob=stopword_prob, clean_lowercase=source.clean),
        model=CLIPConfig(
            vision=BACKBONES[backbone],
            text=TextConfig(layers=source.text_layers, dropout=source.text_dropout),
            embed_dim=256,
            h_head=MLPHeadConfig(hidden=4096),
        ),
        loss=LossConfig(label_smoothing=0.1, reduction="sum" if source.reduction_sum else "avg"),
        optim=OptimConfig(lr=source.lr, weight_decay=source.weight_decay),
        loop=LoopConfig(epochs=32, compile="towers"),
    )


def plain_clip(base: TrainConfig, source: Source | None = None) -> TrainConfig:
    """The plain baseline: one weak view, no text augmentation, no smoothing, one head of 512 dimensions."""
    return replace(
        base,
        name=f"{base.name}-clip",
        image=plain_augment(base.image.weak.size),
        text=None,
        model=replace(base.model, h_head=None, embed_dim=512, text=replace(base.model.text, dropout=0.0)),
        loss=replace(base.loss, label_smoothing=0.0),
    )


def fast(base: TrainConfig, source: Source) -> TrainConfig:
    """CL2L on less of every picture, for ViTs: 160 px instead of 224, and three quarters of the patches in training.

    Not the published recipe: patches of 16 px make 76 tokens a view where that has 197, which saves 60% of the training
    FLOPs of ViT-B/16 and 55% of ViT-S/16's (``rocket-fast presets`` counts them). Positions are interpolated from the
    grid of 224 px; pictures are evaluated at 160 px. A few epochs at 224 px on all patches afterwards (the sizes of all
    views set back, ``--model.vision.patch-keep 1``) are known to recover most of what less costs (Li et al. 2023, FLIP
    and CLIPA). What it costs here has not been measured.
    """
    assert isinstance(base.model.vision, ViTConfig)
    vision = replace(base.model.vision, any_size=True, patch_keep=0.75)
    image = replace(
        base.image,
        weak=replace(base.image.weak, size=160),
        strong=tuple(replace(view, size=160) for view in base.image.strong),
    )
    return replace(base, name=f"{base.name}-fast", image=image, model=replace(base.model, vision=vision))


def siamlip(base: TrainConfig, source: Source) -> TrainConfig:
    """CL2L with SimSiam between the modalities."""
    return _with_companion(base, source, "siamlip", SiamLIPConfig(separate_local=_is_vit(base)))


def byolip(base: TrainConfig, source: Source) -> TrainConfig:
    """CL2L with BYOL between the modalities."""
    return _with_companion(base, source, "byolip", BYOLIPConfig(separate_local=_is_vit(base)))


def barlip(base: TrainConfig, source: Source) -> TrainConfig:
    """CL2L with Barlow Twins between the modalities."""
    return _with_companion(base, source, "barlip", BarLIPConfig(separate_local=_is_vit(base)))


def swalip(base: TrainConfig, source: Source) -> TrainConfig:
    """CL2L whose strong similarities are also trained towards their Sinkhorn-balanced selves; no label smoothing."""
    config = _with_companion(base, source, "swalip", SwALIPConfig())
    return replace(config, loss=replace(config.loss, label_smoothing=0.0))


def swalip_prototypes(base: TrainConfig, source: Source) -> TrainConfig:
    """Plain CLIP beside SwAV between the modalities, with 3,000 prototypes."""
    config = plain_clip(base)
    model = replace(config.model, embed_dim=256, companion=SwALIPPrototypesConfig())
    return replace(config, name=f"{base.name}-swalip-prototypes", model=model)


def _with_companion(base: TrainConfig, source: Source, suffix: str, companion: CompanionConfig) -> TrainConfig:
    text = replace(base.model.text, dropout=source.companion_text_dropout)
    return replace(base, name=f"{base.name}-{suffix}", model=replace(base.model, companion=companion, text=text))


def _is_vit(config: TrainConfig) -> bool:
    return isinstance(config.model.vision, ViTConfig)


VARIANTS: dict[str, Callable[[TrainConfig, Source], TrainConfig]] = {
    "clip": plain_clip,
    "fast": fast,
    "siamlip": siamlip,
    "byolip": byolip,
    "barlip": barlip,
    "swalip": swalip,
    "swalip-prototypes": swalip_prototypes,
}


DEMO_TESTS = ("heldout", "openmoji", "unseen")
"""Names held out of every vendor; a vendor never trained on; that vendor's drawings of held-out names."""


def demo() -> TrainConfig:
    """The improved recipe on emoji drawings: two CPU cores, about five minutes."""
    drawings = "data/emoji"
    weak = ViewConfig(
        size=32, scale=(0.6, 1.0), ratio=(1 / 1.1, 1.1), rotate_degrees=10, shear_degrees=5, zoom_out=1.15,
        jitter=(0.15, 0.0, 0.0, 0.0), jitter_prob=1.0, gray_prob=0.2, color_matrix_std=0.1, color_shift=0.08,
    )  # fmt: skip
    strong = ViewConfig(
        size=32, scale=(0.4, 1.0), rotate_degrees=25, shear_degrees=15, zoom_out=1.2, flip_prob=0.5,
        jitter=(0.15, 0.0, 0.0, 0.0), jitter_prob=1.0, gray_prob=0.2, color_matrix_std=0.2, color_shift=0.08,
        blur_prob=0.3, blur_sigma=(0.3, 1.2),
    )  # fmt: skip
    return TrainConfig(
        name="demo",
        data=DataConfig(
            train=(f"{drawings}/train-*.tar", f"{drawings}/val-*.tar"),
            batch_size=256,
            workers=1,
            captions="several",
            trim_margins=True,  # vendors draw to different sizes on the same canvas
            prefetch=0,  # with no core to spare, making batches beside a step slows it by more than it saves
        ),
        image=ImageAugmentConfig(weak=weak, strong=(strong,)),
        text=TextAugmentConfig(
            stopword_prob=0.0, synonym=0.0, swap=0.25, deletion=0.25, identity=0.5, deletion_word_prob=0.2
        ),
        model=CLIPConfig(
            vision=ConvStemViTConfig(stem_widths=(32, 64, 128), stem_blocks=(0, 1, 2), width=128),
            text=TextConfig(width=128, layers=2, heads=4, context_length=32),
            embed_dim=256,
            h_head=MLPHeadConfig(hidden=512),
        ),
        loss=LossConfig(label_smoothing=0.1, reduction="avg"),
        optim=OptimConfig(lr=2e-3, weight_decay=0.1, warmup_epochs=2, end_lr=2e-5),
        loop=LoopConfig(epochs=23, eval_every_epochs=0, checkpoint_every=300, weight_average=0.99),
        eval=EvalConfig(
            sets=tuple(EvalSet(name=name, shards=(f"{drawings}/{name}-*.tar",)) for name in DEMO_TESTS),
            pixel_baseline=True,
        ),
    )


def demo_clip() -> TrainConfig:
    """The plain recipe on the demo's data, network and time."""
    base = demo()
    return replace(
        plain_clip(base),
        image=replace(base.image, strong=()),
        model=replace(base.model, h_head=None),
        loop=replace(base.loop, epochs=2 * base.loop.epochs),  # half the views a sample
        optim=replace(base.optim, warmup_epochs=2 * base.optim.warmup_epochs),
    )


def demo_siamlip() -> TrainConfig:
    """The demo with SiamLIP beside it: how a companion trains, on a laptop."""
    base = demo()
    companion = SiamLIPConfig(hidden=256, out=64, predictor_hidden=256)
    return replace(base, name=f"{base.name}-siamlip", model=replace(base.model, companion=companion))


def debug() -> TrainConfig:
    """A few seconds of the demo on a tiny network, to see that everything works."""
    base = demo()
    return replace(
        base,
        name="debug",
        data=replace(base.data, train=("data/emoji/val-*.tar",), batch_size=64),
        model=replace(
            base.model,
            vision=ConvStemViTConfig(stem_widths=(8, 16, 32), stem_blocks=(0, 0, 1), width=32, layers=1),
            text=TextConfig(width=32, layers=1, heads=2, context_length=32),
            embed_dim=32,
            h_head=MLPHeadConfig(hidden=64),
        ),
        optim=replace(base.optim, warmup_epochs=0.5),
        loop=replace(base.loop, epochs=2, log_every=5),
    )


def _published() -> dict[str, Callable[[], TrainConfig]]:
    """Every backbone on every data set, plain, improved and with each companion."""
    pairs = [*product(BACKBONES, ("cc3m", "cc12m", "yfcc")), ("rn50", "29m")]
    made: dict[str, Callable[[], TrainConfig]] = {}
    for backbone, data in pairs:
        made[f"{backbone}-{data}"] = lambda b=backbone, d=data: improved(b, d)  # type: ignore[misc]
        for suffix, vary in VARIANTS.items():
            if vary is fast and not isinstance(BACKBONES[backbone], ViTConfig):
                continue
            made[f"{backbone}-{data}-{suffix}"] = lambda b=backbone, d=data, v=vary: v(improved(b, d), SOURCES[d])  # type: ignore[misc]
    return made


SMALL: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "demo-clip": demo_clip,
    "demo-siamlip": demo_siamlip,
    "debug": debug,
}
PRESETS: dict[str, Callable[[], TrainConfig]] = {**SMALL, **_published()}


def overview() -> list[tuple[str, str]]:
    """(names, meaning) in a screenful: the presets on their own, then the grid of published ones by their parts."""
    single = [(name, _first_line(make)) for name, make in SMALL.items()]
    grid = [(f"{{{','.join(BACKBONES)}}}-{{cc3m,cc12m,yfcc}}, rn50-29m", _first_line(improved))]
    return single + grid + [(f"...-{suffix}", _first_line(vary)) for suffix, vary in VARIANTS.items()]


def _first_line(function: Callable[..., TrainConfig]) -> str:
    return (function.__doc__ or "").splitlines()[0]


def preset(name: str) -> TrainConfig:
    """The configuration called ``name``; ValueError with the nearest names where there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5)
        require(
            False, "preset", name, f"{' or '.join(near)}" if near else "one of those that rocket-fast presets lists"
        )
    return PRESETS[name]()
