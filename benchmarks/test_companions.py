"""What companions cost: a step with each of them against CL2L's, and the projector block by itself.

The projector block forward and backward against torch's layers in a row and against its matrix products alone. What is
compared is everything but the products: by torch's profiler, and as the difference from the products alone. Memory kept
for backward is counted where autograd saves it. All in one process, in turns. Without timing (``--benchmark-disable``)
the sizes are tiny.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

from rocket_fast.batch import PackedText
from rocket_fast.config import TrainConfig
from rocket_fast.losses import build_loss
from rocket_fast.models.clip import DualEncoder
from rocket_fast.models.heads import MLPHead, MLPHeadConfig, SwALIPPrototypesConfig
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import ViTConfig
from rocket_fast.optim import build_optimizer
from rocket_fast.presets import preset

ROWS, WIDTHS, ROUNDS = 4096, (512, 4096, 4096, 256), 15
BATCH, RATIO, STEPS = 64, 4, 3  # samples, to each unpaired picture, rounds
VISION = ViTConfig(image_size=64, patch_size=16, width=192, layers=6, heads=3)
TEXT = TextConfig(width=128, layers=4, heads=4)


def kept_mib(step: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> float:
    """Activations that a forward pass keeps: its saved tensors but for input and parameters, each once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *parameters)}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = step(x)
    assert out.requires_grad
    return sum(sizes.values()) / 2**20


def products_and_rest(step: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds of a step in matrix products, and in everything else."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    times = [
        (event.key in ("aten::mm", "aten::addmm"), event.self_cpu_time_total / 1e3) for event in profile.key_averages()
    ]
    return sum(time for product, time in times if product), sum(time for product, time in times if not product)


def contestants() -> dict[str, tuple[TrainConfig, int]]:
    """The recipe for ViTs with each companion, by name, and how many unpaired pictures a step has."""
    companions = ("siamlip", "byolip", "barlip", "swalip", "swalip-prototypes")
    found = {name: (preset(f"vits16-yfcc-{name}"), 0) for name in companions}
    base = preset("vits16-yfcc")
    beside = replace(base, model=replace(base.model, companion=SwALIPPrototypesConfig()))
    found = {"cl2l": (base, 0), **found, "swalip-prototypes beside cl2l": (beside, 0)}
    for name in ("siamlip", "swalip"):
        found[f"{name}, unpaired pictures"] = found[name][0], BATCH // RATIO
    return found


def training_step(config: TrainConfig, unpaired: int, small: bool) -> Callable[[], None]:
    """Forward, loss, backward, AdamW, on pictures and captions that are noise; the towers are small, heads are not."""
    torch.manual_seed(0)
    model_config, batch = replace(config.model, vision=VISION, text=replace(TEXT, dropout=0.0)), BATCH
    if small:
        model_config = replace(
            model_config, vision=replace(VISION, width=12, layers=1), text=replace(TEXT, width=16, layers=1)
        )
        head = model_config.h_head and MLPHeadConfig(hidden=8)
        companion: Any = model_config.companion
        sizes = {name: 8 for name in ("hidden", "out", "predictor_hidden", "prototypes") if hasattr(companion, name)}
        companion = companion and replace(companion, **sizes)
        model_config, batch, unpaired = replace(model_config, h_head=head, companion=companion), 4, min(unpaired, 2)
    model, objective = DualEncoder(model_config).train(), build_loss(config.loss, config.model.companion)
    optimizer, views = build_optimizer(config.optim, model), len(config.image.views)
    images = tuple(torch.randn(batch, 3, 64, 64) for _ in range(views))
    alone = tuple(torch.randn(unpaired, 3, 64, 64) for _ in range(views - 1)) if unpaired else ()
    ids = torch.randint(1, 49000, (views, batch, 14)).tolist()
    texts = tuple(PackedText.from_ids([[49406, *words, 49407] for words in view]) for view in ids)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective(model(images, texts, alone)).total.backward()
        optimizer.step()
        model.clamp_logit_scales_()
        model.update_momentum_()

    return step


def processor_time(act: Callable[[], None]) -> float:
    """Seconds that this process computed."""
    begin = time.process_time()
    act()
    return time.process_time() - begin


@pytest.mark.parametrize("name", list(contestants())[1:])
def test_step(name: str, benchmark: Any) -> None:
    """A whole step with a companion over one of CL2L, on the same towers, in turns, and the rounds' ratios.

    On one thread, by its processor time: the clock says more about who else is on the machine.
    """
    torch.set_num_threads(1)
    made = contestants()
    steps = {each: training_step(*made[each], benchmark.disabled) for each in ("cl2l", name)}
    seconds: dict[str, list[float]] = {each: [] for each in steps}
    for step in steps.values():
        step()
    benchmark.pedantic(
        lambda: seconds[name].append(processor_time(steps[name])),
        setup=lambda: seconds["cl2l"].append(processor_time(steps["cl2l"])),
        rounds=1 if benchmark.disabled else STEPS,
    )
    median = {each: 1e3 * statistics.median(own) for each, own in seconds.items()}
    ratios = sorted(own / base for own, base in zip(seconds[name], seconds["cl2l"], strict=True))
    benchmark.extra_info.update(median_ms=median, ratios=ratios)
    row = (name, f"{median[name]:,.0f} ms", f"{median['cl2l']:,.0f} ms", f"{statistics.median(ratios):.2f}")
    print(f"\n| {' | '.join(row)} | {ratios[0]:.2f} to {ratios[-1]:.2f} |")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projector(dtype: torch.dtype, benchmark: Any) -> None:
    if benchmark.disabled:
        rows, widths, rounds = 64, (8, 32, 32, 4), 1
    else:
        rows, widths, rounds = ROWS, WIDTHS, ROUNDS
    torch.manual_seed(0)
    head = MLPHead(*widths).to(dtype)
    models = {
        "ours": head,
        "torch": nn.Sequential(*copy.deepcopy(list(head))),
        "products": nn.Sequential(*(nn.Linear(a, b, bias=False, dtype=dtype) for a, b in pairwise(widths))),
    }
    x = torch.randn(rows, widths[0], dtype=dtype).requires_grad_()
    upstream = torch.randn(rows, widths[-1], dtype=dtype)

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            models[name].zero_grad()
            models[name](x).backward(upstream)

        return run

    steps, seconds = {name: step(name) for name in models}, {name: [] for name in models}
    for each in steps.values():
        each()

    def others() -> None:
        for name in ("torch", "products"):
            seconds[name].append(peers.timed(steps[name]))

    benchmark.pedantic(lambda: seconds["ours"].append(peers.timed(steps["ours"])), setup=others, rounds=rounds)
    median = {name: round(1e3 * statistics.median(each), 2) for name, each in seconds.items()}
    differences = {
        name: 1e3 * statistics.median(a - b for a, b in zip(seconds[name], seconds["products"], strict=True))
        for name in ("ours", "torch")
    }
    profiled: dict[str, list[tuple[float, float]]] = {"ours": [], "torch": []}
    for name in ("ours", "torch") * min(rounds, 9):
        profiled[name].append(products_and_rest(steps[name]))
    medians = {
        name: [round(statistics.median(part), 2) for part in zip(*each, strict=True)] for name, each in profiled.items()
    }
    kept = {name: kept_mib(models[name], x, list(models[name].parameters())) for name in ("ours", "torch")}
    benchmark.extra_info.update(
        median_ms=median, difference_ms=differences, products_and_rest_ms=medians, kept_mib=kept
    )
    print(f"\n{dtype}: {benchmark.extra_info}")
    assert kept["ours"] <= 0.51 * kept["torch"] or benchmark.disabled
