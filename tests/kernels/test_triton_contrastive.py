"""The Triton kernels against float64: in Triton's interpreter, in a process of its own, and on a GPU if there is."""

import dataclasses
import itertools
import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from rocket_fast.kernels import triton_contrastive as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by triton when it is imported, for the whole process
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
everywhere = pytest.mark.parametrize("device", ["cpu" if INTERPRETED else GPU])
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
MIB = 2**20
# What is rounded to the inputs' dtype: G before the products, the gradients, and in float16 the rows of unit length.
ROUNDING = {FP32: 2**-23, BF16: 2**-8, FP16: 2**-11}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_in_the_interpreter(interpreted: tuple[int, str]):
    """All of this file again, with the kernels run by Triton's interpreter on the CPU."""
    status, said = interpreted
    assert status == 0, said[-10_000:]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """In the interpreter, tiles of two slabs, so small that small problems have several."""
    if INTERPRETED:
        config = kernels.Config(32, 32, 64, slabs=2, warps=4, stages=1)
        for key in kernels.CONFIGS:
            monkeypatch.setitem(kernels.CONFIGS, key, kernels.Configs(config, config, config, config))


# --- the reference: dense, float64 ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Problem:
    """Inputs of both operations."""

    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor
    smoothing: list
    row_offset: int = 0
    diagonal: bool = True
    normalize: bool = False

    @property
    def options(self):
        return {
            "smoothing": self.smoothing,
            "row_offset": self.row_offset,
            "diagonal": self.diagonal,
            "normalize": self.normalize,
        }

    def forward(self, workspace=64 * MIB):
        lse_image, lse_text, *_, losses, accuracies = self.statistics(workspace)
        return lse_image, lse_text, torch.cat([losses, accuracies], -1)

    def statistics(self, workspace=64 * MIB):
        return kernels.contrastive_forward(self.image, self.text, self.scale, workspace=workspace, **self.options)

    def backward(self, lse, weights, workspace=64 * MIB, need_image=True, need_text=True):
        return kernels.contrastive_backward(
            self.image, self.text, self.scale, *lse, *weights, need_image=need_image, need_text=need_text,
            workspace=workspace, **self.options,
        )  # fmt: skip


def make(rows, columns, width, views=(1, 1), *, dtype=FP32, scale=10.0, smoothing=0.0, device="cpu", seed=0, **options):
    """Rows near unit length whose positives stand out; scales and smoothings differ from pair to pair."""
    random = torch.Generator().manual_seed(seed)
    A, B = views
    image = F.normalize(torch.randn(A, rows, width, generator=random), dim=-1)
    text = F.normalize(torch.randn(B, columns, width, generator=random), dim=-1)
    offset = options.get("row_offset", 0)
    first_row, first_column = max(0, -offset), max(0, offset)
    count = min(rows - first_row, columns - first_column)
    text[:, first_column : first_column + count] += 0.5 * image[:1, first_row : first_row + count]
    if options.get("normalize"):
        image, text = 3 * image, 0.2 * text
    pairs = torch.arange(A * B).view(A, B)
    return Problem(
        image.to(device, dtype), text.to(device, dtype), (scale * (1 + 0.3 * pairs)).to(device),
        [smoothing * (1 + index % 2) for index in range(A * B)], **options,
    )  # fmt: skip


@dataclasses.dataclass
class Expected:
    """What float64 says, from the very numbers the kernels were given."""

    lse_image: torch.Tensor
    lse_text: torch.Tensor
    terms: torch.Tensor
    losses: tuple
    right_text: torch.Tensor
    inputs: tuple
    logits: torch.Tensor

    def gradients(self, weights):
        total = sum((weight.double().cpu() * loss).sum() for weight, loss in zip(weights, self.losses, strict=True))
        return torch.autograd.grad(total, self.inputs, retain_graph=True)


def dense(problem):
    inputs = tuple(x.detach().double().cpu().requires_grad_() for x in (problem.image, problem.text, problem.scale))
    x, y, scale = inputs
    if problem.normalize:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    logits = scale[:, :, None, None] * torch.einsum("and,bmd->abnm", x, y)
    lse_image, lse_text = logits.logsumexp(3), logits.logsumexp(2)
    if not problem.diagonal:
        none = torch.zeros(*scale.shape, 4), (lse_image, lse_text), torch.zeros(0, dtype=torch.bool)
        return Expected(lse_image, lse_text, *none, inputs, logits)
    image_loss, image_right = direction(logits, lse_image, problem, problem.row_offset)
    text_loss, text_right = direction(logits.mT, lse_text, problem, -problem.row_offset)
    count = len(matched(*logits.shape[2:], problem.row_offset)[0])
    right_text = text_right > 0
    terms = torch.stack([part.sum(-1) / count for part in (image_loss, text_loss, image_right, text_right)], -1)
    return Expected(lse_image, lse_text, terms.detach(), (image_loss, text_loss), right_text, inputs, logits)


def matched(rows, columns, offset):
    row = torch.arange(max(0, -offset), min(rows, columns - offset))
    return row, row + offset


def direction(logits, lse, problem, offset):
    """Per row its cross-entropy and 100 where it picks right; 0 where it has no positive."""
    row, column = matched(*logits.shape[2:], offset)
    smoothing = torch.tensor(problem.smoothing, dtype=torch.float64).view(*logits.shape[:2], 1)
    target = (1 - smoothing) * logits[:, :, row, column] + smoothing * logits.mean(3)[:, :, row]
    loss = torch.zeros_like(lse).index_copy(2, row, lse[:, :, row] - target)
    # Equal numbers stay equal in float64, products of equal rows too: the first of them is the pick.
    right = torch.zeros_like(lse).index_copy(2, row, 100.0 * (logits.argmax(3)[:, :, row] == column).double())
    return loss, right


def weights_for(problem, factor=1.0, seed=1):
    """Positive, and zero where a row (column) has no positive: its loss is none."""
    random = torch.Generator().manual_seed(seed)
    A, B = problem.scale.shape
    rows, columns = problem.image.shape[1], problem.text.shape[1]
    image, text = torch.rand(A, B, rows, generator=random), torch.rand(A, B, columns, generator=random)
    if problem.diagonal:
        row, column = matched(rows, columns, problem.row_offset)
        image *= torch.zeros(rows).index_fill(0, row, 1)
        text *= torch.zeros(columns).index_fill(0, column, 1)
    return [factor * weight.to(problem.image.device) for weight in (image, text)]


def relative(got, expected):
    return ((got.double().cpu() - expected).norm() / expected.norm()).item()


def copies(problem):
    """Whether rows of unit length are rounded to the inputs' dtype on the way: only in float16."""
    return problem.normalize and problem.image.dtype == FP16


def check(problem, workspace=64 * MIB, accuracy_exact=True):
    """Values and gradients."""
    expected = dense(problem)
    *lse, top_image, top_text, right, losses, accuracies = problem.statistics(workspace)
    terms = torch.cat([losses, accuracies], -1)
    scale = problem.scale.abs().max().item()
    tolerance = scale * (4e-7 + (2 * ROUNDING[FP16] if copies(problem) else 0))
    for got, wanted in ((top_image, expected.logits.amax(3)), (top_text, expected.logits.amax(2))):
        torch.testing.assert_close(got.double().cpu(), wanted.detach(), rtol=1e-6, atol=tolerance)
    for got, wanted in zip(lse, (expected.lse_image, expected.lse_text), strict=True):
        torch.testing.assert_close(got.double().cpu(), wanted.detach(), rtol=1e-6, atol=tolerance)
    terms, wanted = terms.double().cpu(), expected.terms.double()
    torch.testing.assert_close(terms[..., :2], wanted[..., :2], rtol=1e-6, atol=tolerance)
    if accuracy_exact:
        torch.testing.assert_close(terms[..., 2:], wanted[..., 2:], rtol=1e-6, atol=0)
        assert torch.equal(right.cpu(), expected.right_text)
    weights = weights_for(problem)
    check_gradients(problem, problem.backward(lse, weights, workspace), expected.gradients(weights), weights)


def check_gradients(problem, got, expected, weights):
    """Errors within what rounding G costs: its entries are as large as a row's and a column's weight, then cancel."""
    scale, size = problem.scale.abs().max().item(), ROUNDING[problem.image.dtype]
    longest = (
        1.0 if problem.normalize else max(x.float().norm(dim=-1).max().item() for x in (problem.image, problem.text))
    )
    total = sum(weight.double().square().sum() for weight in weights).sqrt().item()
    exact = 4e-7 * max(1.0, scale) + (2 * size * scale if copies(problem) else 0)  # of the logits, hence of G
    for result, wanted, rows in zip(got[:2], expected[:2], (problem.image, problem.text), strict=True):
        assert result.dtype == problem.image.dtype
        error = result.double().cpu() - wanted
        if problem.normalize:
            error = error * rows.double().cpu().norm(dim=-1, keepdim=True).clamp_min(1e-12)
        assert error.norm().item() <= 2 * (exact + size) * scale * longest * total + 1e-30
    total = sum(weight.double().abs().sum() for weight in weights).item()
    assert (got[2].double().cpu() - expected[2]).abs().max().item() <= 2 * exact * longest**2 * total


# --- values and gradients ---------------------------------------------------------------------------------------------

SHAPES = [
    # rows, columns, width, views, options
    (1, 1, 16, (1, 1), {}),
    (1, 65, 24, (1, 1), {"row_offset": 40, "smoothing": 0.1}),
    (65, 1, 24, (1, 1), {"row_offset": -64, "normalize": True}),
    (7, 7, 16, (2, 2), {"smoothing": 0.1}),
    (63, 64, 24, (1, 1), {"normalize": True}),
    (64, 64, 100, (1, 1), {"smoothing": 0.2, "normalize": True}),
    (65, 63, 100, (2, 1), {"row_offset": -2}),
    (127, 129, 24, (1, 1), {"row_offset": 2, "smoothing": 0.1}),
    (129, 200, 16, (1, 1), {"row_offset": 71}),
    (200, 129, 16, (1, 1), {"row_offset": -33, "normalize": True}),
    (64, 96, 256, (1, 2), {"row_offset": 32}),
    (65, 65, 513, (1, 1), {"smoothing": 0.1}),
    (40, 33, 24, (3, 2), {"normalize": True, "smoothing": 0.1, "row_offset": -7}),
    (40, 40, 24, (2, 3), {"diagonal": False}),
]


@everywhere
@pytest.mark.parametrize(("rows", "columns", "width", "views", "options"), SHAPES)
def test_float32_is_float64s(device, rows, columns, width, views, options):
    check(make(rows, columns, width, views, device=device, **options))


@everywhere
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("rows", "columns", "width", "views", "options"), [SHAPES[i] for i in (3, 5, 8, 10, 12)])
def test_16_bits_are_float64s(device, dtype, rows, columns, width, views, options):
    """The reference has the same rounded inputs; what differs is G and the results, rounded once each."""
    check(make(rows, columns, width, views, dtype=dtype, device=device, **options))


@everywhere
@pytest.mark.parametrize("options", [{"dtype": BF16}, {"normalize": True, "smoothing": 0.1, "row_offset": 3}])
def test_little_workspace(device, options):
    """Several chunks of G both ways, and statistics in as few parts as there can be."""
    check(make(70, 66, 24, (2, 1), device=device, **options), workspace=3000)


@everywhere
@pytest.mark.parametrize("programs", [1, 4])
def test_super_tiles(device, programs):
    """Super-tiles five and two tiles high, three and one wide, as if the problem were thousands of times larger."""
    with mock.patch.object(kernels, "PROGRAMS", programs):
        check(make(150, 140, 16, device=device, row_offset=-5))


# --- hard numbers -----------------------------------------------------------------------------------------------------


def unit(rows, width, seed=0):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def opposite(rows, width):
    image = unit(1, width).expand(rows, width)
    return image, -image


def equal(rows, width):
    image = unit(1, width).expand(rows, width)
    return image, image


def one_hot(rows, width):
    image = torch.eye(rows, width)
    return image, image


def zeros(rows, width):
    image, text = unit(rows, width), unit(rows, width, 1)
    image[::2], text[::3] = 0, 0
    return image, text


def ties(rows, width):
    """Every text twice: the first of two equal ones is the pick."""
    image = unit(rows, width)
    return image, image[torch.arange(rows) // 2]


def far_apart(rows, width):
    """Rows and columns of one tile whose largest logits are 2 * scale apart."""
    axis = unit(1, width)[0]
    image, text = axis.repeat(rows, 1), axis.repeat(rows, 1)
    image[::3] *= -1
    image[1::3] = unit(rows, width)[1::3]
    text[: rows // 2] += 1e-2 * unit(rows // 2, width, 3)
    return image, F.normalize(text, dim=-1)


CASES = [
    (inputs, scale, False) for inputs in (opposite, equal, one_hot, zeros, ties, far_apart) for scale in (1.0, 100.0)
]


@everywhere
@pytest.mark.parametrize(("inputs", "scale", "normalize"), [*CASES, (zeros, 100.0, True), (opposite, 100.0, True)])
def test_adversarial(device, inputs, scale, normalize):
    image, text = inputs(40, 40)
    problem = make(40, 40, 40, scale=scale, device=device, normalize=normalize)
    problem.image, problem.text = image[None].to(device), text[None].to(device)
    # Near ties may be decided either way; exact ones must not be.
    check(problem, accuracy_exact=inputs in (equal, one_hot, ties))


@everywhere
def test_equal_logits_go_to_the_first(device):
    """Collapsed embeddings are right once, across tiles too."""
    problem = make(100, 100, 16, device=device)
    problem.image, problem.text = (torch.full((1, 100, 16), 0.25, device=device) for _ in range(2))
    torch.testing.assert_close(problem.forward()[2][0, 0, 2:].cpu(), torch.tensor([1.0, 1.0]))
    problem.row_offset = 40  # the first column, and the first row, that there are have no positive in it
    torch.testing.assert_close(problem.forward()[2][0, 0, 2:].cpu(), torch.tensor([0.0, 100 / 60]))


@everywhere
def test_scale_of_zero_has_a_gradient(device):
    check(make(40, 40, 24, scale=0.0, device=device))


@everywhere
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_weights_of_any_size(device, dtype, factor):
    """Gradients are as exact with weights far outside float16's range; float16 results themselves overflow then."""
    problem = make(40, 40, 24, dtype=dtype, device=device)
    *lse, _ = problem.forward()
    weights = weights_for(problem)
    image, text, scale = problem.backward(lse, [weight * factor for weight in weights])
    expected = [factor * gradient for gradient in dense(problem).gradients(weights)]
    torch.testing.assert_close(scale.double().cpu(), expected[2], rtol=1e-5, atol=0)
    if dtype != FP16:
        assert relative(image, expected[0]) < 2 * max(ROUNDING[dtype], 2e-6)
        assert relative(text, expected[1]) < 2 * max(ROUNDING[dtype], 2e-6)


@everywhere
def test_float16_small_entries_count(device):
    """Softmax entries below float16's range as they are; the weights' largest magnitude decides what is kept."""
    problem = make(200, 200, 16, dtype=FP16, device=device, scale=1.0)
    *lse, _ = problem.forward()
    weights = [weight * 1e-6 for weight in weights_for(problem)]
    image, _, _ = problem.backward(lse, [weight * 1e4 for weight in weights])
    assert relative(image, 1e4 * dense(problem).gradients(weights)[0]) < 2 * ROUNDING[FP16]


@everywhere
def test_nan_is_not_hidden(device):
    problem = make(40, 40, 24, device=device)
    problem.image[0, 3, 5] = torch.nan
    lse_image, lse_text, terms = problem.forward()
    assert lse_image[0, 0, 3].isnan()
    assert lse_text.isnan().all()
    assert terms[0, 0, :2].isnan().all()


# --- what callers rely on ---------------------------------------------------------------------------------------------


@everywhere
def test_repeats_to_the_bit(device):
    problem = make(70, 66, 24, (2, 1), dtype=BF16, device=device, normalize=True, smoothing=0.1)
    *lse, terms = problem.forward()
    weights = weights_for(problem)
    first = [*lse, terms, *problem.backward(lse, weights, 6000)]
    *lse, terms = problem.forward()
    for a, b in zip(first, [*lse, terms, *problem.backward(lse, weights, 6000)], strict=True):
        assert torch.equal(a, b)


@everywhere
def test_strides_and_inputs_left_alone(device):
    problem = make(40, 33, 24, (2, 2), device=device, smoothing=0.1)
    image, text = problem.image.mT.contiguous().mT, problem.text.repeat(1, 1, 2)[..., ::2].clone().expand(2, 33, 24)
    problem.image, problem.text = image, text
    assert not image.is_contiguous()
    kept = image.clone(), text.clone()
    check(problem)
    assert torch.equal(image, kept[0])
    assert torch.equal(text, kept[1])


@everywhere
def test_expanded_weights(device):
    problem = make(40, 33, 24, (2, 2), device=device, row_offset=-7)
    *lse, _ = problem.forward()
    weights = [torch.full((1, 1, 1), w, device=device).expand(2, 2, n) for w, n in ((0.5, 40), (0.25, 33))]
    problem.diagonal = False
    *lse, _ = problem.forward()
    expected = dense(problem).gradients(weights)
    for got, wanted in zip(problem.backward(lse, weights), expected, strict=True):
        assert relative(got, wanted) < 4e-6


@everywhere
@pytest.mark.parametrize(("image", "text"), [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(device, image, text):
    problem = make(40, 33, 24, (2, 2), device=device, normalize=True)
    *lse, _ = problem.forward()
    weights = weights_for(problem)
    everything = problem.backward(lse, weights)
    some = problem.backward(lse, weights, need_image=image, need_text=text)
    for needed, got, wanted in zip((image, text, True), some, everything, strict=True):
        assert torch.equal(got, wanted) if needed else got.shape == (0,)


class Launches(TorchDispatchMode):
    """Counts kernels launched and torch operations that compute."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        result = function(*args, **(kwargs or {}))
        allocates = name in ("empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided")
        views = any(
            value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns
        )
        if not (allocates or views):
            self.names.append(name)
        return result


def count(function):
    def launch(kernel, grid, *args, **options):
        counter.names.append(kernel.__name__)

    with Launches() as counter, mock.patch.object(kernels, "_launch", launch):
        function()
    return [name for name in counter.names if name not in ("detach", "lift_fresh")]


@pytest.mark.parametrize("views", [(1, 1), (2, 2)])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_launches(views, normalize, smoothing):
    """As many for stacks of views as for one pair. (Launches are counted, not made.)"""
    problem = make(64, 64, 16, views, normalize=normalize, smoothing=smoothing)
    problem.smoothing = [smoothing] * len(problem.smoothing)
    lse = torch.zeros(*views, 64, dtype=torch.float64), torch.zeros(*views, 64, dtype=torch.float64)
    weights = [torch.ones(1, 1, 1).expand(*views, 64)] * 2
    rows = normalize or smoothing > 0
    assert len(count(problem.statistics)) == 4 + rows + (smoothing > 0) <= 6
    backward = count(lambda: problem.backward(lse, weights))
    assert len(backward) == 6 + normalize + (smoothing > 0) <= 8
    chunks = len(list(kernels._chunks(kernels.Problem(problem.image, problem.text, problem.scale, 0, False), 5000)))
    assert len(count(lambda: problem.backward(lse, weights, 5000))) == len(backward) + 3 * (chunks - 1)


# --- SigLIP -----------------------------------------------------------------------------------------------------------


def dense_sigmoid(image, text, scale, bias, row_offset, normalize):
    inputs = tuple(x.detach().double().cpu().requires_grad_() for x in (image, text, scale, bias))
    x, y = (F.normalize(x, dim=-1) if normalize else x for x in inputs[:2])
    logits = inputs[2] * x @ y.T + inputs[3]
    sign = -torch.ones_like(logits)
    row, column = matched(*logits.shape, row_offset)
    sign[row, column] = 1
    loss = F.softplus(-sign * logits, threshold=100).sum() / len(x)
    return loss.detach(), torch.autograd.grad(loss, inputs)


@everywhere
@pytest.mark.parametrize(
    ("rows", "columns", "width", "scale", "bias", "dtype", "options"),
    [
        (1, 1, 16, 10.0, -10.0, FP32, {}),
        (65, 65, 24, 10.0, -10.0, FP32, {}),
        (65, 129, 100, 10.0, -3.0, FP32, {"row_offset": 64, "normalize": True}),
        (129, 63, 24, 100.0, -40.0, FP32, {"row_offset": -66}),
        (40, 40, 24, 10.0, 20.0, FP32, {}),
        (64, 65, 100, 10.0, -10.0, BF16, {"normalize": True}),
        (64, 65, 100, 10.0, -10.0, FP16, {"normalize": True}),
        (64, 65, 24, 100.0, -10.0, FP16, {}),
    ],
)
def test_sigmoid(device, rows, columns, width, scale, bias, dtype, options):
    problem = make(rows, columns, width, dtype=dtype, device=device, **options)
    image, text, offset = problem.image[0], problem.text[0], problem.row_offset
    numbers = torch.tensor([scale], device=device), torch.tensor([bias], device=device)
    loss, expected = dense_sigmoid(image, text, *numbers, offset, problem.normalize)
    settings_ = {"row_offset": offset, "normalize": problem.normalize}
    rounding = ROUNDING[dtype] if dtype != FP32 else 1e-6
    for workspace in (64 * MIB, 9000):
        got = kernels.sigmoid_forward_backward(image, text, *numbers, need_grad=True, workspace=workspace, **settings_)
        rough = 1e-2 if copies(problem) else 1e-6 * scale
        torch.testing.assert_close(got[0].double().cpu(), loss, rtol=rough, atol=1e-9)
        for result, wanted in zip(got[1:3], expected[:2], strict=True):
            assert result.dtype == FP32
            assert relative(result, wanted) < 2 * rounding * max(1, scale / 10)
        for result, wanted in zip(got[3:], expected[2:], strict=True):
            torch.testing.assert_close(result.double().cpu().view(1), wanted, rtol=rough, atol=1e-9)
    value = kernels.sigmoid_forward_backward(image, text, *numbers, need_grad=False, workspace=MIB, **settings_)
    assert torch.equal(value[0], kernels.sigmoid_forward_backward(
        image, text, *numbers, need_grad=True, workspace=64 * MIB, **settings_
    )[0])  # fmt: skip
    assert value[1].shape == value[2].shape == (0,)


def test_sigmoid_launches():
    x, one = torch.zeros(64, 16), torch.ones(1)
    run = {"row_offset": 0, "normalize": True, "workspace": MIB}
    assert len(count(lambda: kernels.sigmoid_forward_backward(x, x, one, one, need_grad=True, **run))) <= 7
    assert len(count(lambda: kernels.sigmoid_forward_backward(x, x, one, one, need_grad=False, **run))) <= 4


# --- work laid out ----------------------------------------------------------------------------------------------------


def laid_out(rows, columns, width=512, views=(1, 1), dtype=BF16):
    """A problem of any size, without its numbers."""
    x, y = (torch.empty(v, n, width, dtype=dtype, device="meta") for v, n in zip(views, (rows, columns), strict=True))
    return kernels.Problem(x, y, x.new_empty(*views, dtype=FP32), 0, False)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 70), st.integers(1, 70), st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(1, 40_000))
def test_chunks_cover_everything_once(rows, columns, views, workspace):
    seen = torch.zeros(views[0], rows, views[1], columns, dtype=torch.int64)
    for chunk in kernels._chunks(laid_out(rows, columns, views=views), workspace):
        whole = (chunk.views == 1 or chunk.rows == rows) and (chunk.text_views == 1 or chunk.columns == columns)
        assert whole
        height, width = chunk.shape
        assert height * kernels._padded(width) * 2 <= max(workspace, 32)
        seen[
            chunk.first_view : chunk.first_view + chunk.views,
            chunk.first_row : chunk.first_row + chunk.rows,
            chunk.first_text_view : chunk.first_text_view + chunk.text_views,
            chunk.first_column : chunk.first_column + chunk.columns,
        ] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(("rows", "views"), [(256, 2), (4096, 1), (32_768, 1), (65_536, 1), (65_536, 2), (10**6, 1)])
def test_partial_statistics_stay_within_the_workspace(rows, views):
    problem = laid_out(rows, rows, views=(views, views))
    for arch, workspace in itertools.product((80, 90, 100, 0), (64 * MIB, 256 * MIB)):
        with mock.patch.object(kernels, "_architecture", return_value=arch):
            statistics = kernels.Statistics(problem, True, workspace)
        parts = statistics.row_part.nbytes + statistics.column_part.nbytes
        assert parts <= max(workspace, 48 * rows * views**2)
        if rows in (32_768, 65_536):  # and there is work for every multiprocessor
            assert statistics.high * statistics.wide * views**2 >= (450 if views == 1 else 110)


@pytest.mark.skipif(INTERPRETED, reason="says so itself")
def test_available_says_whether_a_device_is_there():
    assert kernels.available() == torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
def test_more_than_2_31_entries():
    """Offsets beyond 32 bits: 65,536 squared logits; checked on a few rows and columns."""
    problem = make(65_536, 65_536, 64, dtype=BF16, device="cuda", scale=50.0)
    lse_image, lse_text, _ = problem.forward()
    x, y = problem.image[0].double(), problem.text[0].double()
    pick = torch.tensor([0, 1, 32_767, 65_535], device="cuda")
    torch.testing.assert_close(lse_image[0, 0, pick], (50 * x[pick] @ y.T).logsumexp(1), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(lse_text[0, 0, pick], (50 * y[pick] @ x.T).logsumexp(1), rtol=1e-6, atol=1e-4)
    ones = torch.full((1, 1, 1), 1 / 65_536, device="cuda").expand(1, 1, 65_536)
    d_image, _, _ = problem.backward((lse_image, lse_text), (ones, ones))
    logits = 50 * x[pick] @ y.T
    gradient = (logits - lse_image[0, 0, pick, None].double()).exp() + (logits - lse_text[0, 0].double()).exp()
    gradient[torch.arange(len(pick)), pick] -= 2
    assert relative(d_image[0, pick], (50 / 65_536 * gradient @ y).cpu()) < 2 * ROUNDING[BF16]
