"""The numba view renderer against Pillow, cv2 and float64 formulas."""

import ctypes
import mmap
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rocket_fast.image_augment import NO_SOLARIZE, ViewParams, centre_view

cv2 = pytest.importorskip("cv2")
Image = pytest.importorskip("PIL.Image")
numba = pytest.importorskip("numba")
from rocket_fast.kernels import augment  # noqa: E402
from rocket_fast.kernels import resize as resize_module  # noqa: E402
from rocket_fast.kernels.resize import resize  # noqa: E402


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def render(source, params, height, width=None):
    out = np.full((3, height, width or height), 77, np.uint8)
    augment.render_view(source, params, out)
    return out.transpose(1, 2, 0).astype(np.int64)


def whole(source, **changes):
    return ViewParams(window=(0.0, 0.0, float(source.shape[0]), float(source.shape[1])), **changes)


def pillow(source, window, height, width):
    """Pillow's bicubic of a part of the picture, columns first in every version; the filter sees beyond the part."""
    top, left, h, w = window
    columns = Image.fromarray(source).resize(
        (width, source.shape[0]), Image.BICUBIC, (left, 0, left + w, source.shape[0])
    )
    return np.asarray(columns.resize((width, height), Image.BICUBIC, (0, top, width, top + h))).astype(np.int64)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_resize_is_pillows(data):
    height, width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    out_h, out_w = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    bounded, source = data.draw(st.booleans()), noise(height, width)
    window = (float(top), float(left), float(h), float(w))
    got = render(source, ViewParams(window=window, bounded=bounded), out_h, out_w)
    if bounded:
        expected = pillow(source[top : top + h, left : left + w], (0, 0, h, w), out_h, out_w)
    else:
        expected = pillow(source, window, out_h, out_w)
    assert np.abs(got - expected).max() <= 2  # sums in float32 here, in fixed point there: ties may round apart


@pytest.mark.parametrize("target", [32, 224])
def test_resize_of_a_larger_picture_is_pillows(target):
    source = noise(301, 407)
    difference = np.abs(render(source, whole(source), target) - pillow(source, (0, 0, 301, 407), target, target))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("shape", [(48, 48), (61, 37), (120, 201), (33, 32)])
def test_centre_view_is_resize_then_centre_crop(shape):
    source, size = noise(*shape), 32
    short = min(shape)
    resized_h, resized_w = int(size * shape[0] / short), int(size * shape[1] / short)
    resized = pillow(source, (0, 0, *shape), resized_h, resized_w)
    top, left = round((resized_h - size) / 2), round((resized_w - size) / 2)
    expected = resized[top : top + size, left : left + size]
    assert np.abs(render(source, centre_view(*shape, size), size) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (37, 2), (9, 700), (64, 64)])
@pytest.mark.parametrize("out", [(1, 1), (3, 33), (40, 32), (5, 100)])
def test_resize_reads_and_writes_nothing_beyond(shape, out):
    """Pictures whose last pixel ends a page that nothing may be read beyond, and views between guards."""
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    size = 3 * shape[0] * shape[1]
    memory = mmap.mmap(-1, (size // page + 2) * page)
    end = (size // page + 1) * page
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + end), page, 0) == 0
    source = np.frombuffer(memory, np.uint8, size, end - size).reshape(*shape, 3)
    source[...] = noise(*shape)
    for dtype, guard in ((np.uint8, 77), (np.float32, np.nan)):
        room = np.full(3 * out[0] * out[1] + 200, guard, dtype)
        view = room[100:-100].reshape(3, *out)
        resize(source, (0.0, 0.0, *map(float, shape)), True, False, view)
        apart = np.floor(view.astype(np.float64) + 0.5).transpose(1, 2, 0) - pillow(source, (0, 0, *shape), *out)
        assert np.abs(apart).max() <= 2
        np.testing.assert_array_equal(room[:100], np.full(100, guard, dtype))
        np.testing.assert_array_equal(room[-100:], np.full(100, guard, dtype))


@pytest.mark.parametrize("size", [10, 33, 64])
def test_what_memory_held_before_changes_nothing(size):
    source, params = noise(70, 50), whole(noise(70, 50), blur_sigma=1.1, matrix=1.2 * np.eye(3))
    seen = set()
    for before in (np.nan, 1e30, -5.0):
        spaces = [np.full(3 * size * size + 32, before, np.float32) for _ in range(8)]
        del spaces  # which the allocator gives again
        seen.add(render(source, params, size).tobytes())
    assert len(seen) == 1


@pytest.mark.slow
def test_without_avx2_the_sums_are_the_same(monkeypatch):
    """LLVM's own instructions in the place of pmaddwd, which processors of other makes get."""
    source, window = noise(61, 83), (3.0, 2.0, 55.0, 80.0)
    plain = numba.njit(resize_module._resize.py_func)
    for dtype in (np.uint8, np.float32):
        expected, got = (np.zeros((3, 40, 64), dtype) for _ in range(2))
        resize(source, window, True, True, expected)  # compiled before what follows
        with monkeypatch.context() as patched:
            patched.setattr(resize_module, "_has_avx2", lambda context: False)
            plain(source, *window, True, True, 64, got)
        assert (got == expected).all()
        assert got.any()
    assert not any("pmadd.wd" in code for code in plain.inspect_llvm().values())


def test_flip_mirrors_left_right():
    source = noise(40, 61)
    assert (render(source, whole(source, flip=True), 32) == render(source, whole(source), 32)[:, ::-1]).all()


def test_zooming_out_shrinks_the_picture_and_repeats_its_edges():
    source = np.full((32, 32, 3), 255, np.uint8)
    source[8:24, 8:24] = 0
    got = render(source, whole(source, warp=(2.0, 0.0, 0.0, 2.0)), 32)
    assert (got[13:19, 13:19] == 0).all()
    outside = got.copy()
    outside[11:21, 11:21] = 255
    assert (outside == 255).all()


def test_margins_are_cut_off_and_proportions_stay():
    source = np.full((40, 60, 3), 250, np.uint8)
    source[10:20, 30:34] = 0
    trimmed = augment.trim_margins(source)
    assert trimmed.shape == (10, 10, 3)
    assert (trimmed == source[10:20, 27:37]).all()
    wide = np.full((40, 60, 3), 250, np.uint8)
    wide[5:10, 2:58] = 0
    assert augment.trim_margins(wide).shape == (40, 56, 3)  # no square of 56 fits 40 rows
    corner = np.full((40, 60, 3), 250, np.uint8)
    corner[38:, 59:] = 0
    assert augment.trim_margins(corner).shape == (2, 2, 3)
    noisy = (250 + np.random.default_rng(0).integers(-4, 5, (40, 60, 3))).astype(np.uint8)
    assert augment.trim_margins(noisy) is noisy


def test_colour_matrix_pivot_and_shift_equal_the_formula():
    source = noise(32, 32)  # same size: resizing changes nothing
    matrix = np.array([[0.9, 0.2, -0.1], [0.05, 1.2, 0.0], [-0.2, 0.1, 0.7]])
    pivot = np.array([0.1, -0.05, 0.2])
    pixels = source.astype(np.float64)
    luma = pixels.mean(axis=(0, 1)) @ np.array([0.299, 0.587, 0.114])
    shift = np.array([20.0, -30.0, 0.0])
    expected = (pixels @ matrix.T + pivot * luma + shift).clip(0, 255)
    got = render(source, whole(source, matrix=matrix, pivot=pivot, shift=shift), 32)
    assert np.abs(got - expected).max() <= 0.5 + 1e-3
    only = render(source, whole(source, shift=shift), 32)
    assert np.abs(only - (pixels + shift).clip(0, 255)).max() <= 0.5 + 1e-3


def test_contrast_is_pillows_up_to_rounding():
    from PIL import ImageEnhance

    source = noise(32, 32)
    expected = np.asarray(ImageEnhance.Contrast(Image.fromarray(source)).enhance(1.3)).astype(np.int64)
    got = render(source, whole(source, matrix=1.3 * np.eye(3), pivot=np.full(3, -0.3)), 32)
    assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(32, 32), (5, 40), (224, 17)])
def test_blur_equals_cv2(sigma, shape):
    source = noise(*shape)
    side = 2 * max(1, int(np.ceil(3 * sigma))) + 1
    padded = cv2.copyMakeBorder(source.astype(np.float32), side, side, side, side, cv2.BORDER_REFLECT_101)
    expected = cv2.GaussianBlur(padded, (side, side), sigma)[side:-side, side:-side]
    assert np.abs(render(source, whole(source, blur_sigma=sigma), *shape) - expected).max() <= 0.5 + 1e-2


def test_solarize_inverts_from_the_threshold_on():
    source = noise(32, 32)
    pixels = source.astype(np.int64)
    assert (render(source, whole(source, solarize=128), 32) == np.where(pixels >= 128, 255 - pixels, pixels)).all()
    assert (render(source, whole(source, solarize=NO_SOLARIZE), 32) == pixels).all()


def test_erase_fills_a_rectangle_with_the_mean():
    source = noise(32, 32)
    got = render(source, whole(source, erase=(0.25, 0.5, 0.5, 0.25)), 32)
    expected = source.astype(np.int64)
    expected[8:24, 16:24] = np.floor(source.mean(axis=(0, 1)) + 0.5)
    assert (got == expected).all()


def test_quarter_turn_is_rot90():
    source = noise(32, 32)
    got = render(source, whole(source, warp=(0.0, -1.0, 1.0, 0.0)), 32)
    assert np.abs(got - np.rot90(source.astype(np.int64))).max() <= 1


def test_warp_equals_bilinear_sampling_in_float64():
    source, angle, size = noise(40, 50), 0.3, 24
    c, s = np.cos(angle), np.sin(angle)
    window = (3.0, 0.5, 30.0, 49.0)
    points_y, points_x = 1, 2  # 30 / 24 and 49 / 24 source pixels a view pixel, at most 2 between points
    at_y = (np.arange(size * points_y) + 0.5) / (size * points_y) - 0.5
    at_x = (np.arange(size * points_x) + 0.5) / (size * points_x) - 0.5
    dy, dx = np.meshgrid(at_y * window[2], at_x * window[3], indexing="ij")
    x = (0.5 + 24.5 - 0.5 + c * dx - s * dy).clip(0, 49)
    y = (3.0 + 15.0 - 0.5 + s * dx + c * dy).clip(0, 39)
    sampled = cv2.remap(
        source.astype(np.float32),
        x.astype(np.float32),
        y.astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    expected = sampled.reshape(size, points_y, size, points_x, 3).mean(axis=(1, 3))
    got = render(source, ViewParams(window=window, warp=(c, -s, s, c)), size)
    assert np.abs(got - expected).max() <= 1.5  # cv2 rounds coordinates to 1/32 of a pixel


@pytest.mark.parametrize(
    "window", [(-1.0, 0.0, 5.0, 5.0), (0.0, 30.0, 5.0, 5.0), (0.0, 0.0, 0.0, 5.0), (0.0, 0.0, 33.0, 5.0)]
)
def test_a_window_outside_the_picture_is_refused(window):
    with pytest.raises(ValueError, match="window"):
        render(noise(32, 32), ViewParams(window=window), 8)


def test_over_white():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    alpha = pixels[..., 3:].astype(np.float64) / 255
    expected = pixels[..., 2::-1] * alpha + 255 * (1 - alpha)
    assert np.abs(augment.over_white(pixels) - expected).max() <= 0.5 + 1e-9


def run_python(code, **environment):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_without_numba_only_the_kernel_itself_is_missing():
    result = run_python(
        """
        import sys
        sys.modules["numba"] = None
        import rocket_fast.kernels, rocket_fast.image_augment
        try:
            import rocket_fast.kernels.augment
        except ImportError as error:
            assert "rocket-fast[train]" in str(error), error
        else:
            raise SystemExit("imported")
        """,
        PATH="/usr/bin:/bin",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.system
def test_compiles_where_no_cache_folder_can_be_written(tmp_path):
    copy = tmp_path / "augment_copy.py"
    copy.write_text(Path(augment.__file__).read_text())
    (tmp_path / "__pycache__").write_text("a file where the cache folder would be")
    (tmp_path / "home").write_text("and no home")
    result = run_python(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import numpy as np, augment_copy
        out = augment_copy.over_white(np.zeros((2, 2, 4), np.uint8))
        assert (out == 255).all()
        print(type(augment_copy._over_white._cache).__name__)
        """,
        HOME=str(tmp_path / "home"),
        XDG_CACHE_HOME=str(tmp_path / "home"),
        PATH="/usr/bin:/bin",
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "NullCache"
