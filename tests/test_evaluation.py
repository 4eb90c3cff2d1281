"""What an evaluation reads, keeps, writes and says."""

import io
import json
import tarfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from rocket_fast import evaluation
from rocket_fast.config import EvalConfig, TrainConfig
from rocket_fast.evaluation import Evaluation, Evaluator, SetResult, headline, output_path, result_table
from rocket_fast.loaders.base import EvalBatch
from rocket_fast.loaders.cpu import iter_eval
from rocket_fast.models.clip import DualEncoder
from rocket_fast.tokenizer import Tokenizer
from rocket_fast.zeroshot import Accuracy

OFF = torch.autocast("cpu", enabled=False)


@pytest.fixture
def model(tiny_config: TrainConfig) -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(tiny_config.model)


def evaluator(config: TrainConfig) -> Evaluator:
    return Evaluator(config, Tokenizer(context_length=config.model.text.context_length))


def plain_text(table: Any) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_files_and_table_name_the_checkpoint(tiny_config: TrainConfig, model: DualEncoder, tmp_path: Path):
    measured = evaluator(tiny_config)
    last = measured.evaluate(model, OFF, tmp_path / "run", checkpoint="last", step=12)
    first = (tmp_path / "run/eval.json").read_bytes(), (tmp_path / "run/captions-test.png").read_bytes()
    best = measured.evaluate(model, OFF, tmp_path / "run", checkpoint="best", step=7)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "captions-test-best.png", "captions-test.png", "eval-best.json", "eval.json",
    ]  # fmt: skip
    assert first == ((tmp_path / "run/eval.json").read_bytes(), (tmp_path / "run/captions-test.png").read_bytes())
    for result, name, step in ((last, "last", 12), (best, "best", 7)):
        written = json.loads(output_path(tmp_path / "run", name).read_text())
        assert list(written) == ["checkpoint", "step", "sets"]
        assert (written["checkpoint"], written["step"]) == (name, step)
        assert written["sets"][0]["accuracy"]["top1"]["0.5"] == result.sets[0].accuracy.top1[0.5]
        text = plain_text(result_table(result, tiny_config.eval))
        assert f"{name} checkpoint (step {step})" in text
        assert output_path(Path(), name).name in text
        assert headline(result, tiny_config.eval) == measured.top1(model, OFF)
    assert model.training


def test_every_picture_is_read_as_the_configuration_says(
    tiny_config: TrainConfig, model: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reads = []

    def watched(patterns: tuple[str, ...], size: int, batch_size: int, **options: Any) -> Iterator[EvalBatch]:
        reads.append((patterns, size, options["captions"]))
        assert (options["workers"], options["pixel_limit"]) == (3, 5_000)
        return iter_eval(patterns, size, batch_size, **options)

    monkeypatch.setattr(evaluation, "iter_eval", watched)
    config = replace(tiny_config, data=replace(tiny_config.data, workers=3, pixel_limit=5_000))
    measured, test = evaluator(config), config.eval.sets[0].shards
    results = [measured.evaluate(model, OFF, tmp_path / "run", checkpoint="last", step=1) for _ in range(2)]
    measured.top1(model, OFF)
    assert results[0] == results[1]
    assert sorted(reads) == sorted([(test, 16, "txt")] * 3 + [(config.data.train, 16, "several"), (test, 16, "txt")])


def test_no_batch_of_pictures_is_kept(
    tiny_config: TrainConfig, model: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[weakref.ref[torch.Tensor]] = []

    def watched(*args: Any, **options: Any) -> Iterator[EvalBatch]:
        for batch in iter_eval(*args, **options):
            seen.append(weakref.ref(batch.images))
            assert sum(images() is not None for images in seen) <= 2  # this one, and the one before in the loop
            yield batch

    monkeypatch.setattr(evaluation, "iter_eval", watched)
    config = replace(tiny_config, eval=replace(tiny_config.eval, batch_size=2, pixel_baseline=False))
    evaluator(config).evaluate(model, OFF, tmp_path / "run", checkpoint="last", step=1)
    evaluator(config).top1(model, OFF)
    assert len(seen) == 30


def without_text_members(path: Path) -> None:
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar if not info.name.endswith(".txt")]
    with tarfile.open(path, "w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))


def test_pixel_baseline_of_training_data_with_several_captions_only(
    tiny_config: TrainConfig, model: DualEncoder, tmp_path: Path
):
    expected = evaluator(tiny_config).evaluate(model, OFF, tmp_path / "run", checkpoint="last", step=1)
    for path in sorted((tmp_path / "data").glob("train-*.tar")):
        without_text_members(path)
    got = evaluator(tiny_config).evaluate(model, OFF, tmp_path / "run", checkpoint="last", step=1)
    assert got == expected
    assert got.sets[0].pixel_gallery == "training pictures"
    assert got.sets[0].pixel_neighbour is not None


@pytest.mark.parametrize(("weight", "shown"), [(0.1 * 3, 3.0), (0.0, 0.0), (1.0, 10.0)])
def test_the_figure_shown_is_the_configured_weights(weight: float, shown: float):
    def measured(top1: dict[float, float]) -> Evaluation:
        accuracy = Accuracy(top1=top1, top5=top1, classes=10, pictures=10)
        result = SetResult(
            name="set", accuracy=accuracy, chance=10, image_to_text_r1=0, pixel_neighbour=None, pixel_gallery=None
        )
        return Evaluation(checkpoint="last", step=1, sets=[result])

    config = EvalConfig(z_weight=weight)
    both = measured({round(0.1 * i, 1): float(i) for i in range(11)})
    assert headline(both, config) == shown
    assert f" {shown:.1f} " in plain_text(result_table(both, config))
    assert headline(measured({1.0: 42.0}), config) == 42.0
