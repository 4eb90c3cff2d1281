"""Batch norm synchronised over real processes on gloo against one process on the concatenated batch.

Run as a script, this file is a rank: three processes, started once, form groups of two and three in turn.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from process_support import ranks_of
from torch import Tensor, nn

from rocket_fast.kernels.projector import batch_norm_relu, batch_norm_relu_linear
from rocket_fast.models.heads import MLPHead, SiamLIPConfig, build_companion

SIZES = [(4, 4), (6, 1), (3, 0), (5, 1, 4)]  # local batches
WIDTH, OUT = 7, 3
PRECISE = {torch.float64: 1e-11, torch.float32: 2e-5}
TRAINING: dict[str, Any] = {"training": True, "momentum": 0.3, "eps": 1e-5}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs, of which every rank has others on average; what the outputs are multiplied with."""
    x = 50 + draw(count, WIDTH, seed=1) + torch.arange(count, dtype=torch.float64)[:, None]
    return x.to(dtype), draw(count, WIDTH, seed=2).to(dtype)


def operations(x: Tensor, upstream: Tensor, group: Any) -> dict[str, Tensor]:
    """Outputs, buffers, gradients of both operations."""
    dtype, found = x.dtype, {}
    for name in ("norm", "linear"):
        leaves = [
            x.clone(),
            *(draw(WIDTH, seed=seed).to(dtype) for seed in (3, 4, 5)),
            draw(OUT, WIDTH, seed=6).to(dtype),
        ]
        x_NC, weight, bias, shift, matrix = (leaf.requires_grad_() for leaf in leaves)
        running = torch.zeros(WIDTH, dtype=dtype), torch.ones(WIDTH, dtype=dtype)
        state, options = (x_NC, weight, bias, *running), {"linear_bias": shift, "group": group, **TRAINING}
        if name == "norm":
            out, used = batch_norm_relu(*state, **options), (x_NC, weight, bias)
        else:
            out, used = batch_norm_relu_linear(*state, matrix, **options), (x_NC, weight, bias, matrix)
        gradients = torch.autograd.grad(out, used, upstream[:, : out.shape[1]])
        found |= {f"{name} rows out": out.detach(), f"{name} rows d x": gradients[0]}
        found |= {f"{name} sum d {index}": gradient for index, gradient in enumerate(gradients[1:])}
        found |= {f"{name} same mean": running[0], f"{name} same var": running[1]}
    return found


class Model(nn.Module):
    """Heads of both kinds: h's, and a companion's with a norm at their end."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h = MLPHead(WIDTH, 9, 8, OUT).to(dtype)
        self.companion = build_companion(SiamLIPConfig(hidden=9, out=4, predictor_hidden=6), WIDTH, WIDTH).to(dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = self.companion([x], [2 * x])
        return [self.h(x), *outputs.image_v, *outputs.text_v, *outputs.image_p, *outputs.text_p]


def heads(x: Tensor, upstream: Tensor, ranks: int) -> dict[str, Tensor]:
    """Gradients and buffers of the heads after a step, the loss being all ranks' together."""
    model: nn.Module = Model(x.dtype)
    if ranks > 1:
        for module in model.modules():
            module.synchronized = True
        model = nn.parallel.DistributedDataParallel(model)
    loss = sum((out * upstream[:, :1]).square().sum() for out in model(x))
    (ranks * loss).backward()  # DistributedDataParallel averages
    named = [(name.removeprefix("module."), p.grad) for name, p in model.named_parameters()]
    return {**dict(named), **{name.removeprefix("module."): buffer for name, buffer in model.named_buffers()}}


def run_rank(rank: int, folder: Path) -> None:
    """All that one of the processes does."""
    torch.set_num_threads(1)
    everything: dict[str, Any] = {}
    for index, sizes in enumerate(SIZES):
        if rank >= len(sizes):
            continue
        store = f"file://{folder / f'store{index}'}"
        dist.init_process_group("gloo", store, rank=rank, world_size=len(sizes), timeout=timedelta(seconds=60))
        for dtype in PRECISE:
            x, upstream = (whole.split(list(sizes))[rank] for whole in batch(sum(sizes), dtype))
            everything[f"{sizes} {dtype}"] = operations(x, upstream, dist.group.WORLD)
            if min(sizes):
                everything[f"{sizes} {dtype} heads"] = heads(x, upstream, len(sizes))
        if index == 0:
            with pytest.raises(ValueError, match="x_NC: got '1 rows on all ranks'"):
                operations(*(whole[: 1 - rank] for whole in batch(1, torch.float64)), dist.group.WORLD)
        dist.destroy_process_group()
    torch.save(everything, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What every process computed, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    count = max(map(len, SIZES))
    with ranks_of(__file__, count, folder):
        pass
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    size = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= tolerance * size, (name, found, expected)


@pytest.mark.system
@pytest.mark.parametrize("dtype", PRECISE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_operations_equal_one_process(ranks: list[dict[str, Any]], sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    whole = operations(*batch(sum(sizes), dtype), None)
    parts = [ranks[rank][f"{sizes} {dtype}"] for rank in range(len(sizes))]
    for name, expected in whole.items():
        found = [part[name] for part in parts]
        if " rows " in name:
            close(torch.cat(found), expected, PRECISE[dtype], name)
        elif " sum " in name:
            close(torch.stack(found).sum(0), expected, PRECISE[dtype], name)
        else:
            assert all(each.equal(found[0]) for each in found), name
            close(found[0], expected, PRECISE[dtype], name)


@pytest.mark.system
@pytest.mark.parametrize("dtype", PRECISE, ids=str)
@pytest.mark.parametrize("sizes", [sizes for sizes in SIZES if min(sizes)], ids=str)
def test_heads_equal_one_process(ranks: list[dict[str, Any]], sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Parameters under their own names, of DistributedDataParallel's average; running statistics."""
    expected = heads(*batch(sum(sizes), dtype), 1)
    for rank in range(len(sizes)):
        found = ranks[rank][f"{sizes} {dtype} heads"]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            close(found[name], value, 20 * PRECISE[dtype], name)


def test_statistics_of_one_rank_alone_are_others() -> None:
    """What is compared would tell."""
    x, _ = batch(8, torch.float64)
    alone = batch_norm_relu(x[:4], None, None, None, None, **TRAINING)
    assert not torch.allclose(alone, F.relu(F.batch_norm(x, None, None, training=True))[:4])


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
