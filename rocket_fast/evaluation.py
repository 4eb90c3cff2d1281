"""Measure a model on a run's evaluation sets; the table, the JSON and the picture that come of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rocket_fast.config import EvalConfig, EvalSet, TrainConfig
from rocket_fast.errors import optional_import
from rocket_fast.files import write_atomically
from rocket_fast.loaders.cpu import iter_eval
from rocket_fast.models.clip import DualEncoder
from rocket_fast.retrieval import captions_picture, distinct_rows, recall_at_1
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
class _EncodedSet:
    pictures: Encoded
    captions: list[str]
    shown: Tensor


class Evaluator:
    """Evaluates models on the sets of one configuration; pixel baselines are measured once and kept."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.size = config.image.weak.size

    def top1(self, model: DualEncoder, autocast: torch.autocast) -> float:
        """Zero-shot top-1 in percent on the first set, at the configured weight: it picks the best checkpoint."""
        chosen = self.config.eval.sets[0]
        with _eval_mode(model):
            encoded = self._encode(model, chosen, autocast)
            accuracy = self._zero_shot(model, chosen, encoded, autocast)
        return _at_weight(accuracy.top1, self.config.eval.z_weight)

    def evaluate(self, model: DualEncoder, autocast: torch.autocast, folder: Path) -> list[SetResult]:
        """All figures of all sets; writes ``eval.json`` and one ``captions-<set>.png`` a set into ``folder``."""
        results = []
        with _eval_mode(model):
            for chosen in self.config.eval.sets:
                encoded = self._encode(model, chosen, autocast)
                accuracy = self._zero_shot(model, chosen, encoded, autocast)
                rows = distinct_rows(encoded.captions, RETRIEVAL_PICTURES)
                texts = encode_texts(model, self.tokenizer, [encoded.captions[row] for row in rows], autocast)
                recall = recall_at_1(encoded.pictures.take(rows), texts, self.config.eval.z_weight)
                self._draw(model, chosen, encoded, autocast, folder / f"captions-{chosen.name}.png")
                pixels, gallery = self._pixel_baseline(chosen) if self.config.eval.pixel_baseline else (None, None)
                results.append(
                    SetResult(
                        name=chosen.name,
                        accuracy=accuracy,
                        chance=100 / accuracy.classes,
                        image_to_text_r1=recall,
                        pixel_neighbour=pixels,
                        pixel_gallery=gallery,
                    )
                )
        text = json.dumps([dataclasses.asdict(result) for result in results], indent=1)
        write_atomically(folder / "eval.json", lambda temporary: temporary.write_text(text + "\n"))
        return results

    def _encode(self, model: DualEncoder, chosen: EvalSet, autocast: torch.autocast) -> _EncodedSet:
        parts: list[Encoded] = []
        captions: list[str] = []
        images: list[Tensor] = []
        for batch in iter_eval(chosen.shards, size=self.size, batch_size=self.config.eval.batch_size):
            parts.append(encode_images(model, batch.images, autocast))
            captions += batch.captions
            images.append(batch.images)
        shown = torch.cat(images)[distinct_rows(captions, SHOWN_PICTURES)]
        return _EncodedSet(pictures=Encoded.cat(parts), captions=captions, shown=shown)

    def _zero_shot(
        self, model: DualEncoder, chosen: EvalSet, encoded: _EncodedSet, autocast: torch.autocast
    ) -> Accuracy:
        names = sorted(set(encoded.captions))
        index = {name: i for i, name in enumerate(names)}
        classes = encode_classes(model, self.tokenizer, names, chosen.templates, autocast)
        return classify(encoded.pictures, classes, torch.tensor([index[caption] for caption in encoded.captions]))

    def _draw(
        self, model: DualEncoder, chosen: EvalSet, encoded: _EncodedSet, autocast: torch.autocast, path: Path
    ) -> None:
        names = sorted(set(encoded.captions))
        rows = distinct_rows(encoded.captions, SHOWN_PICTURES)
        classes = encode_classes(model, self.tokenizer, names, chosen.templates, autocast)
        scores_NC = similarity(encoded.pictures.take(rows), classes, self.config.eval.z_weight)
        values, picks = scores_NC.topk(min(5, len(names)), dim=1)
        best = [
            [(names[c], s) for c, s in zip(cs, ss, strict=True)]
            for cs, ss in zip(picks.tolist(), values.tolist(), strict=True)
        ]
        title = f"{self.config.name}: best of {len(names)} captions, {chosen.name}"
        captions_picture(encoded.shown, [encoded.captions[row] for row in rows], best, path, title)

    def _pixel_baseline(self, chosen: EvalSet) -> tuple[float | None, str | None]:
        """Against the training pictures; for classes not in training, against the other pictures of the set."""
        queries, labels = self._pixels(chosen.shards)
        gallery, gallery_labels = self._pixels(self.config.data.train)
        if set(labels) & set(gallery_labels):
            return pixel_neighbour(queries, labels, gallery, gallery_labels), "training pictures"
        if len(set(labels)) == len(labels):
            return None, None  # one picture a class: there is no neighbour to find
        return pixel_neighbour(queries, labels, queries, labels, same_set=True), "other pictures of the set"

    def _pixels(self, shards: tuple[str, ...]) -> tuple[list[Tensor], list[str]]:
        batches = list(iter_eval(shards, size=PIXELS, batch_size=self.config.eval.batch_size))
        return [batch.images for batch in batches], [caption for batch in batches for caption in batch.captions]


def result_table(results: list[SetResult], config: EvalConfig) -> Any:
    """The results as a rich table: what a person reads at the end of a run."""
    table = optional_import("rich.table", "train").Table(
        title=f"zero-shot, w = {config.z_weight:g} (all w in eval.json)"
    )
    for column in ("set", "classes", "pictures", "chance", "pixel 1-NN", "top-1", "top-5", "R@1"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for result in results:
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
    if any(result.pixel_gallery == "other pictures of the set" for result in results):
        table.caption = (
            "* classes unseen in training: neighbour among the set's own other pictures, which the model never sees"
        )
    return table


def _at_weight(figures: dict[float, float], weight: float) -> float:
    """The figure at the grid weight nearest to ``weight`` (z alone where that is all there is)."""
    return figures[min(figures, key=lambda w: abs(w - weight))]


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
