"""What all formats share: files read without running code, names turned by tables, and what an import gives.

A table holds pairs (theirs, ours), in which ``*`` stands for any text, the same on both sides; the first that fits a
name counts.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rocket_fast.errors import InvalidArgument, optional_import, require
from rocket_fast.files import write_atomically
from rocket_fast.image_augment import IMAGENET_MEAN, IMAGENET_STD
from rocket_fast.models.clip import CLIPConfig, DualEncoder
from rocket_fast.models.heads import MLPHeadConfig
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import ViTConfig

Rules = tuple[tuple[str, str], ...]
Shapes = Mapping[str, Sequence[int]]
Colours = tuple[float, float, float]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of the pixels (0 to 1) that OpenAI's models and most of their kin take."""

CLIP_TEXT: Rules = (
    ("positional_embedding", "text.positional_embedding"),
    ("token_embedding.weight", "text.token_embedding.weight"),
    ("transformer.resblocks.*.ln_1.*", "text.blocks.*.norm1.*"),
    ("transformer.resblocks.*.attn.in_proj_*", "text.blocks.*.qkv.*"),
    ("transformer.resblocks.*.attn.out_proj.*", "text.blocks.*.proj.*"),
    ("transformer.resblocks.*.ln_2.*", "text.blocks.*.norm2.*"),
    ("transformer.resblocks.*.mlp.c_fc.*", "text.blocks.*.fc1.*"),
    ("transformer.resblocks.*.mlp.c_proj.*", "text.blocks.*.fc2.*"),
    ("ln_final.*", "text.norm.*"),
)
"""CLIP's text tower, under the names it has nearly everywhere."""

TIMM_VIT: Rules = (
    ("visual.cls_token", "visual.cls_token"),
    ("visual.pos_embed", "visual.pos_embed"),
    ("visual.patch_embed.proj.*", "visual.patch_embed.*"),
    ("visual.norm_pre.*", "visual.norm_pre.*"),
    ("visual.blocks.*.norm1.*", "visual.blocks.*.norm1.*"),
    ("visual.blocks.*.attn.qkv.*", "visual.blocks.*.qkv.*"),
    ("visual.blocks.*.attn.proj.*", "visual.blocks.*.proj.*"),
    ("visual.blocks.*.norm2.*", "visual.blocks.*.norm2.*"),
    ("visual.blocks.*.mlp.fc1.*", "visual.blocks.*.fc1.*"),
    ("visual.blocks.*.mlp.fc2.*", "visual.blocks.*.fc2.*"),
    ("visual.norm.*", "visual.norm.*"),
)
"""timm's vision transformers."""


# --- names and shapes -------------------------------------------------------------------------------------------------


def rename(names: Iterable[str], rules: Rules, argument: str, whose: str) -> dict[str, str]:
    """New name -> old name, each by the first rule (old, new) that fits; ``ValueError`` where none does."""
    patterns = [(re.compile(re.escape(old).replace(r"\*", "(.+)")), new.replace("*", "{}")) for old, new in rules]
    renamed, unknown = {}, []
    for name in names:
        found = next(((match, new) for pattern, new in patterns if (match := pattern.fullmatch(name))), None)
        if found is None:
            unknown.append(name)
        else:
            renamed[found[1].format(*found[0].groups())] = name
    require(not unknown, argument, unknown, f"only names that {whose} have")
    return renamed


def reversed_rules(rules: Rules) -> Rules:
    """The table for the way back."""
    return tuple((ours, theirs) for theirs, ours in rules)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """How many different numbers a pattern with one group finds at the beginning of the names."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def clip_text_config(shapes: Shapes, *, heads: int | None = None) -> TextConfig:
    """The text tower, with QuickGELU, of a state with ``CLIP_TEXT``'s names; ``heads`` None: 1 per 64 of the width."""
    require("token_embedding.weight" in shapes, "state", "no text tower", "a model of images and texts")
    vocab_size, width = shapes["token_embedding.weight"]
    return TextConfig(
        vocab_size=vocab_size,
        context_length=shapes["positional_embedding"][0],
        width=width,
        layers=count_blocks(shapes, r"transformer\.resblocks\.(\d+)\."),
        heads=heads or width // 64,
    )


def timm_vit_config(shapes: Shapes, *, heads: int | None = None) -> ViTConfig:
    """The ViT of a state with ``TIMM_VIT``'s names; ``heads`` None takes SLIP's: 12 for ViT-S and -B, 16 for ViT-L."""
    width, _, patch_size, _ = shapes["visual.patch_embed.proj.weight"]
    heads = heads or {384: 12, 768: 12, 1024: 16}.get(width)
    require(heads is not None, "vision_heads", None, f"the number of heads of a ViT {width} wide")
    assert heads is not None
    return ViTConfig(
        image_size=patch_size * math.isqrt(shapes["visual.pos_embed"][1] - 1),
        patch_size=patch_size,
        width=width,
        layers=count_blocks(shapes, r"visual\.blocks\.(\d+)\."),
        heads=heads,
        mlp_ratio=shapes["visual.blocks.0.mlp.fc1.weight"][0] / width,
    )


# --- imports ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """Another project's model as this one holds it; the constructor checks that the state is the configuration's.

    ``mean``, ``std``: how the model wants its pixels. ``notes``: what was left out, in words. ``arguments``: how it
    was trained, as its file says.
    """

    config: CLIPConfig
    state: dict[str, Tensor]
    mean: Colours = IMAGENET_MEAN
    std: Colours = IMAGENET_STD
    notes: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with torch.device("meta"):
            expected = shapes_of(DualEncoder(self.config).state_dict())
        got = shapes_of(self.state)
        wrong = [f"{name} {got.get(name)} for {shape}" for name, shape in expected.items() if got.get(name) != shape]
        wrong += [f"{name} {got[name]} for None" for name in got.keys() - expected.keys()]
        require(not wrong, "state", wrong, f"the parameters of {self.config}")

    def build(self) -> DualEncoder:
        """The model, in evaluation mode."""
        model = DualEncoder(self.config)
        model.load_state_dict(self.state)
        return model.eval()

    def for_imagenet(self) -> ImportedModel:
        """The same model for pixels normalised with ImageNet's mean and std, as everything in this project is.

        What the other normalisation differs by goes into the patch layer's weights and bias. Raises ``ValueError``
        where that is not exact: for convolutions that pad.
        """
        if (self.mean, self.std) == (IMAGENET_MEAN, IMAGENET_STD):
            return self
        vision = self.config.vision
        if not isinstance(vision, ViTConfig):
            raise InvalidArgument(
                f"mean, std: got {self.mean}, {self.std}, expected ImageNet's for a convolutional network: "
                "its first layer pads with zeros, so that no weights make up for another normalisation"
            )
        weight_DCHW = self.state["visual.patch_embed.weight"].double()
        mean_C, std_C, own_mean_C, own_std_C = (
            torch.tensor(colours, dtype=torch.float64) for colours in (self.mean, self.std, IMAGENET_MEAN, IMAGENET_STD)
        )
        bias_D = torch.einsum("dchw,c->d", weight_DCHW, (own_mean_C - mean_C) / std_C)
        if vision.patch_bias:
            bias_D += self.state["visual.patch_embed.bias"]
        weight_DCHW = weight_DCHW * (own_std_C / std_C)[:, None, None]
        patch = {"visual.patch_embed.weight": weight_DCHW.float(), "visual.patch_embed.bias": bias_D.float()}
        config = replace(self.config, vision=replace(vision, patch_bias=True))
        return replace(self, config=config, state=self.state | patch, mean=IMAGENET_MEAN, std=IMAGENET_STD)


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A file's tensors, in float32 and without DistributedDataParallel's ``module.``, and what lay beside them."""

    state: dict[str, Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)
    scripted: bool = False
    """Whether it is a TorchScript archive, as OpenAI publishes."""


def read_weights(path: Path) -> WeightsFile:
    """Read safetensors, a TorchScript archive, or a pickle of a state dict, alone or under ``state_dict``.

    Pickles are read without running code: tensors, builtins, ``argparse.Namespace`` and numpy's scalars are admitted.
    Raises ``ValueError``: no such file, damage, or anything else in a pickle, by name.
    """
    require(path.is_file(), "file", str(path), "an existing file")
    if path.suffix == ".safetensors":
        load = optional_import("safetensors.torch", "train").load_file
        return WeightsFile(state=_tensors(_reading(path, load), path))
    if _is_scripted(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch no longer likes the format; the files stay
            module = _reading(path, lambda file: torch.jit.load(file, map_location="cpu"))
        return WeightsFile(state=_tensors(module.state_dict(), path), scripted=True)
    content = _reading(path, _load_pickle)
    require(isinstance(content, dict), str(path), type(content).__name__, "a dictionary of tensors")
    arguments = content.get("args")
    return WeightsFile(
        state=_tensors(content.get("state_dict", content), path),
        arguments=vars(arguments) if isinstance(arguments, argparse.Namespace) else {},
    )


def _load_pickle(path: Path) -> Any:
    with torch.serialization.safe_globals(list(_plain_globals())):
        return torch.load(path, map_location="cpu", weights_only=True)


def _plain_globals() -> Iterator[Any]:
    """What a pickle may name beside torch's own list; numpy has moved its scalars' maker, files name either place."""
    yield argparse.Namespace
    scalar = np.float64(0).__reduce__()[0]
    yield from ((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))
    yield np.dtype
    yield from {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"}


def _reading(path: Path, load: Any) -> Any:
    try:
        return load(path)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise InvalidArgument(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
        raise InvalidArgument(
            f"{path}: got {found[1]} in the pickle, expected tensors and plain values only: reading anything else may "
            "run code. If you trust the file, load it yourself and save its state dict and plain arguments again"
        ) from error
    except Exception as error:  # whatever a damaged file makes of the reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidArgument(f"{path}: cannot be read ({reason})") from error


def _is_scripted(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    tensors = isinstance(state, dict) and len(state) > 0 and all(isinstance(each, Tensor) for each in state.values())
    require(tensors, str(path), "something else", "a state dict: tensors by name")
    return {
        name.removeprefix("module."): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


# --- exports ----------------------------------------------------------------------------------------------------------


def require_linear_head(model: DualEncoder, head: str, whose: str) -> None:
    """Refuse head h, an MLP with batch norms, for classes that project linearly."""
    h_is_z = not isinstance(model.config.h_head, MLPHeadConfig)
    expected = (
        f"z: {whose} project with one matrix, and head h is an MLP with batch norms. To have h or both, export to "
        "safetensors, which rocket_fast.interop.open_clip.load_exported reads for open_clip's evaluation, onnx or torch"
    )
    require(head == "z" or h_is_z, "head", head, expected)


def positions_with_bias(state: Mapping[str, Tensor]) -> Tensor:
    """The ViT's positions (1, L, D) with the patch layer's bias, if any, added to every patch's."""
    position_1LD, bias_D = state["visual.pos_embed"], state.get("visual.patch_embed.bias")
    if bias_D is None:
        return position_1LD
    return torch.cat([position_1LD[:, :1], position_1LD[:, 1:] + bias_D], dim=1)


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write float tensors, each with memory of its own."""
    save = optional_import("safetensors.torch", "train").save_file
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    write_atomically(path, lambda temporary: save(own, str(temporary), {"format": "pt"} | (metadata or {})))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small file for people and programs."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))
