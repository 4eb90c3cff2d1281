import copy

import pytest
import torch
from torch import nn

from rocket_fast.models.heads import (
    BarLIPConfig,
    BYOLIPConfig,
    LinearHead,
    MLPHead,
    MLPHeadConfig,
    PrototypeHeads,
    Prototypes,
    SiamLIPConfig,
    SiamLIPHeads,
    SwALIPConfig,
    SwALIPPrototypesConfig,
    ViewHeads,
    build_companion,
)


def layers(head: nn.Module) -> list[str]:
    return [f"{name}:{type(module).__name__}" for name, module in head.named_children()]


def test_linear_head_is_one_matrix():
    torch.manual_seed(0)
    head = LinearHead(256, 200)
    assert head.bias is None
    assert head.weight.std().item() == pytest.approx(1 / 16, rel=0.05)


def test_mlp_head_h():
    head = MLPHead(6, 5, 5, 4)
    names = ["fc1:Linear", "bn1:BatchNorm1d", "relu1:ReLU", "fc2:Linear", "bn2:BatchNorm1d", "relu2:ReLU", "fc3:Linear"]
    assert layers(head) == names
    assert head(torch.randn(3, 6)).shape == (3, 4)


def heads_of_every_kind() -> list[MLPHead]:
    return [
        MLPHead(6, 5, 7, 4),
        MLPHead(6, 5, 4, bias=False, last_bias=False, last_norm="plain"),
        MLPHead(6, 5, 5, 4, last_norm="affine"),
        MLPHead(6, 4, last_norm="plain"),
        MLPHead(6, 5, 4, bias=False),
        MLPHead(6, 4),
    ]


@pytest.mark.parametrize("index", range(len(heads_of_every_kind())))
@pytest.mark.parametrize("momentum", [0.1, None])
def test_working_together_layers_do_what_they_do_in_a_row(index, momentum):
    """Two steps of training, then evaluation: outputs, gradients, and every entry of the state."""
    head = heads_of_every_kind()[index].double()
    for name, parameter in head.named_parameters():
        if name.startswith("bn"):
            nn.init.normal_(parameter)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = momentum
    row = nn.Sequential(*copy.deepcopy(list(head)))
    for _ in range(2):
        x = torch.randn(9, 6, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [model(each) for model, each in zip((head, row), inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    state = dict(zip(head.state_dict(), row.state_dict().values(), strict=True))
    torch.testing.assert_close(head.state_dict(), state, check_dtype=True)
    for (name, mine), other in zip(head.named_parameters(), row.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(head.eval()(x), row.eval()(x))


def test_frozen_and_converted_norms_are_respected():
    head = MLPHead(6, 5, 4).double()
    nn.init.uniform_(head.bn1.running_mean)
    head.bn1.eval()
    x, before = torch.randn(3, 6, dtype=torch.float64), head.bn1.running_mean.clone()
    torch.testing.assert_close(head(x), nn.Sequential(*head)(x))
    assert head.bn1.running_mean.equal(before)
    head.train()
    expected = head(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(head)
    assert isinstance(converted.bn1, nn.SyncBatchNorm)
    assert converted(x).equal(expected)  # in a world of one, and on the CPU


def test_siamlip_heads_as_the_recipe_has_them():
    heads = build_companion(SiamLIPConfig(hidden=5, out=3, predictor_hidden=4), 6, 7)
    assert isinstance(heads, SiamLIPHeads)
    projector, predictor = heads.image_projector.weak, heads.image_predictor.weak
    assert layers(projector) == ["fc1:Linear", "bn1:BatchNorm1d", "relu1:ReLU", "fc2:Linear", "bn2:BatchNorm1d"]
    assert projector.fc1.bias is None
    assert projector.fc2.bias is None
    assert not projector.bn2.affine
    assert layers(predictor) == ["fc1:Linear", "bn1:BatchNorm1d", "relu1:ReLU", "fc2:Linear"]
    assert predictor.fc1.bias is None
    assert predictor.fc2.bias is not None
    assert predictor.fc1.weight.shape == (4, 3)


def test_companions_give_what_their_losses_read():
    image, text = [torch.randn(8, 6) for _ in range(3)], [torch.randn(8, 7) for _ in range(3)]
    siamlip = build_companion(SiamLIPConfig(hidden=5, out=3, predictor_hidden=4), 6, 7)(image, text)
    counts = [len(views) for views in (siamlip.image_v, siamlip.text_v, siamlip.image_p, siamlip.text_p)]
    assert counts == [3, 3, 3, 3]
    barlip = build_companion(BarLIPConfig(hidden=5, out=9), 6, 7)(image, text)
    assert [v.shape for v in (*barlip.image_v, *barlip.text_v)] == [(8, 9)] * 6
    assert barlip.image_p == barlip.text_p == ()
    prototypes = build_companion(SwALIPPrototypesConfig(hidden=5, out=3, prototypes=11), 6, 7)(image, text)
    assert [p.shape for p in (*prototypes.image_p, *prototypes.text_p)] == [(8, 11)] * 2
    assert prototypes.logit_scale.item() == pytest.approx(10)
    assert build_companion(SwALIPConfig(), 6, 7) is None
    assert build_companion(None, 6, 7) is None


@pytest.mark.parametrize("separate", [False, True])
def test_view_heads(separate):
    heads = ViewHeads(lambda: LinearHead(4, 2), separate=separate)
    weak, first, second = torch.randn(3, 5, 4)
    outputs = heads([weak, first, second])
    for output, head, view in zip(
        outputs, (heads.weak, heads.strong, heads.strong), (weak, first, second), strict=True
    ):
        torch.testing.assert_close(output, head(view))
    assert (heads.strong is heads.weak) != separate
    assert len(list(heads.parameters())) == 1 + separate
    assert len(heads([weak])) == 1


def test_batch_norm_takes_each_views_own_statistics():
    heads = ViewHeads(lambda: MLPHead(4, 3, last_norm="plain"), separate=False)
    weak, strong = torch.randn(6, 4), 10 + 3 * torch.randn(6, 4)
    for output in heads([weak, strong]):
        torch.testing.assert_close(output.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert heads.weak.bn1.num_batches_tracked == 2


def test_prototype_scores_are_cosines():
    prototypes = Prototypes(4, 6).double()
    v = torch.randn(5, 4, dtype=torch.float64)
    expected = nn.functional.cosine_similarity(v[:, None], prototypes.direction[None], dim=2)
    torch.testing.assert_close(prototypes(v), expected)
    torch.testing.assert_close(prototypes(3 * v), expected)
    with torch.no_grad():
        prototypes.direction.mul_(7)
    torch.testing.assert_close(prototypes(v), expected)
    assert [name for name, p in prototypes.named_parameters() if p.requires_grad] == ["direction"]


@pytest.mark.parametrize("shared", [False, True])
def test_prototypes_stay_where_they_are_at_first(shared):
    config = SwALIPPrototypesConfig(hidden=5, out=3, prototypes=4, shared=shared, freeze_steps=2)
    heads = PrototypeHeads(config, 6, 7)
    assert (heads.image_prototypes is heads.text_prototypes) == shared
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.1, weight_decay=0.5)
    before = heads.text_prototypes.direction.detach().clone()
    moved = []
    for step in range(3):
        optimizer.zero_grad()
        outputs = heads([torch.randn(8, 6)], [torch.randn(8, 7)])
        (outputs.image_p[0] - outputs.text_p[0]).square().sum().backward()
        heads.freeze_gradients(step)
        optimizer.step()
        moved.append(not torch.equal(heads.text_prototypes.direction, before))
    assert moved == [False, False, True]


def test_byolip_is_a_siamlip():
    assert isinstance(build_companion(BYOLIPConfig(hidden=5, out=3, predictor_hidden=4), 6, 7), SiamLIPHeads)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: MLPHeadConfig(hidden=0), "h_head.hidden"),
        (lambda: MLPHeadConfig(temperature=0.001), "h_head.temperature"),
        (lambda: SiamLIPConfig(out=0), "companion.out"),
        (lambda: BYOLIPConfig(predictor_hidden=-1), "companion.predictor_hidden"),
        (lambda: BYOLIPConfig(momentum=1.1), "companion.momentum"),
        (lambda: BarLIPConfig(lambda_=-1.0), "companion.lambda_"),
        (lambda: BarLIPConfig(scale=0.0), "companion.scale"),
        (lambda: SwALIPConfig(iterations=0), "companion.iterations"),
        (lambda: SwALIPConfig(epsilon=0.0), "companion.epsilon"),
        (lambda: SwALIPConfig(weight=-1.0), "companion.weight"),
        (lambda: SwALIPPrototypesConfig(prototypes=0), "companion.prototypes"),
        (lambda: SwALIPPrototypesConfig(freeze_steps=-1), "companion.freeze_steps"),
        (lambda: SwALIPPrototypesConfig(temperature=2.0), "companion.temperature"),
        (lambda: build_companion("siamlip", 6, 7), "companion"),
    ],
)
def test_bad_fields_are_named(build, name):
    with pytest.raises(ValueError, match=rf"^{name}: got "):
        build()
