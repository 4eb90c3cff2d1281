"""Models of Hugging Face's transformers: ``CLIPModel`` both ways, ``VisionTextDualEncoderModel`` on the way there.

A ViT with a norm before its blocks is ``CLIPModel``'s; one without is ``ViTModel``, beside ``CLIPTextModel`` in a
``VisionTextDualEncoderModel``. Both keep q, k and v apart. The files are written under the names that transformers 4
and 5 read; transformers itself is not needed. (In transformers 4 the latter class's ``get_text_features`` hands
``CLIPTextModel`` an argument that it does not take; 5 has mended that.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rocket_fast.errors import InvalidArgument, require
from rocket_fast.image_augment import IMAGENET_MEAN, IMAGENET_STD
from rocket_fast.interop.weights import (
    OPENAI_MEAN,
    OPENAI_STD,
    ImportedModel,
    Rules,
    positions_with_bias,
    read_weights,
    rename,
    require_linear_head,
    reversed_rules,
    write_json,
    write_safetensors,
)
from rocket_fast.models.clip import CLIPConfig, DualEncoder
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import ViTConfig

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")


def _clip_blocks(theirs: str, ours: str) -> Rules:
    names = {
        "self_attn.qkv": "qkv",
        "self_attn.out_proj": "proj",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "mlp.fc1": "fc1",
        "mlp.fc2": "fc2",
    }
    return tuple((f"{theirs}.encoder.layers.*.{name}.*", f"{ours}.blocks.*.{own}.*") for name, own in names.items())


def _text_rules(model: str) -> Rules:
    return (
        (f"{model}.embeddings.token_embedding.weight", "text.token_embedding.weight"),
        (f"{model}.embeddings.position_embedding.weight", "text.positional_embedding"),
        *_clip_blocks(model, "text"),
        (f"{model}.final_layer_norm.*", "text.norm.*"),
    )


_HEADS: Rules = (
    ("text_projection.weight", "text_z.weight"),
    ("visual_projection.weight", "image_z.weight"),
    ("logit_scale", "logit_scale"),
)
_CLIP: Rules = (
    *_text_rules("text_model"),
    *_HEADS,
    ("vision_model.embeddings.class_embedding", "visual.cls_token"),
    ("vision_model.embeddings.patch_embedding.*", "visual.patch_embed.*"),
    ("vision_model.embeddings.position_embedding.weight", "visual.pos_embed"),
    ("vision_model.pre_layrnorm.*", "visual.norm_pre.*"),
    *_clip_blocks("vision_model", "visual"),
    ("vision_model.post_layernorm.*", "visual.norm.*"),
)
_VIT: Rules = (
    *_text_rules("text_model.text_model"),  # CLIPTextModel was a shell around another class before transformers 5
    *_HEADS,
    ("vision_model.embeddings.cls_token", "visual.cls_token"),
    ("vision_model.embeddings.patch_embeddings.projection.*", "visual.patch_embed.*"),
    ("vision_model.embeddings.position_embeddings", "visual.pos_embed"),
    ("vision_model.encoder.layer.*.layernorm_before.*", "visual.blocks.*.norm1.*"),
    ("vision_model.encoder.layer.*.attention.attention.qkv.*", "visual.blocks.*.qkv.*"),
    ("vision_model.encoder.layer.*.attention.output.dense.*", "visual.blocks.*.proj.*"),
    ("vision_model.encoder.layer.*.layernorm_after.*", "visual.blocks.*.norm2.*"),
    ("vision_model.encoder.layer.*.intermediate.dense.*", "visual.blocks.*.fc1.*"),
    ("vision_model.encoder.layer.*.output.dense.*", "visual.blocks.*.fc2.*"),
    ("vision_model.layernorm.*", "visual.norm.*"),
)
_CLIP_QKV = ("self_attn.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
_VIT_QKV = ("attention.attention.qkv", tuple(f"attention.attention.{part}" for part in ("query", "key", "value")))
_RESAMPLE_BICUBIC = 3  # PIL's number


# --- import -----------------------------------------------------------------------------------------------------------


def read_hf(folder: Path) -> ImportedModel:
    """The model in a folder of ``CLIPModel.save_pretrained``; each tower's ``hidden_act`` is its activation.

    Raises ``ValueError`` for other classes' folders and for settings that no tower here has, and as ``read_weights``.
    """
    path = folder / "config.json"
    require(path.is_file(), str(folder), "no config.json", "a folder of CLIPModel.save_pretrained")
    document = json.loads(path.read_text())
    kind = document.get("model_type")
    require(kind == "clip", "model_type", kind, "clip: no other class of transformers is known to be held exactly")
    vision, text = document["vision_config"], document["text_config"]
    files = sorted(folder.glob("model-*-of-*.safetensors"))
    files = files or [folder / name for name in WEIGHTS_FILES if (folder / name).is_file()][:1]
    require(len(files) > 0, str(folder), "no weights", " or ".join(WEIGHTS_FILES))
    theirs = {name: tensor for file in files for name, tensor in read_weights(file).state.items()}
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith("position_ids")}
    pixels_file = folder / "preprocessor_config.json"
    pixels = json.loads(pixels_file.read_text()) if pixels_file.is_file() else {}
    return ImportedModel(
        config=CLIPConfig(
            vision=_vision_config(vision),
            text=_text_config(text),
            embed_dim=document.get("projection_dim", 512),
            h_head=None,
        ),
        state=_ours(theirs),
        mean=tuple(pixels.get("image_mean", OPENAI_MEAN)),
        std=tuple(pixels.get("image_std", OPENAI_STD)),
    )


def _vision_config(settings: Mapping[str, Any]) -> ViTConfig:
    """``CLIPVisionConfig``; what a file does not say has that class's default (ViT-B/32)."""
    width, channels = settings.get("hidden_size", 768), settings.get("num_channels", 3)
    require(channels == 3, "num_channels", channels, "3")
    return ViTConfig(
        image_size=settings.get("image_size", 224),
        patch_size=settings.get("patch_size", 32),
        width=width,
        layers=settings.get("num_hidden_layers", 12),
        heads=settings.get("num_attention_heads", 12),
        mlp_ratio=settings.get("intermediate_size", 3072) / width,
        activation=settings.get("hidden_act", "quick_gelu"),
        norm_pre=True,
        patch_bias=False,
        norm_eps=settings.get("layer_norm_eps", 1e-5),
    )


def _text_config(settings: Mapping[str, Any]) -> TextConfig:
    """``CLIPTextConfig``; what a file does not say has that class's default."""
    width, vocab_size = settings.get("hidden_size", 512), settings.get("vocab_size", 49408)
    hidden, eps = settings.get("intermediate_size", 2048), settings.get("layer_norm_eps", 1e-5)
    require(hidden == 4 * width, "text_config.intermediate_size", hidden, f"4 times hidden_size = {width}")
    require(eps == 1e-5, "text_config.layer_norm_eps", eps, "1e-5, as all text towers here")
    end = settings.get("eos_token_id", 49407)
    largest = f"{vocab_size - 1} (or 2, its old name): end of text is the largest id here"
    require(end in (2, vocab_size - 1), "text_config.eos_token_id", end, largest)
    return TextConfig(
        vocab_size=vocab_size,
        context_length=settings.get("max_position_embeddings", 77),
        width=width,
        layers=settings.get("num_hidden_layers", 12),
        heads=settings.get("num_attention_heads", 8),
        activation=settings.get("hidden_act", "quick_gelu"),
    )


def _ours(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    joined, parts = _CLIP_QKV
    state = {name: tensor for name, tensor in theirs.items() if not any(part in name for part in parts)}
    for name, query in theirs.items():
        if parts[0] in name:
            rest = [theirs[name.replace(parts[0], part)] for part in parts[1:]]
            state[name.replace(parts[0], joined)] = torch.cat([query, *rest])
    state = {name: state[old] for name, old in rename(state, _CLIP, "state", "CLIPModel").items()}
    state["visual.cls_token"] = state["visual.cls_token"].reshape(1, 1, -1)
    state["visual.pos_embed"] = state["visual.pos_embed"][None]
    state["logit_scale"] = state["logit_scale"].reshape(())
    return state


# --- export -----------------------------------------------------------------------------------------------------------


def write_hf(model: DualEncoder, folder: Path, *, head: str = "z") -> list[Path]:
    """Write the files that ``from_pretrained`` of the class that is this model reads: see the module's description.

    Pixels are prepared by ``CLIPImageProcessor`` as the folder says, ids made by CLIP's tokenizer (not written).
    Raises ``ValueError``, with the reason, for an MLP head and for towers that are no ViT.
    """
    whose = "the classes of transformers"
    require_linear_head(model, head, whose)
    vision, state = model.config.vision, dict(model.state_dict())
    if not isinstance(vision, ViTConfig):
        raise InvalidArgument(
            f"vision: got {type(vision).__name__}, expected a ViT: no class of transformers pairs another tower of "
            "this project with CLIP's text tower exactly. Export to safetensors, onnx or torch"
        )
    own = ("visual.", "text.", "image_z.", "text_z.", "logit_scale")
    state = {name: tensor for name, tensor in state.items() if name.startswith(own)}
    rules, document = (_CLIP, _clip_document(model)) if vision.norm_pre else (_VIT, _dual_document(model))
    if vision.norm_pre:
        state["visual.pos_embed"] = positions_with_bias(state)[0]
        state["visual.cls_token"] = state["visual.cls_token"].flatten()
        state.pop("visual.patch_embed.bias", None)
    elif not vision.patch_bias:
        state["visual.patch_embed.bias"] = torch.zeros(vision.width)
    names = rename(state, reversed_rules(rules), "model", whose)
    theirs = _split(_split({name: state[old] for name, old in names.items()}, *_CLIP_QKV), *_VIT_QKV)
    if not vision.norm_pre:  # ViTModel's pooler has one more layer, which shall do nothing
        theirs["vision_model.pooler.dense.weight"] = torch.eye(vision.width)
        theirs["vision_model.pooler.dense.bias"] = torch.zeros(vision.width)
    write_safetensors(folder / WEIGHTS_FILES[0], theirs)
    write_json(folder / "config.json", document)
    write_json(folder / "preprocessor_config.json", _pixels(vision.image_size))
    return [folder / name for name in (WEIGHTS_FILES[0], "config.json", "preprocessor_config.json")]


def _split(state: Mapping[str, Tensor], joined: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """q, k and v apart."""
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        pieces = tensor.chunk(3) if joined in name else [tensor]
        apart |= {name.replace(joined, part): piece for part, piece in zip(parts, pieces, strict=False)}
    return apart


def _text_document(text: TextConfig) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "hidden_act": text.activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": text.vocab_size - 2,
        "eos_token_id": text.vocab_size - 1,
        "pad_token_id": text.vocab_size - 1,
    }


def _vision_document(vision: ViTConfig) -> dict[str, Any]:
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "hidden_size": vision.width,
        "intermediate_size": round(vision.width * vision.mlp_ratio),
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.norm_eps,
    }


def _clip_document(model: DualEncoder) -> dict[str, Any]:
    config, dim = model.config, model.config.embed_dim
    assert isinstance(config.vision, ViTConfig)
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": dim,
        "text_config": _text_document(config.text) | {"projection_dim": dim},
        "vision_config": _vision_document(config.vision) | {"model_type": "clip_vision_model", "projection_dim": dim},
    }


def _dual_document(model: DualEncoder) -> dict[str, Any]:
    config = model.config
    assert isinstance(config.vision, ViTConfig)
    vision = {"model_type": "vit", "qkv_bias": True, "pooler_act": "linear", "pooler_output_size": config.vision.width}
    return {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": "vision-text-dual-encoder",
        "projection_dim": config.embed_dim,
        "text_config": _text_document(config.text),
        "vision_config": _vision_document(config.vision) | vision,
    }


def _pixels(size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _RESAMPLE_BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
