"""SLIP's checkpoints: a timm ViT and open_clip's text tower stand in for SLIP's own, which are the same."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from interop_support import assert_equal
from torch import Tensor

from rocket_fast.batch import PackedText
from rocket_fast.interop.slip import read_slip

open_clip = pytest.importorskip("open_clip", reason="the test extra brings open_clip_torch")
timm = pytest.importorskip("timm", reason="the train extra brings timm")


def towers() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    visual = timm.models.VisionTransformer(**size)
    quick_gelu = open_clip.transformer.QuickGELU
    text = open_clip.transformer.TextTransformer(10, 50, 64, 1, 2, output_dim=12, act_layer=quick_gelu)
    return visual.eval(), text.eval()


def checkpoint() -> dict[str, Tensor]:
    visual, text = towers()
    state = {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()} | text.state_dict()
    state |= {"image_projection": torch.randn(24, 12), "logit_scale": torch.tensor(3.0)}
    state |= {"image_mlp.layer1.weight": torch.zeros(4, 24), "image_mlp.bn1.num_batches_tracked": torch.tensor(3)}
    return {f"module.{name}": tensor for name, tensor in state.items()}


def test_slips_models_are_read(tmp_path: Path):
    state = checkpoint()
    torch.save({"epoch": 1, "state_dict": state, "args": argparse.Namespace(model="SLIP_VITB16")}, tmp_path / "slip.pt")
    found = read_slip(tmp_path / "slip.pt", vision_heads=3)
    assert found.notes == ("image_mlp, the head of the self-supervision (2 tensors), is left out",)
    assert found.arguments == {"model": "SLIP_VITB16"}
    model, (visual, text) = found.build(), towers()
    image_BCHW = torch.randn(3, 3, 16, 16)
    token_BL = torch.tensor([[48, 3, 4, 49, 0, 0, 0, 0, 0, 0], [48, 3, 4, 5, 6, 7, 8, 9, 10, 49]])
    with torch.no_grad():
        expected = visual(image_BCHW) @ state["module.image_projection"]
        assert_equal(model.encode_image(image_BCHW)[0], expected)
        own, _ = model.encode_text(PackedText.from_padded(token_BL))
        assert_equal(own, text(token_BL))
    assert model.logit_scale.item() == 3


def test_simclr_and_unknown_names_are_refused(tmp_path: Path):
    state = checkpoint()
    torch.save({"state_dict": {"module.visual.cls_token": torch.zeros(1, 1, 8)}}, tmp_path / "simclr.pt")
    with pytest.raises(ValueError, match="got 'no image_projection', expected a CLIP or SLIP checkpoint"):
        read_slip(tmp_path / "simclr.pt")
    torch.save({"state_dict": state | {"queue": torch.zeros(1)}}, tmp_path / "queue.pt")
    with pytest.raises(ValueError, match=r"state: got \['queue'\], expected only names that SLIP's models have"):
        read_slip(tmp_path / "queue.pt", vision_heads=3)
    torch.save({"state_dict": state}, tmp_path / "slip.pt")
    with pytest.raises(ValueError, match="the number of heads of a ViT 24 wide"):
        read_slip(tmp_path / "slip.pt")
