"""Weights of the original implementation of the recipe (clip-rocket), both ways.

One table holds every name: pairs (theirs, ours), in which ``*`` stands for any text, the same on both sides. The
layouts of the tensors are the same, so that nothing is copied. BYOLIP's averaged encoder is not part of the format:
it is left out on the way there, and absent on the way back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from rocket_fast.errors import require
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
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import TimmConfig, VisionConfig, ViTConfig

Rules = tuple[tuple[str, str], ...]

_TOWERS: Rules = (
    ("positional_embedding", "text.positional_embedding"),
    ("token_embedding.weight", "text.token_embedding.weight"),
    ("transformer.resblocks.*.ln_1.*", "text.blocks.*.norm1.*"),
    ("transformer.resblocks.*.attn.in_proj_*", "text.blocks.*.qkv.*"),
    ("transformer.resblocks.*.attn.out_proj.*", "text.blocks.*.proj.*"),
    ("transformer.resblocks.*.ln_2.*", "text.blocks.*.norm2.*"),
    ("transformer.resblocks.*.mlp.c_fc.*", "text.blocks.*.fc1.*"),
    ("transformer.resblocks.*.mlp.c_proj.*", "text.blocks.*.fc2.*"),
    ("ln_final.*", "text.norm.*"),
    ("visual.cls_token", "visual.cls_token"),
    ("visual.pos_embed", "visual.pos_embed"),
    ("visual.patch_embed.proj.*", "visual.patch_embed.*"),
    ("visual.blocks.*.norm1.*", "visual.blocks.*.norm1.*"),
    ("visual.blocks.*.attn.qkv.*", "visual.blocks.*.qkv.*"),
    ("visual.blocks.*.attn.proj.*", "visual.blocks.*.proj.*"),
    ("visual.blocks.*.norm2.*", "visual.blocks.*.norm2.*"),
    ("visual.blocks.*.mlp.fc1.*", "visual.blocks.*.fc1.*"),
    ("visual.blocks.*.mlp.fc2.*", "visual.blocks.*.fc2.*"),
    ("visual.norm.*", "visual.norm.*"),
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


def to_clip_rocket(model: DualEncoder) -> dict[str, Tensor]:
    """The model's state under clip-rocket's names; the tensors are the model's own.

    Raises ``ValueError`` for a model that clip-rocket does not have (a ``ConvStemViT``).
    """
    rules = (*_TOWERS, *_HEADS, *_companion_rules(model.config.companion))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("momentum.")}
    renamed = _rename(state, tuple((ours, theirs) for theirs, ours in rules), "model")
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
    renamed = _rename(state, (*_TOWERS, *_HEADS, *_SIAMLIP, *_BARLIP, *_PROTOTYPES), "state")
    return {name: state[old] for name, old in renamed.items()}


def config_from_shapes(
    shapes: Mapping[str, Sequence[int]], *, vision_heads: int | None = None, text_heads: int | None = None
) -> CLIPConfig:
    """The configuration of a clip-rocket state, from its names (without ``module.``) and shapes.

    Shapes do not tell the numbers of attention heads: None takes the published models' (12 for ViT-S and ViT-B, 16 for
    ViT-L, one per 64 of the text's width). Nor do they tell dropout and loss constants, which stay at their defaults.
    Raises ``ValueError`` for an unknown tower, or a ViT width not published where ``vision_heads`` is None.
    """
    vocab_size, width = shapes["token_embedding.weight"]
    text = TextConfig(
        vocab_size=vocab_size,
        context_length=shapes["positional_embedding"][0],
        width=width,
        layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
        heads=text_heads or width // 64,
    )
    return CLIPConfig(
        vision=_vision_from_shapes(shapes, vision_heads),
        text=text,
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


def _rename(names: Iterable[str], rules: Rules, argument: str) -> dict[str, str]:
    """New name -> old name, each by the first rule (old, new) that fits."""
    patterns = [(re.compile(re.escape(old).replace(r"\*", "(.+)")), new.replace("*", "{}")) for old, new in rules]
    renamed, unknown = {}, []
    for name in names:
        found = next(((match, new) for pattern, new in patterns if (match := pattern.fullmatch(name))), None)
        if found is None:
            unknown.append(name)
        else:
            renamed[found[1].format(*found[0].groups())] = name
    require(not unknown, argument, unknown, "only names that clip-rocket's models have")
    return renamed


def _count(shapes: Iterable[str], pattern: str) -> int:
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _vision_from_shapes(shapes: Mapping[str, Sequence[int]], heads: int | None) -> VisionConfig:
    if "visual.stem.0.weight" in shapes:
        return TimmConfig(name="convnext_tiny")
    if "visual.conv1.weight" in shapes:
        return TimmConfig(name="resnet50")
    require("visual.cls_token" in shapes, "shapes", "an unknown vision tower", "a ViT, ResNet-50 or ConvNeXt-T")
    width, _, patch_size, _ = shapes["visual.patch_embed.proj.weight"]
    heads = heads or {384: 12, 768: 12, 1024: 16}.get(width)
    require(heads is not None, "vision_heads", None, f"the number of heads of a ViT {width} wide")
    assert heads is not None
    return ViTConfig(
        image_size=patch_size * math.isqrt(shapes["visual.pos_embed"][1] - 1),
        patch_size=patch_size,
        width=width,
        layers=_count(shapes, r"visual\.blocks\.(\d+)\."),
        heads=heads,
        mlp_ratio=shapes["visual.blocks.0.mlp.fc1.weight"][0] / width,
    )


def _h_head_from_shapes(shapes: Mapping[str, Sequence[int]]) -> HHeadConfig | None:
    if "l2l_image_projector.weight" in shapes:
        return SharedHeadConfig()
    first = shapes.get("l2l_image_projector.layer1.weight")
    return None if first is None else MLPHeadConfig(hidden=first[0])


def _companion_from_shapes(shapes: Mapping[str, Sequence[int]]) -> CompanionConfig | None:
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
