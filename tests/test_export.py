"""One embedding of both heads, and every file it is written to, read back by the package that reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_support import ids
from torch import Tensor, nn

from rocket_fast.batch import PackedText
from rocket_fast.config import TrainConfig
from rocket_fast.export import ExportedModel, ExportFormat, Head, SavedModel, export, load_model, save_model
from rocket_fast.image_augment import IMAGENET_MEAN, normalize
from rocket_fast.interop.open_clip import load_exported
from rocket_fast.loaders.cpu import iter_eval
from rocket_fast.models.clip import CLIPConfig, DualEncoder
from rocket_fast.models.heads import BYOLIPConfig, MLPHeadConfig, SharedHeadConfig
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import ConvStemViTConfig, ViTConfig
from rocket_fast.trainer import saved_run, train
from rocket_fast.zeroshot import Encoded, similarity

CL2L = CLIPConfig(
    vision=ViTConfig(image_size=16, patch_size=8, width=24, layers=2, heads=2),
    text=TextConfig(vocab_size=50, context_length=10, width=16, layers=2, heads=2),
    embed_dim=12,
    h_head=MLPHeadConfig(hidden=8),
)
CONV = ConvStemViTConfig(image_size=16, stem_widths=(8, 16), stem_blocks=(0, 1), width=16, layers=1, heads=2)
CONFIGS = {
    "vit": CL2L,
    "conv": replace(CL2L, vision=CONV),
    "shared": replace(CL2L, h_head=SharedHeadConfig()),
    "clip": replace(CL2L, h_head=None, vision=replace(CL2L.vision, checkpointing="blocks")),
}


def build(name: str = "vit") -> DualEncoder:
    """A model all of whose parameters and statistics are used."""
    torch.manual_seed(0)
    model = DualEncoder(CONFIGS[name])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model


def saved(name: str = "vit", **changes: Any) -> SavedModel:
    return SavedModel(model=build(name), image_size=16, **changes)


def pictures(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("z_weight", [0.0, 0.3, 1.0])
def test_a_plain_cosine_is_the_ensembles_score(name: str, z_weight: float):
    model = build(name).eval()
    exported = ExportedModel(model, z_weight=z_weight)
    with torch.no_grad():
        images = Encoded.of(*model.encode_image(pictures()))
        texts = Encoded.of(*model.encode_text(PackedText.from_padded(ids(5))))
        image_BD, text_BD = (
            exported.encode_image(pictures(), normalize=True),
            exported.encode_text(ids(5), normalize=True),
        )
    torch.testing.assert_close(image_BD @ text_BD.T, similarity(images, texts, z_weight), atol=1e-6, rtol=0)
    image, text, scale = exported(pictures(), ids(5))
    assert torch.equal(image, image_BD)
    assert torch.equal(text, text_BD)
    assert exported(text=ids(5))[0] is None
    expected = (z_weight / 0.07 + (1 - z_weight) / 0.1) if name in ("vit", "conv") else 1 / 0.07
    assert scale.item() == pytest.approx(expected)


@pytest.mark.parametrize("head", ["z", "h"])
def test_one_head_alone_is_its_own_output(head: Head):
    model = build().eval()
    exported = ExportedModel(model, head=head)
    number = ("z", "h").index(head)
    with torch.no_grad():
        torch.testing.assert_close(exported.encode_image(pictures()), model.encode_image(pictures())[number])
        own = model.encode_text(PackedText.from_padded(ids(5)))[number]
        torch.testing.assert_close(exported.encode_text(ids(5)), own, atol=1e-6, rtol=1e-6)
    assert exported.logit_scale.exp().item() == pytest.approx((1 / 0.07, 10)[number])
    assert model.encode_image(pictures())[0].requires_grad  # the copy is frozen, the model is not


def test_wrong_heads_and_weights_are_refused():
    with pytest.raises(ValueError, match="head: got 'h', expected z: the model has no head h"):
        ExportedModel(build("clip"), head="h")
    with pytest.raises(ValueError, match="head: got 'x', expected one of"):
        ExportedModel(build(), head="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"z_weight: got 1\.5, expected a number from 0 to 1"):
        ExportedModel(build(), z_weight=1.5)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_safetensors_come_back(name: str, tmp_path: Path):
    before = saved(name, head="z", z_weight=0.3, arguments={"lr": 3e-3, "model": "CL2L"})
    assert export(before, tmp_path / "out", "safetensors") == [tmp_path / "out" / "model.safetensors"]
    after = load_model(tmp_path / "out" / "model.safetensors")
    assert (after.head, after.z_weight, after.arguments) == ("z", 0.3, before.arguments)
    assert after.model.config == before.model.config
    state = after.model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in before.model.state_dict().items())


def test_what_serves_training_alone_is_left_out(tmp_path: Path):
    companion = BYOLIPConfig(hidden=7, out=5, predictor_hidden=4)
    model = DualEncoder(replace(CL2L, companion=companion))
    save_model(SavedModel(model=model, image_size=16), tmp_path / "model.safetensors")
    after = load_model(tmp_path / "model.safetensors").model
    assert after.companion is None
    assert after.momentum is None
    assert torch.equal(after.image_z.weight, model.image_z.weight)


def test_other_files_are_refused(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch", reason="the train extra brings safetensors")
    bare, text = tmp_path / "weights.safetensors", tmp_path / "text.safetensors"
    safetensors.save_file({"a": torch.zeros(1)}, str(bare))
    text.write_text("not tensors")
    with pytest.raises(ValueError, match="safetensors without a configuration', expected a file of rocket-fast import"):
        load_model(bare)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_model(text)
    with pytest.raises(ValueError, match="an existing file"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"out: got .*, expected a folder"):
        export(saved(), bare, "safetensors")
    with pytest.raises(ValueError, match="format: got 'caffe', expected one of"):
        export(saved(), tmp_path / "out", "caffe")  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["open_clip", "hf"])
def test_formats_of_one_linear_head(format: ExportFormat, tmp_path: Path):
    with pytest.raises(ValueError, match=r"head: got 'both', expected z: .* To have h or both, export to safetensors"):
        export(saved(), tmp_path, format)
    paths = export(saved(head="z"), tmp_path, format)
    assert sorted(paths) == sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert export(saved("shared"), tmp_path, format)


@pytest.mark.parametrize("name", ["vit", "conv"])
@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_programs_of_both_towers(format: ExportFormat, name: str, tmp_path: Path):
    """Any number of pictures and captions at once, one among them; ONNX to 1e-4, torch.export exactly."""
    runtime = pytest.importorskip("onnxruntime", reason="the export extra brings it") if format == "onnx" else None
    paths = export(saved(name, z_weight=0.3), tmp_path, format)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    expected = ExportedModel(build(name), z_weight=0.3)
    for tower, inputs in (("image", pictures), ("text", ids)):
        for count in (1, 5):
            value = inputs(count)
            if runtime is None:
                got = torch.export.load(tmp_path / f"{tower}.pt2").module()(value)
                tolerance = 1e-6
            else:
                session = runtime.InferenceSession(str(tmp_path / f"{tower}.onnx"))
                got = torch.from_numpy(session.run(None, {tower: value.numpy()})[0])
                tolerance = 1e-4
            own = expected.encode_image(value) if tower == "image" else expected.encode_text(value)
            torch.testing.assert_close(got, own, atol=tolerance, rtol=0)
    record = json.loads((tmp_path / "export.json").read_text())
    assert record["image"]["input"] == ["batch", 3, 16, 16]
    assert tuple(record["image"]["mean"]) == IMAGENET_MEAN


# --- a trained model in open_clip's own evaluation --------------------------------------------------------------------


@pytest.fixture
def trained(tiny_config: TrainConfig) -> TrainConfig:
    """The demo's kind of model: both heads, a CNN's stem; its averaged weights are the ones to use."""
    config = replace(tiny_config, loop=replace(tiny_config.loop, weight_average=0.9))
    train(config)
    return config


def test_open_clips_own_classes_classify_with_the_same_accuracy(tiny_config: TrainConfig, tmp_path: Path):
    """A trained ViT through head z, built by open_clip from the folder alone."""
    open_clip = pytest.importorskip("open_clip", reason="the test extra brings open_clip_torch")
    vision = ViTConfig(image_size=16, patch_size=4, width=24, layers=1, heads=2)
    loop = replace(tiny_config.loop, epochs=10, checkpoint_every=1000, eval_every_epochs=0)
    config = replace(tiny_config, model=replace(tiny_config.model, vision=vision), loop=loop)
    train(config)
    run, out = saved_run(config.folder, "last"), tmp_path / "out"
    export(run.using("z", None), out, "open_clip")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    assert own_accuracy(config, 1.0) == pytest.approx(open_clip_accuracy(config, model.eval(), tokenizer), abs=1e-4)


def own_accuracy(config: TrainConfig, z_weight: float) -> float:
    """Top-1 in percent, as the run wrote it down."""
    return json.loads((config.folder / "eval.json").read_text())["sets"][0]["accuracy"]["top1"][str(z_weight)]


@torch.no_grad()
def open_clip_accuracy(config: TrainConfig, model: Any, tokenizer: Any) -> float:
    """Top-1 in percent of the same pictures, by open_clip's zero-shot code."""
    open_clip = pytest.importorskip("open_clip", reason="the test extra brings open_clip_torch")
    (batch,) = iter_eval(config.eval.sets[0].shards, 16, 100)
    names = sorted(set(batch.captions))
    classifier_DC = open_clip.build_zero_shot_classifier(model, tokenizer, names, ["{}"])
    best_N = (model.encode_image(normalize(batch.images), normalize=True) @ classifier_DC).argmax(1)
    assert best_N.unique().numel() > 1
    return 100 * (best_N == torch.tensor([names.index(caption) for caption in batch.captions])).float().mean().item()


def test_open_clip_classifies_with_the_same_accuracy(trained: TrainConfig, tmp_path: Path):
    export(saved_run(trained.folder, "last"), tmp_path / "out", "safetensors")
    for z_weight in (0.0, 0.3, 0.5, 1.0):
        model, preprocess, tokenizer = load_exported(tmp_path / "out", z_weight=z_weight)
        accuracy = open_clip_accuracy(trained, model, tokenizer)
        assert accuracy == pytest.approx(own_accuracy(trained, z_weight), abs=1e-4)
        assert preprocess.transforms[-1].mean == IMAGENET_MEAN
    assert tokenizer(["red square"]).shape == (1, trained.model.text.context_length)
