"""Weights of the original implementation of the recipe (clip-rocket), both ways.

One table holds every name. The layouts of the tensors are the same, so that nothing is copied. BYOLIP's averaged
encoder is not part of the format: it is left out on the way there, and absent on the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rocket_fast.errors import require
from rocket_fast.interop.weights import (
    CLIP_TEXT,
    TIMM_VIT,
    ImportedModel,
    Rules,
    Shapes,
    clip_text_config,
    read_weights,
    rename,
    reversed_rules,
    shapes_of,
    timm_vit_config,
)
from rocket_fast.models.clip import CLIPConfig, DualEncoder
from rocket_fast.models.heads import (
    BarLIPConfig,
    CompanionConfig,
    HHeadConfig,
    MLPHeadConfig,
    SharedHeadConfig,
    SiamLIPConfig,
    SwALIPPrototypesConfig,
)
from rocket_fast.models.vision import TimmConfig, VisionConfig

_TOWERS: Rules = (
    *CLIP_TEXT,
    *TIMM_VIT,
    ("visual.*", "visual.trunk.*"),  # timm's networks, which keep timm's names
)

_HEADS: Rules = (
    ("logit_scale", "logit_scale"),
    ("l2l_logit_scale", "h_logit_scale"),
    ("image_projector.*", "image_z.*"),
    ("text_projector.*", "text_z.*"),
    ("l2l_image_projector.weight", "image_h.weight"),  # the shared head: z's matrix once more
    ("l2l_text_projector.weight", "text_h.weight"),
    ("l2l_image_projector.layer*", "image_h.fc*"),
    ("l2l_image_projector.bn*", "image_h.bn*"),
    ("l2l_text_projector.layer*", "text_h.fc*"),
    ("l2l_text_projector.bn*", "text_h.bn*"),
)


def _layers(theirs: str, ours: str, names: Mapping[str, str]) -> Rules:
    """Rules for a stack of layers that has numbers there and names here."""
    return tuple((f"{theirs}.{number}.*", f"{ours}.{name}.*") for number, name in names.items())


_SIDES = (("image", "text"), ("text", "image"))
_PLACES = (("global", "weak"), ("local", "strong"))

_SIAMLIP: Rules = tuple(
    rule
    for side, other in _SIDES
    for theirs, ours in _PLACES
    for rule in (
        *_layers(
            f"siamlip_{side}_projector_{theirs}",
            f"companion.{side}_projector.{ours}",
            {"0.0": "fc1", "0.1": "bn1", "0.3": "fc2", "1": "bn2"},
        ),
        *_layers(
            f"{side}_{other}_predictor_{theirs}",
            f"companion.{side}_predictor.{ours}",
            {"0": "fc1", "1": "bn1", "3": "fc2"},
        ),
    )
)

_BARLIP: Rules = tuple(
    rule
    for side, _ in _SIDES
    for theirs, ours in _PLACES
    for rule in _layers(
        f"barlip_{side}_projector_{theirs}",
        f"companion.{side}_projector.{ours}",
        {"0": "fc1", "1": "bn1", "3": "fc2", "4": "bn2", "6": "fc3", "7": "bn3"},
    )
)

_PROTOTYPES: Rules = (
    ("swalip_logit_scale", "companion.logit_scale"),
    *_layers("swalip_image_projector", "companion.image_projector", {"0": "fc1", "1": "bn1", "3": "fc2"}),
    *_layers("swalip_text_projector", "companion.text_projector", {"0": "fc1", "1": "bn1", "3": "fc2"}),
    ("image_prototypes.weight_g", "companion.image_prototypes.gain"),
    ("image_prototypes.weight_v", "companion.image_prototypes.direction"),
    ("text_prototypes.weight_g", "companion.text_prototypes.gain"),
    ("text_prototypes.weight_v", "companion.text_prototypes.direction"),
)


_WHOSE = "clip-rocket's models"


def read_clip_rocket(path: Path, *, vision_heads: int | None = None, text_heads: int | None = None) -> ImportedModel:
    """A model of the original implementation from its checkpoint, the arguments it was trained with beside it.

    Heads as in ``config_from_shapes``. Raises ``ValueError`` as ``read_weights``, ``from_clip_rocket`` and
    ``config_from_shapes`` do, and for other projects' files.
    """
    file = read_weights(path)
    require("image_projector.weight" in file.state, str(path), "no image_projector", "a checkpoint of clip-rocket")
    return ImportedModel(
        config=config_from_shapes(shapes_of(file.state), vision_heads=vision_heads, text_heads=text_heads),
        state=from_clip_rocket(file.state),
        arguments=file.arguments,
    )


def to_clip_rocket(model: DualEncoder) -> dict[str, Tensor]:
    """The model's state under clip-rocket's names; the tensors are the model's own.

    Raises ``ValueError`` for a model that clip-rocket does not have (a ``ConvStemViT``).
    """
    rules = (*_TOWERS, *_HEADS, *_companion_rules(model.config.companion))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("momentum.")}
    renamed = rename(state, reversed_rules(rules), "model", _WHOSE)
    return {name: state[old] for name, old in renamed.items()}


def from_clip_rocket(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """clip-rocket's state under this project's names, for ``DualEncoder.load_state_dict``.

    The ``module.`` that DistributedDataParallel puts before every name is taken away where it is there.
    Raises ``ValueError`` for names that clip-rocket does not use, and for a shared head that differs from head z.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    for side, _ in _SIDES:
        shared, own = state.get(f"l2l_{side}_projector.weight"), state.get(f"{side}_projector.weight")
        tied = shared is None or (own is not None and shared.equal(own))
        require(tied, f"l2l_{side}_projector.weight", "another matrix", f"{side}_projector.weight's values")
    renamed = rename(state, (*_TOWERS, *_HEADS, *_SIAMLIP, *_BARLIP, *_PROTOTYPES), "state", _WHOSE)
    return {name: state[old] for name, old in renamed.items()}


def config_from_shapes(shapes: Shapes, *, vision_heads: int | None = None, text_heads: int | None = None) -> CLIPConfig:
    """The configuration of a clip-rocket state, from its names (without ``module.``) and shapes.

    Shapes do not tell the numbers of attention heads: None takes the published models' (12 for ViT-S and ViT-B, 16 for
    ViT-L, one per 64 of the text's width). Nor do they tell dropout and loss constants, which stay at their defaults.
    Raises ``ValueError`` for an unknown tower, or a ViT width not published where ``vision_heads`` is None.
    """
    return CLIPConfig(
        vision=_vision_from_shapes(shapes, vision_heads),
        text=clip_text_config(shapes, heads=text_heads),
        embed_dim=shapes["image_projector.weight"][0],
        h_head=_h_head_from_shapes(shapes),
        companion=_companion_from_shapes(shapes),
    )


def _companion_rules(config: CompanionConfig | None) -> Rules:
    if isinstance(config, SiamLIPConfig):
        return _SIAMLIP
    if isinstance(config, BarLIPConfig):
        return _BARLIP
    return _PROTOTYPES if isinstance(config, SwALIPPrototypesConfig) else ()


def _vision_from_shapes(shapes: Shapes, heads: int | None) -> VisionConfig:
    if "visual.stem.0.weight" in shapes:
        return TimmConfig(name="convnext_tiny")
    if "visual.conv1.weight" in shapes:
        return TimmConfig(name="resnet50")
    require("visual.cls_token" in shapes, "shapes", "an unknown vision tower", "a ViT, ResNet-50 or ConvNeXt-T")
    return timm_vit_config(shapes, heads=heads)


def _h_head_from_shapes(shapes: Shapes) -> HHeadConfig | None:
    if "l2l_image_projector.weight" in shapes:
        return SharedHeadConfig()
    first = shapes.get("l2l_image_projector.layer1.weight")
    return None if first is None else MLPHeadConfig(hidden=first[0])


def _companion_from_shapes(shapes: Shapes) -> CompanionConfig | None:
    if "image_text_predictor_global.0.weight" in shapes:
        predictor_hidden, out = shapes["image_text_predictor_global.0.weight"]
        return SiamLIPConfig(
            hidden=shapes["siamlip_image_projector_global.0.0.weight"][0],
            out=out,
            predictor_hidden=predictor_hidden,
            separate_local="siamlip_image_projector_local.0.0.weight" in shapes,
        )
    if "barlip_image_projector_global.6.weight" in shapes:
        out, hidden = shapes["barlip_image_projector_global.6.weight"]
        separate_local = "barlip_image_projector_local.6.weight" in shapes
        return BarLIPConfig(hidden=hidden, out=out, separate_local=separate_local)
    if "image_prototypes.weight_v" in shapes:
        prototypes, out = shapes["image_prototypes.weight_v"]
        hidden = shapes["swalip_image_projector.0.weight"][0]
        return SwALIPPrototypesConfig(hidden=hidden, out=out, prototypes=prototypes)
    return None
