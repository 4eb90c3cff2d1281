"""Real processes on gloo that train: as one process on the same global batch, whatever their number and micro-batches.

All ranks of all cases are four processes started once, which form groups in turn. Run as a script, this file is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_support import ranks_of
from torch import Tensor

from rocket_fast import distributed
from rocket_fast.batch import Batch, Embeddings, PackedText
from rocket_fast.checkpoint import CheckpointFolder
from rocket_fast.config import EvalConfig, TrainConfig, from_plain, to_plain
from rocket_fast.models.clip import DualEncoder
from rocket_fast.models.heads import (
    BarLIPConfig,
    BYOLIPConfig,
    CompanionConfig,
    SharedHeadConfig,
    SiamLIPConfig,
    SwALIPConfig,
    SwALIPPrototypesConfig,
)
from rocket_fast.models.vision import ViTConfig
from rocket_fast.trainer import NonFiniteLoss, Trainer, train

STEPS, BATCH = 10, 32
WORLDS, MICRO_BATCHES = (1, 2, 4), (1, 4)
SHARED, PROTOTYPES = "cl2l, shared head", "swalip with prototypes"  # beside the matrix, of two processes only
SIAMESE = {"hidden": 32, "out": 16, "predictor_hidden": 32}
SYSTEMS: dict[str, CompanionConfig | None] = {
    "cl2l": None,
    "siamlip": SiamLIPConfig(**SIAMESE),
    "byolip": BYOLIPConfig(**SIAMESE),
    "barlip": BarLIPConfig(hidden=32, out=64),
    "swalip": SwALIPConfig(),
    SHARED: None,  # the one without any batch norm
    PROTOTYPES: SwALIPPrototypesConfig(hidden=32, out=16, prototypes=24, freeze_steps=3),
}
CASES = [
    case
    for case in itertools.product(WORLDS, MICRO_BATCHES, SYSTEMS)
    if case[:2] != (1, 1) and (case[0] == 2 or case[2] not in (SHARED, PROTOTYPES))
]


@dataclass(frozen=True)
class Trained:
    """Of every step the loss and the norm of the gradients; and the model's state after the last."""

    losses: list[float]
    norms: list[float]
    state: dict[str, Tensor]


def trained(config: TrainConfig, parts: list[list[int]] | None = None) -> Trained:
    """Ten steps, which cross epochs, in float64: else rounding decides at the corners of ReLUs, and hides mistakes.

    With ``parts``, the batch is embedded in these.
    """
    torch.set_default_dtype(torch.float64)
    try:
        trainer = Trainer(config)
    finally:
        torch.set_default_dtype(torch.float32)
    forward = trainer.model.forward if parts is None else in_parts(trainer.model.forward, parts)
    trainer.model.forward = lambda images, texts, _: forward(tuple(i.double() for i in images), texts)  # type: ignore
    losses, norms = [], []
    with contextlib.closing(trainer):
        for step in range(STEPS):
            if step % len(trainer.loader) == 0:
                trainer.loader.set_epoch(step // len(trainer.loader))
                batches = iter(trainer.loader)
            output = trainer.train_step(next(batches))
            losses.append(output.total.item())
            norms.append(output.metrics["grad_norm"].item())
        return Trained(losses, norms, trainer.model.state_dict())


# --- what a process does ----------------------------------------------------------------------------------------------


def matrix(configs: dict[str, TrainConfig], world: int) -> dict[tuple[int, int, str], Trained]:
    """The cases of a world, which this process is in."""
    results = {}
    for case in CASES:
        if case[0] == world:
            config = configs[case[2]]
            loop = replace(config.loop, accumulation=case[1])
            results[case] = trained(replace(config, name="-".join(map(str, case)), loop=loop))
    return results


def poisoned(config: TrainConfig) -> dict[str, Any]:
    """A run in which rank 1's pictures of step 5 are not numbers."""
    trainer = Trainer(config)
    weights: dict[int, list[Tensor]] = {}
    real_step = trainer.train_step

    def step(batch: Batch) -> Any:
        weights[trainer.step] = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        if trainer.step == 4 and distributed.rank() == 1:
            nan = torch.full(batch.images[0].shape, torch.nan)
            batch = replace(batch, images=(nan, *batch.images[1:]))
        return real_step(batch)

    trainer.train_step = step  # type: ignore[method-assign]
    with contextlib.closing(trainer), pytest.raises(NonFiniteLoss) as caught:
        trainer.fit(types.SimpleNamespace(signum=0))  # type: ignore[arg-type]
    after = [parameter.detach() for parameter in trainer.model.parameters()]
    return {"step": trainer.step, "message": str(caught.value), "before": weights[4], "after": after}


def resumed(config: TrainConfig) -> dict[str, Any]:
    """A run stopped in the middle of an epoch, continued and evaluated."""
    train(replace(config, loop=replace(config.loop, max_steps=5)))
    dist.barrier()  # rank 0's checkpoint is written
    return {"step": train(config).step}


def run_process(process: int, folder: Path) -> None:
    """Processes 0 and 1 are a world of two while process 2 is one of its own; then all are a world of four."""
    torch.set_num_threads(1)
    plain = json.loads((folder / "configs.json").read_text())
    configs = {name: from_plain(each) for name, each in plain.items()}
    poison, whole = configs.pop("poisoned"), configs.pop("resumed")

    @contextlib.contextmanager
    def world_of(size: int) -> Any:
        store = f"file://{folder / f'store{size}'}"
        dist.init_process_group("gloo", store, rank=process, world_size=size, timeout=timedelta(minutes=20))
        yield
        dist.destroy_process_group()

    results: dict[Any, Any] = {}
    if process < 2:
        with world_of(2):
            results |= {"poisoned": poisoned(poison), "resumed": resumed(whole)} | matrix(configs, 2)
    elif process == 2:
        results |= matrix(configs, 1)
    with world_of(4):
        results |= matrix(configs, 4)
    torch.save(
        {case: vars(r) if isinstance(r, Trained) else r for case, r in results.items()}, folder / f"{process}.pt"
    )


# --- against one process ----------------------------------------------------------------------------------------------


def partition(world: int, micro_batches: int) -> list[list[int]]:
    """Places in the global batch of each micro-batch's samples, those of all ranks together."""
    own = BATCH // world
    ends = [own * part // micro_batches for part in range(micro_batches + 1)]
    return [
        [rank * own + place for rank in range(world) for place in range(start, end)]
        for start, end in itertools.pairwise(ends)
    ]


def in_parts(forward: Callable[..., Embeddings], parts: list[list[int]]) -> Callable[..., Embeddings]:
    """The forward pass of textbooks: part by part, with a graph of all."""

    def embed(images: tuple[Tensor, ...], texts: tuple[PackedText, ...]) -> Embeddings:
        singles = [text.split([1] * len(text)) for text in texts]
        return joined(
            [
                forward(
                    tuple(image[part] for image in images),
                    tuple(PackedText.cat([single[place] for place in part]) for single in singles),
                )
                for part in parts
            ]
        )

    return embed


def joined(parts: Sequence[Any]) -> Any:
    """Embeddings of all parts: rows one after the other, what is the same for all once."""
    if dataclasses.is_dataclass(parts[0]):
        fields = [field.name for field in dataclasses.fields(parts[0])]
        return type(parts[0])(**{name: joined([getattr(part, name) for part in parts]) for name in fields})
    if isinstance(parts[0], tuple):
        return tuple(joined(each) for each in zip(*parts, strict=True))
    if parts[0] is None or parts[0].ndim == 0:
        return parts[0]
    return torch.cat(list(parts))


def alone(config: TrainConfig, parts: list[list[int]] | None = None) -> Trained:
    """One process on the global batch, embedded in these parts."""
    return trained(replace(config, name=f"alone-{len(list(config.out.glob('*')))}"), parts)


@pytest.fixture(scope="module")
def configs(
    tmp_path_factory: pytest.TempPathFactory, tiny_config_in: Callable[[Path], TrainConfig]
) -> dict[str, TrainConfig]:
    """A run of each system without dropout and without batch norm in the tower, which ranks have each for itself."""
    base = tiny_config_in(tmp_path_factory.mktemp("configs"))
    model = replace(
        base.model,
        vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
        text=replace(base.model.text, width=8, dropout=0.0),
    )
    # Epsilon is near the gradients' size: where it is far below, Adam takes the same step whatever their scale, and
    # whole steps from the rounding in those that should be zero (biases of keys).
    base = replace(
        base,
        model=model,
        data=replace(base.data, batch_size=BATCH, workers=1),
        optim=replace(base.optim, lr=1e-2, eps=1e-2),
        loop=replace(base.loop, epochs=4),
        eval=EvalConfig(),
    )
    # Batch norm takes most of the time, three exchanges each in every micro-batch: head h has it where it is alone.
    shared = replace(model, h_head=SharedHeadConfig())
    models = {name: replace(shared if each else model, companion=each) for name, each in SYSTEMS.items()}
    return {name: replace(base, model=each) for name, each in (models | {SHARED: shared}).items()}


@pytest.fixture(scope="module")
def runs(
    configs: dict[str, TrainConfig],
    tiny_config_in: Callable[[Path], TrainConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, TrainConfig]:
    """Whole runs of two processes: one that is poisoned, and one that is stopped, continued and evaluated."""
    base = tiny_config_in(tmp_path_factory.mktemp("runs"))
    resume = replace(base, name="resumed", model=configs["cl2l"].model, optim=configs["cl2l"].optim)
    loop = replace(base.loop, log_every=3, checkpoint_every=2)
    return {"resumed": resume, "poisoned": replace(resume, name="poisoned", loop=loop)}


@pytest.fixture(scope="module")
def outcomes(
    configs: dict[str, TrainConfig], runs: dict[str, TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[Any, Any]], dict[tuple[int, int, str], Trained]]:
    """What each process got; and, of the matrix's cases, what one process gets."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "configs.json").write_text(json.dumps({name: to_plain(c) for name, c in (configs | runs).items()}))
    count, threads = max(WORLDS), torch.get_num_threads()
    whole = {name: alone(config) for name, config in configs.items()}  # compiles for all processes
    with ranks_of(__file__, count, folder):
        expected = {}
        for world, parts, name in CASES:
            # Batch norm takes each micro-batch's own statistics, over all ranks.
            norm = parts > 1 and name != SHARED
            own = alone(configs[name], partition(world, parts)) if norm else whole[name]
            expected[world, parts, name] = own
        torch.set_num_threads(threads)
    return [torch.load(folder / f"{number}.pt") for number in range(count)], expected


@pytest.mark.system
@pytest.mark.parametrize("case", CASES, ids=lambda case: "{}-{}-{}".format(*case))
def test_ten_steps_are_those_of_one_process(
    outcomes: tuple[list[dict[Any, Any]], dict[Any, Trained]], case: tuple[int, int, str]
) -> None:
    """Losses, gradients' norms, weights and running statistics: (processes, micro-batches, system).

    With batch norm and micro-batches, the one process embeds the same micro-batches, each of all ranks' samples.
    """
    processes, expected = outcomes
    of_case = [results[case] for results in processes if case in results]
    assert len(of_case) == case[0]
    for result in of_case:
        assert result["losses"] == pytest.approx(expected[case].losses, rel=1e-9)
        assert result["norms"] == pytest.approx(expected[case].norms, rel=1e-9)
        torch.testing.assert_close(result["state"], expected[case].state, rtol=1e-9, atol=1e-9)


@pytest.mark.system
def test_numbers_that_are_none_in_one_rank_stop_all_at_the_same_step(
    outcomes: tuple[list[dict[Any, Any]], dict[Any, Trained]], runs: dict[str, TrainConfig]
) -> None:
    """Step 5 is bad and step 6 the next that is logged: the weights are those before, on both ranks and on disk."""
    results, folder = [process["poisoned"] for process in outcomes[0][:2]], runs["poisoned"].folder
    for rank, result in enumerate(results):
        assert result["step"] == 6
        assert re.search(rf"not finite at step 5\..*{folder}/nonfinite-rank{rank}\.json", result["message"])
        dump = json.loads((folder / f"nonfinite-rank{rank}.json").read_text())
        assert (dump["step"], dump["noticed_at_step"], len(dump["keys"])) == (5, 6, BATCH // 4)
        for before, after, other in zip(result["before"], result["after"], results[0]["after"], strict=True):
            assert torch.equal(before, after)
            assert torch.equal(after, other)
    checkpoints = CheckpointFolder(folder / "checkpoints", keep=9)
    saved = checkpoints.load_latest()
    assert saved is not None
    assert saved["step"] == 4
    assert [path.name for path in checkpoints.step_paths()] == ["step-00000002.pt", "step-00000004.pt"]
    names = [name for name, _ in DualEncoder(runs["poisoned"].model).named_parameters()]
    for name, parameter in zip(names, results[0]["before"], strict=True):
        assert torch.equal(saved["model"][name], parameter), name


@pytest.mark.system
def test_a_run_of_two_continues_where_it_was_stopped(
    outcomes: tuple[list[dict[Any, Any]], dict[Any, Trained]], runs: dict[str, TrainConfig]
) -> None:
    """And is evaluated meanwhile. Head h's batch norm is synchronised; there is none in the tower, and no dropout."""
    assert [process["resumed"]["step"] for process in outcomes[0][:2]] == [12, 12]
    from trainer_support import records  # which the processes do not find

    one = replace(runs["resumed"], name="one")
    train(one)
    losses = [[record["loss"] for record in records(c) if "loss" in record] for c in (one, runs["resumed"])]
    assert len(losses[0]) == 12
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


if __name__ == "__main__":
    run_process(int(sys.argv[1]), Path(sys.argv[2]))
