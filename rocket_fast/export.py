"""A trained model as one embedding a picture and one a caption, and the files it is written to.

Head z and head h make one embedding: sqrt(w) z beside sqrt(1 - w) h, both of unit length. Its plain cosine is
w cos(z) + (1 - w) cos(h), the score of the ensemble, so that whatever compares two vectors can use it.
Shapes: B samples, L places of a padded caption, D dimensions of the embedding.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rocket_fast.config import from_plain, to_plain
from rocket_fast.errors import InvalidArgument, optional_import, require
from rocket_fast.image_augment import IMAGENET_MEAN, IMAGENET_STD
from rocket_fast.interop.hf import write_hf
from rocket_fast.interop.open_clip_weights import write_open_clip
from rocket_fast.interop.weights import write_json, write_safetensors
from rocket_fast.models.attention import Attention, TransformerBlock
from rocket_fast.models.clip import CLIPConfig, DualEncoder
from rocket_fast.models.heads import MLPHead
from rocket_fast.models.text import TextTower
from rocket_fast.models.vision import TimmConfig, VisionTower, ViTConfig

Head = Literal["z", "h", "both"]
ExportFormat = Literal["open_clip", "hf", "safetensors", "onnx", "torch"]
FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"


# --- one embedding ----------------------------------------------------------------------------------------------------


class Embed(nn.Module):
    """Features to the embedding: one head's raw output, or both heads', of unit length together."""

    def __init__(self, z: nn.Module | None, h: nn.Module | None, z_weight: float) -> None:
        super().__init__()
        self.z, self.h = z, h
        self.factors = (math.sqrt(z_weight), math.sqrt(1 - z_weight))

    def forward(self, features_BW: Tensor) -> Tensor:
        """(B, width) to (B, D)."""
        if self.z is None or self.h is None:
            only = self.h if self.z is None else self.z
            assert only is not None
            return only(features_BW)
        parts = (head(features_BW) for head in (self.z, self.h))
        return torch.cat([f * F.normalize(x, dim=1) for f, x in zip(self.factors, parts, strict=True)], dim=1)


class ImageEncoder(nn.Module):
    """Normalised pictures (B, 3, H, W) to embeddings (B, D)."""

    def __init__(self, tower: VisionTower, embed: Embed) -> None:
        super().__init__()
        self.tower, self.embed = tower, embed

    def forward(self, image: Tensor) -> Tensor:
        """Embeddings; see the class."""
        return self.embed(self.tower(image))


class TextEncoder(nn.Module):
    """Padded token ids (B, L), as open_clip's tokenizer makes them, to embeddings (B, D).

    The embedding is read at each row's first largest id, which is end-of-text; what is behind it changes nothing.
    """

    def __init__(self, tower: TextTower, embed: Embed) -> None:
        super().__init__()
        self.tower, self.embed = tower, embed

    def forward(self, text: Tensor) -> Tensor:
        """Embeddings; see the class."""
        tower = self.tower
        x_BLW = tower.token_embedding(text) + tower.positional_embedding[: text.shape[1]]
        for block in tower.blocks:
            x_BLW = block(x_BLW)
        last_B11 = text.int().argmax(dim=1)[:, None, None]
        last_BW = x_BLW.gather(1, last_B11.expand(-1, 1, x_BLW.shape[2]))[:, 0]
        return self.embed(tower.norm(last_BW))


class ExportedModel(nn.Module):
    """A model's embeddings with the interface of open_clip's models, whose evaluation it can stand in.

    A copy on the CPU, in evaluation mode. ``head``: z, h, or both in one embedding with weight ``z_weight`` of z; where
    h is z or absent, both is z. ``logit_scale`` is the logarithm of the head's scale; of both, of the scales' mean with
    the same weights, which makes no difference to what is classified as what.

    Raises ``ValueError`` for head h of a model without one, and for a weight outside 0 to 1.
    """

    logit_scale: Tensor

    def __init__(self, model: DualEncoder, *, head: Head = "both", z_weight: float = 0.5) -> None:
        super().__init__()
        require_head(model.config, head)
        require_weight(z_weight)
        model = _for_inference(model)
        has_h = isinstance(model.image_h, MLPHead)
        use_z, use_h = head != "h" or not has_h, head != "z" and has_h
        self.context_length = model.text.config.context_length
        parts = ((model.image_z, model.image_h), (model.text_z, model.text_h))
        image, text = (Embed(z if use_z else None, h if use_h else None, z_weight) for z, h in parts)
        self.image, self.text = ImageEncoder(model.visual, image), TextEncoder(model.text, text)
        scale = model.logit_scale.detach()
        if use_h and model.h_logit_scale is not None:
            weight = z_weight if use_z else 0.0
            scale = (weight * scale.exp() + (1 - weight) * model.h_logit_scale.detach().exp()).log()
        self.register_buffer("logit_scale", scale.clone())

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings (B, D) of normalised pictures (B, 3, H, W), of unit length if asked."""
        embedding_BD = self.image(image)
        return F.normalize(embedding_BD, dim=-1) if normalize else embedding_BD

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings (B, D) of padded ids (B, L), of unit length if asked."""
        embedding_BD = self.text(text)
        return F.normalize(embedding_BD, dim=-1) if normalize else embedding_BD

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> tuple[Any, Any, Tensor]:
        """Embeddings of unit length, None for what is not given, and the scale."""
        image_BD = None if image is None else self.encode_image(image, normalize=True)
        text_BD = None if text is None else self.encode_text(text, normalize=True)
        return image_BD, text_BD, self.logit_scale.exp()


def require_head(config: CLIPConfig, head: str) -> None:
    """Refuse an unknown head, and h where strong views had none."""
    require(head in get_args(Head), "head", head, f"one of {get_args(Head)}")
    require(head != "h" or config.h_head is not None, "head", head, "z: the model has no head h")


def require_weight(z_weight: float) -> None:
    """Refuse what is no weight of head z."""
    require(0 <= z_weight <= 1, "z_weight", z_weight, "a number from 0 to 1")


def _for_inference(model: DualEncoder) -> DualEncoder:
    """A copy on the CPU in evaluation mode, with torch's attention and nothing computed twice."""
    model = copy.deepcopy(model).to("cpu").eval().requires_grad_(False)
    vision = model.visual.config if hasattr(model.visual, "config") else None
    if isinstance(vision, ViTConfig):
        model.visual.config = dataclasses.replace(vision, checkpointing="none")
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            module.attend = Attention()
    return model


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model and how it is used: the side of its pictures, and which embedding is taken (see ``ExportedModel``).

    ``arguments``: how it was trained, as the file it was imported from says.
    """

    model: DualEncoder
    image_size: int
    head: Head = "both"
    z_weight: float = 0.5
    arguments: dict[str, Any] = field(default_factory=dict)

    def using(self, head: Head | None, z_weight: float | None) -> SavedModel:
        """The same with another embedding; None leaves what is set."""
        head, z_weight = self.head if head is None else head, self.z_weight if z_weight is None else z_weight
        return dataclasses.replace(self, head=head, z_weight=z_weight)

    def exported(self) -> ExportedModel:
        """The embedding that is taken."""
        return ExportedModel(self.model, head=self.head, z_weight=self.z_weight)


def image_size_of(config: CLIPConfig, otherwise: int = 224) -> int:
    """The side of the pictures that the image tower takes; ``otherwise`` for those that take any."""
    return otherwise if isinstance(config.vision, TimmConfig) else config.vision.image_size


def save_model(saved: SavedModel, path: Path) -> None:
    """Write safetensors that ``load_model`` reads, everything it has to know in the metadata.

    What serves training alone, a companion's heads and the averaged encoder, is left out.
    """
    config = dataclasses.replace(saved.model.config, companion=None)
    training = ("companion.", "momentum.")
    state = {name: x for name, x in saved.model.state_dict().items() if not name.startswith(training)}
    record = {
        "format_version": FORMAT_VERSION,
        "model": to_plain(config),
        "image_size": saved.image_size,
        "head": saved.head,
        "z_weight": saved.z_weight,
        "arguments": saved.arguments,
    }
    write_safetensors(path, state, {"rocket_fast": json.dumps(record, default=str)})


def load_model(path: Path) -> SavedModel:
    """Read what ``save_model`` wrote. Raises ``ValueError`` for other files, a trainer's bare weights among them."""
    require(path.is_file(), "file", str(path), "an existing file")
    safetensors = optional_import("safetensors", "train")
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get("rocket_fast", "")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except safetensors.SafetensorError as error:
        raise InvalidArgument(f"{path}: cannot be read as safetensors ({error})") from error
    expected = "a file of rocket-fast import or export --format safetensors (a run's own weights: name its folder)"
    require(text != "", str(path), "safetensors without a configuration", expected)
    record = json.loads(text)
    version = record.get("format_version")
    require(version == FORMAT_VERSION, f"format_version of {path}", version, str(FORMAT_VERSION))
    model = DualEncoder(from_plain(record["model"], CLIPConfig, "model"))
    model.load_state_dict(state)
    rest = {name: record[name] for name in ("image_size", "head", "z_weight", "arguments")}
    return SavedModel(model=model.eval(), **rest)


def export(saved: SavedModel, folder: Path, format: ExportFormat) -> list[Path]:
    """Write a model into ``folder`` in the given format, and say which files these are.

    open_clip, hf: what those packages load by themselves, through one linear head. safetensors: this project's own.
    torch, onnx: a program for each tower, pictures or ids in, embeddings out, any number of them at once, and
    ``export.json`` with all that a caller has to know. Raises ``ValueError``, with the reason, for what a format cannot
    hold.
    """
    require(format in get_args(ExportFormat), "format", format, f"one of {get_args(ExportFormat)}")
    require_head(saved.model.config, saved.head)
    require_weight(saved.z_weight)
    require(not folder.exists() or folder.is_dir(), "out", str(folder), "a folder")
    if format == "safetensors":
        save_model(saved, folder / WEIGHTS_FILE)
        return [folder / WEIGHTS_FILE]
    if format == "open_clip":
        return write_open_clip(saved.model, folder, head=saved.head, image_size=saved.image_size)
    if format == "hf":
        return write_hf(saved.model, folder, head=saved.head)
    return _write_programs(saved, folder, format)


def _write_programs(saved: SavedModel, folder: Path, format: Literal["onnx", "torch"]) -> list[Path]:
    for package in ("onnx", "onnxscript") if format == "onnx" else ():
        optional_import(package, "export")
    exported = saved.exported().to(memory_format=torch.contiguous_format)  # what torch.export.save keeps
    size, length = saved.image_size, exported.context_length
    image_BCHW = torch.zeros(2, 3, size, size)
    token_BL = torch.zeros(2, length, dtype=torch.int64)
    token_BL[:, 1] = saved.model.config.text.vocab_size - 1
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.{'pt2' if format == 'torch' else 'onnx'}" for name in ("image", "text")]
    towers = ((exported.image, image_BCHW), (exported.text, token_BL))
    for file, (module, example) in zip(files, towers, strict=True):
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        if format == "torch":
            torch.export.save(program, file)
        else:
            _write_onnx(program, file)
    record = {
        "image": {"input": ["batch", 3, size, size], "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "resize": "bicubic"},
        "text": {"input": ["batch", length], "tokenizer": "CLIP's, zero-padded"},
        "head": saved.head,
        "z_weight": saved.z_weight,
        "logit_scale": exported.logit_scale.exp().item(),
    }
    write_json(folder / "export.json", record)
    return [*files, folder / "export.json"]


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    outputs = [f"{path.stem}_embedding"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch thinks of its own translation tables
        written = torch.onnx.export(
            program, input_names=[path.stem], output_names=outputs, dynamo=True, verbose=False, external_data=False
        )
    assert written is not None
    written.save(str(path))
