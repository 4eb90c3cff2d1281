"""Real processes on gloo against one process on the concatenated batch. Run as a script, this file is a rank.

All ranks of all cases are four processes started once, which form groups of one to four in turn.
"""

from __future__ import annotations

import contextlib
import sys
import unittest.mock
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from process_support import ranks_of
from torch import Tensor, nn

from rocket_fast import distributed, exchange, own_rows
from rocket_fast.batch import CompanionOutputs, Embeddings, UnpairedOutputs
from rocket_fast.device import cpu_peak_bytes
from rocket_fast.interop.open_clip import ClipLoss, SigLipLoss
from rocket_fast.kernels import siglip_loss
from rocket_fast.losses import LossConfig, build_loss, siglip_loss_over_ranks
from rocket_fast.models.heads import BarLIPConfig, BYOLIPConfig, SiamLIPConfig, SwALIPConfig, SwALIPPrototypesConfig

SIZES = [(7,), (4, 4), (6, 1), (3, 1, 4), (2, 3, 1, 2)]  # local batches
EXCHANGES: tuple[Any, ...] = ("auto", "one_sided", "all_gather")
ROWS = 1024  # of the local batches whose traffic and memory are looked at
WIDTH = 6
COMPANIONS = {
    "none": None,
    "siamlip": SiamLIPConfig(),
    "byolip": BYOLIPConfig(),
    "barlip": BarLIPConfig(),
    "swalip": SwALIPConfig(),
    "swalip_prototypes": SwALIPPrototypesConfig(),
}
PRECISE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-6, "atol": 1e-6}}
CASES = [(sizes, dtype) for sizes in SIZES for dtype in PRECISE if dtype == torch.float64 or len(sizes) <= 2]


# --- the model and its batch ------------------------------------------------------------------------------------------


class Towers(nn.Module):
    """One linear head per kind of embedding over two strong views; enough to tell every gradient apart."""

    def __init__(self, dtype: torch.dtype, strong: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.strong = strong
        for name in ("image_z", "text_z", "image_h", "text_h", "image_v", "text_v", "image_p", "text_p"):
            head = nn.Linear(WIDTH, 5, bias=False, dtype=torch.float64)
            nn.init.normal_(head.weight, generator=generator)
            if strong or not name.endswith("_h"):
                setattr(self, name, head.to(dtype))
        self.log_scales = nn.Parameter(torch.tensor([2.5, 2.0, 1.0], dtype=dtype))

    def forward(self, views_VBD: Tensor) -> Embeddings:
        scale, h_scale, p_scale = self.log_scales.exp()
        images, texts = views_VBD[: 1 + self.strong], views_VBD[3 : 4 + self.strong]
        heads = {
            name: tuple(getattr(self, name)(view) for view in (images if name.startswith("image") else texts))
            for name in ("image_v", "text_v", "image_p", "text_p")
        }
        return Embeddings(
            image_z=self.image_z(images[0]),
            text_z=self.text_z(texts[0]),
            logit_scale=scale,
            image_h=tuple(self.image_h(view) for view in images[1:]),
            text_h=tuple(self.text_h(view) for view in texts[1:]),
            h_logit_scale=h_scale,
            companion=CompanionOutputs(**heads, logit_scale=p_scale),
            unpaired=self.of_unpaired(-images[1:]) if self.strong else None,
        )

    def of_unpaired(self, images_VBD: Tensor) -> UnpairedOutputs:
        """Other pictures, as many."""
        v, p = (tuple(head(view) for view in images_VBD) for head in (self.image_v, self.image_p))
        return UnpairedOutputs(image_v=v, image_p=p)


def samples(count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, count, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def outcome(model: nn.Module, views_VBD: Tensor, objective: Callable[[Embeddings], Any]) -> dict[str, Tensor]:
    """The loss's metrics and the gradient of every parameter."""
    model.zero_grad()
    embeddings = model(views_VBD)
    output = objective(embeddings)
    heads = embeddings.companion
    outputs = (*heads.image_v, *heads.text_v, *heads.image_p, *heads.text_p, *embeddings.image_h, *embeddings.text_h)
    # DistributedDataParallel wants every parameter to take part in every backward.
    (output.total + 0 * sum(x.sum() for x in outputs)).backward()
    gradients = {f"grad/{name.removeprefix('module.')}": p.grad.clone() for name, p in model.named_parameters()}
    return {**output.metrics, **gradients}


def objectives(exchange: str) -> dict[str, Callable[[Embeddings], Any]]:
    """What is compared, by name."""
    config = LossConfig(exchange=exchange)  # type: ignore[arg-type]
    plain = LossConfig(exchange=exchange, label_smoothing=0.0, reduction="avg")  # type: ignore[arg-type]
    return {name: build_loss(config, companion) for name, companion in COMPANIONS.items()} | {
        "no smoothing": build_loss(plain, None)
    }


# Which samples are equal, bit for bit: each to those three before; and some within a rank, some across ranks.
TIES = {"in turns": [0, 1, 2, 0, 1, 2, 0, 1], "within and across": [0, 6, 2, 3, 4, 4, 6, 7]}


def tied(pattern: str, count: int) -> Embeddings:
    """Embeddings of which some are equal, images and texts."""
    one_hot = torch.eye(8, dtype=torch.float64)[TIES[pattern][:count]]
    scale = torch.tensor(4.0, dtype=torch.float64)
    return Embeddings(image_z=one_hot, text_z=one_hot, logit_scale=scale)


# --- what a rank does -------------------------------------------------------------------------------------------------


def own_part(tensor: Tensor, sizes: tuple[int, ...], dim: int = 0) -> Tensor:
    return tensor.split(list(sizes), dim=dim)[distributed.rank()]


def exact_schemes(sizes: tuple[int, ...]) -> dict[str, Any]:
    """Both schemes in the case's precisions, with every companion; and ties between ranks."""
    results: dict[str, Any] = {}
    for dtype in (dtype for case, dtype in CASES if case == sizes):
        model = nn.parallel.DistributedDataParallel(Towers(dtype))
        mine = own_part(samples(sum(sizes), dtype), sizes, dim=1)
        for scheme in ("one_sided", "all_gather"):
            for name, objective in objectives(scheme).items():
                results[f"{dtype}/{scheme}/{name}"] = outcome(model, mine, objective)
    weak_only = nn.parallel.DistributedDataParallel(Towers(torch.float64, strong=0))
    mine = own_part(samples(sum(sizes), torch.float64), sizes, dim=1)
    results["weak only"] = outcome(weak_only, mine, build_loss(LossConfig(exchange="one_sided"), None))
    for pattern in TIES:
        everyone = tied(pattern, sum(sizes))
        own = Embeddings(
            image_z=own_part(everyone.image_z, sizes),
            text_z=own_part(everyone.text_z, sizes),
            logit_scale=everyone.logit_scale,
        )
        results[pattern] = build_loss(LossConfig(exchange="one_sided"), None)(own).metrics
    return results


def without_gradients_across(sizes: tuple[int, ...]) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(Towers(torch.float64))
    mine = own_part(samples(sum(sizes), torch.float64), sizes, dim=1)
    config = LossConfig(gather_grad=False)
    return {
        "local": outcome(model, mine, build_loss(config, None)),
        "local, swalip": outcome(model, mine, build_loss(config, COMPANIONS["swalip"])),
    }


def collectives(sizes: tuple[int, ...]) -> dict[str, Any]:
    """Gradients of the collectives by themselves."""
    leaf = own_part(samples(sum(sizes), torch.float64)[0], sizes).clone().requires_grad_()
    gathered = distributed.gather(leaf)
    (
        gathered * (distributed.rank() + 1)
    ).sum().backward()  # another loss on every rank: gradients add up to 1 + 2 + ...
    results = {"gathered": gathered.detach(), "gathered grad": leaf.grad}
    constants = leaf.detach().unsqueeze(1).expand(-1, 2, -1), torch.arange(len(leaf), dtype=torch.int32)
    if len(sizes) > 1:
        require_refusals_on_every_rank(leaf)
    together = distributed.gather_together([*constants, leaf.to(torch.bfloat16)], distributed.row_counts(leaf))
    assert [tensor.requires_grad for tensor in together] == [False, False, True]
    return results | {f"together {i}": tensor.detach() for i, tensor in enumerate(together)}


def require_refusals_on_every_rank(own: Tensor) -> None:
    """What fits on some ranks only is refused by all of them, so that none waits for another."""
    last = distributed.rank() == distributed.world_size() - 1
    refused = {
        r"tensors: got shapes .* expected a dimension of samples": own.sum() if last else own,
        r"tensors: got .*, expected widths and dtypes that are the same": own[:, 1:] if last else own,
        r"expected widths and dtypes": own.float() if last else own,
    }
    for message, tensor in refused.items():
        with pytest.raises(ValueError, match=message):
            distributed.gather(tensor)
    with pytest.raises(ValueError, match=r"tensor: got <class 'list'>, expected a tensor"):
        distributed.gather([1.0])  # type: ignore[arg-type]
    texts = torch.cat([own, own]) if last else own
    place = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    for loss in (ClipLoss(**place), SigLipLoss(**place)):
        with pytest.raises(ValueError, match=r"rows by rank', expected equally many in all of a rank"):
            loss(own, texts, 1.0, 0.0)


def siglip(sizes: tuple[int, ...]) -> dict[str, Any]:
    parameters = siglip_parameters()
    image, text = own_part(samples(sum(sizes), torch.float64), sizes, dim=1)[:2]
    loss = siglip_loss_over_ranks(image @ parameters[0], text @ parameters[1], *parameters[2:], normalize=True)
    gradients = torch.autograd.grad(loss, parameters)
    for gradient in gradients:  # as DistributedDataParallel does
        dist.all_reduce(gradient)
    return {"siglip": loss.detach()} | {f"siglip grad {i}": g / len(sizes) for i, g in enumerate(gradients)}


def without_samples(sizes: tuple[int, ...]) -> dict[str, Any]:
    """Rank 1 has no samples: what can do without gives the whole loss, the rest is refused by all ranks alike."""
    everyone = samples(sum(sizes), torch.float64)[:2]
    image, text = own_part(everyone, sizes, dim=1)
    own = Embeddings(image_z=image, text_z=text, logit_scale=torch.tensor(3.0, dtype=torch.float64))
    results = {f"empty {scheme}": build_loss(LossConfig(exchange=scheme), None)(own).total for scheme in EXCHANGES}
    embedded = Towers(torch.float64)(own_part(samples(sum(sizes), torch.float64), sizes, dim=1))
    results |= {f"empty {name}": objective(embedded).total.detach() for name, objective in objectives("auto").items()}
    refused = (
        lambda: build_loss(LossConfig(gather_grad=False), None)(own),
        lambda: siglip_loss_over_ranks(image, text, 3.0, -2.0),
    )
    for loss in refused:
        with pytest.raises(
            ValueError, match=r"samples of the ranks: got \[4, 0\], expected at least one on every rank"
        ):
            loss()
    return results


def siglip_parameters() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    maps = (torch.randn(WIDTH, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return tuple(x.requires_grad_() for x in (*maps, *torch.tensor([10.0, -5.0], dtype=torch.float64)))


def traffic_and_memory(sizes: tuple[int, ...]) -> dict[str, Any]:
    """Bytes sent and peak memory of a step on equal local batches, two strong views, 64 and 48 wide, in bfloat16."""
    exchange.WORKSPACE_MIB = 1 / 2  # lest tiles hide what grows with the world

    def step(scheme: str, rows: int) -> None:
        embeddings, inputs = some_embeddings(rows)
        torch.autograd.grad(build_loss(LossConfig(exchange=scheme), None)(embeddings).total, inputs)  # type: ignore[arg-type]

    results: dict[str, Any] = {}
    for scheme in ("one_sided", "all_gather", "auto"):
        few, _ = bytes_sent_and_peak(lambda s=scheme: step(s, 4))
        # The least of several: the backend's threads free some tensors when they get to it.
        (sent, peak), *again = (bytes_sent_and_peak(lambda s=scheme: step(s, sizes[0])) for _ in range(3))
        peak = min(peak, *(other for _, other in again))
        results[scheme] = {"sent for few": few, "sent": sent, "peak": peak}
    return results


def companions_traffic(sizes: tuple[int, ...]) -> dict[str, Any]:
    """Bytes sent in a step of each companion whose samples are compared across ranks, 64 wide, in float32."""
    ranks, generator = distributed.AllRanks(torch.empty(sizes[0], 1)), torch.Generator().manual_seed(distributed.rank())

    def sent(loss: Callable[..., Tensor], *options: Any) -> float:
        views = [torch.randn(sizes[0], 64, generator=generator).requires_grad_() for _ in range(4)]
        return bytes_sent_and_peak(lambda: loss(views[:2], views[2:], *options).backward())[0]

    def sent_without_gradients(companion: SwALIPConfig | None) -> float:
        embeddings, _ = some_embeddings(sizes[0])
        objective = build_loss(LossConfig(gather_grad=False), companion)
        return bytes_sent_and_peak(lambda: objective(embeddings).total.backward())[0]

    scale, sinkhorn = torch.tensor(5.0), {"epsilon": 0.05, "iterations": 3}
    return {
        "swalip beside a loss without gradients": sent_without_gradients(SwALIPConfig()) - sent_without_gradients(None),
        "barlip": sent(partial(own_rows.barlip_over_ranks, ranks=ranks, lambda_=0.1, scale=1.0)),
        "swalip": sent(partial(own_rows.swalip_over_ranks, h_logit_scale=scale, ranks=ranks, **sinkhorn)),
        "prototypes": sent(partial(own_rows.swalip_prototypes_over_ranks, logit_scale=scale, ranks=ranks, **sinkhorn)),
    }


def some_embeddings(rows: int) -> tuple[Embeddings, list[Tensor]]:
    """Random ones of this rank, and all tensors they consist of."""
    generator = torch.Generator().manual_seed(distributed.rank())
    inputs = [torch.randn(rows, width, generator=generator).to(torch.bfloat16) for width in (64, 64, 48, 48, 48, 48)]
    inputs = [tensor.requires_grad_() for tensor in (*inputs, torch.tensor(10.0), torch.tensor(10.0))]
    image_z, text_z, *h, scale, h_scale = inputs
    embeddings = Embeddings(
        image_z=image_z,
        text_z=text_z,
        logit_scale=scale,
        image_h=tuple(h[:2]),
        text_h=tuple(h[2:]),
        h_logit_scale=h_scale,
    )
    return embeddings, inputs


def bytes_sent_and_peak(step: Callable[[], Any]) -> tuple[float, int]:
    """What the collectives of a step make a rank send, if ranks form a ring, and the most that it has allocated."""
    others = dist.get_world_size() - 1
    ring = {  # which argument is this rank's block, and how often it or as much is sent
        "all_gather": (1, others),
        "all_gather_single": (1, others),
        "all_gather_into_tensor": (1, others),
        "reduce_scatter_single": (0, others),
        "reduce_scatter_tensor": (0, others),
        "all_reduce": (0, 2 * others / (others + 1)),
    }
    sent: list[float] = []

    def counting(function: Callable[..., Any], argument: int, times: float) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            sent.append(times * args[argument].numel() * args[argument].element_size())
            return function(*args, **kwargs)

        return collective

    with contextlib.ExitStack() as patches:
        for name, (argument, times) in ring.items():
            if hasattr(dist, name):
                patches.enter_context(
                    unittest.mock.patch.object(dist, name, counting(getattr(dist, name), argument, times))
                )
        peak = cpu_peak_bytes(step)
    return sum(sent), peak


def run_rank(rank: int, folder: Path) -> None:
    """All that one of the processes does."""
    torch.set_num_threads(1)

    def work(sizes: tuple[int, ...], index: int, *parts: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        if rank >= len(sizes):
            return {}
        store = f"file://{folder / f'store{index}'}"
        dist.init_process_group("gloo", store, rank=rank, world_size=len(sizes), timeout=timedelta(minutes=5))
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (rank, len(sizes), rank == 0)
        results = {name: value for part in parts for name, value in part(sizes).items()}
        dist.destroy_process_group()
        return results

    everything = {}
    for index, sizes in enumerate(SIZES):
        everything[str(sizes)] = work(sizes, index, exact_schemes, without_gradients_across, collectives, siglip)
    for world in (2, 4):
        everything[f"traffic {world}"] = work((ROWS,) * world, len(SIZES) + world, traffic_and_memory)
    everything["companions' traffic"] = work((32, 32), 200, companions_traffic)
    everything["without samples"] = work((4, 0), 100, without_samples)
    torch.save(everything, folder / f"{rank}.pt")


# --- against one process ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What every process computed, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    count = max(map(len, SIZES))
    with ranks_of(__file__, count, folder):
        pass
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def of_case(ranks: list[dict[str, Any]], sizes: tuple[int, ...], result: str) -> list[Any]:
    return [ranks[rank][str(sizes)][result] for rank in range(len(sizes))]


def require_equal(result: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, where: str) -> None:
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, **PRECISE[dtype], msg=lambda m, n=name: f"{where} {n}: {m}")


@pytest.mark.system
@pytest.mark.parametrize(("sizes", "dtype"), CASES, ids=str)
def test_both_schemes_equal_one_process_on_the_whole_batch(
    ranks: list[dict[str, Any]], sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    for name, objective in objectives("auto").items():
        expected = outcome(Towers(dtype), samples(sum(sizes), dtype), objective)
        for scheme in ("one_sided", "all_gather"):
            for result in of_case(ranks, sizes, f"{dtype}/{scheme}/{name}"):
                require_equal(result, expected, dtype, f"{scheme} {name}")


@pytest.mark.system
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_plain_clip_and_ties(ranks: list[dict[str, Any]], sizes: tuple[int, ...]) -> None:
    objective = build_loss(LossConfig(), None)
    expected = outcome(Towers(torch.float64, strong=0), samples(sum(sizes), torch.float64), objective)
    for result in of_case(ranks, sizes, "weak only"):
        require_equal(result, expected, torch.float64, "weak only")
    for pattern in TIES:
        ties = objective(tied(pattern, sum(sizes))).metrics
        assert ties["clip_acc"] < 100
        for result in of_case(ranks, sizes, pattern):
            require_equal(result, ties, torch.float64, pattern)


def own_samples_loss(embeddings: Embeddings, own: slice) -> tuple[Tensor, Tensor]:
    """The original's loss of one rank, dense: its samples against everyone's, who are constants; accuracies (2, 2)."""
    labels = torch.arange(len(embeddings.image_z))[own]

    def pair(image: Tensor, text: Tensor, scale: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        logits = scale * image[own] @ text.detach().T, scale * text[own] @ image.detach().T
        losses = [F.cross_entropy(each, labels, label_smoothing=smoothing) for each in logits]
        return losses[0] + losses[1], torch.stack([100 * (each.argmax(1) == labels).double().mean() for each in logits])

    weak_loss, weak_right = pair(embeddings.image_z, embeddings.text_z, embeddings.logit_scale, 0.0)
    strong = [
        pair(image, text, embeddings.h_logit_scale, 0.1) for image in embeddings.image_h for text in embeddings.text_h
    ]
    strong_loss, strong_right = (torch.stack(each).mean(0) for each in zip(*strong, strict=True))
    return (weak_loss + 2 * strong_loss) / 3, torch.stack([weak_right, strong_right])


def own_samples_outcome(sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """The mean over ranks of their own losses, as far as it says something new."""
    model = Towers(torch.float64)
    embeddings = model(samples(sum(sizes), torch.float64))
    every_own = torch.arange(sum(sizes)).split(list(sizes))
    losses, right = zip(*[own_samples_loss(embeddings, slice(own[0], own[-1] + 1)) for own in every_own], strict=True)
    loss = torch.stack(losses).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    (weak_image, weak_text), (strong_image, strong_text) = torch.stack(right).mean(0)
    return {
        "loss": loss.detach(),
        "clip_acc_image_global": weak_image,
        "clip_acc_text_global": weak_text,
        "clip_acc_image_local": strong_image,
        "clip_acc_text_local": strong_text,
        **{f"grad/{name}": gradient for name, gradient in zip(names, gradients, strict=True)},
    }


@pytest.mark.system
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_without_gradients_across_ranks(ranks: list[dict[str, Any]], sizes: tuple[int, ...]) -> None:
    exact = outcome(Towers(torch.float64), samples(sum(sizes), torch.float64), build_loss(LossConfig(), None))
    expected = own_samples_outcome(sizes) if len(sizes) > 1 else exact
    different = not torch.allclose(expected["grad/text_z.weight"], exact["grad/text_z.weight"])
    assert different == (len(sizes) > 1)
    for result in of_case(ranks, sizes, "local"):
        require_equal({name: result[name] for name in expected}, expected, torch.float64, "own samples")
    both = outcome(
        Towers(torch.float64), samples(sum(sizes), torch.float64), build_loss(LossConfig(), COMPANIONS["swalip"])
    )
    added = {name: both[name] - exact[name] for name in expected if name.startswith(("grad", "loss"))}
    for result in of_case(ranks, sizes, "local, swalip"):
        require_equal(
            {name: result[name] for name in added},
            {name: expected[name] + own for name, own in added.items()},
            torch.float64,
            "swalip beside own samples",
        )


@pytest.mark.system
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_collectives_and_siglip(ranks: list[dict[str, Any]], sizes: tuple[int, ...]) -> None:
    whole = samples(sum(sizes), torch.float64)
    parameters = siglip_parameters()
    loss = siglip_loss(whole[0] @ parameters[0], whole[1] @ parameters[1], *parameters[2:], normalize=True)
    expected = {
        "gathered": whole[0],
        "together 0": whole[0].unsqueeze(1).expand(-1, 2, -1),
        "together 1": torch.cat([torch.arange(size, dtype=torch.int32) for size in sizes]),
        "together 2": whole[0].to(torch.bfloat16),
        "siglip": loss.detach(),
    }
    expected |= {f"siglip grad {i}": g for i, g in enumerate(torch.autograd.grad(loss, parameters))}
    for rank, size in enumerate(sizes):
        result = ranks[rank][str(sizes)]
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        ones = torch.ones(size, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(result["gathered grad"], sum(range(1, len(sizes) + 1)) * ones, rtol=0, atol=0)


@pytest.mark.system
def test_a_rank_without_samples(ranks: list[dict[str, Any]]) -> None:
    image, text = samples(4, torch.float64)[:2]
    whole = Embeddings(image_z=image, text_z=text, logit_scale=torch.tensor(3.0, dtype=torch.float64))
    expected = build_loss(LossConfig(), None)(whole).total
    for result in ranks[:2]:
        for scheme in EXCHANGES:
            torch.testing.assert_close(result["without samples"][f"empty {scheme}"], expected, rtol=1e-12, atol=0)
        for name, objective in objectives("auto").items():
            total = objective(Towers(torch.float64)(samples(4, torch.float64))).total.detach()
            torch.testing.assert_close(result["without samples"][f"empty {name}"], total, rtol=1e-12, atol=0)


@pytest.mark.system
def test_one_sided_sends_half_and_its_memory_grows_with_the_texts_alone(ranks: list[dict[str, Any]]) -> None:
    """Against the formulas in rocket_fast/exchange.py."""
    text_width, pairs, bytes_a_number = 64 + 2 * 48, 1 + 4, 2
    peaks = {}
    for world in (2, 4):
        case = ranks[world - 1][f"traffic {world}"]
        once = (world - 1) * ROWS * text_width * bytes_a_number
        small = 2000 * (world - 1)  # row counts, terms, what label smoothing needs
        assert 0 <= case["all_gather"]["sent"] - 4 * once <= small
        assert 0 <= case["one_sided"]["sent"] - 2 * (once + (world - 1) * ROWS * 8 * pairs) <= small
        assert case["one_sided"]["sent"] < 0.65 * case["all_gather"]["sent"]
        assert case["auto"]["sent"] == case["one_sided"]["sent"]
        assert case["auto"]["sent for few"] == case["all_gather"]["sent for few"]
        peaks[world] = {scheme: case[scheme]["peak"] for scheme in case}
    # From two ranks to four: twice as many texts. There may be some copies of those (one more or less at a time, by
    # the timing of the backend's threads), but never a pair's logits.
    new_texts = 2 * ROWS
    growth = {scheme: peaks[4][scheme] - peaks[2][scheme] for scheme in peaks[4]}
    assert growth["one_sided"] <= 16 * new_texts * text_width < 4 * ROWS * new_texts
    assert growth["one_sided"] < 2 / 3 * growth["all_gather"]


@pytest.mark.system
def test_companions_send_what_their_own_rows_take(ranks: list[dict[str, Any]]) -> None:
    """Against rocket_fast/own_rows.py; the old way, everything to everybody and back, is 8 views."""
    view = 32 * 64 * 4
    for result in ranks[:2]:
        sent = result["companions' traffic"]
        assert sent["barlip"] == 4 * view + 2 * (1 + 64) * 8  # the weak and one strong pair
        # Maxima and sums, in float64, of four pairs: two assignments in three iterations, and one of predictions.
        assert sent["swalip"] == 4 * view + 2 * 4 * (2 * 3 + 1) * 64 * 8 + 4  # and the loss
        # The texts are there: gradients to two views of 48, in the embeddings' 16 bits, go home.
        texts = sent["swalip beside a loss without gradients"] - (sent["swalip"] - 4 * view)
        assert texts == 2 * 32 * 48 * 2
        assert sent["prototypes"] == 2 * 4 * 3 * 64 * 8 + 4


def test_a_world_of_one_gathers_nothing() -> None:
    tensor = torch.randn(3, 2)
    assert distributed.gather(tensor) is tensor
    assert distributed.sum_over_ranks(tensor) is tensor
    assert distributed.mean_over_ranks(tensor, 3) is tensor
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
