"""Models of open_clip and OpenAI: imported from their files, exported to folders that open_clip loads by itself.

Their own ViT keeps its projection as (width, dim), the other way round than ``nn.Linear``, and has no bias in the patch
layer: on the way there the bias goes into the positions. One switch, ``quick_gelu``, decides the activation of both of
open_clip's own towers; timm's towers have their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rocket_fast.errors import InvalidArgument, optional_import, require
from rocket_fast.image_augment import IMAGENET_MEAN, IMAGENET_STD
from rocket_fast.interop.weights import (
    CLIP_TEXT,
    OPENAI_MEAN,
    OPENAI_STD,
    TIMM_VIT,
    ImportedModel,
    Rules,
    Shapes,
    WeightsFile,
    clip_text_config,
    count_blocks,
    positions_with_bias,
    read_weights,
    rename,
    require_linear_head,
    reversed_rules,
    shapes_of,
    write_json,
    write_safetensors,
)
from rocket_fast.models.clip import CLIPConfig, DualEncoder
from rocket_fast.models.text import Activation, TextConfig
from rocket_fast.models.vision import TimmConfig, VisionConfig, ViTConfig

CONFIG_FILE = "open_clip_config.json"
_TIMM_FILE = "timm/config.json"
WEIGHTS_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)

_NATIVE_VIT: Rules = (
    ("visual.class_embedding", "visual.cls_token"),
    ("visual.positional_embedding", "visual.pos_embed"),
    ("visual.conv1.*", "visual.patch_embed.*"),
    ("visual.ln_pre.*", "visual.norm_pre.*"),
    ("visual.transformer.resblocks.*.ln_1.*", "visual.blocks.*.norm1.*"),
    ("visual.transformer.resblocks.*.attn.in_proj_*", "visual.blocks.*.qkv.*"),
    ("visual.transformer.resblocks.*.attn.out_proj.*", "visual.blocks.*.proj.*"),
    ("visual.transformer.resblocks.*.ln_2.*", "visual.blocks.*.norm2.*"),
    ("visual.transformer.resblocks.*.mlp.c_fc.*", "visual.blocks.*.fc1.*"),
    ("visual.transformer.resblocks.*.mlp.c_proj.*", "visual.blocks.*.fc2.*"),
    ("visual.ln_post.*", "visual.norm.*"),
    ("visual.proj", "image_z.weight"),
)
_TEXT: Rules = (*CLIP_TEXT, ("text_projection", "text_z.weight"), ("logit_scale", "logit_scale"))
_TIMM_HEAD: Rules = (("visual.head.proj.weight", "image_z.weight"),)
_NATIVE: Rules = (*_TEXT, *_NATIVE_VIT)
_TIMM: Rules = (
    *_TEXT,
    *_TIMM_HEAD,
    *((theirs.replace("visual.", "visual.trunk.", 1), ours) for theirs, ours in TIMM_VIT),
)
_TIMM_NETWORK: Rules = (*_TEXT, *_TIMM_HEAD, ("visual.trunk.*", "visual.trunk.*"))
_BUFFERS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
_TRANSPOSED = ("visual.proj", "text_projection")

_TIMM_VITS = {
    (192, 3, 16): "vit_tiny_patch16_224",
    (384, 6, 16): "vit_small_patch16_224",
    (384, 6, 32): "vit_small_patch32_224",
    (768, 12, 16): "vit_base_patch16_224",
    (768, 12, 32): "vit_base_patch32_224",
    (1024, 16, 16): "vit_large_patch16_224",
}
"""timm's vision transformers of 224 pixels by width, heads and patch size; all MLPs are 4 times as wide."""


# --- import -----------------------------------------------------------------------------------------------------------


def read_open_clip(path: Path, *, model_name: str | None = None) -> ImportedModel:
    """A model of open_clip: a folder with its configuration, or a weights file and the model's name in open_clip.

    The configuration decides the activation (``ViT-B-32`` has GELU, ``ViT-B-32-quickgelu`` QuickGELU). A file's pixels
    are taken to be normalised as OpenAI's, open_clip's default. Raises ``ValueError`` for what this project's towers do
    not hold, naming it, and as ``read_weights`` does.
    """
    if path.is_dir():
        require(model_name is None, "model_name", model_name, f"None: {path} has its own configuration")
        document = json.loads(_file_in(path, CONFIG_FILE).read_text())
        model, pixels = document.get("model_cfg", document), document.get("preprocess_cfg", {})
        path, folder = _file_in(path, *WEIGHTS_FILES), path
    else:
        require(model_name is not None, "model_name", None, "the model's name in open_clip: weights do not tell GELUs")
        model, pixels, folder = optional_import("open_clip", "eval").get_model_config(model_name), {}, None
        require(model is not None, "model_name", model_name, "a name that open_clip.list_models() has")
    state = _plain_names(read_weights(path).state)
    _require_settings("model_cfg", model)
    vision, rules = _vision(model, folder)
    text = _text(model["text_cfg"], quick_gelu=bool(model.get("quick_gelu")))
    return ImportedModel(
        config=CLIPConfig(vision=vision, text=text, embed_dim=model["embed_dim"], h_head=None),
        state=_renamed(state, rules, model["embed_dim"]),
        mean=tuple(pixels.get("mean", OPENAI_MEAN)),
        std=tuple(pixels.get("std", OPENAI_STD)),
    )


def read_openai(path: Path) -> ImportedModel:
    """A ViT of OpenAI's, from the published TorchScript archive or a state dict of it: QuickGELU, 64 wide heads.

    Raises ``ValueError`` for a ResNet, whose attention pooling no tower here has, and as ``read_weights`` does.
    """
    return openai_model(read_weights(path))


def openai_model(file: WeightsFile) -> ImportedModel:
    """The model in a file already read; see ``read_openai``."""
    state = _plain_names(file.state)
    shapes = shapes_of(state)
    attention_pool = any(name.startswith("visual.attnpool.") for name in shapes)
    require(not attention_pool, "visual", "a ResNet with attention pooling", "a ViT: no tower here pools by attention")
    require("visual.proj" in shapes, "state", "no visual.proj", "a ViT of OpenAI's")
    text = clip_text_config(shapes)
    return ImportedModel(
        config=CLIPConfig(
            vision=_native_vit_from_shapes(shapes),
            text=text,
            embed_dim=shapes["text_projection"][1],
            h_head=None,
        ),
        state=_renamed(state, _NATIVE, shapes["text_projection"][1]),
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
    )


def _file_in(folder: Path, *names: str) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    require(found is not None, str(folder), "none of them", " or ".join(names))
    assert found is not None
    return found


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's models with ``custom_text`` have the text tower under ``text.``; buffers are left out."""
    names = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in names.items() if name not in _BUFFERS}


def _renamed(state: Mapping[str, Tensor], rules: Rules, embed_dim: int) -> dict[str, Tensor]:
    renamed = {}
    for name, old in rename(state, rules, "state", "the models of open_clip that can be held here").items():
        tensor = state[old].T.contiguous() if old in _TRANSPOSED else state[old]
        shape = {"visual.cls_token": (1, 1, -1), "logit_scale": ()}.get(name)
        tensor = tensor if shape is None else tensor.reshape(shape)
        renamed[name] = tensor[None] if old == "visual.positional_embedding" else tensor
    for side in ("image_z", "text_z"):
        renamed.setdefault(f"{side}.weight", torch.eye(embed_dim))  # a tower without projection
    return renamed


def _native_vit_from_shapes(shapes: Shapes) -> ViTConfig:
    width, _, patch_size, _ = shapes["visual.conv1.weight"]
    return ViTConfig(
        image_size=patch_size * math.isqrt(shapes["visual.positional_embedding"][0] - 1),
        patch_size=patch_size,
        width=width,
        layers=count_blocks(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
        heads=width // 64,
        mlp_ratio=shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0] / width,
        activation="quick_gelu",
        norm_pre=True,
        patch_bias=False,
        norm_eps=1e-5,
    )


_CUSTOM_BLOCKS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
_OFF = ("ls_init_value", "act_kwargs", "output_tokens", "block_type", *_CUSTOM_BLOCKS)
_FREE: dict[str, tuple[str, ...]] = {
    "model_cfg": (
        *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"),
        *("init_logit_scale", "nonscalar_logit_scale", "output_dict"),
    ),
    "vision_cfg": (
        *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "no_ln_pre", "norm_kwargs"),
        *("patch_dropout", "pos_embed_type", "attn_pooler_queries", "attn_pooler_heads", "final_ln_after_pool"),
        *("timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path", "timm_model_pretrained"),
    ),
    "text_cfg": (
        *("context_length", "vocab_size", "width", "heads", "layers", "proj_type", "pad_id", "eos_id"),
        *("final_ln_after_pool", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    ),
}
"""open_clip's settings that may have any value: those that are read here, and those that change no result."""

_FIXED: dict[str, dict[str, Any]] = {
    "model_cfg": dict.fromkeys(("multimodal_cfg", "init_logit_bias")),
    "vision_cfg": {"pool_type": "tok", **dict.fromkeys(("timm_model_name", "attentional_pool", *_OFF))},
    "text_cfg": {
        "pool_type": "argmax",
        "mlp_ratio": 4,
        **dict.fromkeys(("hf_model_name", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "embed_cls")),
        **dict.fromkeys(("no_causal_mask", "proj_bias", "norm_kwargs", *_OFF)),
    },
}
"""Settings that have one value here; None: they are off."""


def _require_settings(where: str, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        fixed = _FIXED[where].get(name)
        if name not in _FREE[where] and (value or fixed):
            require(
                name in _FIXED[where] and value == fixed, f"{where}.{name}", value, f"{fixed!r}, as all towers here"
            )


def _text(settings: Mapping[str, Any], *, quick_gelu: bool) -> TextConfig:
    settings = {name: value for name, value in settings.items() if (name, value) != ("norm_kwargs", {"eps": 1e-5})}
    _require_settings("text_cfg", settings)
    return TextConfig(
        vocab_size=settings.get("vocab_size", 49408),
        context_length=settings.get("context_length", 77),
        width=settings.get("width", 512),
        layers=settings.get("layers", 12),
        heads=settings.get("heads", 8),
        activation="quick_gelu" if quick_gelu else "gelu",
    )


def _vision(model: Mapping[str, Any], folder: Path | None) -> tuple[VisionConfig, Rules]:
    settings = model["vision_cfg"]
    if settings.get("timm_model_name"):
        return _timm_vision(settings, folder)
    layers, size = settings.get("layers", 12), settings.get("image_size", 224)
    resnet = "a ResNet with attention pooling"
    require(isinstance(layers, int), "visual", resnet, "a ViT: no tower here pools by attention")
    _require_settings("vision_cfg", settings)
    size = size if isinstance(size, int) or size[0] != size[1] else size[0]
    require(isinstance(size, int), "image_size", size, "square pictures")
    norm = settings.get("norm_kwargs") or {}
    require(set(norm) <= {"eps"}, "norm_kwargs", norm, "eps at most")
    width = settings.get("width", 768)
    return ViTConfig(
        image_size=size,
        patch_size=settings.get("patch_size", 16),
        width=width,
        layers=layers,
        heads=width // settings.get("head_width", 64),
        mlp_ratio=int(width * settings.get("mlp_ratio", 4.0)) / width,
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        norm_pre=not settings.get("no_ln_pre", False),
        patch_bias=False,
        norm_eps=norm.get("eps", 1e-5),
    ), _NATIVE


def _timm_vision(settings: Mapping[str, Any], folder: Path | None) -> tuple[VisionConfig, Rules]:
    name, pool, projection = settings["timm_model_name"], settings.get("timm_pool"), settings.get("timm_proj")
    network = name in ("resnet50", "convnext_tiny")
    vision: VisionConfig = TimmConfig(name=name) if network else _timm_vit(name, folder)
    pools = ("avg", "", None) if network else ("token", "")  # open_clip's default is avg
    require(pool in pools, "timm_pool", pool or "avg", f"{pools[0]}: no such tower here pools otherwise")
    projection = "linear" if projection is None and "timm_proj" not in settings else projection
    require(projection in ("linear", "none"), "timm_proj", projection, "linear or none: a head here is one matrix")
    bias = settings.get("timm_proj_bias", False)
    require(not bias, "timm_proj_bias", bias, "False: head z has no bias")
    return vision, _TIMM_NETWORK if network else _TIMM


def _timm_vit(name: str, folder: Path | None) -> ViTConfig:
    if name.startswith("local-dir:") and folder is not None and (folder / _TIMM_FILE).is_file():
        name = f"local-dir:{(folder / _TIMM_FILE).parent}"  # the folder may have moved since it was written
    timm = optional_import("timm", "train")
    with torch.device("meta"):
        trunk = timm.create_model(name, pretrained=False, num_classes=0)
    plain = type(trunk) is timm.models.VisionTransformer and trunk.has_class_token and trunk.num_prefix_tokens == 1
    expected = "a vision_transformer of timm's with a class token, resnet50 or convnext_tiny"
    require(plain and not trunk.no_embed_class, "timm_model_name", name, expected)
    block = trunk.blocks[0]
    activations: dict[type, Activation] = {nn.GELU: "gelu", timm.layers.QuickGELU: "quick_gelu"}
    kind = type(block.mlp.act)
    require(kind in activations, "timm_model_name", name, f"a network with GELU or QuickGELU, not {kind.__name__}")
    return ViTConfig(
        image_size=trunk.patch_embed.img_size[0],
        patch_size=trunk.patch_embed.patch_size[0],
        width=trunk.embed_dim,
        layers=len(trunk.blocks),
        heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / trunk.embed_dim,
        activation=activations[kind],
        norm_pre=not isinstance(trunk.norm_pre, nn.Identity),
        patch_bias=trunk.patch_embed.proj.bias is not None,
        norm_eps=trunk.norm.eps,
    )


# --- export -----------------------------------------------------------------------------------------------------------


def write_open_clip(model: DualEncoder, folder: Path, *, head: str = "z", image_size: int = 224) -> list[Path]:
    """Write the files that ``open_clip.create_model_and_transforms(f"local-dir:{folder}")`` loads.

    They hold the model through head z. Vision transformers become open_clip's own where both towers have one
    activation, else timm's; a ViT that timm has no name for is described in ``timm/config.json``, whose absolute path
    the configuration holds (timm 1.0.20 reads it): write it again, or change the path, after moving the folder.
    ``image_size`` is read for convolutional networks only, which do not fix it.

    Raises ``ValueError``, with the reason, for what open_clip's classes do not hold: an MLP head, a ``ConvStemViT``.
    """
    require_linear_head(model, head, "open_clip's models")
    state = dict(model.state_dict())
    own = ("visual.", "text.", "image_z.", "text_z.", "logit_scale")
    state = {name: tensor for name, tensor in state.items() if name.startswith(own)}
    settings, rules = _vision_settings(model.config, folder, image_size)
    if rules is _NATIVE:
        state["visual.pos_embed"] = positions_with_bias(state)
        state.pop("visual.patch_embed.bias", None)
    names = rename(state, reversed_rules(rules), "model", "open_clip's models")
    theirs = {name: state[old].T if name in _TRANSPOSED else state[old] for name, old in names.items()}
    if rules is _NATIVE:
        theirs["visual.class_embedding"] = theirs["visual.class_embedding"].flatten()
        theirs["visual.positional_embedding"] = theirs["visual.positional_embedding"][0]
    text = model.config.text
    document = {
        "model_cfg": {
            "embed_dim": model.config.embed_dim,
            "quick_gelu": text.activation == "quick_gelu",
            "vision_cfg": settings,
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": text.vocab_size,
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
            },
        },
        "preprocess_cfg": {
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    write_safetensors(folder / WEIGHTS_FILES[0], theirs)
    write_json(folder / CONFIG_FILE, document)
    own_timm = settings.get("timm_model_name", "").startswith("local-dir:")
    return [folder / name for name in (WEIGHTS_FILES[0], CONFIG_FILE, *([_TIMM_FILE] if own_timm else []))]


def _vision_settings(config: CLIPConfig, folder: Path, image_size: int) -> tuple[dict[str, Any], Rules]:
    vision = config.vision
    if isinstance(vision, TimmConfig):
        pooled = {"timm_pool": "avg", "timm_proj": "linear", "image_size": image_size}
        return {"timm_model_name": vision.name, **pooled}, _TIMM_NETWORK
    if not isinstance(vision, ViTConfig):
        raise InvalidArgument(
            f"vision: got {type(vision).__name__}, which no class of open_clip holds, expected a ViT, resnet50 or "
            "convnext_tiny. Export to safetensors: rocket_fast.interop.open_clip.load_exported reads that for "
            "open_clip's evaluation"
        )
    if vision.activation == config.text.activation:
        return _native_settings(vision), _NATIVE
    timms = vision.activation == "gelu" and vision.patch_bias and not vision.norm_pre and vision.norm_eps == 1e-6
    require(timms, "vision", vision, "the text tower's activation, or a ViT as timm's are: GELU, no norm_pre, eps 1e-6")
    return _timm_settings(vision, folder), _TIMM


def _native_settings(vision: ViTConfig) -> dict[str, Any]:
    hidden = round(vision.width * vision.mlp_ratio)
    settings: dict[str, Any] = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "width": vision.width,
        "layers": vision.layers,
        "head_width": vision.width // vision.heads,
        "mlp_ratio": hidden / vision.width,
        "no_ln_pre": not vision.norm_pre,
    }
    if int(vision.width * settings["mlp_ratio"]) != hidden:  # open_clip rounds down
        settings["mlp_ratio"] = (hidden + 0.5) / vision.width
    return settings if vision.norm_eps == 1e-5 else settings | {"norm_kwargs": {"eps": vision.norm_eps}}


def _timm_settings(vision: ViTConfig, folder: Path) -> dict[str, Any]:
    name = _TIMM_VITS.get((vision.width, vision.heads, vision.patch_size))
    depth = 24 if name == "vit_large_patch16_224" else 12
    if name is None or (vision.image_size, vision.layers, vision.mlp_ratio) != (224, depth, 4.0):
        arguments = {
            "img_size": vision.image_size,
            "patch_size": vision.patch_size,
            "embed_dim": vision.width,
            "depth": vision.layers,
            "num_heads": vision.heads,
            "mlp_ratio": vision.mlp_ratio,
        }
        document = {
            "architecture": "vit_base_patch16_224",
            "pretrained_cfg": {"num_classes": 0},
            "model_args": arguments,
        }
        write_json(folder / _TIMM_FILE, document)
        name = f"local-dir:{(folder / _TIMM_FILE).parent.resolve()}"
    pooled = {"timm_pool": "token", "timm_proj": "linear", "image_size": vision.image_size}
    return {"timm_model_name": name, "timm_model_pretrained": False, **pooled}
