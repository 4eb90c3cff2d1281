"""Two real processes on gloo against one process on the concatenated batch. Run as a script, this file is a rank."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rocket_fast import distributed
from rocket_fast.batch import CompanionOutputs, Embeddings
from rocket_fast.losses import LossConfig, build_loss
from rocket_fast.models.heads import BarLIPConfig, BYOLIPConfig, SiamLIPConfig, SwALIPConfig

WIDTH = 6
COMPANIONS = {
    "none": None,
    "siamlip": SiamLIPConfig(),
    "byolip": BYOLIPConfig(),
    "barlip": BarLIPConfig(),
    "swalip": SwALIPConfig(),
}


class Towers(nn.Module):
    """One linear head per kind of embedding over two strong views; enough to tell every gradient apart."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in ("image_z", "text_z", "image_h", "text_h", "image_v", "text_v", "image_p", "text_p"):
            head = nn.Linear(WIDTH, 5, bias=False, dtype=torch.float64)
            nn.init.normal_(head.weight, generator=generator)
            setattr(self, name, head)
        self.log_scales = nn.Parameter(torch.tensor([2.5, 2.0], dtype=torch.float64))

    def forward(self, views_VBD: Tensor) -> Embeddings:
        scale, h_scale = self.log_scales.exp()
        images, texts = views_VBD[:3], views_VBD[3:]
        heads = {
            name: tuple(getattr(self, name)(view) for view in (images if name.startswith("image") else texts))
            for name in ("image_v", "text_v", "image_p", "text_p")
        }
        return Embeddings(
            image_z=self.image_z(images[0]),
            text_z=self.text_z(texts[0]),
            logit_scale=scale,
            image_h=tuple(self.image_h(view) for view in images[1:]),
            text_h=tuple(self.text_h(view) for view in texts[1:]),
            h_logit_scale=h_scale,
            companion=CompanionOutputs(**heads),
        )


def samples(count: int) -> Tensor:
    return torch.randn(6, count, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def losses_and_gradients(model: nn.Module, views_VBD: Tensor) -> dict[str, Tensor]:
    """Per objective, the loss, its metrics and the gradient of every parameter."""
    results = {}
    for name, companion in COMPANIONS.items():
        model.zero_grad()
        embeddings = model(views_VBD)
        output = build_loss(LossConfig(), companion)(embeddings)
        heads = embeddings.companion
        outputs = (*heads.image_v, *heads.text_v, *heads.image_p, *heads.text_p)
        # DistributedDataParallel wants every parameter to take part in every backward.
        (output.total + 0 * sum(x.sum() for x in outputs)).backward()
        results |= {f"{name}/{metric}": value for metric, value in output.metrics.items()}
        for parameter_name, parameter in model.named_parameters():
            results[f"{name}/grad/{parameter_name.removeprefix('module.')}"] = parameter.grad.clone()
    return results


def run_rank(rank: int, sizes: list[int], folder: Path) -> None:
    """What one of the processes does; called with sizes as the local batches."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=len(sizes), timeout=timedelta(seconds=60))
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (rank, len(sizes), rank == 0)
    mine = samples(sum(sizes)).split(sizes, dim=1)[rank]

    leaf = mine[0].clone().requires_grad_()
    gathered = distributed.gather(leaf)
    (gathered * (rank + 1)).sum().backward()  # another loss on every rank: gradients add up to 1 + 2 + ...
    results = {"gathered": gathered.detach(), "gathered_grad": leaf.grad}

    model = nn.parallel.DistributedDataParallel(Towers())
    results |= losses_and_gradients(model, mine)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(params=[(4, 4), (6, 1)], ids=str)
def ranks(request: pytest.FixtureRequest, tmp_path: Path) -> list[dict[str, Tensor]]:
    """What two processes with these local batches computed."""
    sizes = request.param
    arguments = [str(tmp_path), *map(str, sizes)]
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(rank), *arguments]) for rank in range(len(sizes))]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * len(sizes)
    finally:
        for process in processes:
            process.kill()
    return [torch.load(tmp_path / f"{rank}.pt") | {"size": torch.tensor(sizes)} for rank in range(len(sizes))]


@pytest.mark.system
def test_ranks_equal_one_process_on_the_whole_batch(ranks: list[dict[str, Tensor]]) -> None:
    sizes = ranks[0]["size"].tolist()
    whole = samples(sum(sizes))
    expected = losses_and_gradients(Towers(), whole)
    assert any(value.abs().sum() > 0 for name, value in expected.items() if "byolip/grad" in name)
    for rank, results in enumerate(ranks):
        torch.testing.assert_close(results.pop("gathered"), whole[0], rtol=0, atol=0)
        grad = results.pop("gathered_grad")
        torch.testing.assert_close(grad, torch.full_like(whole[0][: sizes[rank]], 3.0), rtol=0, atol=0)
        results.pop("size")
        assert results.keys() == expected.keys()
        for name, value in results.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12, msg=lambda m, name=name: name + m)


def test_a_world_of_one_gathers_nothing() -> None:
    tensor = torch.randn(3, 2)
    assert distributed.gather(tensor) is tensor
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), [int(size) for size in sys.argv[3:]], Path(sys.argv[2]))
