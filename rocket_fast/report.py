"""`rocket-fast report`: a run's folder as one HTML page that needs nothing else, finished or not.

Read downward: what is read, what is computed from it, the charts, the page. Charts are matplotlib's SVG with the page's
own colours put in, so that they turn dark with it; pictures are inside the page; nothing is fetched.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocket_fast.config import TrainConfig, load_config, to_plain
from rocket_fast.errors import optional_import
from rocket_fast.evaluation import CHECKPOINTS, output_path
from rocket_fast.files import write_atomically

PARTS = ("data", "forward", "backward", "optimizer", "other")
"""Parts of a step's time, as the log has them with ``_s`` behind."""
POINTS = 400
"""Most points of a curve; a longer one is drawn as means, in a band from the least to the most."""
_TEMPLATE = Path(__file__).parent / "data" / "report.html"


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of the run in ``folder`` (to ``report.html`` in it by default); ValueError where no run is."""
    config = load_config(folder)
    out = folder / "report.html" if out is None else out
    environment = optional_import("jinja2", "report").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text()).render(_contents(config, folder))
    write_atomically(out, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return out


def _contents(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """What the template names."""
    lines = read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line and line.get("step")]
    scores = [line for line in lines if "zero_shot_top1" in line]
    evaluations = [_evaluation(config, folder, checkpoint) for checkpoint in CHECKPOINTS]
    found = [each for each in evaluations if each is not None]
    return {
        "name": config.name,
        "state": _state(config, steps),
        "headline": _headline(steps, scores, found),
        "curves": _curves(steps, scores),
        "speed": _speed(steps),
        "parts": _time_parts(steps),
        "skipped": steps[-1].get("skipped_reasons", {}) if steps else {},
        "skipped_total": steps[-1].get("skipped", 0) if steps else 0,
        "evaluations": found,
        "z_weight": f"{config.eval.z_weight:g}",
        "settings": _settings(to_plain(config)),
        "starts": [_start(line) for line in read_lines(folder / "run.jsonl")],
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


# --- what is read -----------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where there is no file, and none for a line torn by a kill."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """One checkpoint's table and its pictures, ready for the page."""

    checkpoint: str
    step: int
    rows: list[dict[str, str]]
    pictures: list[tuple[str, str]]
    own_gallery: bool
    first_top1: float


def _evaluation(config: TrainConfig, folder: Path, checkpoint: Any) -> _Evaluation | None:
    """What evaluation wrote of a checkpoint; None if it has not (or is just writing)."""
    try:
        plain = json.loads(output_path(folder, checkpoint).read_text())
    except (OSError, ValueError):
        return None
    rows, pictures, tops = [], [], []
    for each in plain["sets"]:
        top1 = {float(weight): value for weight, value in each["accuracy"]["top1"].items()}
        top5 = {float(weight): value for weight, value in each["accuracy"]["top5"].items()}
        weight = round(config.eval.z_weight, 1) if len(top1) > 1 else 1.0
        pixels, other = each.get("pixel_neighbour"), each.get("pixel_gallery") == "other pictures of the set"
        tops.append(top1[weight])
        rows.append(
            {
                "set": each["name"],
                "classes": f"{each['accuracy']['classes']:,}",
                "pictures": f"{each['accuracy']['pictures']:,}",
                "chance": f"{each['chance']:.2f}",
                "pixel 1-NN": "–" if pixels is None else f"{pixels:.1f}" + ("*" if other else ""),
                "top-1": f"{top1[weight]:.1f}",
                "top-5": f"{top5[weight]:.1f}",
                "z alone": f"{top1[1.0]:.1f}",
                "h alone": f"{top1[0.0]:.1f}" if 0.0 in top1 else "–",
                "R@1": f"{each['image_to_text_r1']:.1f}",
            }
        )
        picture = output_path(folder, checkpoint, each["name"])
        if picture.is_file():
            pictures.append((each["name"], base64.b64encode(picture.read_bytes()).decode()))
    return _Evaluation(
        checkpoint=checkpoint,
        step=plain["step"],
        rows=rows,
        pictures=pictures,
        own_gallery=any(row["pixel 1-NN"].endswith("*") for row in rows),
        first_top1=tops[0] if tops else math.nan,
    )


# --- what is computed -------------------------------------------------------------------------------------------------


def _state(config: TrainConfig, steps: Sequence[dict[str, Any]]) -> str:
    """How far the run is, in one line."""
    if not steps:
        return "no step logged yet"
    last = steps[-1]
    whole = round(config.loop.epochs * last["step"] / last["epoch"]) if last.get("epoch") else None
    end = min(whole or last["step"], config.loop.max_steps or math.inf)
    state = "finished" if last["step"] >= end else "not finished"
    logged = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(last["time"])) if "time" in last else "unknown"
    return f"{state}: step {last['step']:,} of {end:,}, epoch {last.get('epoch', 0):.2f}; last record {logged}"


def _headline(
    steps: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]], evaluations: Sequence[_Evaluation]
) -> list[tuple[str, str]]:
    """The few numbers to see first: (name, value)."""
    if not steps:
        return []
    last, found = steps[-1], []
    if evaluations:
        found.append(("zero-shot top-1", f"{evaluations[0].first_top1:.1f}%"))
    elif scores:
        found.append(("zero-shot top-1", f"{scores[-1]['zero_shot_top1']:.1f}%"))
    found.append(("loss", _number(last["loss"])))
    if "clip_acc" in last:
        found.append(("batch accuracy", f"{_number(last['clip_acc'], 1)}%"))
    weights = [each.get("step_s", 1.0) * done for each, done in zip(steps, _steps_done(steps), strict=True)]
    waited = sum(each["data_wait"] * weight for each, weight in zip(steps, weights, strict=True)) / sum(weights)
    found.append(("images/s, median", f"{_median([each['images_per_s'] for each in steps]):,.0f}"))
    found.append(("waiting for data", f"{100 * waited:.1f}%"))
    if any("mfu" in each for each in steps):
        found.append(("MFU, median", f"{100 * _median([each['mfu'] for each in steps if 'mfu' in each]):.1f}%"))
    spent = sum(each["step_s"] * done for each, done in zip(steps, _steps_done(steps), strict=True) if "step_s" in each)
    if spent:
        found.append(("time in steps", _duration(spent)))
    found.append(("samples skipped", f"{last.get('skipped', 0):,}"))
    return found


def _time_parts(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean milliseconds and share of each part of a step; the whole step last. Empty where the log has no parts."""
    timed = [(each, done) for each, done in zip(steps, _steps_done(steps), strict=True) if "step_s" in each]
    total = sum(done for _, done in timed)
    if not total:
        return []
    mean = {part: sum(each.get(f"{part}_s", 0.0) * done for each, done in timed) / total for part in (*PARTS, "step")}
    return [
        {"part": part, "ms": f"{1000 * mean[part]:.1f}", "share": f"{100 * mean[part] / max(mean['step'], 1e-12):.1f}"}
        for part in (*PARTS, "step")
    ]


def _steps_done(steps: Sequence[dict[str, Any]]) -> list[int]:
    """How many steps each record speaks of."""
    numbers = [0, *(each["step"] for each in steps)]
    return [after - before for before, after in itertools.pairwise(numbers)]


def _settings(plain: Any, at: str = "") -> list[tuple[str, str]]:
    """(option, value) of every leaf of the configuration."""
    if isinstance(plain, dict):
        found = [(at, str(plain["class"]))] if at else []
        for name, value in plain.items():
            found += _settings(value, f"{at}.{name}".lstrip(".")) if name != "class" else []
        return found
    if isinstance(plain, list) and any(isinstance(item, dict) for item in plain):
        return [row for place, item in enumerate(plain) for row in _settings(item, f"{at}.{place}")]
    return [(at, ", ".join(str(item) for item in plain) if isinstance(plain, list) else str(plain))]


def _start(line: dict[str, Any]) -> dict[str, str]:
    """One start of the run: what run.jsonl says."""
    versions = line.get("versions") or {}
    return {
        "command": " ".join(str(word) for word in line.get("command", [])),
        "rocket_fast": str(line.get("rocket_fast", "unknown")),
        "commit": str(line.get("git_commit") or "an installed package"),
        "python": f"{line.get('python', 'unknown')} on {line.get('platform', 'unknown')}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


# --- charts -----------------------------------------------------------------------------------------------------------

_INK, _GRID = "#010203", "#040506"
_SERIES = ("#a10001", "#a10002", "#a10003", "#a10004", "#a10005")
"""Colours that stand for the page's: replaced by CSS variables in the SVG."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rocket-fast",
    "font.size": 9,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": _INK,
}

Curve = tuple[list[float], list[float]]


@dataclass(frozen=True, kw_only=True)
class _Chart:
    """A title, the curves' names in the order of the page's colours (none where there is one curve), an SVG."""

    title: str
    names: list[str]
    svg: str


def _curves(steps: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]]) -> list[_Chart]:
    """How training went."""
    names = {name for each in steps for name in each}
    companion = [name for name in ("siamlip_loss", "barlip_loss", "swalip_loss") if name in names]
    accuracies = {
        "weak, image to text": "clip_acc_image_global",
        "weak, text to image": "clip_acc_text_global",
        "strong, image to text": "clip_acc_image_local",
        "strong, text to image": "clip_acc_text_local",
    }
    scales = {"z": "logit_scale", "h": "h_logit_scale", "SwALIP": "swalip_logit_scale"}
    losses = {"total": "loss", "contrastive": "clip_loss", **{name.removesuffix("_loss"): name for name in companion}}
    charts = [
        _lines("Loss", steps, losses),
        _lines("Accuracy in the batch, percent", steps, accuracies),
        _lines("Zero-shot top-1, percent", scores, {"first set": "zero_shot_top1"}, marker="o"),
        _lines("Temperature: factor of the cosines", steps, scales),
        _lines("Temperature as learned: its logarithm", steps, {key: f"{name}_raw" for key, name in scales.items()}),
        _lines("Learning rate", steps, {"lr": "lr"}),
        _lines("Norm of the gradient", steps, {"norm": "grad_norm"}),
    ]
    return [chart for chart in charts if chart is not None]


def _speed(steps: Sequence[dict[str, Any]]) -> list[_Chart]:
    """Where the time went."""
    percent = [
        {"step": each["step"]} | {name: 100 * each[name] for name in ("data_wait", "mfu") if name in each}
        for each in steps
    ]
    charts = [
        _lines("Images per second", steps, {"images/s": "images_per_s"}, zero=True),
        _lines("Waiting for data, percent of the time", percent, {"data-wait": "data_wait"}, zero=True),
        _lines("MFU, percent", percent, {"MFU": "mfu"}, zero=True),
        _stack("A step's time, milliseconds", steps),
    ]
    return [chart for chart in charts if chart is not None]


def _lines(
    title: str, records: Sequence[dict[str, Any]], fields: dict[str, str], *, zero: bool = False, marker: str = ""
) -> _Chart | None:
    """Curves over steps, ``fields`` being name -> field; None where no record has any of them."""
    curves = {name: _curve(records, field) for name, field in fields.items()}
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    if not curves:
        return None
    figure, axes = _figure()
    for colour, (x, y) in zip(_SERIES, curves.values(), strict=False):
        x_mean, low, mean, high = _binned(x, y)
        if len(x) > len(x_mean):
            axes.fill_between(x_mean, low, high, color=colour, alpha=0.18, linewidth=0)
        alone = marker or ("o" if len(x) == 1 else "")
        axes.plot(x_mean, mean, color=colour, linewidth=1.4, marker=alone, markersize=3.5)
    if zero:
        axes.set_ylim(bottom=0, top=1.1 * max(max(y) for _, y in curves.values()) or 1)
    return _Chart(title=title, names=list(curves) if len(curves) > 1 else [], svg=_svg(figure, axes))


def _stack(title: str, records: Sequence[dict[str, Any]]) -> _Chart | None:
    """The parts of a step's time on top of each other; None where the log has none.

    A slow first step leaves the rest to be seen: what exceeds three times the median is cut.
    """
    timed = [each for each in records if "step_s" in each]
    if not timed:
        return None
    figure, axes = _figure()
    curves = [_curve(timed, f"{part}_s") for part in PARTS]
    binned = [_binned(x, [1000 * value for value in y]) for x, y in curves]
    at, heights = binned[0][0], [mean for _, _, mean, _ in binned]
    if len(at) == 1:  # an area needs two ends
        at, heights = [at[0] - 0.5, at[0] + 0.5], [mean * 2 for mean in heights]
    axes.stackplot(at, *heights, colors=_SERIES, linewidth=0)
    totals = [1000 * each["step_s"] for each in timed]
    axes.set_ylim(bottom=0, top=1.1 * min(max(totals), 3 * _median(totals)))
    return _Chart(title=title, names=list(PARTS), svg=_svg(figure, axes))


def _curve(records: Sequence[dict[str, Any]], field: str) -> Curve:
    """Steps and values of a field, where it is a number."""
    pairs = [(each["step"], each[field]) for each in records if isinstance(each.get(field), int | float)]
    return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def _binned(x: list[float], y: list[float]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Mean x, and least, mean and largest y, of at most POINTS neighbouring groups."""
    size = -(-len(x) // POINTS)
    groups = [slice(start, start + size) for start in range(0, len(x), size)]
    return (
        [_mean(x[group]) for group in groups],
        [min(y[group]) for group in groups],
        [_mean(y[group]) for group in groups],
        [max(y[group]) for group in groups],
    )


def _figure() -> tuple[Any, Any]:
    matplotlib = optional_import("matplotlib", "report")
    with matplotlib.rc_context(_STYLE):
        figure = optional_import("matplotlib.figure", "report").Figure(figsize=(4.8, 2.5), layout="constrained")
        return figure, figure.subplots()


def _svg(figure: Any, axes: Any) -> str:
    """The figure as an SVG element for the middle of an HTML page: no prologue, colours from CSS, ids of its own."""
    axes.set_xlabel("step")
    axes.locator_params(axis="both", nbins=5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    with optional_import("matplotlib", "report").rc_context(_STYLE):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = (
        re.sub(r' (xmlns(:xlink)?|width|height|version)="[^"]*"', "", text[: text.index(">")]) + text[text.index(">") :]
    )
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", text)
    for place, colour in enumerate(_SERIES):
        text = text.replace(colour, f"var(--series-{place + 1})")
    text = text.replace(_INK, "var(--muted)").replace(_GRID, "var(--line)")
    own = f"c{zlib.crc32(text.encode()):x}-"
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}", text)
