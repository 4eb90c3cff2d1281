"""Which project's a file or folder is, and the model in it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rocket_fast.errors import InvalidArgument, require
from rocket_fast.interop import hf, open_clip_weights
from rocket_fast.interop.clip_rocket import read_clip_rocket
from rocket_fast.interop.slip import read_slip
from rocket_fast.interop.weights import ImportedModel, read_weights

Format = Literal["auto", "clip_rocket", "slip", "open_clip", "openai", "hf"]


def import_checkpoint(path: Path, *, format: Format = "auto", model_name: str | None = None) -> ImportedModel:
    """The model in another project's file or folder.

    ``format`` auto tells by what is there. A file of open_clip's needs ``model_name``, the model's name in open_clip,
    and so does whatever has the same names: they do not tell which GELU the model was trained with. Raises
    ``ValueError`` as the format's reader does, and where nothing tells the format.
    """
    require(path.exists(), "checkpoint", str(path), "an existing file or folder")
    format = _format(path, model_name) if format == "auto" else format
    readers = {
        "clip_rocket": read_clip_rocket,
        "slip": read_slip,
        "openai": open_clip_weights.read_openai,
        "hf": hf.read_hf,
    }
    if format == "open_clip":
        return open_clip_weights.read_open_clip(path, model_name=model_name)
    require(format in readers, "format", format, f"one of {('auto', 'open_clip', *readers)}")
    require(model_name is None, "model_name", model_name, f"None: {format} has no names of models")
    return readers[format](path)


def _format(path: Path, model_name: str | None) -> Format:
    if path.is_dir():
        marks: dict[str, Format] = {open_clip_weights.CONFIG_FILE: "open_clip", "config.json": "hf"}
        for file, format in marks.items():
            if (path / file).is_file():
                return format
        raise InvalidArgument(
            f"checkpoint: got the folder {path}, expected one with open_clip_config.json (open_clip) or config.json "
            "(transformers); or name a file"
        )
    if model_name is not None:
        return "open_clip"
    weights = read_weights(path)
    if "image_projector.weight" in weights.state:
        return "clip_rocket"
    if "image_projection" in weights.state:
        return "slip"
    if weights.scripted or "input_resolution" in weights.state:
        return "openai"
    raise InvalidArgument(
        f"checkpoint: {path} has the names of neither clip-rocket nor SLIP. If it is open_clip's, give the model's "
        "name there (ViT-B-32 has GELU, ViT-B-32-quickgelu QuickGELU: the weights do not tell); if OpenAI's, say so by "
        "format"
    )
