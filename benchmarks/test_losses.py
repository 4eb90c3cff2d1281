"""The contrastive losses, forward and backward: this package, the usual dense peer, and the floor of four products."""

import pytest
import torch
import torch.nn.functional as F

from rocket_fast.kernels import clip_loss, multiview_clip_loss

N, D = 2048, 256


def unit(seed: int, rows: int = N) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, D, generator=generator), dim=1).requires_grad_()


def backward(build, leaves):
    for leaf in leaves:
        leaf.grad = None
    build().backward()


@pytest.mark.benchmark(group=f"clip loss, N={N}, D={D}, fp32, forward + backward")
class TestClipLoss:
    def test_rocket_fast(self, benchmark):
        image, text, scale = unit(0), unit(1), torch.tensor(14.3, requires_grad=True)
        benchmark(backward, lambda: clip_loss(image, text, scale, normalize=False), (image, text, scale))

    def test_open_clip(self, benchmark):
        peer = pytest.importorskip("open_clip", reason="the bench extra brings open_clip_torch").ClipLoss()
        image, text, scale = unit(0), unit(1), torch.tensor(14.3, requires_grad=True)
        benchmark(backward, lambda: peer(image, text, scale), (image, text, scale))

    def test_floor(self, benchmark):
        """One product forward, three backward: nothing that does not store the N x N similarities can do less."""
        image, text = unit(0).detach(), unit(1).detach()

        def products():
            scores_NN = image @ text.T
            return image @ text.T, scores_NN @ text, scores_NN.T @ image

        benchmark(products)


@pytest.mark.benchmark(group=f"CL2L loss, N={N}, D={D}, K=2, fp32, forward + backward")
class TestMultiviewLoss:
    def test_rocket_fast(self, benchmark):
        views = [unit(seed) for seed in range(6)]
        scales = [torch.tensor(s, requires_grad=True) for s in (14.3, 10.0)]

        def loss():
            return multiview_clip_loss(
                views[0], views[1], scales[0], views[2:4], views[4:6], scales[1], label_smoothing=0.1, reduction="sum"
            )

        benchmark(backward, loss, [*views, *scales])
