"""Micro-batches against the whole batch, in one process and on two ranks. Run as a script, this file is a rank."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rocket_fast.accumulation import cached_step
from rocket_fast.batch import CompanionOutputs, Embeddings, LossOutput
from rocket_fast.kernels import clip_loss
from rocket_fast.losses import LossConfig, build_loss
from rocket_fast.models.heads import BarLIPConfig, SwALIPPrototypesConfig

EXACT = {"rtol": 1e-12, "atol": 1e-12}
MICRO = (3, 1, 4)
PROTOTYPES = SwALIPPrototypesConfig()
PARTS = ("image_z", "text_z", "image_h", "text_h", "image_v", "text_v", "image_p", "text_p")


class Towers(nn.Module):
    """One head with dropout per kind of embedding, over two strong views."""

    def __init__(self, *, dropout: float = 0.3, checkpointed: bool = False, norm: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in PARTS:
            layers = [nn.Linear(6, 5), *([nn.BatchNorm1d(5)] if norm else []), nn.Dropout(dropout), nn.Linear(5, 5)]
            setattr(self, name, nn.Sequential(*layers))
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.log_scales = nn.Parameter(torch.tensor([2.5, 2.0, 1.0]))
        self.checkpointed = checkpointed
        self.double()

    def forward(self, views_VBD: Tensor) -> Embeddings:
        def head(name: str, view: Tensor) -> Tensor:
            module = getattr(self, name)
            return checkpoint(module, view, use_reentrant=False) if self.checkpointed else module(view)

        images, texts = views_VBD[:3], views_VBD[3:]
        views = {name: images if name.startswith("image") else texts for name in PARTS}
        scale, h_scale, p_scale = self.log_scales.exp()
        heads = {name: tuple(head(name, view) for view in views[name]) for name in PARTS[4:]}
        return Embeddings(
            image_z=head("image_z", images[0]),
            text_z=head("text_z", texts[0]),
            logit_scale=scale,
            image_h=tuple(head("image_h", view) for view in images[1:]),
            text_h=tuple(head("text_h", view) for view in texts[1:]),
            h_logit_scale=h_scale,
            companion=CompanionOutputs(**heads, logit_scale=p_scale),
        )


def samples(count: int) -> Tensor:
    return torch.randn(6, count, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def objective(embeddings: Embeddings) -> LossOutput:
    """Every output takes part: CL2L with BarLIP, and with prototypes; draws a number, as an objective may."""
    torch.rand(1)
    barlip, prototypes = (build_loss(LossConfig(), each)(embeddings) for each in (BarLIPConfig(), PROTOTYPES))
    return LossOutput(total=barlip.total + prototypes.total, metrics=barlip.metrics | prototypes.metrics)


def whole_step(embed: Callable[[Tensor], Embeddings], micro_batches: Sequence[Tensor]) -> LossOutput:
    """The step of textbooks, with a graph of everything: what ``cached_step`` has to equal."""
    parts = [embed(micro_batch) for micro_batch in micro_batches]

    def together(take: Callable[[Embeddings], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return tuple(torch.cat(views) for views in zip(*map(take, parts), strict=True))

    companion = CompanionOutputs(
        **{name: together(lambda part, name=name: getattr(part.companion, name)) for name in PARTS[4:]},
        logit_scale=parts[-1].companion.logit_scale,
    )
    (image_z, text_z) = together(lambda part: (part.image_z, part.text_z))
    output = objective(
        Embeddings(
            image_z=image_z,
            text_z=text_z,
            logit_scale=parts[-1].logit_scale,
            image_h=together(lambda part: part.image_h),
            text_h=together(lambda part: part.text_h),
            h_logit_scale=parts[-1].h_logit_scale,
            companion=companion,
        )
    )
    output.total.backward()
    return output


def after(step: Callable[[], LossOutput], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Metrics, total and the random number that follows; all gradients."""
    torch.manual_seed(3)
    output = step()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return output.metrics | {"total": output.total.detach(), "next": torch.rand(2)}, gradients


def require_equal(result: dict[str, Tensor], expected: dict[str, Tensor], tolerance: dict[str, float] = EXACT) -> None:
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("sizes", [MICRO, (8,)], ids=str)
def test_micro_batches_equal_the_whole_batch(sizes: tuple[int, ...], checkpointed: bool) -> None:
    """Value, metrics, every gradient, and the state of the generator, with dropout."""
    micro_batches = samples(sum(sizes)).split(list(sizes), dim=1)
    one, other = Towers(), Towers(checkpointed=checkpointed)
    expected = after(lambda: whole_step(one, micro_batches), one)
    result = after(lambda: cached_step(other, micro_batches, objective), other)
    for mine, theirs in zip(result, expected, strict=True):
        require_equal(mine, theirs)
    assert all(gradient.abs().sum() > 0 for gradient in result[1].values())


def test_the_whole_batch_in_one_forward() -> None:
    """Without dropout nothing tells micro-batches from one forward of all; gradients add to what is there."""
    one, other = Towers(dropout=0.0), Towers(dropout=0.0)
    objective(one(samples(8))).total.backward()
    for times in (1, 2):
        output = cached_step(other, samples(8).split(3, dim=1), objective)
        assert not output.total.requires_grad
        grown = {name: times * p.grad for name, p in one.named_parameters()}
        require_equal({name: p.grad for name, p in other.named_parameters()}, grown)


def test_autocast_around_the_step() -> None:
    """Its cache of cast weights, filled without a graph, must not cut the replay off from the weights."""
    micro_batches = samples(8).float().split(list(MICRO), dim=1)
    one, other = Towers().float(), Towers().float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = after(lambda: whole_step(one, micro_batches), one)
        result = after(lambda: cached_step(other, micro_batches, objective), other)
    for mine, theirs in zip(result, expected, strict=True):
        require_equal(mine, theirs, {"rtol": 0.02, "atol": 0.02})


def test_batch_norm_sees_every_micro_batch_once() -> None:
    """Running statistics as after one forward of each; gradients those of normalising micro-batch by micro-batch."""
    micro_batches = samples(9).split(3, dim=1)
    one, other = Towers(norm=True), Towers(norm=True)
    expected = after(lambda: whole_step(one, micro_batches), one)
    result = after(lambda: cached_step(other, micro_batches, objective, model=other), other)
    for mine, theirs in zip(result, expected, strict=True):
        require_equal(mine, theirs)
    require_equal(other.state_dict(), one.state_dict())
    assert all(module.momentum == 0.1 for module in other.modules() if isinstance(module, nn.BatchNorm1d))


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"micro_batches: got \[\], expected at least one"):
        cached_step(Towers(), [], objective)
    first = Towers()(samples(2))
    outputs = iter([first, replace(first, companion=None)])
    with pytest.raises(ValueError, match=r"embeddings: got '8 tensors', expected 21, as the first micro-batch's"):
        cached_step(lambda _: next(outputs), [0, 1], objective)


def test_a_scale_that_only_the_objective_knows_gets_its_gradient() -> None:
    own = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    tower = torch.nn.Linear(5, 4, dtype=torch.float64)
    pictures = torch.randn(6, 5, dtype=torch.float64)

    def embed(rows: torch.Tensor) -> Embeddings:
        return Embeddings(image_z=tower(rows), text_z=rows[:, :4], logit_scale=torch.tensor(1.0, dtype=torch.float64))

    def objective(embeddings: Embeddings) -> LossOutput:
        return LossOutput(total=clip_loss(embeddings.image_z, embeddings.text_z, own.exp()), metrics={})

    objective(embed(pictures)).total.backward()
    expected = own.grad.clone(), tower.weight.grad.clone()
    own.grad = tower.weight.grad = None
    cached_step(embed, pictures.split(2), objective)
    torch.testing.assert_close((own.grad, tower.weight.grad), expected)


class Pair(NamedTuple):
    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class Weighted:
    sides: list[Tensor]
    logit_scale: Tensor
    weight: None = None


CONTAINERS: dict[str, tuple[Callable[..., object], Callable[[Any], tuple[Tensor, ...]]]] = {
    "tuple": (lambda *parts: parts, lambda whole: whole),
    "dict": (
        lambda image, text, scale: {"text": text, "image": image, "s": scale},
        lambda whole: (whole["image"], whole["text"], whole["s"]),
    ),
    "nested": (
        lambda image, text, scale: [Pair(image, text), {"s": scale}],
        lambda whole: (whole[0].image, whole[0].text, whole[1]["s"]),
    ),
    "dataclass": (
        lambda image, text, scale: Weighted([image, text], scale[None]),  # shared by its name, of whatever shape
        lambda whole: (*whole.sides, whole.logit_scale),
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_embeddings_of_any_kind_and_a_loss_that_is_a_tensor(name: str) -> None:
    pack, unpack = CONTAINERS[name]
    tower = nn.Linear(5, 4).double()
    scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    rows = torch.randn(7, 5, dtype=torch.float64)

    def embed(part: Tensor) -> Any:
        return pack(tower(part), part[:, :4], scale.exp())

    def objective(whole: Any) -> Tensor:
        return clip_loss(*unpack(whole))

    expected = torch.autograd.grad(objective(embed(rows)), (tower.weight, scale))
    loss = cached_step(embed, iter(rows.split(3)), objective)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, objective(embed(rows)).detach())
    torch.testing.assert_close((tower.weight.grad, scale.grad), expected)


class Averaged(nn.Linear):
    """A model whose gradients ranks would average, as far as ``cached_step`` can see."""

    no_sync = staticmethod(contextlib.nullcontext)


def test_what_cannot_train_is_refused() -> None:
    rows = torch.randn(4, 3)
    tower, own = Averaged(3, 3), nn.Parameter(torch.tensor(2.0))

    def step(embed: Any = lambda part: (tower(part), part), objective: Any = lambda w: clip_loss(*w, 1.0)) -> Any:
        return cached_step(embed, rows.split(2), objective, model=tower)

    step()
    step(objective=lambda whole: clip_loss(*whole, own))  # a parameter that is not the model's
    assert own.grad is not None
    with pytest.raises(ValueError, match=r"objective: got 'bias', expected no parameter of the model itself"):
        step(objective=lambda whole: clip_loss(*whole, 1.0 + tower.bias.sum().square()))
    with pytest.raises(ValueError, match=r"is_grad_enabled\(\): got False"), torch.no_grad():
        step()
    with pytest.raises(ValueError, match=r"embed: got 'embeddings that need no gradient'"):
        step(lambda part: (tower(part).detach(), part))
    with pytest.raises(ValueError, match=r"embed: text: got <class 'str'>, expected tensors in tuples"):
        step(lambda part: {"image": tower(part), "text": "a dog"})
    with pytest.raises(ValueError, match=r"objective: got <class 'float'>, expected a loss"):
        step(objective=lambda whole: clip_loss(*whole, 1.0).item())
    with pytest.raises(ValueError, match=r"objective: got 'a loss without a graph'"):
        step(objective=lambda whole: torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"objective: got 'a loss of shape \(4,\)', expected one number"):
        step(objective=lambda whole: whole[0].sum(1))


# --- two ranks --------------------------------------------------------------------------------------------------------

RANKS = ((2, 3), (1, 2))  # micro-batches of each


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=len(RANKS), timeout=timedelta(seconds=60))
    sizes = [size for of_rank in RANKS for size in of_rank]
    micro_batches = samples(sum(sizes)).split(sizes, dim=1)[2 * rank : 2 * rank + 2]
    model = nn.parallel.DistributedDataParallel(Towers(dropout=0.0))
    reductions = []
    model.register_comm_hook(None, lambda _, bucket: count_and_average(bucket, reductions))
    result = after(lambda: cached_step(model, micro_batches, objective, model=model), model)
    assert len(reductions) >= 1
    assert sum(reductions) == sum(p.numel() for p in model.parameters()), "gradients are exchanged once"
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


def count_and_average(bucket: dist.GradBucket, reductions: list[int]) -> torch.futures.Future[Tensor]:
    reductions.append(bucket.buffer().numel())
    future = dist.all_reduce(bucket.buffer().div_(len(RANKS)), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


@pytest.mark.system
def test_two_ranks_with_micro_batches_equal_one_process(tmp_path: Path) -> None:
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(len(RANKS))]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * len(RANKS)
    finally:
        for process in processes:
            process.kill()
    model = Towers(dropout=0.0)
    expected = after(lambda: whole_step(model, [samples(sum(map(sum, RANKS)))]), model)
    for rank in range(len(RANKS)):
        for mine, theirs in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            require_equal(mine, theirs)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
