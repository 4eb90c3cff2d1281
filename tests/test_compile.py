"""torch.compile in the trainer: few graphs, none broken and none made again, same numbers, failures said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from rocket_fast import parallel
from rocket_fast.checkpoint import CheckpointFolder
from rocket_fast.config import Compile, EvalConfig, TrainConfig
from rocket_fast.errors import Failed
from rocket_fast.models.heads import BYOLIPConfig, SwALIPConfig
from rocket_fast.models.vision import ViTConfig
from rocket_fast.trainer import Trainer, train


@pytest.fixture
def small(tiny_config: TrainConfig) -> Iterator[TrainConfig]:
    """Checkpointed transformers, without dropout, whose random numbers are others in compiled code."""
    vision = ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, checkpointing="blocks")
    text = replace(tiny_config.model.text, dropout=0.0, checkpointing="blocks")
    torch._dynamo.reset()
    yield replace(tiny_config, model=replace(tiny_config.model, vision=vision, text=text), eval=EvalConfig())
    torch._dynamo.reset()
    torch._dynamo.config.suppress_errors = False


def with_loop(config: TrainConfig, name: str, **changes: Any) -> TrainConfig:
    return replace(config, name=name, loop=replace(config.loop, **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "accumulation", "companion"),
    [
        ("towers", 2, BYOLIPConfig(hidden=24, out=8, predictor_hidden=24)),
        ("step", 1, SwALIPConfig()),
        ("step", 2, None),
    ],
    ids=["towers", "step", "step-accumulated"],
)
def test_whole_graphs_made_once_for_captions_of_any_length(
    small: TrainConfig, monkeypatch, mode: Compile, accumulation: int, companion: Any
):
    monkeypatch.setattr(parallel, "BACKEND", "aot_eager")
    small = replace(small, model=replace(small.model, companion=companion))
    losses: dict[str, list[float]] = {"off": [], mode: []}
    graphs, tokens = [], set()
    counters.clear()
    for name in losses:
        trainer = Trainer(with_loop(small, name, compile=name, accumulation=accumulation))
        for batch in trainer.loader:
            losses[name].append(trainer.train_step(batch).metrics["loss"].item())
            graphs.append(counters["stats"]["unique_graphs"])
            tokens.add(batch.texts[0].tokens.shape[0])
        trainer.close()
    assert len(tokens) >= 3
    assert losses[mode] == pytest.approx(losses["off"], rel=1e-5)
    assert not counters["graph_break"]
    off, first, *later = graphs[len(losses["off"]) - 1 :]
    assert off == 0 < first <= 6  # two towers, of BYOLIP twice two; for replays with a graph and without
    assert set(later) == {first}


@pytest.mark.slow
def test_inductors_code_resumes_bit_for_bit(small: TrainConfig):
    whole, parts = (with_loop(small, name, compile="towers", max_steps=8) for name in ("whole", "parts"))
    train(whole)
    for max_steps in (5, 8):
        train(with_loop(parts, "parts", max_steps=max_steps))
    states = [CheckpointFolder(config.folder / "checkpoints", keep=9).load_latest() for config in (whole, parts)]
    torch.testing.assert_close(states[0]["model"], states[1]["model"], rtol=0, atol=0)
    torch.testing.assert_close(states[0]["optimizer"]["state"], states[1]["optimizer"]["state"], rtol=0, atol=0)


def test_what_cannot_be_compiled_is_said_and_run_as_it_is_only_if_asked(small: TrainConfig, monkeypatch, caplog):
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("a bug in the compiler")

    monkeypatch.setattr(parallel, "BACKEND", broken)
    with pytest.raises(Failed, match=r"torch.compile failed: .*a bug in the compiler.*--loop.compile off, or"):
        train(with_loop(small, "ends", compile="towers", max_steps=2))
    torch._dynamo.reset()
    with caplog.at_level("WARNING", logger="torch._dynamo"):
        train(with_loop(small, "goes on", compile="towers", compile_fallback=True, max_steps=2))
    lines = (small.out / "goes on" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert "a bug in the compiler" in caplog.text
