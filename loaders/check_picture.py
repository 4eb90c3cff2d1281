"""What `rocket-fast data check` found, as one picture: sizes, caption lengths and a few samples."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from rocket_fast.errors import optional_import
from rocket_fast.files import write_atomically
from rocket_fast.loaders.check import CheckReport

_WIDTH, _MARGIN, _PLOT, _TILE, _COLUMNS, _BINS = 1080, 24, 240, 160, 6, 40
_BAR, _INK, _FAINT = "#2a6f97", "#222222", "#8a8a8a"


def quantile(values: Counter[int], part: float) -> int:
    """The smallest value that ``part`` of all do not exceed."""
    left = part * values.total()
    for value in sorted(values):
        left -= values[value]
        if left <= 0:
            return value
    return max(values)


def histogram(values: Counter[int], bins: int = _BINS) -> tuple[int, int, list[int]]:
    """First value, width of a bin, counts; the last bin also holds the largest half percent."""
    low, high = min(values), quantile(values, 0.995)
    step = -(-(high - low + 1) // bins)
    counts = [0] * (-(-(high - low + 1) // step))
    for value, count in values.items():
        counts[min((value - low) // step, len(counts) - 1)] += count
    return low, step, counts


def draw_check(report: CheckReport, path: Path, title: str) -> None:
    """Write a PNG of histograms of shorter sides and words a caption, and of the samples in ``report.shown``."""
    pil, draw, fonts = (optional_import(f"PIL.{part}", "train") for part in ("Image", "ImageDraw", "ImageFont"))
    rows = -(-len(report.shown) // _COLUMNS)
    sheet = pil.new("RGB", (_WIDTH, 2 * _MARGIN + 60 + _PLOT + 40 + rows * (_TILE + 44)), "white")
    canvas, font = draw.Draw(sheet), fonts.load_default(size=13)
    canvas.text((_MARGIN, _MARGIN - 8), title, fill=_INK, font=fonts.load_default(size=17))
    left_out = sum(report.skipped.values())
    canvas.text((_MARGIN, _MARGIN + 18), f"{report.usable:,} usable, {left_out:,} left out", fill=_FAINT, font=font)
    width = (_WIDTH - 3 * _MARGIN) // 2
    for number, (values, name) in enumerate(
        ((report.sides, "shorter side, pixels"), (report.words, "words a caption"))
    ):
        if values:
            _draw_histogram(canvas, font, values, name, _MARGIN + number * (width + _MARGIN), width)
    top, across = 2 * _MARGIN + 60 + _PLOT + 30, (_WIDTH - 2 * _MARGIN) // _COLUMNS
    for number, shown in enumerate(report.shown):
        corner = (_MARGIN + number % _COLUMNS * across, top + number // _COLUMNS * (_TILE + 44))
        tile = pil.fromarray(shown.image)
        tile.thumbnail((_TILE, _TILE))
        sheet.paste(tile, corner)
        text = "\n".join(textwrap.wrap(shown.caption, 25, max_lines=2, placeholder="..."))
        canvas.multiline_text((corner[0], corner[1] + _TILE + 2), text, fill=_INK, font=font)
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


def _draw_histogram(canvas: Any, font: Any, values: Counter[int], name: str, left: int, width: int) -> None:
    low, step, counts = histogram(values)
    bottom, bar = _MARGIN + 60 + _PLOT, width / len(counts)
    middle = ", ".join(f"{quantile(values, part):,}" for part in (0.05, 0.5, 0.95))
    canvas.text((left, _MARGIN + 42), f"{name} (5%, 50%, 95%: {middle})", fill=_INK, font=font)
    for number, count in enumerate(counts):
        height = count / max(counts) * (_PLOT - 10)
        if count:
            box = (left + number * bar, bottom - max(height, 1), left + (number + 1) * bar - 1, bottom)
            canvas.rectangle(box, fill=_BAR)
    canvas.line((left, bottom, left + width, bottom), fill=_FAINT)
    for number in sorted({0, len(counts) // 2, len(counts) - 1}):
        label = f"{low + number * step:,}" + ("+" if number == len(counts) - 1 and number else "")
        canvas.text((left + number * bar, bottom + 4), label, fill=_FAINT, font=font)
