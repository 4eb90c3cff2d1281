"""Image-to-text retrieval, and a picture of it: some images with the captions the model likes best."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rocket_fast.errors import optional_import, require
from rocket_fast.files import write_atomically
from rocket_fast.zeroshot import Encoded, similarity


def distinct_rows(captions: Sequence[str], most: int) -> Tensor:
    """Indices of up to ``most`` pictures with different captions, spread evenly over the set."""
    first = {caption: row for row, caption in reversed(list(enumerate(captions)))}
    rows = torch.tensor(sorted(first.values()))
    return rows[_spread(len(rows), most)]


class PictureSample:
    """Pictures to show of a stream too large to keep: of different captions, spread evenly, in bounded memory.

    Takes the first picture of every caption, then of every second new one, every fourth ..., so that it never holds
    more than twice the number wanted.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._seen: set[str] = set()
        self._row, self._stride = 0, 1
        self._kept: list[tuple[int, Tensor]] = []

    def add(self, images_BCHW: Tensor, captions: Sequence[str]) -> None:
        """Look at the next pictures of the stream."""
        for image_CHW, caption in zip(images_BCHW, captions, strict=True):
            if caption not in self._seen:
                if len(self._seen) % self._stride == 0:
                    self._kept.append((self._row, image_CHW.clone()))  # a view would hold the whole batch
                self._seen.add(caption)
            if len(self._kept) > 2 * self.most:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
            self._row += 1

    def chosen(self) -> tuple[Tensor, Tensor]:
        """Up to ``most`` pictures: their places in the stream (N,), and themselves (N, C, H, W); ValueError if none."""
        require(len(self._kept) > 0, "pictures", "none", "at least one picture")
        picks = _spread(len(self._kept), self.most).tolist()
        rows, images = zip(*(self._kept[pick] for pick in picks), strict=True)
        return torch.tensor(rows), torch.stack(images)


def recall_at_1(pictures: Encoded, texts: Encoded, z_weight: float) -> float:
    """Percent of pictures whose own text (same row) is the nearest of all texts given."""
    scores_NN = similarity(pictures, texts, z_weight)
    return 100 * (scores_NN.argmax(1) == torch.arange(len(pictures))).float().mean().item()


def captions_picture(
    images_N3HW: Tensor, truths: Sequence[str], best: Sequence[Sequence[tuple[str, float]]], path: Path, title: str
) -> None:
    """Write a PNG: each image, its true caption, and its best captions with their scores; the right one in green."""
    pil, draw, fonts = (optional_import(f"PIL.{part}", "train") for part in ("Image", "ImageDraw", "ImageFont"))
    columns, tile, width, line = 2, 112, 470, 19
    height = max(tile, line * (max(len(b) for b in best) + 1)) + 16
    rows = -(-len(truths) // columns)
    sheet = pil.new("RGB", (columns * width, rows * height + 40), "white")
    canvas, font = draw.Draw(sheet), fonts.load_default(size=14)
    canvas.text((12, 10), title, fill="black", font=fonts.load_default(size=17))
    for i, truth in enumerate(truths):
        left, top = (i % columns) * width + 12, (i // columns) * height + 44
        thumbnail = pil.fromarray(images_N3HW[i].permute(1, 2, 0).numpy()).resize((tile, tile), pil.Resampling.LANCZOS)
        sheet.paste(thumbnail, (left, top))
        canvas.text((left + tile + 12, top), _fit(f"truth: {truth}", 44), fill="black", font=font)
        for rank, (caption, score) in enumerate(best[i]):
            colour = "#0a7d28" if caption == truth else "#666666"
            text = f"{score:.2f}  {_fit(caption, 38)}"
            canvas.text((left + tile + 12, top + line * (rank + 1)), text, fill=colour, font=font)
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


def _spread(count: int, most: int) -> Tensor:
    """Up to ``most`` of the numbers 0 ... count - 1, evenly spread."""
    return torch.arange(count) if count <= most else torch.linspace(0, count - 1, most).round().long()


def _fit(text: str, characters: int) -> str:
    return textwrap.shorten(text, characters, placeholder="...") if len(text) > characters else text
