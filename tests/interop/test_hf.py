"""CLIPModel in, CLIPModel and VisionTextDualEncoderModel out, beside transformers' own code on the same inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_support import assert_equal, ids, shaken
from torch import Tensor, nn

from rocket_fast.batch import PackedText
from rocket_fast.image_augment import IMAGENET_MEAN, normalize
from rocket_fast.interop.hf import read_hf, write_hf
from rocket_fast.interop.weights import OPENAI_MEAN
from rocket_fast.models.clip import CLIPConfig, DualEncoder
from rocket_fast.models.heads import MLPHeadConfig
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import ConvStemViTConfig, TimmConfig, ViTConfig

transformers = pytest.importorskip("transformers", reason="the test extra brings transformers")

VISION = {"hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
TEXT = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"max_position_embeddings": 10, "bos_token_id": 48, "eos_token_id": 49}
VIT = ViTConfig(image_size=16, patch_size=8, width=24, layers=2, heads=2)
TINY = CLIPConfig(
    vision=VIT,
    text=TextConfig(vocab_size=50, context_length=10, width=16, layers=2, heads=2),
    embed_dim=12,
    h_head=None,
)


def pictures() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def hf_model(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> nn.Module:
    config = transformers.CLIPConfig(
        vision_config=VISION | (vision or {}), text_config=TEXT | (text or {}), projection_dim=12
    )
    return shaken(transformers.CLIPModel(config))


def pooled(output: Any) -> Tensor:
    """transformers 5 gives an output object, 4 the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


def assert_same(model: DualEncoder, other: Any) -> None:
    with torch.no_grad():
        assert_equal(model.encode_image(pictures())[0], pooled(other.get_image_features(pictures())))
        text = PackedText.from_padded(ids())
        assert_equal(model.encode_text(text)[0], pooled(other.get_text_features(ids())))
    torch.testing.assert_close(model.logit_scale.detach(), other.logit_scale.detach())


@pytest.mark.parametrize(
    ("vision", "text"),
    [({}, {}), ({"hidden_act": "gelu", "layer_norm_eps": 1e-6}, {}), ({}, {"hidden_act": "gelu", "eos_token_id": 2})],
)
def test_clip_models_of_transformers(vision: dict[str, Any], text: dict[str, Any], tmp_path: Path):
    other = hf_model(vision, text)
    other.save_pretrained(tmp_path)
    found = read_hf(tmp_path)
    assert found.mean == OPENAI_MEAN
    assert_same(found.build(), other)


def test_sharded_and_pickled_weights(tmp_path: Path):
    other = hf_model()
    other.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert_same(read_hf(tmp_path / "sharded").build(), other)
    other.config.save_pretrained(tmp_path / "pickled")
    state = other.state_dict() | {"text_model.embeddings.position_ids": torch.arange(10)[None]}
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    assert_same(read_hf(tmp_path / "pickled").build(), other)


def test_the_normalisation_is_read(tmp_path: Path):
    hf_model().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    found = read_hf(tmp_path)
    assert (found.mean, found.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip"}, "model_type: got 'siglip', expected clip"),
        ({"text_config": TEXT | {"intermediate_size": 32}}, "text_config.intermediate_size: got 32, expected 4 times"),
        ({"text_config": TEXT | {"layer_norm_eps": 1e-6}}, "text_config.layer_norm_eps: got 1e-06"),
        ({"text_config": TEXT | {"eos_token_id": 7}}, "text_config.eos_token_id: got 7, expected 49"),
        ({"text_config": TEXT | {"hidden_act": "relu"}}, "text.activation: got 'relu', expected one of"),
        ({"vision_config": VISION | {"num_channels": 1}}, "num_channels: got 1, expected 3"),
    ],
)
def test_what_cannot_be_held_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    hf_model().save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | changes))
    with pytest.raises(ValueError, match=message):
        read_hf(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"got 'no config\.json'"):
        read_hf(tmp_path)
    hf_model().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got 'no weights', expected model\.safetensors"):
        read_hf(tmp_path)


CLIP_VIT = replace(VIT, norm_pre=True, activation="quick_gelu", norm_eps=1e-5)
EXPORTED = {
    "openai": replace(TINY, vision=replace(CLIP_VIT, patch_bias=False)),
    "patch_bias": replace(TINY, vision=CLIP_VIT),
    "mixed": replace(TINY, vision=replace(CLIP_VIT, activation="gelu", mlp_ratio=50 / 24)),
    "timm": TINY,
    "timm_no_bias": replace(TINY, vision=replace(VIT, patch_bias=False, activation="quick_gelu", norm_eps=1e-5)),
    "with_h": replace(TINY, h_head=MLPHeadConfig(hidden=8), text=replace(TINY.text, activation="gelu")),
}


def own_model(config: CLIPConfig) -> Any:
    torch.manual_seed(0)
    return shaken(DualEncoder(config))


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_loads_the_folder_by_itself(name: str, tmp_path: Path):
    model = own_model(EXPORTED[name])
    write_hf(model, tmp_path)
    vision = EXPORTED[name].vision
    assert isinstance(vision, ViTConfig)
    kind = transformers.CLIPModel if vision.norm_pre else transformers.VisionTextDualEncoderModel
    other, found = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is kind
    assert_same(model, other.eval())
    if vision.norm_pre:
        again = read_hf(tmp_path)
        assert_same(again.build(), other)
        assert again.mean == IMAGENET_MEAN


def test_pixels_are_prepared_as_here(tmp_path: Path):
    pil = pytest.importorskip("PIL.Image", reason="the train extra brings pillow")
    write_hf(own_model(EXPORTED["openai"]), tmp_path)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    pixel_HWC = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = processor(pil.fromarray(pixel_HWC.numpy()), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(theirs, normalize(pixel_HWC.permute(2, 0, 1)[None]), atol=1e-6, rtol=1e-5)


def test_what_no_class_holds_is_refused_with_the_reason(tmp_path: Path):
    for head in ("h", "both"):
        with pytest.raises(ValueError, match="expected z: the classes of transformers project with one matrix"):
            write_hf(own_model(EXPORTED["with_h"]), tmp_path, head=head)
    stem = ConvStemViTConfig(image_size=16, stem_widths=(8,), stem_blocks=(0,), width=8, layers=0)
    for vision in (stem, TimmConfig(name="resnet50")):
        with pytest.raises(ValueError, match=f"vision: got {type(vision).__name__}, expected a ViT: no class"):
            write_hf(DualEncoder(replace(TINY, vision=vision)), tmp_path)
