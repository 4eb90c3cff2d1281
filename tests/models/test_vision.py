import dataclasses
import sys

import pytest
import torch

from rocket_fast.errors import MissingExtra
from rocket_fast.models import vision
from rocket_fast.models.vision import ConvStemViTConfig, TimmConfig, ViTConfig, build_vision

VIT = ViTConfig(image_size=24, patch_size=8, width=12, layers=2, heads=3)
CONV = ConvStemViTConfig(image_size=16, stem_widths=(4, 6), stem_blocks=(2, 1), width=12, layers=2, heads=3)


def pictures(size: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


CONV_VARIANTS = [
    CONV,
    dataclasses.replace(CONV, layers=0),
    dataclasses.replace(CONV, layers=0, width=6),
    dataclasses.replace(CONV, stem_widths=(5,), stem_blocks=(1,)),
    dataclasses.replace(CONV, stem_widths=(4, 5, 6, 7), stem_blocks=(0, 0, 1, 0)),
]


@pytest.mark.parametrize("config", [VIT, *CONV_VARIANTS], ids=repr)
def test_features_have_the_towers_width(config):
    tower = build_vision(config)
    features = tower(pictures(config.image_size))
    assert features.shape == (3, config.width)
    assert tower.width == config.width
    assert features.isfinite().all()


@pytest.mark.parametrize("config", [VIT, CONV, dataclasses.replace(CONV, layers=0)], ids=repr)
def test_gradients_reach_every_parameter(config):
    tower = build_vision(config)
    for module in tower.modules():
        if isinstance(module, vision.ResidualBlock):
            torch.nn.init.ones_(module.norm2.weight)  # at 0 it keeps gradients from its branch
    tower(pictures(config.image_size)).pow(3).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0 or name.endswith("bias"), name


@pytest.mark.parametrize("config", [VIT, CONV], ids=repr)
def test_pictures_of_another_size_are_refused(config):
    size = config.image_size
    with pytest.raises(ValueError, match=rf"image: got shape \(3, 3, 8, 8\), expected shape \(B, 3, {size}, {size}\)"):
        build_vision(config)(pictures(8))


def test_stages_halve_the_resolution():
    tower = build_vision(dataclasses.replace(CONV, image_size=32, stem_widths=(4, 5, 6), stem_blocks=(0, 1, 2)))
    shapes = []
    for stage in tower.stem:
        stage.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape[1:])))
    tower(pictures(32))
    assert shapes == [(4, 16, 16), (5, 8, 8), (6, 4, 4)]
    blocks = [sum(isinstance(part, vision.ResidualBlock) for part in stage) for stage in tower.stem]
    assert blocks == [0, 1, 2]


def test_batch_norm_is_per_call_and_a_vit_has_none():
    picture, others = pictures(16, 2), 5 * pictures(16, 6)[:2]
    conv = build_vision(CONV)
    torch.testing.assert_close(conv(picture), conv(picture))
    assert not torch.allclose(conv(picture), conv(torch.cat([picture, others]))[:2], atol=1e-3)
    vit = build_vision(dataclasses.replace(VIT, image_size=16))
    torch.testing.assert_close(vit(picture), vit(torch.cat([picture, others]))[:2])


def test_vit_checkpointing_changes_no_value_and_no_gradient():
    results = []
    for checkpointing in ("none", "cheap", "blocks"):
        torch.manual_seed(0)
        tower = build_vision(dataclasses.replace(VIT, checkpointing=checkpointing))
        features = tower(pictures(24))
        features.pow(3).sum().backward()
        results.append([features.detach(), *(parameter.grad for parameter in tower.parameters())])
    for plain, *recomputed in zip(*results, strict=True):
        for other in recomputed:
            torch.testing.assert_close(plain, other)


def test_pictures_of_other_sizes_interpolate_the_positions():
    timm = pytest.importorskip("timm.layers")
    tower = build_vision(dataclasses.replace(VIT, any_size=True)).double()
    torch.nn.init.normal_(tower.pos_embed)
    own = tower.config.image_size
    torch.testing.assert_close(tower(pictures(own).double()), build_like(tower, any_size=False)(pictures(own).double()))
    expected = timm.resample_abs_pos_embed(tower.pos_embed.float(), new_size=[2, 4], num_prefix_tokens=1)[:, 1:]
    torch.testing.assert_close(tower._positions(2 * 8, 4 * 8).float(), expected)
    assert tower(torch.randn(2, 3, 16, 32, dtype=torch.float64)).shape == (2, VIT.width)
    with pytest.raises(ValueError, match=r"image: got 20 x 32 pixels, expected multiples of patch_size = 8"):
        tower(torch.randn(2, 3, 20, 32, dtype=torch.float64))


def build_like(tower, **changes):
    other = build_vision(dataclasses.replace(tower.config, **changes)).double()
    other.load_state_dict(tower.state_dict())
    return other


def test_patches_are_dropped_in_training_only():
    tower = build_vision(dataclasses.replace(VIT, patch_keep=0.5)).double()
    picture = pictures(VIT.image_size).double()
    torch.testing.assert_close(tower.eval()(picture), build_like(tower, patch_keep=1.0)(picture))
    tower.train()
    seen = torch.zeros(1000)
    for _ in range(60):
        patches = torch.arange(18.0).view(2, 9, 1)
        kept = tower._drop_patches(patches)
        assert kept.shape == (2, 4, 1)  # round(4.5)
        assert ((kept >= 0) & (kept < 9))[0].all()
        assert ((kept >= 9) & (kept < 18))[1].all()
        assert len(kept.unique()) == 8
        seen[kept.flatten().long()] += 1
    assert (seen[:18] > 10).all()  # 27 expected
    assert not torch.equal(tower(picture), tower(picture))
    gradient = torch.autograd.grad(tower(picture).sum(), tower.pos_embed)[0]
    assert gradient.abs().sum() > 0


def test_vit_sees_where_a_patch_is():
    tower, picture = build_vision(VIT).double(), pictures(24).double()
    torch.nn.init.normal_(tower.pos_embed)
    assert not torch.allclose(tower(picture), tower(picture.roll(8, dims=3)))
    torch.nn.init.zeros_(tower.pos_embed)
    torch.testing.assert_close(tower(picture), tower(picture.roll(8, dims=3)))


def test_vit_initialisation_is_that_of_timm():
    torch.manual_seed(0)
    tower = build_vision(ViTConfig(image_size=64, patch_size=8, width=128, layers=1, heads=4))
    block = tower.blocks[0]
    for weight in (block.qkv.weight, block.proj.weight, block.fc1.weight, block.fc2.weight, tower.pos_embed):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for layer in (block.qkv, block.proj, block.fc1, block.fc2):
        assert layer.bias.abs().max() == 0
    assert tower.cls_token.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (vision.VIT_S16, 21_665_664),
        (vision.VIT_B16, 85_798_656),
        (vision.VIT_B32, 87_455_232),
        (vision.VIT_L16, 303_301_632),
        (TimmConfig(name="resnet50"), 23_508_032),
        (TimmConfig(name="convnext_tiny"), 27_820_128),
    ],
    ids=repr,
)
def test_named_towers_have_the_published_sizes(config, parameters):
    with torch.device("meta"):
        tower = build_vision(config)
    assert sum(parameter.numel() for parameter in tower.parameters()) == parameters


@pytest.mark.parametrize(("name", "width"), [("resnet50", 2048), ("convnext_tiny", 768)])
def test_timm_towers_pool_their_features_at_any_size(name, width):
    with torch.device("meta"):
        tower = build_vision(TimmConfig(name=name))
        assert tower.width == width
        assert tower(torch.empty(2, 3, 64, 96)).shape == (2, width)


def test_timm_towers_work_on_channels_last():
    seen = []
    tower = build_vision(TimmConfig(name="resnet50"))
    tower.trunk.layer1.register_forward_hook(lambda *call: seen.append(call[2]))
    tower(torch.randn(2, 3, 64, 64))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].is_contiguous()


def test_missing_timm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"timm .* pip install 'rocket-fast\[train\]'"):
        build_vision(TimmConfig(name="resnet50"))


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (VIT, "image_size", 25),
        (VIT, "patch_size", 0),
        (VIT, "width", 13),
        (VIT, "heads", 0),
        (VIT, "layers", 0),
        (VIT, "mlp_ratio", 0.0),
        (CONV, "image_size", 15),
        (CONV, "stem_widths", ()),
        (CONV, "stem_blocks", (1,)),
        (CONV, "layers", -1),
        (CONV, "width", 13),
        (TimmConfig(name="resnet50"), "name", "resnet18"),
    ],
)
def test_bad_fields_are_named(config, field, value):
    with pytest.raises(ValueError, match=rf"vision\.{field}: got "):
        dataclasses.replace(config, **{field: value})


def test_options_of_published_vits():
    config = dataclasses.replace(VIT, activation="quick_gelu", norm_pre=True, patch_bias=False, norm_eps=1e-5)
    tower, image = build_vision(config), pictures(24)
    assert set(build_vision(VIT).state_dict()) ^ set(tower.state_dict()) == {
        "norm_pre.weight",
        "norm_pre.bias",
        "patch_embed.bias",
    }
    assert tower(image).isfinite().all()
    assert {module.eps for module in tower.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-5}
    with torch.no_grad():
        tower.norm_pre.weight.zero_()
        tower.norm_pre.bias.zero_()
    torch.testing.assert_close(tower(image)[0], tower(image)[1])  # what comes before the norm has no say any more
    for wrong, message in (({"activation": "relu"}, "vision.activation: got 'relu'"), ({"norm_eps": 0.0}, "norm_eps")):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(VIT, **wrong)
