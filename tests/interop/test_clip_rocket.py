"""The names of the published models, and the numbers of the original implementation (tiny models, training mode)."""

import argparse
import enum
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rocket_fast.batch import Embeddings, PackedText
from rocket_fast.interop.clip_rocket import config_from_shapes, from_clip_rocket, read_clip_rocket, to_clip_rocket
from rocket_fast.interop.weights import read_weights
from rocket_fast.models import vision
from rocket_fast.models.clip import CLIPConfig, DualEncoder
from rocket_fast.models.heads import (
    BarLIPConfig,
    BYOLIPConfig,
    SharedHeadConfig,
    SiamLIPConfig,
    SwALIPPrototypesConfig,
)
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import ConvStemViTConfig, TimmConfig, ViTConfig

FIXTURES = Path(__file__).parent.parent / "fixtures"
SHAPES: dict[str, dict[str, list[int]]] = json.loads((FIXTURES / "clip_rocket_state_dict_shapes.json").read_text())
ARRAYS = np.load(FIXTURES / "reference_models.npz")
CASES = ("cl2l", "cl2l_shared", "barlip", "siamlip", "clip", "swalip_prototypes")

TEXT = TextConfig()
PUBLISHED = {
    "CL2L_VITB16_CL2L": CLIPConfig(vision=vision.VIT_B16, text=TEXT),
    "CL2L_R50_CL2L": CLIPConfig(vision=TimmConfig(name="resnet50"), text=TEXT),
    "CL2L_VITS16MOCO_CL2L": CLIPConfig(vision=vision.VIT_S16, text=TEXT),
    "CL2L_VITS16MOCO_SIAMLIP": CLIPConfig(
        vision=vision.VIT_S16, text=TEXT, companion=SiamLIPConfig(separate_local=True)
    ),
    "CL2L_VITS16MOCO_BARLIP": CLIPConfig(vision=vision.VIT_S16, text=TEXT, companion=BarLIPConfig(separate_local=True)),
    "CL2L_VITB32_CL2L": CLIPConfig(vision=vision.VIT_B32, text=TEXT),
    "CL2L_CNEXTT_CL2L": CLIPConfig(vision=TimmConfig(name="convnext_tiny"), text=TEXT),
    "CLIP_VITB16_CLIP": CLIPConfig(vision=vision.VIT_B16, text=TEXT, h_head=None),
    "CLIP_R50_SWALIPV1": CLIPConfig(
        vision=TimmConfig(name="resnet50"), text=TEXT, h_head=None, companion=SwALIPPrototypesConfig()
    ),
}


def meta_model(config: CLIPConfig) -> DualEncoder:
    with torch.device("meta"):
        return DualEncoder(config)


@pytest.mark.parametrize("name", SHAPES)
def test_published_names_and_shapes(name):
    model = meta_model(PUBLISHED[name])
    exported = to_clip_rocket(model)
    assert {key: list(tensor.shape) for key, tensor in exported.items()} == SHAPES[name]
    returned = from_clip_rocket(exported)
    assert {key: tensor.shape for key, tensor in returned.items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("name", SHAPES)
def test_published_parameter_counts(name):
    buffers = re.compile(r".*\.(running_mean|running_var|num_batches_tracked)")
    published = sum(int(np.prod(shape)) for key, shape in SHAPES[name].items() if not buffers.fullmatch(key))
    assert sum(parameter.numel() for parameter in meta_model(PUBLISHED[name]).parameters()) == published


@pytest.mark.parametrize("name", SHAPES)
def test_configuration_is_read_off_the_shapes(name):
    assert config_from_shapes(SHAPES[name]) == PUBLISHED[name]


def reference_state(case: str) -> dict[str, Tensor]:
    prefix = f"{case}/state/"
    return {key.removeprefix(prefix): torch.from_numpy(ARRAYS[key]) for key in ARRAYS.files if key.startswith(prefix)}


def reference_model(case: str) -> DualEncoder:
    state = reference_state(case)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    model = DualEncoder(config_from_shapes(shapes, vision_heads=4, text_heads=4))
    model.load_state_dict(from_clip_rocket(state))
    return model


def named(embeddings: Embeddings, features: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Our outputs under the names that the fixture gives them."""
    values = {"logit_scale": embeddings.logit_scale}
    companion = embeddings.companion
    for side in ("image", "text"):
        values[f"feats_{side}"], *local = features[side]
        values |= {f"feats_{side}_local/{i}": value for i, value in enumerate(local)}
        values[f"z_{side}_global" if embeddings.h_logit_scale is not None else f"z_{side}"] = getattr(
            embeddings, f"{side}_z"
        )
        values |= {f"h_{side}_local/{i}": h for i, h in enumerate(getattr(embeddings, f"{side}_h"))}
        if companion is None:
            continue
        kinds = {"v": "h" if companion.logit_scale is not None else "v", "p": "p"}
        for ours, theirs in kinds.items():
            for i, value in enumerate(getattr(companion, f"{side}_{ours}")):
                values[f"{theirs}_{side}" if i == 0 else f"{theirs}_{side}_local/{i - 1}"] = value
    if embeddings.h_logit_scale is not None:
        values["h_logit_scale"] = embeddings.h_logit_scale
    if companion is not None and companion.logit_scale is not None:
        values["swalip_logit_scale"] = companion.logit_scale
    return values


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_original(case):
    """To 4e-5 absolute plus 1e-5 relative: twice what the fixture itself is from float64, behind BarLIP's norms.

    Ours is as far, on another side: 1e-5 is met on Intel's processors, on AMD's Zen 3 it is 1.9e-5.
    """
    model = reference_model(case).train()
    features: dict[str, list[Tensor]] = {"image": [], "text": []}
    model.visual.register_forward_hook(lambda *call: features["image"].extend(call[2].split(5)))  # 5 a view
    model.text.register_forward_hook(lambda *call: features["text"].extend(call[2].split(5)))
    count = 1 if model.config.h_head is None else 3
    tokens = torch.from_numpy(ARRAYS[f"{case}/in/text"])
    images = tuple(torch.from_numpy(ARRAYS[f"{case}/in/image/{view}"]) for view in range(count))
    outputs = named(model(images, tuple(PackedText.from_padded(tokens[:, view]) for view in range(count))), features)

    prefix = f"{case}/out/"
    expected = {key.removeprefix(prefix): ARRAYS[key] for key in ARRAYS.files if key.startswith(prefix)}
    assert set(outputs) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            outputs[name].detach(),
            torch.from_numpy(value),
            atol=4e-5,
            rtol=1e-5,
            msg=lambda text, n=name: f"{n}: {text}",
        )


@pytest.mark.parametrize("case", CASES)
def test_reference_states_survive_the_round_trip(case):
    state, exported = reference_state(case), to_clip_rocket(reference_model(case))
    assert set(exported) == set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in exported.items())


def test_shared_modules_are_exported_twice():
    shared = SwALIPPrototypesConfig(hidden=4, out=3, prototypes=5, shared=True)
    tiny = {"vision": ViTConfig(image_size=8, patch_size=8, width=4, layers=1, heads=1), "embed_dim": 4}
    text = TextConfig(vocab_size=9, context_length=4, width=4, layers=1, heads=1)
    exported = to_clip_rocket(DualEncoder(CLIPConfig(**tiny, text=text, h_head=SharedHeadConfig(), companion=shared)))
    for one, other in (
        ("image_prototypes.weight_v", "text_prototypes.weight_v"),
        ("image_projector.weight", "l2l_image_projector.weight"),
    ):
        assert exported[one].data_ptr() == exported[other].data_ptr()


def test_the_averaged_encoder_is_left_out():
    config = CLIPConfig(vision=vision.VIT_S16, text=TEXT, companion=BYOLIPConfig(separate_local=True))
    assert set(to_clip_rocket(meta_model(config))) == set(SHAPES["CL2L_VITS16MOCO_SIAMLIP"])


def test_names_of_a_distributed_checkpoint():
    state = reference_state("siamlip")
    wrapped = from_clip_rocket({f"module.{name}": tensor for name, tensor in state.items()})
    assert set(wrapped) == set(from_clip_rocket(state))


def test_unknown_names_are_refused_by_name():
    with pytest.raises(ValueError, match=r"state: got \['queue', 'queue_ptr'\]"):
        from_clip_rocket({"queue": torch.zeros(1), "queue_ptr": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model: got \['visual\.stem\.stage0\.0\.weight', "):
        to_clip_rocket(meta_model(CLIPConfig(vision=ConvStemViTConfig(), text=TEXT)))


def test_a_shared_head_must_be_head_z():
    state = reference_state("cl2l_shared")
    state["l2l_text_projector.weight"] = state["l2l_text_projector.weight"] + 1
    with pytest.raises(ValueError, match=r"l2l_text_projector\.weight: got 'another matrix'"):
        from_clip_rocket(state)


def test_widths_without_published_heads_need_a_number():
    shapes = {name: tensor.shape for name, tensor in reference_state("clip").items()}
    with pytest.raises(ValueError, match="vision_heads: got None, expected the number of heads of a ViT 32 wide"):
        config_from_shapes(shapes, text_heads=4)


def test_checkpoints_are_read_with_their_arguments(tmp_path: Path):
    state = reference_state("cl2l")
    arguments = argparse.Namespace(model="CL2L_VITB16", lr=3e-3, betas=(0.9, 0.98), resume=None, best=np.float64(42.5))
    path = tmp_path / "checkpoint.pt"
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 25, "state_dict": wrapped, "best_acc1": np.float64(42.5), "args": arguments}, path)
    file = read_weights(path)
    assert file.arguments == vars(arguments)
    shapes = {name: tensor.shape for name, tensor in file.state.items()}
    config = config_from_shapes(shapes, vision_heads=4, text_heads=4)
    with pytest.raises(ValueError, match="vision_heads: got None, expected the number of heads of a ViT 32 wide"):
        read_clip_rocket(path)
    found = read_clip_rocket(path, vision_heads=4, text_heads=4)
    assert (found.config, found.arguments) == (config, vars(arguments))
    model, again = reference_model("cl2l").eval(), found.build()
    image = torch.from_numpy(ARRAYS["cl2l/in/image/0"])
    for own, expected in zip(again.encode_image(image), model.encode_image(image), strict=True):
        assert torch.equal(own, expected)


class Weekday(enum.Enum):
    MONDAY = 1


@pytest.mark.parametrize("value", [Path("x"), Weekday.MONDAY, print], ids=["path", "enum", "function"])
@pytest.mark.parametrize("zipped", [True, False])
def test_anything_but_plain_arguments_is_refused_by_name(value: object, zipped: bool, tmp_path: Path):
    path = tmp_path / "checkpoint.pt"
    content = {"state_dict": {"a": torch.zeros(1)}, "args": argparse.Namespace(out=value)}
    try:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    except Exception:
        pytest.skip("cannot be pickled from here")
    names = {"Path": r"pathlib\S+", "Weekday": r"\S*Weekday", "builtin_function_or_method": "print"}
    name = next(pattern for kind, pattern in names.items() if kind in [c.__name__ for c in type(value).__mro__])
    with pytest.raises(ValueError, match=f"got {name} in the pickle, expected tensors and plain values only"):
        read_clip_rocket(path)


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere\.pt', expected an existing file"):
        read_clip_rocket(tmp_path / "nowhere.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"damaged\.pt: cannot be read \("):
        read_clip_rocket(tmp_path / "damaged.pt")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "numbers.pt")
    with pytest.raises(ValueError, match="expected a state dict: tensors by name"):
        read_clip_rocket(tmp_path / "numbers.pt")
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="got 'no image_projector', expected a checkpoint of clip-rocket"):
        read_clip_rocket(tmp_path / "other.pt")
