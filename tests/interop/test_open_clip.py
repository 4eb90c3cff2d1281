"""Inside open_clip's own training loop, and on two real processes. Run as a script, this file is a rank."""

from __future__ import annotations

import inspect
import itertools
import math
import subprocess
import sys
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rocket_fast import exchange
from rocket_fast.interop.open_clip import DIST_IMPLS, ClipLoss, SigLipLoss

LR = 3e-3
STEPS, BATCH = 20, 16

# --- open_clip's training loop ----------------------------------------------------------------------------------------


def tiny_clip(open_clip: Any, siglip: bool) -> nn.Module:
    """An open_clip model of 16-pixel images and 8-token captions; the same weights every time."""
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    scales = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0} if siglip else {}
    return open_clip.CLIP(16, vision, text, output_dict=True, **scales)


def peer_and_own(name: str) -> tuple[Any, Any]:
    """open_clip's class of that name, and the one that stands in for it."""
    peers = pytest.importorskip("open_clip.loss", reason="the test extra brings open_clip_torch")
    return getattr(peers, name), {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name]


class Batches:
    """A data loader as open_clip's loop reads it: learnable pairs, each caption telling the image's colour."""

    num_batches, num_samples = STEPS, STEPS * BATCH

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        for _ in range(STEPS):
            colour_B3 = torch.rand(BATCH, 3, generator=generator)
            noise = 0.1 * torch.randn(BATCH, 3, 16, 16, generator=generator)
            tokens_BL = torch.zeros(BATCH, 8, dtype=torch.long)
            tokens_BL[:, :3] = 1 + (colour_B3 * 60).long()
            tokens_BL[:, 3] = 63
            yield colour_B3[:, :, None, None] + noise, tokens_BL


class Recorder:
    """Stands in for the tensorboard writer: keeps every step's loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name == "train/loss":
            self.losses.append(value)


def train(loss: nn.Module, *, siglip: bool, **options: Any) -> tuple[list[float], nn.Module]:
    """Twenty batches through ``open_clip_train.train.train_one_epoch``; the losses it logs and the trained model."""
    open_clip = pytest.importorskip("open_clip", reason="the test extra brings open_clip_torch")
    from open_clip_train.train import train_one_epoch

    defaults = {"device": "cpu", "precision": "fp32", "distill": False, "accum_freq": 1, "skip_scheduler": True}
    defaults |= {"horovod": False, "grad_clip_norm": 1.0, "rank": 0, "local_rank": 0, "world_size": 1, "wandb": False}
    args = Namespace(**defaults | {"batch_size": BATCH, "log_every_n_steps": 1} | options)
    model, recorder = tiny_clip(open_clip, siglip), Recorder()
    data = {"train": SimpleNamespace(dataloader=Batches(), set_epoch=lambda epoch: None)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    train_one_epoch(model, data, loss, 0, optimizer, None, None, None, args, tb_writer=recorder)
    return recorder.losses, model


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize(
    "options", [{}, {"accum_freq": 2}, {"precision": "amp_bf16"}], ids=["fp32", "accumulated", "bf16"]
)
def test_twenty_training_steps_are_open_clips(name: str, options: dict[str, Any]) -> None:
    peer, own = peer_and_own(name)
    siglip = name == "SigLipLoss"
    theirs, their_model = train(peer(), siglip=siglip, **options)
    ours, our_model = train(own(), siglip=siglip, **options)
    assert len(ours) == STEPS // options.get("accum_freq", 1)
    assert theirs[-1] < 0.97 * theirs[0], theirs  # it learns, so equal losses mean equal gradients
    if "precision" in options:  # open_clip's bf16 loss has 8 bits, so the two runs part slowly
        torch.testing.assert_close(ours, theirs, rtol=2**-5, atol=0)
        return
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    state = our_model.state_dict()
    # Adam moves a weight by up to the learning rate a step, whatever the gradient's size: where that is small, rounding
    # decides the direction. So weights agree to a thousandth of how far they could have moved.
    atol = 1e-3 * LR * STEPS
    for key, value in their_model.state_dict().items():
        if not key.endswith("in_proj_bias"):  # the keys' part has gradient zero, of which Adam scales up the rounding
            torch.testing.assert_close(state[key], value, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_constructor_call_and_output_are_open_clips(name: str) -> None:
    peer, own = peer_and_own(name)
    for method in ("__init__", "forward"):
        theirs, ours = (inspect.signature(getattr(cls, method)).parameters for cls in (peer, own))
        assert [(p.name, p.default, p.kind) for p in ours.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]
    arguments = (*samples(8).split(6, dim=1), torch.tensor(10.0), torch.tensor(-3.0))
    for loss in (peer(), own()):
        torch.testing.assert_close(loss(*arguments, output_dict=True), {"contrastive_loss": loss(*arguments)})
    torch.testing.assert_close(own()(*arguments), peer()(*arguments))
    torch.testing.assert_close(own()(*arguments[:3], None), peer()(*arguments[:3], None))


# --- several processes ------------------------------------------------------------------------------------------------


def samples(rows: int) -> Tensor:
    """Images and texts side by side, (rows, 12), float64."""
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Towers(nn.Module):
    """A linear map each for images and texts, and the two numbers of the losses."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.image, self.text = (
            nn.Parameter(torch.randn(6, 5, generator=generator, dtype=torch.float64)) for _ in range(2)
        )
        self.logit_scale = nn.Parameter(torch.tensor(10.0, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-5.0, dtype=torch.float64))

    def forward(self, pairs: Tensor) -> tuple[Tensor, ...]:
        image, text = pairs.split(6, dim=1)
        # Of a length that is not 1: features are taken as they are.
        features = (1.5 * F.normalize(image @ self.image, dim=1), 0.8 * F.normalize(text @ self.text, dim=1))
        return (*features, self.logit_scale, self.logit_bias)


def losses(**place: Any) -> dict[str, nn.Module]:
    """Both losses with every combination of their flags."""
    flags = itertools.product([False, True], repeat=2)
    clip = {f"clip {f}": ClipLoss(local_loss=f[0], gather_with_grad=f[1], **place) for f in flags}
    return clip | {f"siglip {name}": SigLipLoss(dist_impl=name, **place) for name in DIST_IMPLS}


def values_and_gradients(model: nn.Module, pairs: Tensor, losses: dict[str, nn.Module]) -> dict[str, Tensor]:
    results = {}
    for name, loss in losses.items():
        model.zero_grad()
        value = loss(*model(pairs))
        value.backward()
        results[name] = value.detach()
        for parameter, tensor in model.named_parameters():
            results[f"{name}/{parameter.removeprefix('module.')}"] = tensor.grad.clone()
    return results


def run_rank(rank: int, sizes: list[int], folder: Path) -> None:
    """What one of the processes does; called with sizes as the local batches."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=len(sizes), timeout=timedelta(seconds=60))
    model = nn.parallel.DistributedDataParallel(Towers())
    mine = samples(sum(sizes)).split(sizes)[rank]
    place = {"rank": rank, "world_size": len(sizes)}
    found = []
    for flop in (math.inf, 0.0):  # so few samples are gathered; so many would be exchanged one-sidedly
        exchange.COLLECTIVES_FLOP["cpu"] = flop
        found.append(values_and_gradients(model, mine, losses(**place)))
    torch.save(found, folder / f"{rank}.pt")
    for misplaced in ({"rank": rank, "world_size": 3}, {"rank": 1 - rank, "world_size": 2}):
        for loss in losses(**misplaced).values():
            with pytest.raises(ValueError, match=r"world_size: got 3, expected 2|rank: got \d, expected \d"):
                loss(*model(mine))
    dist.destroy_process_group()


@pytest.mark.system
@pytest.mark.parametrize("sizes", [(4, 4), (6, 1)], ids=str)
def test_two_processes_equal_one_on_the_whole_batch(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """Value and all gradients, whatever the flags."""
    command = [sys.executable, __file__]
    arguments = [str(tmp_path), *map(str, sizes)]
    processes = [subprocess.Popen([*command, str(rank), *arguments]) for rank in range(len(sizes))]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * len(sizes)
    finally:
        for process in processes:
            process.kill()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(sizes))]
    gathered, one_sided = zip(*ranks, strict=True)
    expected = values_and_gradients(Towers(), samples(sum(sizes)), losses())
    for (name, value), found in itertools.product(expected.items(), (gathered, one_sided)):
        values = [results[name] for results in found]
        if name.startswith("siglip") and "/" not in name:  # each process's value is its share
            values = [torch.stack(values).mean()]
        for one in values:
            torch.testing.assert_close(one, value, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals_name_argument_value_and_expectation() -> None:
    pairs = (*samples(4).split(6, dim=1), torch.tensor(10.0, dtype=torch.float64), None)
    with pytest.raises(ValueError, match=r"use_horovod: got True, expected False: .* torch\.distributed"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match=r"dist_impl: got 'ring', expected one of"):
        SigLipLoss(dist_impl="ring")
    for loss in (ClipLoss(world_size=2), SigLipLoss(world_size=2)):
        with pytest.raises(ValueError, match=r"world_size: got 2, expected 1, the size of the initialised"):
            loss(*pairs)


@pytest.mark.system
def test_open_clip_itself_is_not_imported() -> None:
    code = (
        "import sys; sys.modules.update(open_clip=None, triton=None, numba=None, timm=None); import torch;"
        "from rocket_fast.interop.open_clip import ClipLoss, SigLipLoss; x = torch.randn(4, 8, requires_grad=True);"
        "ClipLoss()(x, x, 10.0).backward(); SigLipLoss()(x, x, 10.0, -10.0).backward(); assert x.grad.any()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), [int(size) for size in sys.argv[3:]], Path(sys.argv[2]))
