"""Weights of SLIP (Mu et al. 2021): the models that it calls CLIP and SLIP.

Vision transformers of timm, CLIP's text tower with QuickGELU; ViT-S has 12 heads. Projections are stored as
(width, dim), the other way round than ``nn.Linear``'s.
"""

from __future__ import annotations

from pathlib import Path

from rocket_fast.errors import require
from rocket_fast.interop.weights import (
    CLIP_TEXT,
    TIMM_VIT,
    ImportedModel,
    Rules,
    clip_text_config,
    read_weights,
    rename,
    shapes_of,
    timm_vit_config,
)
from rocket_fast.models.clip import CLIPConfig

_RULES: Rules = (
    *CLIP_TEXT,
    *TIMM_VIT,
    ("image_projection", "image_z.weight"),
    ("text_projection", "text_z.weight"),
    ("logit_scale", "logit_scale"),
)


def read_slip(path: Path, *, vision_heads: int | None = None, text_heads: int | None = None) -> ImportedModel:
    """A SLIP or CLIP model from a checkpoint of SLIP's; the MLP of its self-supervision is left out.

    ``vision_heads``, ``text_heads``: None takes the published models'. Raises ``ValueError`` as ``read_weights`` does,
    for SimCLR's files, which have no text tower, and for names that SLIP does not use.
    """
    file = read_weights(path)
    require("image_projection" in file.state, str(path), "no image_projection", "a CLIP or SLIP checkpoint of SLIP's")
    used = {name: tensor for name, tensor in file.state.items() if not name.startswith("image_mlp.")}
    state = {name: used[old] for name, old in rename(used, _RULES, "state", "SLIP's models").items()}
    for side in ("image_z", "text_z"):
        state[f"{side}.weight"] = state[f"{side}.weight"].T.contiguous()
    shapes = shapes_of(used)
    dropped = len(file.state) - len(used)
    return ImportedModel(
        config=CLIPConfig(
            vision=timm_vit_config(shapes, heads=vision_heads),
            text=clip_text_config(shapes, heads=text_heads),
            embed_dim=shapes["image_projection"][1],
            h_head=None,
        ),
        state=state,
        notes=(f"image_mlp, the head of the self-supervision ({dropped} tensors), is left out",) if dropped else (),
        arguments=file.arguments,
    )
