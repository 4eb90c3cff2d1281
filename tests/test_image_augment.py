"""What is drawn for a view, and the presets' numbers."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rocket_fast.image_augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LUMA,
    NO_SOLARIZE,
    ImageAugmentConfig,
    ViewConfig,
    asymmetric_augment,
    centre_view,
    draw,
    normalize,
    plain_augment,
    recipe_augment,
    strong_view,
    weak_view,
)

EVERYTHING = ViewConfig(
    scale=(0.08, 1.0),
    flip_prob=0.5,
    jitter_prob=0.8,
    gray_prob=0.2,
    blur_prob=0.5,
    solarize_prob=0.2,
    rotate_degrees=20,
    shear_degrees=10,
    zoom_out=1.3,
    color_matrix_std=0.3,
    color_shift=0.1,
    erase_prob=0.3,
)


def generator(seed):
    return np.random.default_rng(seed)


@settings(deadline=None)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), seed=st.integers(0, 10**6))
def test_windows_are_whole_pixels_inside_the_picture(height, width, seed):
    params = draw(EVERYTHING, height, width, generator(seed))
    top, left, h, w = params.window
    assert all(value == int(value) for value in params.window)
    assert top >= 0
    assert left >= 0
    assert h >= 1
    assert w >= 1
    assert top + h <= height
    assert left + w <= width
    e_top, e_left, e_height, e_width = params.erase
    assert e_top >= 0
    assert e_left >= 0
    assert e_top + e_height <= 1 + 1e-12
    assert e_left + e_width <= 1 + 1e-12


def test_crops_are_distributed_as_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    rng, view, image = generator(0), strong_view(), torch.empty(3, 150, 200)
    ours = np.array([draw(view, 150, 200, rng).window for _ in range(4000)])
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    tolerance = 5 * np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / 4000)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < tolerance).all()
    areas, others = ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]
    assert np.abs(np.quantile(areas, [0.1, 0.5, 0.9]) / np.quantile(others, [0.1, 0.5, 0.9]) - 1).max() < 0.1


def test_a_crop_that_never_fits_is_central():
    params = draw(ViewConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0)), 10, 101, generator(0))
    assert params.window == (0.0, 45.0, 10.0, 10.0)


@pytest.mark.parametrize(
    ("field", "off"),
    [
        ("flip_prob", 0.0),
        ("jitter_prob", 0.0),
        ("gray_prob", 0.0),
        ("blur_prob", 0.0),
        ("solarize_prob", 0.0),
        ("rotate_degrees", 0.0),
        ("erase_prob", 0.0),
        ("scale", (1.0, 1.0)),
    ],
)
def test_switching_one_decision_off_leaves_the_others(field, off):
    touched = {
        "jitter_prob": {"matrix", "pivot", "shift"},
        "gray_prob": {"matrix", "pivot", "shift"},
        "blur_prob": {"blur_sigma"},
        "solarize_prob": {"solarize"},
        "rotate_degrees": {"warp"},
        "erase_prob": {"erase"},
        "scale": {"window"},
        "flip_prob": {"flip"},
    }[field]
    without = dataclasses.replace(EVERYTHING, **{field: off})
    for seed in range(30):
        a, b = draw(EVERYTHING, 60, 80, generator(seed)), draw(without, 60, 80, generator(seed))
        for f in dataclasses.fields(a):
            if f.name not in touched:
                assert np.array_equal(getattr(a, f.name), getattr(b, f.name)), f.name


def test_frequencies_and_ranges():
    drawn = [draw(EVERYTHING, 100, 100, generator(seed)) for seed in range(2000)]
    assert abs(np.mean([p.flip for p in drawn]) - 0.5) < 0.05
    assert abs(np.mean([p.blur_sigma > 0 for p in drawn]) - 0.5) < 0.05
    assert abs(np.mean([p.solarize == 128 for p in drawn]) - 0.2) < 0.04
    assert abs(np.mean([p.erase[2] > 0 for p in drawn]) - 0.3) < 0.05
    assert {p.solarize for p in drawn} == {128, NO_SOLARIZE}
    sigmas = [p.blur_sigma for p in drawn if p.blur_sigma > 0]
    assert 0.1 <= min(sigmas) < 0.15
    assert 1.95 < max(sigmas) <= 2.0


def test_jitter_is_brightness_contrast_saturation_hue():
    view = ViewConfig(jitter=(0.4, 0.0, 0.0, 0.0), jitter_prob=1.0)
    factors = np.array([draw(view, 8, 8, generator(seed)).matrix for seed in range(200)])
    assert np.allclose(factors, factors[:, :1, :1] * np.eye(3))
    assert 0.6 <= factors.max(axis=(1, 2)).min() < 0.65
    assert 1.35 < factors.max() <= 1.4
    contrast = draw(dataclasses.replace(view, jitter=(0.0, 0.4, 0.0, 0.0)), 8, 8, generator(3))
    assert np.allclose(contrast.matrix.sum(axis=1) + contrast.pivot, 1)  # a uniform picture stays as it is
    assert not np.allclose(contrast.pivot, 0)


def test_contrast_pivots_on_the_mean_of_the_brightened_picture():
    """bc x + (1 - c) b mean: matrix and pivot add up to b, and their ratio gives c, each within its own limits."""
    view = ViewConfig(jitter=(0.4, 0.4, 0.0, 0.0), jitter_prob=1.0)
    drawn = [draw(view, 8, 8, generator(seed)) for seed in range(500)]
    brightness = np.array([p.matrix[0, 0] + p.pivot[0] for p in drawn])
    contrast = np.array([p.matrix[0, 0] for p in drawn]) / brightness
    for factor in (brightness, contrast):
        assert 0.6 <= factor.min() < 0.62
        assert 1.38 < factor.max() <= 1.4


def test_saturation_and_hue_keep_luma_and_greys():
    params = draw(ViewConfig(jitter=(0.0, 0.0, 0.4, 0.1), jitter_prob=1.0), 8, 8, generator(1))
    assert np.allclose(params.matrix.sum(axis=1), 1)
    assert np.allclose(np.array(LUMA) @ params.matrix, LUMA, atol=1e-12)
    assert not np.allclose(params.matrix, np.eye(3), atol=0.05)


def test_hue_turns_by_the_angle():
    """Half a turn about the grey axis, twice, is nothing; a hue turn keeps the chroma's length in YIQ."""
    from rocket_fast.image_augment import _CHROMA, _GRAY, _TURN

    half = _GRAY + math.cos(math.pi) * _CHROMA + math.sin(math.pi) * _TURN
    assert np.allclose(half @ half, np.eye(3))
    third = _GRAY + math.cos(2 * math.pi / 3) * _CHROMA + math.sin(2 * math.pi / 3) * _TURN
    assert np.allclose(third @ third @ third, np.eye(3))
    # towards the same side as torchvision: red turned a little forward gains green
    assert (_GRAY + math.cos(0.3) * _CHROMA + math.sin(0.3) * _TURN)[1, 0] > 0


def test_grayscale_wins():
    view = dataclasses.replace(EVERYTHING, gray_prob=1.0, color_matrix_std=0.0)
    params = draw(view, 8, 8, generator(0))
    assert np.allclose(params.matrix, params.matrix[:1])
    plain = draw(ViewConfig(gray_prob=1.0), 8, 8, generator(0))
    assert np.allclose(plain.matrix, np.tile(LUMA, (3, 1)))


def test_color_matrix_has_its_standard_deviation():
    view = ViewConfig(color_matrix_std=0.3)
    matrices = np.array([draw(view, 8, 8, generator(seed)).matrix for seed in range(1500)])
    assert np.allclose(matrices.mean(axis=0), np.eye(3), atol=0.04)
    assert np.allclose(matrices.std(axis=0), 0.3, atol=0.03)


def test_color_matrix_turns_about_mid_grey_and_the_shift_is_uniform():
    turned = [draw(ViewConfig(color_matrix_std=0.3), 8, 8, generator(seed)) for seed in range(20)]
    assert all(np.allclose(p.matrix @ np.full(3, 127.5) + p.shift, 127.5) for p in turned)
    shifts = np.array([draw(ViewConfig(color_shift=0.1), 8, 8, generator(seed)).shift for seed in range(1500)])
    assert np.abs(shifts).max() <= 25.5
    assert np.allclose(shifts.std(axis=0), 25.5 / np.sqrt(3), rtol=0.05)
    grays = draw(ViewConfig(color_shift=0.1, gray_prob=1.0), 8, 8, generator(0)).shift
    assert np.allclose(grays, grays[0])


def test_zooming_out_is_uniform_in_its_logarithm():
    warps = np.array([draw(ViewConfig(zoom_out=2.0), 8, 8, generator(seed)).warp for seed in range(1500)])
    assert np.array_equal(warps[:, [1, 2]], np.zeros((1500, 2)))
    assert np.array_equal(warps[:, 0], warps[:, 3])
    assert np.allclose(np.quantile(np.log2(warps[:, 0]), [0, 0.5, 1]), [0, 0.5, 1], atol=0.05)


def test_a_view_that_does_nothing():
    params = draw(ViewConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0)), 32, 32, generator(0))
    assert params.window == (0.0, 0.0, 32.0, 32.0)
    assert np.array_equal(params.matrix, np.eye(3))
    assert params.warp == (1.0, 0.0, 0.0, 1.0)
    assert not params.flip
    assert params.blur_sigma == 0


def test_presets_have_the_recipes_numbers():
    recipe = recipe_augment(224, strong_size=192)
    assert recipe.weak == weak_view(224) == ViewConfig(size=224, scale=(0.5, 1.0))
    assert len(recipe.strong) == 2
    for strong in recipe.strong:
        assert (strong.size, strong.scale, strong.flip_prob) == (192, (0.08, 1.0), 0.5)
        assert (strong.jitter, strong.jitter_prob, strong.gray_prob) == ((0.4, 0.4, 0.4, 0.1), 0.8, 0.2)
        assert (strong.blur_prob, strong.blur_sigma, strong.solarize_prob) == (0.5, (0.1, 2.0), 0.0)
    first, second = asymmetric_augment().strong
    assert (first.blur_prob, second.blur_prob) == (1.0, 0.1)
    assert (first.solarize_prob, second.solarize_prob) == (0.0, 0.2)
    assert first.jitter == second.jitter == (0.4, 0.4, 0.2, 0.1)
    assert plain_augment().views == (weak_view(),)
    assert ImageAugmentConfig(weak=weak_view(32), strong=(strong_view(16),)).views[1].size == 16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("scale", (0.5, 1.1)),
        ("scale", (0.6, 0.5)),
        ("ratio", (0.0, 1.0)),
        ("flip_prob", 1.5),
        ("jitter", (0.4, 0.4, 0.4, 0.6)),
        ("blur_sigma", (0.0, 1.0)),
        ("rotate_degrees", -1.0),
        ("zoom_out", 0.5),
        ("color_matrix_std", -0.1),
        ("color_shift", 1.5),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        ViewConfig(**{field: value})


def test_centre_view_has_torchvisions_geometry():
    view = centre_view(300, 451, 224)
    step = 300 / 224
    resized = int(224 * 451 / 300)
    assert view.window[0] == 0
    assert view.window[2] == pytest.approx(300)
    assert view.window[1] == pytest.approx(round((resized - 224) / 2) * 451 / resized)
    assert view.window[3] == pytest.approx(224 * step, rel=0.01)
    assert not view.bounded


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (images.double() / 255 - mean) / std
    got = normalize(images)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), expected, atol=1e-6, rtol=0)
    assert normalize(got) is got
    with pytest.raises(ValueError, match="images"):
        normalize(images.int())
