import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rocket_fast.batch import Embeddings, PackedText
from rocket_fast.models.clip import CLIPConfig, DualEncoder, encode_pictures
from rocket_fast.models.heads import (
    BarLIPConfig,
    BYOLIPConfig,
    MLPHeadConfig,
    SharedHeadConfig,
    SiamLIPConfig,
    SwALIPConfig,
    SwALIPPrototypesConfig,
)
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import ConvStemViTConfig, VisionTower, ViTConfig, build_vision

CL2L = CLIPConfig(
    vision=ViTConfig(image_size=16, patch_size=8, width=12, layers=1, heads=3),
    text=TextConfig(vocab_size=50, context_length=10, width=8, layers=1, heads=2),
    embed_dim=6,
    h_head=MLPHeadConfig(hidden=7),
)
SIAMLIP = SiamLIPConfig(hidden=7, out=5, predictor_hidden=4)
CASES = {
    "clip": dataclasses.replace(CL2L, h_head=None),
    "cl2l": CL2L,
    "cl2l_shared": dataclasses.replace(CL2L, h_head=SharedHeadConfig()),
    "siamlip": dataclasses.replace(CL2L, companion=SIAMLIP),
    "siamlip_separate": dataclasses.replace(CL2L, companion=dataclasses.replace(SIAMLIP, separate_local=True)),
    "byolip": dataclasses.replace(
        CL2L, companion=BYOLIPConfig(hidden=7, out=5, predictor_hidden=4, separate_local=True, momentum=0.75)
    ),
    "barlip": dataclasses.replace(CL2L, companion=BarLIPConfig(hidden=7, out=9)),
    "swalip": dataclasses.replace(CL2L, companion=SwALIPConfig()),
    "swalip_prototypes": dataclasses.replace(
        CL2L, h_head=None, companion=SwALIPPrototypesConfig(hidden=7, out=5, prototypes=11)
    ),
    "swalip_prototypes_beside_cl2l": dataclasses.replace(
        CL2L, companion=SwALIPPrototypesConfig(hidden=7, out=5, prototypes=11, shared=True)
    ),
}


def build_model(config: CLIPConfig = CL2L) -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(config)


def views(count: int, samples: int = 6) -> tuple[tuple[Tensor, ...], tuple[PackedText, ...]]:
    generator = torch.Generator().manual_seed(count)
    images = tuple(torch.randn(samples, 3, 16, 16, generator=generator) for _ in range(count))
    ids = torch.randint(1, 48, (count, samples, 8), generator=generator).tolist()
    return images, tuple(PackedText.from_ids([[48, *words[i:], 49] for i, words in enumerate(view)]) for view in ids)


def strong_views(config: CLIPConfig) -> int:
    return 0 if config.h_head is None else 2


def tensors(embeddings: Embeddings) -> list[Tensor]:
    companion = embeddings.companion
    groups = [embeddings.image_h, embeddings.text_h]
    if companion is not None:
        groups += [companion.image_v, companion.text_v, companion.image_p, companion.text_p]
    scales = [embeddings.logit_scale, embeddings.h_logit_scale, companion and companion.logit_scale]
    present = [scale for scale in scales if scale is not None]
    return [embeddings.image_z, embeddings.text_z, *(tensor for group in groups for tensor in group), *present]


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_embeddings_have_the_declared_shapes(config):
    strong = strong_views(config)
    embeddings = build_model(config)(*views(1 + strong))
    assert embeddings.image_z.shape == embeddings.text_z.shape == (6, 6)
    assert [h.shape for h in (*embeddings.image_h, *embeddings.text_h)] == [(6, 6)] * 2 * strong
    assert embeddings.logit_scale.item() == pytest.approx(1 / 0.07)
    expected = {"cl2l_shared": 1 / 0.07}.get(next(name for name, c in CASES.items() if c is config), 10)
    assert (embeddings.h_logit_scale is None) == (config.h_head is None)
    assert embeddings.h_logit_scale is None or embeddings.h_logit_scale.item() == pytest.approx(expected)
    assert all(tensor.isfinite().all() for tensor in tensors(embeddings))


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_gradients_reach_every_parameter(config):
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    outputs = [t for t in tensors(model(*views(1 + strong_views(config)))) if t.requires_grad]
    sum((t * torch.randn(t.shape, generator=generator)).sum() for t in outputs).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert name.startswith("momentum.") or name.endswith("prototypes.gain"), name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.ndim < 2 or parameter.grad.abs().max() > 0, name


STEM = ConvStemViTConfig(image_size=16, stem_widths=(4, 8), stem_blocks=(0, 1), width=12, layers=1, heads=3)


@pytest.mark.parametrize("vision", [CL2L.vision, STEM], ids=["vit", "batch norm"])
@pytest.mark.parametrize("name", [name for name, config in CASES.items() if config.companion is not None])
def test_unpaired_pictures_go_through_the_strong_heads_and_change_nothing_else(name, vision):
    model = build_model(dataclasses.replace(CASES[name], vision=vision)).double()
    images, texts = views(1 + strong_views(model.config))
    images, unpaired = (tuple(view.double() for view in side) for side in (images, views(2, samples=4)[0]))
    alone, beside = model(images, texts), model(images, texts, unpaired)
    torch.testing.assert_close(tensors(beside), tensors(alone))
    assert alone.unpaired is None

    def expected(encoder, heads) -> list[Tensor]:
        projector = getattr(heads.image_projector, "strong", heads.image_projector)
        return [projector(encoder.visual(view)) for view in unpaired]

    found, heads = beside.unpaired, model.companion
    if heads is None:
        torch.testing.assert_close(list(found.image_v), [model.image_h(model.visual(view)) for view in unpaired])
        assert found.image_p == ()
        return
    v = expected(model, heads)
    torch.testing.assert_close(list(found.image_v), v if model.momentum is None else expected(*[model.momentum] * 2))
    assert all(view.requires_grad == (model.momentum is None) for view in found.image_v)
    predict = getattr(heads, "image_prototypes", None) or getattr(
        getattr(heads, "image_predictor", None), "strong", None
    )
    torch.testing.assert_close(list(found.image_p), [] if predict is None else [predict(view) for view in v])
    assert all(view.shape[0] == 4 for view in (*found.image_v, *found.image_p))


def test_unpaired_pictures_need_a_companion_and_two_views():
    images, texts = views(3)
    with pytest.raises(ValueError, match=r"unpaired: got '2 views', expected none: model.companion is None"):
        build_model()(images, texts, images[1:])
    with pytest.raises(ValueError, match=r"unpaired: got '1 views', expected two strong views or more"):
        build_model(CASES["barlip"])(images, texts, images[:1])


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_without_strong_views(config):
    embeddings = build_model(config)(*views(1))
    assert embeddings.image_h == embeddings.text_h == ()
    if embeddings.companion is not None:
        assert len(embeddings.companion.image_v) == len(embeddings.companion.text_v) == 1


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_state_survives_a_round_trip_and_a_deep_copy(config):
    model, other = build_model(config).eval(), DualEncoder(config).eval()
    other.load_state_dict(model.state_dict())
    batch = views(1 + strong_views(config))
    expected = tensors(model(*batch))
    for again in (other, copy.deepcopy(model)):
        for left, right in zip(expected, tensors(again(*batch)), strict=True):
            torch.testing.assert_close(left, right)
        assert len(list(again.parameters())) == len(list(model.parameters()))


def test_numbers_of_views_are_checked():
    images, texts = views(3)
    with pytest.raises(ValueError, match=r"texts: got '2 views', expected as many as images, 3"):
        build_model()(images, texts[:2])
    with pytest.raises(ValueError, match=r"images: got '0 views'"):
        build_model()((), ())
    with pytest.raises(ValueError, match=r"images: got '3 views', expected the weak view alone: model.h_head is None"):
        build_model(CASES["clip"])(images, texts)


def test_batch_norm_heads_see_one_view_at_a_time():
    model, ((*images, last), texts) = build_model(), views(3)
    one, other = model((*images, last), texts), model((*images, 9 * last), texts)
    torch.testing.assert_close(one.image_h[0], other.image_h[0])
    assert not torch.allclose(one.image_h[1], other.image_h[1])


def test_dropout_acts_on_strong_views_only():
    model = build_model(dataclasses.replace(CL2L, text=dataclasses.replace(CL2L.text, dropout=0.5)))
    images, texts = views(3)
    one, other = model(images, texts), model(images, texts)
    torch.testing.assert_close(one.text_z, other.text_z)
    for left, right in zip(one.text_h, other.text_h, strict=True):
        assert not torch.allclose(left, right)


def test_encoding_one_view_equals_forward():
    model, (images, texts) = build_model().eval(), views(2)
    embeddings = model(images, texts)
    image_z, _ = model.encode_image(images[0])
    text_z, _ = model.encode_text(texts[0])
    torch.testing.assert_close(image_z, embeddings.image_z)
    torch.testing.assert_close(text_z, embeddings.text_z)
    _, image_h = model.encode_image(images[1])
    _, text_h = model.encode_text(texts[1])
    torch.testing.assert_close(image_h, embeddings.image_h[0])
    torch.testing.assert_close(text_h, embeddings.text_h[0])


def test_shared_head_is_head_z():
    model, (images, texts) = build_model(CASES["cl2l_shared"]), views(2)
    embeddings = model(images, texts)
    torch.testing.assert_close(embeddings.image_h[0], model.encode_image(images[1])[0])
    torch.testing.assert_close(embeddings.text_h[0], model.encode_text(texts[1])[0])
    assert model.encode_image(images[0])[1] is None
    assert model.encode_text(texts[0])[1] is None
    assert model.h_logit_scale is None
    plain = build_model(CASES["clip"])
    assert len(list(model.parameters())) == len(list(plain.parameters()))


def test_scales_are_clamped_to_1_and_100():
    for config in (CL2L, CASES["swalip_prototypes"]):
        model = build_model(config)
        scales = [p for name, p in model.named_parameters() if name.endswith("logit_scale")]
        assert len(scales) == 2
        for start, end in ((-1.0, 0.0), (1.5, 1.5), (7.0, math.log(100))):
            for scale in scales:
                scale.data.fill_(start)
            model.clamp_logit_scales_()
            assert [scale.item() for scale in scales] == pytest.approx([end, end])


def byolip(**changes: object) -> DualEncoder:
    return build_model(dataclasses.replace(CASES["byolip"], **changes))


def trained_and_average(model: DualEncoder) -> list[tuple[Tensor, Tensor]]:
    """Pairs by name: every parameter of towers and projectors, and its average."""
    trained = dict(model.named_parameters())
    places = {name: name if name.startswith(("visual.", "text.")) else f"companion.{name}" for name in averages(model)}
    return [(trained[place], averages(model)[name]) for name, place in places.items()]


def averages(model: DualEncoder) -> dict[str, Tensor]:
    return dict(model.momentum.named_parameters())


def test_momentum_encoder_starts_as_a_copy_and_is_not_trained():
    model = byolip()
    pairs = trained_and_average(model)
    expected = [n for n, _ in model.named_parameters() if n.startswith(("visual.", "text.", "companion."))]
    assert len(pairs) == len([name for name in expected if "_predictor" not in name])
    for trained, average in pairs:
        assert torch.equal(trained, average)
        assert trained is not average
        assert not average.requires_grad


def test_momentum_is_an_exponential_average_of_parameters():
    model = byolip()
    expected = [average.clone().double() for _, average in trained_and_average(model)]
    buffers = {name: buffer.clone() for name, buffer in model.momentum.named_buffers()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        model.update_momentum_()
        pairs = trained_and_average(model)
        expected = [0.75 * old + 0.25 * new.double() for old, (new, _) in zip(expected, pairs, strict=True)]
    for value, (_, average) in zip(expected, trained_and_average(model), strict=True):
        torch.testing.assert_close(average, value.float())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.momentum.named_buffers())


def test_byolip_targets_are_the_averaged_encoders_without_gradient():
    model, (images, texts) = byolip(), views(3)
    copied = copy.deepcopy(model.companion)
    with torch.no_grad():
        for parameter in model.companion.parameters():
            parameter.add_(torch.randn_like(parameter))
    outputs = model(images, texts).companion
    image_features = [model.visual(image) for image in images]
    text_features = [model.text(text, dropout_from=0 if view else None) for view, text in enumerate(texts)]
    before, now = copied(image_features, text_features), model.companion(image_features, text_features)
    for targets, averaged in ((outputs.image_v, before.image_v), (outputs.text_v, before.text_v)):
        assert not any(target.requires_grad for target in targets)
        torch.testing.assert_close(targets, tuple(value.detach() for value in averaged))
    for predictions, trained in ((outputs.image_p, now.image_p), (outputs.text_p, now.text_p)):
        assert all(prediction.requires_grad for prediction in predictions)
        torch.testing.assert_close(predictions, trained)


def test_momentum_encoders_batch_norm_follows_its_own_views():
    vision = ConvStemViTConfig(image_size=16, stem_widths=(4,), stem_blocks=(1,), width=12, layers=0, heads=1)
    model = byolip(vision=vision)
    model(*views(3))
    online, target = model.visual.state_dict(), model.momentum.visual.state_dict()
    assert target["stem.stage0.1.num_batches_tracked"] == 3
    torch.testing.assert_close(target["stem.stage0.1.running_mean"], online["stem.stage0.1.running_mean"])


def test_freezing_takes_prototype_gradients_only():
    model = build_model(CASES["swalip_prototypes"])
    loss = sum(tensor.sum() for tensor in tensors(model(*views(1))))
    loss.backward()
    model.freeze_gradients(100)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.freeze_gradients(99)
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == ["companion.image_prototypes.direction", "companion.text_prototypes.direction"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"embed_dim": 0}, "model.embed_dim"),
        ({"temperature": 3.0}, "model.temperature"),
        ({"h_head": None, "companion": SwALIPConfig()}, "model.h_head"),
    ],
)
def test_bad_fields_are_named(changes, name):
    with pytest.raises(ValueError, match=rf"^{name}: got "):
        dataclasses.replace(CL2L, **changes)


# --- views ------------------------------------------------------------------------------------------------------------


class Counting(VisionTower):
    """Remembers what it is called with; with a batch norm that looks at the whole batch, if asked."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3) if batch_norm else torch.nn.Identity()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image_BCHW: Tensor) -> Tensor:
        self.seen.append(tuple(image_BCHW.shape))
        return self.norm(image_BCHW).mean((2, 3)) * image_BCHW.shape[-1]


@pytest.mark.parametrize(
    ("batch_norm", "seen"),
    [(False, [(6, 3, 8, 8), (2, 3, 4, 4)]), (True, [(4, 3, 8, 8), (2, 3, 4, 4), (2, 3, 8, 8)])],
)
def test_views_of_one_size_run_together_unless_batch_norm_sees_them(batch_norm: bool, seen: list) -> None:
    images = tuple(torch.randn(count, 3, size, size) for count, size in ((4, 8), (2, 4), (2, 8)))
    tower = Counting(batch_norm)
    features = encode_pictures(tower, images)
    assert tower.seen == seen
    for image, found in zip(images, features, strict=True):
        torch.testing.assert_close(found, tower(image))


def test_a_vits_views_are_those_of_one_by_one() -> None:
    tower = build_vision(ViTConfig(image_size=8, patch_size=4, width=16, layers=2, heads=2))
    images = tuple(torch.randn(3, 3, 8, 8) for _ in range(3))
    for image, found in zip(images, encode_pictures(tower, images), strict=True):
        torch.testing.assert_close(found, tower(image))
