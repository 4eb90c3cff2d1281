"""Whose a checkpoint is, told by what is in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rocket_fast.interop import detect
from rocket_fast.interop.clip_rocket import to_clip_rocket
from rocket_fast.interop.detect import import_checkpoint
from rocket_fast.interop.hf import write_hf
from rocket_fast.interop.open_clip_weights import write_open_clip
from rocket_fast.models.clip import CLIPConfig, DualEncoder
from rocket_fast.models.heads import BarLIPConfig, MLPHeadConfig
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import ViTConfig

safetensors = pytest.importorskip("safetensors.torch", reason="the train extra brings safetensors")

VIT = ViTConfig(image_size=16, patch_size=8, width=384, layers=1, heads=12)
TEXT = TextConfig(vocab_size=50, context_length=10, width=64, layers=1, heads=1)
CLIP = CLIPConfig(vision=VIT, text=TEXT, embed_dim=12, h_head=None)
OPENAI = ViTConfig(
    image_size=16,
    patch_size=8,
    width=64,
    layers=1,
    heads=1,
    activation="quick_gelu",
    norm_pre=True,
    patch_bias=False,
    norm_eps=1e-5,
)


def assert_same_state(model: DualEncoder, path: Path, **options: str) -> None:
    found = import_checkpoint(path, **options)  # type: ignore[arg-type]
    assert found.config == model.config
    assert all(torch.equal(tensor, found.state[name]) for name, tensor in model.state_dict().items())


def test_clip_rocket_and_slip(tmp_path: Path):
    config = replace(CLIP, h_head=MLPHeadConfig(hidden=8), companion=BarLIPConfig(hidden=7, out=9, separate_local=True))
    model = DualEncoder(config)
    torch.save({"state_dict": to_clip_rocket(model)}, tmp_path / "cl2l.pt")
    assert_same_state(model, tmp_path / "cl2l.pt")
    model = DualEncoder(CLIP)
    state = to_clip_rocket(model)
    for side in ("image", "text"):
        state[f"{side}_projection"] = state.pop(f"{side}_projector.weight").T
    torch.save({"state_dict": state}, tmp_path / "slip.pt")
    assert_same_state(model, tmp_path / "slip.pt")


def test_openai_and_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = DualEncoder(replace(CLIP, vision=OPENAI))
    write_open_clip(model, tmp_path / "folder")
    assert_same_state(model, tmp_path / "folder")
    state = safetensors.load_file(str(tmp_path / "folder" / "open_clip_model.safetensors"))
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="ViT-B-32-quickgelu QuickGELU: the weights do not tell"):
        import_checkpoint(tmp_path / "weights.pt")
    assert_same_state(model, tmp_path / "weights.pt", format="openai")
    torch.save(state | {"input_resolution": torch.tensor(16)}, tmp_path / "openai.pt")
    assert_same_state(model, tmp_path / "openai.pt")
    names = []
    monkeypatch.setattr(
        detect.open_clip_weights, "read_open_clip", lambda path, *, model_name: names.append(model_name)
    )
    import_checkpoint(tmp_path / "weights.pt", model_name="ViT-B-32")
    assert names == ["ViT-B-32"]


def test_transformers(tmp_path: Path):
    model = DualEncoder(replace(CLIP, vision=OPENAI))
    write_hf(model, tmp_path)
    assert_same_state(model, tmp_path)


def test_nothing_known_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="expected an existing file or folder"):
        import_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"open_clip_config\.json \(open_clip\) or config\.json \(transformers\)"):
        import_checkpoint(tmp_path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="has the names of neither clip-rocket nor SLIP"):
        import_checkpoint(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="format: got 'caffe', expected one of"):
        import_checkpoint(tmp_path / "other.pt", format="caffe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model_name: got 'x', expected None: slip has no names of models"):
        import_checkpoint(tmp_path / "other.pt", format="slip", model_name="x")
