"""From embeddings to the number that is differentiated: exchange, call the kernels, name the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rocket_fast.batch import CompanionOutputs, Embeddings, LossOutput, UnpairedOutputs
from rocket_fast.distributed import AllRanks, mean_over_ranks
from rocket_fast.errors import require
from rocket_fast.exchange import Exchange, multiview_terms
from rocket_fast.kernels import (
    MultiviewClipTerms,
    Reduction,
    siamlip_loss,
    siglip_loss,
)
from rocket_fast.kernels.tiled import compute_dtype
from rocket_fast.models.heads import (
    BarLIPConfig,
    BYOLIPConfig,
    CompanionConfig,
    SiamLIPConfig,
    SwALIPConfig,
    SwALIPPrototypesConfig,
)
from rocket_fast.own_rows import barlip_over_ranks, swalip_over_ranks, swalip_prototypes_over_ranks


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrastive loss; with strong views it is CL2L, without them plain CLIP."""

    label_smoothing: float = 0.1
    """Label smoothing of the strong pairs, in [0, 1); the weak pair has none."""
    reduction: Reduction = "sum"
    """avg: mean of image-to-text and text-to-image; sum: their sum (twice as much, companions weigh less)."""
    exchange: Exchange = "auto"
    """How several processes share the work, loss and gradients being the same: all_gather sends all embeddings to all,
    one_sided the texts only, half the bytes and 1/processes of the products; auto takes it for large batches."""
    gather_grad: bool = True
    """Whether the contrastive loss's gradients cross processes, as in one process with all samples; False drops them,
    as the original does. Companions' always do."""

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "a number in [0, 1)")
        require(self.reduction in ("avg", "sum"), "loss.reduction", self.reduction, "'avg' or 'sum'")
        require(self.exchange in get_args(Exchange), "loss.exchange", self.exchange, f"one of {get_args(Exchange)}")
        fits = self.gather_grad or self.exchange == "auto"
        require(fits, "loss.exchange", self.exchange, "'auto' with gather_grad=False, which has an exchange of its own")


# A companion's loss between images and texts, without its weight, and its metrics.
CompanionLoss = Callable[[Embeddings, AllRanks], tuple[Tensor, dict[str, Tensor]]]

# The same between two strong views, given by their numbers, of unpaired pictures.
ViewsLoss = Callable[[Embeddings, AllRanks, int, int], Tensor]


class Companion(NamedTuple):
    """What a companion adds to the total: ``weight`` times the loss of the pairs, and that of unpaired pictures."""

    weight: float
    of_pairs: CompanionLoss
    of_views: ViewsLoss


class Objective(nn.Module):
    """The training objective: CL2L plus, where there is one, a companion's loss. Has no parameters."""

    def __init__(self, loss: LossConfig, companion: Companion | None) -> None:
        super().__init__()
        self.loss = loss
        self.companion = companion

    def forward(self, embeddings: Embeddings) -> LossOutput:
        """The loss of the batch of all ranks together, the same number on each; see rocket_fast/distributed.py.

        Embeddings are taken in their own dtype, under autocast too: 16-bit ones are multiplied exactly, no others are
        rounded.

        ``metrics`` (0-dimensional, detached): ``loss``; ``clip_loss`` (mean of both directions), ``clip_loss_image``,
        ``clip_loss_text``, the same with ``_global`` (weak pair) and ``_local`` (mean over strong pairs); ``clip_acc``
        (weak, image to text, percent), ``clip_acc_{image,text}_{global,local}``; ``logit_scale``, ``h_logit_scale``
        (after exp); the companion's ``siamlip_loss``, ``barlip_loss`` or ``swalip_loss`` (without its weight),
        ``swalip_logit_scale``, and ``unpaired_loss``, the same loss between the views of unpaired pictures.
        """
        with torch.autocast(embeddings.image_z.device.type, enabled=False):
            ranks = AllRanks(embeddings.image_z, embeddings.text_z)
            terms = multiview_terms(
                embeddings,
                ranks,
                exchange=self.loss.exchange,
                gather_grad=self.loss.gather_grad,
                label_smoothing=self.loss.label_smoothing,
            )
            total = terms.reduce(self.loss.reduction)
            metrics = _clip_metrics(terms) | _scale_metrics(embeddings)
            if self.companion is not None:
                added, companion_metrics = self.companion.of_pairs(embeddings, ranks)
                total, metrics = total + self.companion.weight * added, metrics | companion_metrics
                if embeddings.unpaired is not None:
                    metrics["unpaired_loss"] = _unpaired(embeddings, self.companion.of_views)
                    total = total + self.companion.weight * metrics["unpaired_loss"]
        metrics["loss"] = total
        return LossOutput(total=total, metrics={name: value.detach() for name, value in metrics.items()})


def build_loss(loss: LossConfig, companion: CompanionConfig | None) -> Objective:
    """The objective for a model with the given companion (None: CL2L or plain CLIP alone)."""
    return Objective(loss, None if companion is None else _companion(companion))


def siglip_loss_over_ranks(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    normalize: bool = False,
) -> Tensor:
    """``rocket_fast.kernels.siglip_loss`` of all ranks' samples: the same number on every rank, exact gradients.

    A rank gathers the texts and takes its own images against them. Row counts may differ between ranks.
    """
    ranks = AllRanks(image_ND, text_ND)
    ranks.require_samples()
    ((text_MD,),) = ranks.gather((text_ND,))
    own = siglip_loss(image_ND, text_MD, logit_scale, logit_bias, row_offset=ranks.first_row, normalize=normalize)
    return mean_over_ranks(own, len(image_ND))


def _clip_metrics(terms: MultiviewClipTerms) -> dict[str, Tensor]:
    metrics = {
        "clip_loss": terms.reduce("avg"),
        "clip_loss_image": terms.loss_image,
        "clip_loss_text": terms.loss_text,
        "clip_acc": terms.weak.accuracy_image,
    }
    for place, part in (("global", terms.weak), ("local", terms.strong)):
        if part is not None:
            metrics[f"clip_loss_image_{place}"] = part.loss_image
            metrics[f"clip_loss_text_{place}"] = part.loss_text
            metrics[f"clip_acc_image_{place}"] = part.accuracy_image
            metrics[f"clip_acc_text_{place}"] = part.accuracy_text
    return metrics


def _scale_metrics(embeddings: Embeddings) -> dict[str, Tensor]:
    scales = {"logit_scale": embeddings.logit_scale, "h_logit_scale": embeddings.h_logit_scale}
    return {name: scale for name, scale in scales.items() if scale is not None}


def _outputs(embeddings: Embeddings) -> CompanionOutputs:
    require(embeddings.companion is not None, "embeddings.companion", None, "the outputs of the companion's heads")
    assert embeddings.companion is not None
    return embeddings.companion


def _views(embeddings: Embeddings) -> UnpairedOutputs:
    assert embeddings.unpaired is not None
    return embeddings.unpaired


def _companion(config: CompanionConfig) -> Companion:
    """The losses that belong to a companion's configuration, chosen once."""
    if isinstance(config, SiamLIPConfig | BYOLIPConfig):
        return Companion(1.0, _siamlip, _siamlip_views)
    if isinstance(config, BarLIPConfig):
        return Companion(1.0, partial(_barlip, config), partial(_barlip_views, config))
    if isinstance(config, SwALIPConfig):
        return Companion(config.weight, partial(_swalip, config), partial(_swalip_views, config))
    require(isinstance(config, SwALIPPrototypesConfig), "companion", config, "one of rocket_fast.models.heads' configs")
    return Companion(config.weight, partial(_swalip_prototypes, config), partial(_prototypes_views, config))


def _unpaired(embeddings: Embeddings, of_views: ViewsLoss) -> Tensor:
    """The mean over all pairs of two different strong views of the same unpaired pictures.

    As in the recipe, weak and strong views are not compared: they may have heads of their own.
    """
    views = _views(embeddings).image_v
    require(len(views) >= 2, "embeddings.unpaired.image_v", f"{len(views)} views", "two or more")
    ranks = AllRanks(*views)
    return torch.stack([of_views(embeddings, ranks, i, j) for i, j in combinations(range(len(views)), 2)]).mean()


def _cosines(ranks: AllRanks, *outputs: Sequence[Tensor]) -> Tensor:
    """``siamlip_loss`` of all ranks' samples, no one's cost depending on another."""
    if min(ranks.counts) == 0:  # there is no mean of no samples
        return siamlip_loss(*ranks.gather(*outputs))
    return mean_over_ranks(siamlip_loss(*outputs), ranks.own)


def _siamlip(embeddings: Embeddings, ranks: AllRanks) -> tuple[Tensor, dict[str, Tensor]]:
    heads = _outputs(embeddings)
    loss = _cosines(ranks, heads.image_p, heads.text_p, heads.image_v, heads.text_v)
    return loss, {"siamlip_loss": loss}


def _siamlip_views(embeddings: Embeddings, ranks: AllRanks, i: int, j: int) -> Tensor:
    """Each view predicts the other's projection."""
    p, v = _views(embeddings).image_p, _views(embeddings).image_v
    return _cosines(ranks, (p[i],), (p[j],), (v[i],), (v[j],))


def _barlip(config: BarLIPConfig, embeddings: Embeddings, ranks: AllRanks) -> tuple[Tensor, dict[str, Tensor]]:
    heads = _outputs(embeddings)
    loss = barlip_over_ranks(heads.image_v, heads.text_v, ranks, lambda_=config.lambda_, scale=config.scale)
    return loss, {"barlip_loss": loss}


def _barlip_views(config: BarLIPConfig, embeddings: Embeddings, ranks: AllRanks, i: int, j: int) -> Tensor:
    v = _views(embeddings).image_v
    return barlip_over_ranks((v[i],), (v[j],), ranks, lambda_=config.lambda_, scale=config.scale)


def _swalip(config: SwALIPConfig, embeddings: Embeddings, ranks: AllRanks) -> tuple[Tensor, dict[str, Tensor]]:
    scale = _strong_scale(embeddings)
    options: dict[str, Any] = {"epsilon": config.epsilon, "iterations": config.iterations}
    loss = swalip_over_ranks(embeddings.image_h, embeddings.text_h, scale, ranks, **options)
    return loss, {"swalip_loss": loss}


def _swalip_views(config: SwALIPConfig, embeddings: Embeddings, ranks: AllRanks, i: int, j: int) -> Tensor:
    """The pictures of one view are labelled by the other's similarities, which are those of the former, transposed.

    The pictures of a view being the other's prototypes, it is the loss with prototypes of both views' cosines.
    """
    views = _views(embeddings).image_v
    (everyone,) = ranks.gather(views)
    (own_i, own_j), (all_i, all_j) = (
        [F.normalize(side[view].to(compute_dtype(side[view])), dim=1) for view in (i, j)] for side in (views, everyone)
    )
    options: dict[str, Any] = {"epsilon": config.epsilon, "iterations": config.iterations}
    scores = (own_i @ all_j.T,), (own_j @ all_i.T,)
    return swalip_prototypes_over_ranks(*scores, _strong_scale(embeddings), ranks, **options)


def _strong_scale(embeddings: Embeddings) -> Tensor:
    scale = embeddings.h_logit_scale
    require(scale is not None, "embeddings.h_logit_scale", None, "the strong head's scale, which SwALIP needs")
    assert scale is not None
    return scale


def _swalip_prototypes(
    config: SwALIPPrototypesConfig, embeddings: Embeddings, ranks: AllRanks
) -> tuple[Tensor, dict[str, Tensor]]:
    heads, scale = _outputs(embeddings), _prototypes_scale(embeddings)
    options: dict[str, Any] = {"epsilon": config.epsilon, "iterations": config.iterations}
    loss = swalip_prototypes_over_ranks(heads.image_p, heads.text_p, scale, ranks, **options)
    return loss, {"swalip_loss": loss, "swalip_logit_scale": scale}


def _prototypes_views(
    config: SwALIPPrototypesConfig, embeddings: Embeddings, ranks: AllRanks, i: int, j: int
) -> Tensor:
    """Each view predicts the other's assignment to the images' prototypes."""
    p, scale = _views(embeddings).image_p, _prototypes_scale(embeddings)
    options: dict[str, Any] = {"epsilon": config.epsilon, "iterations": config.iterations}
    return swalip_prototypes_over_ranks((p[i],), (p[j],), scale, ranks, **options)


def _prototypes_scale(embeddings: Embeddings) -> Tensor:
    scale = _outputs(embeddings).logit_scale
    require(scale is not None, "embeddings.companion.logit_scale", None, "the prototypes' own scale")
    assert scale is not None
    return scale
