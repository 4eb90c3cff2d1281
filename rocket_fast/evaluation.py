"""Measure a model on a run's evaluation sets; the table, the JSON and the picture that come of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rocket_fast.config import EvalConfig, EvalSet, TrainConfig
from rocket_fast.errors import optional_import
from rocket_fast.files import write_atomically
from rocket_fast.loaders.base import EvalBatch
from rocket_fast.loaders.cpu import iter_eval
from rocket_fast.loaders.shards import expand_patterns
from rocket_fast.models.clip import DualEncoder
from rocket_fast.retrieval import PictureSample, captions_picture, distinct_rows, recall_at_1
from rocket_fast.tokenizer import Tokenizer
from rocket_fast.zeroshot import (
    Accuracy,
    Encoded,
    classify,
    encode_classes,
    encode_images,
    encode_texts,
    pixel_neighbour,
    similarity,
)

Checkpoint = Literal["last", "best"]
CHECKPOINTS: tuple[Checkpoint, ...] = get_args(Checkpoint)
RETRIEVAL_PICTURES = 500
SHOWN_PICTURES = 12
PIXELS = 16


@dataclass(frozen=True, kw_only=True)
class SetResult:
    """One evaluation set's figures, all in percent; ``pixel_neighbour`` is None where it was not asked for."""

    name: str
    accuracy: Accuracy
    chance: float
    image_to_text_r1: float
    pixel_neighbour: float | None
    pixel_gallery: str | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of every set, and which of the run's checkpoints they describe; ``eval.json`` holds just this."""

    checkpoint: Checkpoint
    step: int
    sets: list[SetResult]


@dataclass(frozen=True, kw_only=True)
class _EncodedSet:
    pictures: Encoded
    captions: list[str]
    names: list[str]
    classes: Encoded

    @property
    def labels(self) -> Tensor:
        index = {name: i for i, name in enumerate(self.names)}
        return torch.tensor([index[caption] for caption in self.captions])


class Evaluator:
    """Evaluates models on the sets of one configuration; pixel baselines are measured once and kept."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.size = config.image.weak.size
        for number, each in enumerate(config.eval.sets):  # a missing file is better noticed before the training
            expand_patterns(each.shards, field=f"eval.sets.{number}.shards")

    def top1(self, model: DualEncoder, autocast: torch.autocast) -> float:
        """Zero-shot top-1 in percent on the first set, at the configured weight: it picks the best checkpoint."""
        with _eval_mode(model):
            encoded = self._encode(model, self.config.eval.sets[0], autocast)
        accuracy = classify(encoded.pictures, encoded.classes, encoded.labels)
        return _at_weight(accuracy.top1, self.config.eval.z_weight)

    def evaluate(
        self, model: DualEncoder, autocast: torch.autocast, folder: Path, *, checkpoint: Checkpoint, step: int
    ) -> Evaluation:
        """All figures of all sets; writes the JSON and one picture a set into ``folder`` (see ``output_path``).

        ``checkpoint`` and ``step`` say which of the run's checkpoints ``model`` is.
        """
        with _eval_mode(model):
            sets = [
                self._evaluate_set(model, chosen, autocast, output_path(folder, checkpoint, chosen.name))
                for chosen in self.config.eval.sets
            ]
        evaluation = Evaluation(checkpoint=checkpoint, step=step, sets=sets)
        text = json.dumps(dataclasses.asdict(evaluation), indent=1)
        write_atomically(output_path(folder, checkpoint), lambda temporary: temporary.write_text(text + "\n"))
        return evaluation

    def _evaluate_set(self, model: DualEncoder, chosen: EvalSet, autocast: torch.autocast, path: Path) -> SetResult:
        shown = PictureSample(SHOWN_PICTURES)
        encoded = self._encode(model, chosen, autocast, shown)
        accuracy = classify(encoded.pictures, encoded.classes, encoded.labels)
        rows = distinct_rows(encoded.captions, RETRIEVAL_PICTURES)
        texts = encode_texts(model, self.tokenizer, [encoded.captions[row] for row in rows], autocast)
        recall = recall_at_1(encoded.pictures.take(rows), texts, self.config.eval.z_weight)
        self._draw(chosen, encoded, shown, path)
        pixels, gallery = self._pixel_baselines[chosen.name] if self.config.eval.pixel_baseline else (None, None)
        return SetResult(
            name=chosen.name,
            accuracy=accuracy,
            chance=100 / accuracy.classes,
            image_to_text_r1=recall,
            pixel_neighbour=pixels,
            pixel_gallery=gallery,
        )

    def _read(
        self, shards: tuple[str, ...], size: int, captions: Literal["txt", "several"], *, trim_margins: bool = False
    ) -> Iterator[EvalBatch]:
        data = self.config.data
        return iter_eval(
            shards,
            size,
            self.config.eval.batch_size,
            captions=captions,
            workers=data.workers,
            trim_margins=trim_margins,
            pixel_limit=data.pixel_limit,
        )

    def _encode(
        self, model: DualEncoder, chosen: EvalSet, autocast: torch.autocast, shown: PictureSample | None = None
    ) -> _EncodedSet:
        parts: list[Encoded] = []
        captions: list[str] = []
        for batch in self._read(chosen.shards, self.size, "txt", trim_margins=self.config.data.trim_margins):
            parts.append(encode_images(model, batch.images, autocast))
            captions += batch.captions
            if shown is not None:
                shown.add(batch.images, batch.captions)
        names = sorted(set(captions))
        classes = encode_classes(model, self.tokenizer, names, chosen.templates, autocast)
        return _EncodedSet(pictures=Encoded.cat(parts), captions=captions, names=names, classes=classes)

    def _draw(self, chosen: EvalSet, encoded: _EncodedSet, shown: PictureSample, path: Path) -> None:
        rows, images = shown.chosen()
        names = encoded.names
        scores_NC = similarity(encoded.pictures.take(rows), encoded.classes, self.config.eval.z_weight)
        values, picks = scores_NC.topk(min(5, len(names)), dim=1)
        best = [
            [(names[c], s) for c, s in zip(cs, ss, strict=True)]
            for cs, ss in zip(picks.tolist(), values.tolist(), strict=True)
        ]
        title = f"{self.config.name}: best of {len(names)} captions, {chosen.name}"
        captions_picture(images, [encoded.captions[row] for row in rows], best, path, title)

    @cached_property
    def _pixel_baselines(self) -> dict[str, tuple[float | None, str | None]]:
        """By set, the baseline and what it was looked for in."""
        gallery, labels = self._pixels(self.config.data.train, self.config.data.captions)
        return {chosen.name: self._pixel_baseline(chosen, gallery, labels) for chosen in self.config.eval.sets}

    def _pixel_baseline(
        self, chosen: EvalSet, gallery: list[Tensor], gallery_labels: list[str]
    ) -> tuple[float | None, str | None]:
        """Against the training pictures; for classes not in training, against the other pictures of the set."""
        queries, labels = self._pixels(chosen.shards, "txt")
        if set(labels) & set(gallery_labels):
            return pixel_neighbour(queries, labels, gallery, gallery_labels), "training pictures"
        if len(set(labels)) == len(labels):
            return None, None  # one picture a class: there is no neighbour to find
        return pixel_neighbour(queries, labels, queries, labels, same_set=True), "other pictures of the set"

    def _pixels(self, shards: tuple[str, ...], captions: Literal["txt", "several"]) -> tuple[list[Tensor], list[str]]:
        batches = list(self._read(shards, PIXELS, captions))
        return [batch.images for batch in batches], [caption for batch in batches for caption in batch.captions]


def output_path(folder: Path, checkpoint: Checkpoint, set_name: str | None = None) -> Path:
    """Where a checkpoint's JSON lies, or the picture of one of its sets; the best one's are named ``-best``."""
    suffix = "" if checkpoint == "last" else f"-{checkpoint}"
    return folder / (f"eval{suffix}.json" if set_name is None else f"captions-{set_name}{suffix}.png")


def headline(evaluation: Evaluation, config: EvalConfig) -> float:
    """What ``Evaluator.top1`` would give for the same model: top-1 of the first set at the configured weight."""
    return _at_weight(evaluation.sets[0].accuracy.top1, config.z_weight)


def result_table(evaluation: Evaluation, config: EvalConfig) -> Any:
    """The results as a rich table: what a person reads at the end of a run."""
    file = output_path(Path(), evaluation.checkpoint).name
    table = optional_import("rich.table", "train").Table(
        title=f"zero-shot and image-to-text R@1, percent; {evaluation.checkpoint} checkpoint (step {evaluation.step}), "
        f"w = {config.z_weight:g} (all w in {file})"
    )
    for column in ("set", "classes", "pictures", "chance", "pixel 1-NN", "top-1", "top-5", "R@1"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for result in evaluation.sets:
        pixels = "-" if result.pixel_neighbour is None else f"{result.pixel_neighbour:.1f}"
        table.add_row(
            result.name,
            str(result.accuracy.classes),
            str(result.accuracy.pictures),
            f"{result.chance:.2f}",
            pixels + ("*" if result.pixel_gallery == "other pictures of the set" else ""),
            f"{_at_weight(result.accuracy.top1, config.z_weight):.1f}",
            f"{_at_weight(result.accuracy.top5, config.z_weight):.1f}",
            f"{result.image_to_text_r1:.1f}",
        )
    if any(result.pixel_gallery == "other pictures of the set" for result in evaluation.sets):
        table.caption = (
            "* classes unseen in training: neighbour among the set's own other pictures, which the model never sees"
        )
    return table


def _at_weight(figures: dict[float, float], weight: float) -> float:
    """The figure at ``weight``, one of 0, 0.1 ... 1; z's where there is no head h."""
    return figures[1.0] if len(figures) == 1 else figures[round(weight, 1)]


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
