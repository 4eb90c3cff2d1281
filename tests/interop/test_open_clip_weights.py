"""open_clip's and OpenAI's models in, and out again, beside open_clip's own code on the same pixels and ids."""

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
from rocket_fast.image_augment import IMAGENET_MEAN, IMAGENET_STD
from rocket_fast.interop.open_clip_weights import read_open_clip, read_openai, write_open_clip
from rocket_fast.interop.weights import OPENAI_MEAN, OPENAI_STD
from rocket_fast.models.clip import CLIPConfig, DualEncoder
from rocket_fast.models.heads import MLPHeadConfig, SharedHeadConfig
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import ConvStemViTConfig, TimmConfig, ViTConfig

open_clip = pytest.importorskip("open_clip", reason="the test extra brings open_clip_torch")
safetensors = pytest.importorskip("safetensors.torch", reason="the train extra brings safetensors")

VISION = {"layers": 2, "width": 64, "head_width": 64, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 10, "vocab_size": 50, "width": 64, "heads": 1, "layers": 2}
NATIVE = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}


def pixels(size: int = 16, count: int = 3) -> Tensor:
    """In 0 to 1, not normalised."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def normalized(pixel_BCHW: Tensor, mean: Any, std: Any) -> Tensor:
    return (pixel_BCHW - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def save_folder(model: nn.Module, settings: dict[str, Any], folder: Path, **pixels: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": pixels}))
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    safetensors.save_file(state, str(folder / "open_clip_model.safetensors"))
    return folder


def theirs(settings: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    settings = dict(settings)
    kind = open_clip.CustomTextCLIP if settings.pop("custom_text", False) else open_clip.CLIP
    return shaken(kind(**settings))


def assert_same(model: DualEncoder, other: nn.Module, image_BCHW: Tensor, token_BL: Tensor) -> None:
    with torch.no_grad():
        image, _ = model.encode_image(image_BCHW)
        text, _ = model.encode_text(PackedText.from_padded(token_BL))
        assert_equal(image, other.encode_image(image_BCHW))
        assert_equal(text, other.encode_text(token_BL))
    torch.testing.assert_close(model.logit_scale.detach(), other.logit_scale.detach().reshape(()))


# --- import -----------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "gelu": NATIVE,
    "quick_gelu": NATIVE | {"quick_gelu": True},
    "custom_text": NATIVE | {"custom_text": True, "quick_gelu": True, "nonscalar_logit_scale": True},
    "no_ln_pre": NATIVE | {"vision_cfg": VISION | {"no_ln_pre": True, "norm_kwargs": {"eps": 1e-6}, "mlp_ratio": 2.7}},
    "no_projection": {"embed_dim": 192, "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"}}
    | {"text_cfg": TEXT | {"width": 192, "heads": 3, "proj_type": "none"}},
    "timm": NATIVE | {"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": ""}, "quick_gelu": True},
    "timm_network": NATIVE | {"vision_cfg": {"timm_model_name": "resnet50", "image_size": 64}},
}
CASES["no_projection"]["vision_cfg"]["timm_proj"] = "none"


@pytest.mark.parametrize("name", CASES)
def test_folders_of_open_clip(name: str, tmp_path: Path):
    other = theirs(CASES[name])
    found = read_open_clip(save_folder(other, CASES[name], tmp_path / "model"))
    assert (found.mean, found.std) == (OPENAI_MEAN, OPENAI_STD)
    size = 16 if "timm" not in str(CASES[name]) else 64 if name == "timm_network" else 224
    assert_same(found.build(), other, pixels(size, 2), ids(2))


def test_the_configuration_decides_the_activation(tmp_path: Path):
    for quick_gelu, activation in ((False, "gelu"), (True, "quick_gelu")):
        settings = NATIVE | {"quick_gelu": quick_gelu}
        config = read_open_clip(save_folder(theirs(settings), settings, tmp_path)).config
        assert isinstance(config.vision, ViTConfig)
        assert config.vision.activation == config.text.activation == activation


def test_a_file_needs_the_models_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = theirs(NATIVE | {"quick_gelu": True})
    path = tmp_path / "epoch_3.pt"
    state = {f"module.{name}": tensor for name, tensor in other.state_dict().items()}
    torch.save({"epoch": 3, "name": "mine", "state_dict": state}, path)
    with pytest.raises(ValueError, match="model_name: got None, expected the model's name in open_clip"):
        read_open_clip(path)
    with pytest.raises(ValueError, match=r"model_name: got 'ViT-Z', expected a name that open_clip\.list_models"):
        read_open_clip(path, model_name="ViT-Z")
    configs = {"ViT-tiny-quickgelu": NATIVE | {"quick_gelu": True}}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", configs)
    assert_same(read_open_clip(path, model_name="ViT-tiny-quickgelu").build(), other, pixels(), ids())


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-S-16", "ViT-B-32-256"])
def test_settings_of_published_models_are_understood(name: str):
    from rocket_fast.interop.open_clip_weights import _require_settings, _text, _vision

    settings = open_clip.get_model_config(name)
    _require_settings("model_cfg", settings)
    assert isinstance(_vision(settings, None)[0], ViTConfig)
    assert _text(settings["text_cfg"], quick_gelu="quick" in name).context_length == 77


REFUSED = {
    "RN50": "visual: got 'a ResNet with attention pooling', expected a ViT",
    "coca_ViT-B-32": "model_cfg.multimodal_cfg: got {.*}, expected None",
    "ViT-B-16-SigLIP": "model_cfg.init_logit_bias: got -10, expected None",
    "roberta-ViT-B-32": "text_cfg.hf_model_name: got 'roberta-base'",
    "ViT-H-14-CLIPA": "vision_cfg.pool_type: got 'avg', expected 'tok'",
    "EVA02-B-16": "timm_model_name: got 'eva02_base_patch16_clip_224', expected a vision_transformer",
    "convnext_base": "timm_model_name: got 'convnext_base', expected a vision_transformer",
    "vit_medium_patch16_gap_256": "timm_model_name: got 'vit_medium_patch16_gap_256', expected a vision_transformer",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_refused_by_name(name: str, tmp_path: Path):
    settings = open_clip.get_model_config(name)
    folder = save_folder(nn.Linear(2, 2), settings, tmp_path)
    with pytest.raises(ValueError, match=REFUSED[name]):
        read_open_clip(folder)


@pytest.mark.parametrize(
    ("where", "setting", "message"),
    [
        ("vision_cfg", {"ls_init_value": 0.1}, "vision_cfg.ls_init_value: got 0.1, expected None"),
        ("vision_cfg", {"something_new": 3}, "vision_cfg.something_new: got 3"),
        ("vision_cfg", {"image_size": [16, 8]}, r"image_size: got \[16, 8\], expected square pictures"),
        ("vision_cfg", {"norm_kwargs": {"bias": False}}, "norm_kwargs"),
        ("text_cfg", {"mlp_ratio": 2.0}, "text_cfg.mlp_ratio: got 2.0, expected 4"),
        ("text_cfg", {"pool_type": "last"}, "text_cfg.pool_type: got 'last', expected 'argmax'"),
        ("text_cfg", {"norm_kwargs": {"eps": 1e-6}}, "text_cfg.norm_kwargs"),
        ("vision_cfg", {"timm_model_name": "vit_tiny_patch16_224"}, "timm_pool: got 'avg', expected token"),
        ("vision_cfg", {"timm_model_name": "resnet50", "timm_proj": "mlp"}, "timm_proj: got 'mlp'"),
        ("vision_cfg", {"timm_model_name": "resnet50", "timm_proj_bias": True}, "timm_proj_bias: got True"),
    ],
)
def test_settings_that_change_the_model_are_refused(where: str, setting: dict[str, Any], message: str, tmp_path: Path):
    settings = NATIVE | {where: NATIVE[where] | setting}
    with pytest.raises(ValueError, match=message):
        read_open_clip(save_folder(nn.Linear(2, 2), settings, tmp_path))


def test_weights_of_another_size_are_refused_by_name(tmp_path: Path):
    settings = NATIVE | {"vision_cfg": VISION | {"image_size": 24}}
    with pytest.raises(ValueError, match=r"visual\.pos_embed \(1, 5, 64\) for \(1, 10, 64\)"):
        read_open_clip(save_folder(theirs(NATIVE), settings, tmp_path))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_openai_state_dicts_and_archives(tmp_path: Path):
    other = theirs(NATIVE | {"quick_gelu": True})
    state = other.state_dict() | {"input_resolution": torch.tensor(16), "context_length": torch.tensor(10)}
    path = tmp_path / "state.pt"
    torch.save(state, path)
    assert_same(read_openai(path).build(), other, pixels(), ids())
    scripted = torch.jit.trace_module(other, {"encode_image": pixels()})
    torch.jit.save(scripted, str(tmp_path / "archive.pt"))
    found = read_openai(tmp_path / "archive.pt")
    assert_same(found.build(), other, pixels(), ids())
    assert isinstance(found.config.vision, ViTConfig)
    assert found.config.vision.activation == "quick_gelu"


def test_half_precision_becomes_single(tmp_path: Path):
    other = theirs(NATIVE | {"quick_gelu": True}).half()
    torch.save(other.state_dict(), tmp_path / "state.pt")
    assert_same(read_openai(tmp_path / "state.pt").build(), other.float(), pixels(), ids())


def test_openai_resnets_are_refused(tmp_path: Path):
    torch.save({"visual.attnpool.positional_embedding": torch.zeros(50, 4)}, tmp_path / "rn50.pt")
    with pytest.raises(ValueError, match="a ResNet with attention pooling"):
        read_openai(tmp_path / "rn50.pt")


def test_the_normalisation_goes_into_the_patch_layer(tmp_path: Path):
    other = theirs(NATIVE)
    found = read_open_clip(save_folder(other, NATIVE, tmp_path)).for_imagenet()
    assert found.mean == IMAGENET_MEAN
    pixel_BCHW = pixels()
    with torch.no_grad():
        own, _ = found.build().encode_image(normalized(pixel_BCHW, IMAGENET_MEAN, IMAGENET_STD))
        expected = other.encode_image(normalized(pixel_BCHW, OPENAI_MEAN, OPENAI_STD))
    assert_equal(own, expected)
    assert found.for_imagenet() is found


def test_a_padding_network_keeps_its_normalisation(tmp_path: Path):
    settings = CASES["timm_network"]
    other = theirs(settings)
    found = read_open_clip(save_folder(other, settings, tmp_path))
    with pytest.raises(ValueError, match="its first layer pads with zeros"):
        found.for_imagenet()
    assert read_open_clip(save_folder(other, settings, tmp_path, mean=IMAGENET_MEAN, std=IMAGENET_STD)).for_imagenet()


# --- export -----------------------------------------------------------------------------------------------------------

TINY_VIT = ViTConfig(image_size=16, patch_size=8, width=48, layers=2, heads=3)
TINY = CLIPConfig(
    vision=TINY_VIT,
    text=TextConfig(vocab_size=50, context_length=10, width=32, layers=2, heads=2),
    embed_dim=12,
    h_head=None,
)
GELU_TEXT = replace(TINY.text, activation="gelu")
EXPORTED = {
    "timm": TINY,
    "native": replace(TINY, text=GELU_TEXT),
    "native_quick": replace(TINY, vision=replace(TINY_VIT, activation="quick_gelu", norm_pre=True, norm_eps=1e-5)),
    "mlp_ratio": replace(TINY, vision=replace(TINY_VIT, mlp_ratio=131 / 48), text=GELU_TEXT),
    "no_patch_bias": replace(TINY, vision=replace(TINY_VIT, patch_bias=False), text=GELU_TEXT),
    "shared_head": replace(TINY, h_head=SharedHeadConfig()),
    "resnet": replace(TINY, vision=TimmConfig(name="resnet50")),
    "convnext": replace(TINY, vision=TimmConfig(name="convnext_tiny")),
    "with_h": replace(TINY, h_head=MLPHeadConfig(hidden=8)),
}


def own_model(config: CLIPConfig) -> DualEncoder:
    torch.manual_seed(0)
    return shaken(DualEncoder(config))


@pytest.mark.parametrize("name", EXPORTED)
def test_open_clip_loads_the_folder_by_itself(name: str, tmp_path: Path):
    model = own_model(EXPORTED[name])
    size = 64 if isinstance(model.config.vision, TimmConfig) else 16
    write_open_clip(model, tmp_path / "out", image_size=size)
    other, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert_same(model, other.eval(), pixels(size, 2), ids(2))
    assert (tmp_path / "out" / "timm").is_dir() == (name in ("timm", "shared_head", "with_h"))
    normalize = preprocess.transforms[-1]
    assert (tuple(normalize.mean), tuple(normalize.std)) == (IMAGENET_MEAN, IMAGENET_STD)
    assert preprocess.transforms[0].size in (size, [size], (size,), (size, size))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    assert tokenizer(["a"]).shape == (1, 10)


@pytest.mark.parametrize("name", EXPORTED)
def test_what_is_exported_comes_back(name: str, tmp_path: Path):
    model = own_model(EXPORTED[name])
    write_open_clip(model, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    found = read_open_clip(tmp_path / "moved")
    size = 64 if isinstance(model.config.vision, TimmConfig) else 16
    with torch.no_grad():
        assert_equal(found.build().encode_image(pixels(size))[0], model.encode_image(pixels(size))[0])
    assert found.for_imagenet() is found
    assert found.config.text == model.config.text


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CLIPConfig(vision=ViTConfig(), text=TextConfig(layers=1)), "vit_base_patch16_224"),
        (CLIPConfig(vision=ViTConfig(patch_size=32), text=TextConfig(layers=1)), "vit_base_patch32_224"),
        (CLIPConfig(vision=ViTConfig(width=384, heads=6), text=TextConfig(layers=1)), "vit_small_patch16_224"),
        (CLIPConfig(vision=ViTConfig(width=1024, heads=16, layers=24), text=TextConfig()), "vit_large_patch16_224"),
    ],
)
def test_standard_vits_have_timms_names(config: CLIPConfig, name: str, tmp_path: Path):
    from rocket_fast.interop.open_clip_weights import _timm_vision, _vision_settings  # of whole models, unbuilt

    settings, _ = _vision_settings(config, tmp_path, 224)
    assert settings["timm_model_name"] == name
    assert _timm_vision(settings, None)[0] == config.vision


def test_what_open_clip_does_not_hold_is_refused_with_the_reason(tmp_path: Path):
    with_h = own_model(EXPORTED["with_h"])
    for head in ("h", "both"):
        with pytest.raises(ValueError, match=f"head: got '{head}', expected z: open_clip's models project with one"):
            write_open_clip(with_h, tmp_path, head=head)
    stem = ConvStemViTConfig(image_size=16, stem_widths=(8,), stem_blocks=(0,), width=8, layers=0)
    with pytest.raises(ValueError, match="got ConvStemViTConfig, which no class of open_clip holds"):
        write_open_clip(own_model(replace(TINY, vision=stem)), tmp_path)
    mixed = replace(TINY, vision=replace(TINY_VIT, norm_pre=True))
    with pytest.raises(ValueError, match="the text tower's activation, or a ViT as timm's are"):
        write_open_clip(own_model(mixed), tmp_path)
    write_open_clip(own_model(EXPORTED["shared_head"]), tmp_path, head="both")
