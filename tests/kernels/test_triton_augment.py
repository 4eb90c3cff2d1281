"""The Triton view kernel against the CPU's: in Triton's interpreter, in a process of its own, and on a GPU if there is.

That no configuration spills: test_compile_check.py.
"""

import dataclasses
import os
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
pytest.importorskip("numba")
from rocket_fast.image_augment import IMAGENET_MEAN, IMAGENET_STD, ViewConfig, ViewParams, draw, normalize, strong_view
from rocket_fast.kernels import augment
from rocket_fast.kernels import triton_augment as kernels
from rocket_fast.kernels.triton_augment import augment_batch, pack_params

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by triton when it is imported, for the whole process
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
everywhere = pytest.mark.parametrize("device", ["cpu" if INTERPRETED else GPU])
NORMAL = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
MATRIX = np.array([[0.9, 0.4, -0.1], [0.05, 1.3, 0.0], [-0.3, 0.1, 0.7]]) * 1.0123  # round ones would make many ties
COLOUR = {"matrix": MATRIX, "pivot": np.array([0.2, -0.1, 0.3]), "shift": np.array([10.0, -20.0, 5.0])}
BOX = (0.13, 0.26, 0.41, 0.37)
PINNED = dict(kernels.CONFIGS)
SIZES = [(1, 1), (1, 7), (7, 1), (5, 3), (16, 16), (19, 45), (48, 32)]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_in_the_interpreter(interpreted: tuple[int, str]):
    """All of this file again, with the kernel run by Triton's interpreter on the CPU."""
    status, said = interpreted
    assert status == 0, said[-10_000:]


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """In the interpreter, tiles so small that small views have several."""
    if not INTERPRETED:
        yield
        return
    config = kernels.Config(tile=32, rows=8, columns=16, block=64, warps=4, stages=1)
    with mock.patch.dict(kernels.CONFIGS, dict.fromkeys(kernels.CONFIGS, config)):
        yield


def view(**changes):
    return ViewParams(window=(0.0, 0.0, 1.0, 1.0), **changes)


def pictures(views, height, width, seed=0):
    """Noise about a slope, of very different brightness."""
    random = np.random.default_rng(seed)
    slope = np.linspace(0, 160, height * width).reshape(1, 1, height, width) * random.random((views, 3, 1, 1))
    return torch.from_numpy((slope + random.integers(0, 96, (views, 3, height, width))).astype(np.uint8))


def on_the_cpu(images, params):
    """Grey levels that ``augment.render_view`` makes of whole pictures: resizing to their own size changes nothing."""
    out = np.empty(tuple(images.shape), np.uint8)
    height, width = images.shape[2:]
    for picture, one, rendered in zip(images.cpu().numpy(), params, out, strict=True):
        whole = dataclasses.replace(one, window=(0.0, 0.0, float(height), float(width)), warp=(1.0, 0.0, 0.0, 1.0))
        augment.render_view(np.ascontiguousarray(picture.transpose(1, 2, 0)), whole, rendered)
    return torch.from_numpy(out)


def levels(out):
    """Grey levels of what was normalised."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (out.double().cpu() * std + mean) * 255


def check(images, params, device):
    """Within one level everywhere, and equal in all but a few places; an erased rectangle is one place."""
    got = augment_batch(images.to(device), params, **NORMAL, out_dtype=torch.float32)
    assert got.shape == images.shape
    found, expected = levels(got), on_the_cpu(images, params).double()
    assert (found - found.round()).abs().max() < 1e-3  # whole grey levels
    apart = (found - expected).abs()
    for index, (one, packed) in enumerate(zip(params, pack_params(params, *images.shape[2:]), strict=True)):
        assert apart[index].max() < 1.001, one
        top, bottom, left, right = packed[18:22].int().tolist()
        apart[index, :, top:bottom, left:right] = 0
        blurred = one.blur_sigma > 0
        few = 0.08 if blurred else 0.002  # float16 products, sums within float32 of a tie
        assert (apart[index] > 0.5).double().mean() <= few + 3 / apart[index].numel(), one
    return got


OPERATIONS = [
    {},
    {"flip": True},
    {"matrix": MATRIX},
    {"shift": np.array([30.0, -40.0, 0.0])},
    {"matrix": MATRIX, "pivot": COLOUR["pivot"]},
    {"blur_sigma": 0.3},
    {"blur_sigma": 2.0},
    {"erase": BOX},
    {"solarize": 100},
    COLOUR,
    {"flip": True, "blur_sigma": 1.2},
    {"flip": True, "erase": BOX},
    {"erase": BOX, "blur_sigma": 1.7, **COLOUR},
    {"flip": True, "erase": BOX, "blur_sigma": 0.6, "solarize": 128, **COLOUR},
]


@everywhere
@pytest.mark.parametrize("size", SIZES)
def test_every_operation_on_and_off(device, size):
    params = [view(**changes) for changes in OPERATIONS]
    check(pictures(len(params), *size), params, device)


@everywhere
@pytest.mark.parametrize("changes", OPERATIONS[1:], ids=lambda changes: "+".join(changes))
def test_every_operation_does_something(device, changes):
    """What ``check`` compares is not the untouched picture on both sides."""
    images = pictures(1, 19, 45).to(device)
    plain, changed = (augment_batch(images, [view(**how)], **NORMAL) for how in ({}, changes))
    assert (plain != changed).double().mean() > 0.1


@everywhere
@settings(deadline=None, max_examples=12 if INTERPRETED else 200)
@given(data=st.data())
def test_what_is_drawn(device, data):
    """Everything that a specification may ask for, on views of any size, many to a batch."""
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    config = ViewConfig(
        size=32, flip_prob=0.5, jitter=(0.8, 0.8, 0.8, 0.5), jitter_prob=0.7, gray_prob=0.2, blur_prob=0.5,
        solarize_prob=0.3, erase_prob=0.4, color_shift=data.draw(st.sampled_from([0.0, 0.3])),
        color_matrix_std=data.draw(st.sampled_from([0.0, 0.4])),
    )  # fmt: skip
    seed = data.draw(st.integers(0, 2**32))
    params = [draw(config, 64, 64, np.random.default_rng((seed, index))) for index in range(3)]
    check(pictures(3, height, width, seed), params, device)


@everywhere
def test_blur_wider_than_the_view(device):
    """Reflected several times."""
    for size in ((1, 1), (2, 3), (4, 2), (3, 20)):
        check(pictures(2, *size), [view(blur_sigma=4.0), view(blur_sigma=3.5, flip=True)], device)


@everywhere
def test_pinned_tiles_and_the_widest_blur(device):
    """The tiles that a device takes; two of them across, and the radius that leaves least of each."""
    params = [view(blur_sigma=8.0), view(blur_sigma=2.0, flip=True), view(erase=BOX, **COLOUR)]
    with mock.patch.dict(kernels.CONFIGS, PINNED):
        check(pictures(3, 33, 67), params, device)


@everywhere
def test_normalised_as_normalize_does(device):
    images = pictures(3, 9, 11).to(device)
    mean, std = (0.1, 0.5, 0.7), (0.2, 1.0, 0.3)
    got = augment_batch(images, [view()] * 3, mean=mean, std=std, out_dtype=torch.float32)
    torch.testing.assert_close(got, normalize(images, mean, std), rtol=1e-6, atol=1e-6)


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_once_to_the_output_type(device, dtype):
    images, params = pictures(3, 19, 33).to(device), [view(**changes) for changes in OPERATIONS[-3:]]
    exact = augment_batch(images, params, **NORMAL, out_dtype=torch.float32)
    got = augment_batch(images, params, **NORMAL, out_dtype=dtype)
    assert got.dtype == dtype
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter cuts off where a device rounds
        torch.testing.assert_close(got.float(), exact, rtol=2**-7, atol=0)
    else:
        assert torch.equal(got, exact.to(dtype))
    if dtype == torch.bfloat16:
        assert torch.equal(got, augment_batch(images, params, **NORMAL))


@everywhere
def test_a_view_does_not_depend_on_its_batch_and_repeats_to_the_bit(device):
    images, params = pictures(3, 19, 33).to(device), [view(**changes) for changes in OPERATIONS[-3:]]
    together = augment_batch(images, params, **NORMAL)
    assert torch.equal(together, augment_batch(images, params, **NORMAL))
    for index in range(3):
        alone = augment_batch(images[index : index + 1], params[index : index + 1], **NORMAL)
        assert torch.equal(together[index], alone[0])


@everywhere
def test_packed_parameters_and_strides_and_inputs_left_alone(device):
    images, params = pictures(2, 9, 17).to(device), [view(**changes) for changes in OPERATIONS[-2:]]
    expected, kept = augment_batch(images, params, **NORMAL), images.clone()
    packed = pack_params(params, 9, 17)
    for given_params in (packed, packed.to(device).mT.contiguous().mT):
        assert torch.equal(augment_batch(images, given_params, **NORMAL), expected)
    last = images.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    got = augment_batch(last, packed, **NORMAL)
    assert got.is_contiguous()
    assert torch.equal(got, expected)
    odd = torch.zeros(images.numel() + 1, dtype=torch.uint8, device=device)[1:].view_as(images).copy_(images)
    assert torch.equal(augment_batch(odd, packed, **NORMAL), expected)  # not at a multiple of 16 bytes
    assert torch.equal(images, kept)


def test_one_launch():
    images, packed = torch.zeros(5, 3, 8, 8, dtype=torch.uint8, device="meta"), torch.zeros(5, 23)
    with mock.patch.object(kernels, "_launch") as launch:
        kernels.render(images, packed, *NORMAL.values(), torch.empty_like(images, dtype=torch.bfloat16))
    assert launch.call_count == 1
    assert launch.call_args.args[1] == (5,)


# --- packed parameters ------------------------------------------------------------------------------------------------


def test_the_layout_is_the_documented_one():
    (row,) = pack_params([view(flip=True, blur_sigma=1.5, erase=(0.5, 0.25, 0.26, 0.9), solarize=128, **COLOUR)], 9, 21)
    expected = [1, *MATRIX.flatten(), *COLOUR["pivot"], *COLOUR["shift"], 1.5, 5, 4, 6, 5, 21, 128]
    torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float32))
    (row,) = pack_params([view()], 9, 21)
    torch.testing.assert_close(row[[0, 17, 22]], torch.tensor([0.0, 0, 256]))
    assert row[18:22].eq(0).all()
    assert pack_params([], 9, 21).shape == (0, 23)


@given(
    sigma=st.floats(0, 8), height=st.integers(1, 500), width=st.integers(1, 500), box=st.tuples(*[st.floats(0, 1)] * 4)
)
def test_radius_and_box_are_the_cpus(sigma, height, width, box):
    (row,) = pack_params([view(blur_sigma=sigma, erase=box)], height, width).tolist()
    assert row[17] == (max(1, int(np.ceil(3.0 * sigma))) if sigma > 0 else 0)
    y, x = int(box[0] * height), int(box[1] * width)
    bottom, right = min(height, y + int(box[2] * height + 0.5)), min(width, x + int(box[3] * width + 0.5))
    assert row[18:22] == ([y, bottom, x, right] if box[2] > 0 else [0, 0, 0, 0])


def test_a_pivot_alone_does_nothing_as_on_the_cpu():
    (row,) = pack_params([view(pivot=np.array([0.5, 0.5, 0.5]))], 8, 8)
    assert row[10:13].eq(0).all()


def test_every_radius_that_is_allowed_leaves_results_of_every_tile():
    assert all(config.tile - 2 * kernels.MAX_RADIUS >= kernels.STEP.value for config in PINNED.values())


# --- errors -----------------------------------------------------------------------------------------------------------

IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
WRONG = [
    ("images_BCHW: got <class 'int'>", 3, None, {}),
    ("images_BCHW: got \\(3, 8, 8\\)", IMAGES[0], None, {}),
    ("images_BCHW: got \\(2, 4, 8, 8\\)", torch.zeros(2, 4, 8, 8, dtype=torch.uint8), None, {}),
    ("images_BCHW: got \\(2, 3, 0, 8\\)", IMAGES[:, :, :0], None, {}),
    ("images_BCHW: got \\(0, 3, 8, 8\\)", IMAGES[:0], None, {}),
    ("images_BCHW: got \\(2, 3, 65536, 65536\\)", IMAGES[:, :, :1, :1].expand(2, 3, 65536, 65536), None, {}),
    ("images_BCHW: got torch.float32, expected uint8", IMAGES.float(), None, {}),
    ("images_BCHW: got device\\(type='meta'\\)", IMAGES.to("meta"), None, {}),
    ("mean: got \\(0.5, 0.5\\)", IMAGES, None, {"mean": (0.5, 0.5)}),
    ("mean: got 0.5", IMAGES, None, {"mean": 0.5}),
    ("std: got \\(1.0, 0.0, 1.0\\), expected numbers > 0", IMAGES, None, {"std": (1.0, 0.0, 1.0)}),
    ("std: got \\(1.0, nan, 1.0\\)", IMAGES, None, {"std": (1.0, float("nan"), 1.0)}),
    ("out_dtype: got torch.float64", IMAGES, None, {"out_dtype": torch.float64}),
    ("len\\(params\\): got 3, expected 2", IMAGES, [view()] * 3, {}),
    ("params: got <class 'list'>", IMAGES, [view(), 3], {}),
    ("params: got <class 'rocket_fast.image_augment.ViewParams'>", IMAGES, view(), {}),
    ("params: got \\(2, 22\\), expected a shape \\(2, 23\\)", IMAGES, torch.zeros(2, 22), {}),
    ("params: got \\(3, 23\\), expected a shape \\(2, 23\\)", IMAGES, torch.zeros(3, 23), {}),
    ("params: got torch.float64", IMAGES, torch.zeros(2, 23, dtype=torch.float64), {}),
    ("params: got device\\(type='meta'\\)", IMAGES, torch.zeros(2, 23, device="meta"), {}),
    ("blur_sigma: got \\[8.5\\], expected at most 8", IMAGES, [view(), view(blur_sigma=8.5)], {}),
    ("blur_sigma: got \\[nan\\]", IMAGES, [view(), view(blur_sigma=float("nan"))], {}),
]


@everywhere
@pytest.mark.parametrize(("message", "images", "params", "options"), WRONG, ids=[wrong[0] for wrong in WRONG])
def test_bad_arguments_are_named(device, message, images, params, options):
    if isinstance(images, torch.Tensor) and images.device.type == "cpu" and images.numel() < 10**6:
        images = images.to(device)
    with pytest.raises(ValueError, match=f"^{message}"):
        augment_batch(images, [view()] * 2 if params is None else params, **{**NORMAL, **options})


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes them")
def test_cpu_tensors_are_refused():
    with pytest.raises(ValueError, match=r"^images_BCHW: got device\(type='cpu'\), expected a cuda device"):
        augment_batch(IMAGES, [view()] * 2, **NORMAL)


# --- the operation ----------------------------------------------------------------------------------------------------


@everywhere
def test_passes_opcheck(device):
    images, packed = pictures(2, 9, 7).to(device), pack_params([view(), view(**OPERATIONS[-1])], 9, 7).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = images, packed, list(IMAGENET_MEAN), list(IMAGENET_STD), dtype
        torch.library.opcheck(kernels.augment_operation, arguments)


@everywhere
def test_compiles_as_one_graph(device):
    images, packed = pictures(2, 9, 7).to(device), pack_params([view(), view(**OPERATIONS[-1])], 9, 7).to(device)

    def run(images, packed):
        return augment_batch(images, packed, **NORMAL) * 2

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(images, packed), run(images, packed))


def test_is_known_to_fake_tensors():
    images, packed = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="meta"), torch.zeros(2, 23, device="meta")
    out = kernels.augment_operation(images, packed, [0.5] * 3, [0.5] * 3, torch.float16)
    assert (out.shape, out.dtype) == (images.shape, torch.float16)


# --- sizes of practice, on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("size", [(224, 224), (192, 192), (225, 301)])
def test_strong_views_of_practice(size):
    config = dataclasses.replace(strong_view(), solarize_prob=0.2, erase_prob=0.2)
    params = [draw(config, 300, 400, np.random.default_rng((1, index))) for index in range(64)]
    check(pictures(64, *size), params, "cuda")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
def test_more_than_2_31_values():
    """Offsets beyond 32 bits, in values and in bytes."""
    views = 2**31 // (3 * 224 * 224) + 3
    images = torch.zeros(views, 3, 224, 224, dtype=torch.uint8, device="cuda")
    images[-2:] = pictures(2, 224, 224).to("cuda")
    params = [view()] * (views - 2) + [view(**OPERATIONS[-1]), view(flip=True)]
    got = augment_batch(images, params, **NORMAL)
    assert torch.equal(got[-2:], augment_batch(images[-2:].clone(), params[-2:], **NORMAL))
    assert (got[:-2].float() - augment_batch(images[:1], params[:1], **NORMAL).float()).abs().max() == 0
