"""From embeddings to the number that is differentiated: exchange, call the kernels, name the metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from rocket_fast.batch import CompanionOutputs, Embeddings, LossOutput
from rocket_fast.distributed import AllRanks, mean_over_ranks
from rocket_fast.errors import require
from rocket_fast.exchange import Exchange, multiview_terms
from rocket_fast.kernels import (
    MultiviewClipTerms,
    Reduction,
    siamlip_loss,
    siglip_loss,
)
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


# What a companion adds to the total, and its metrics.
CompanionLoss = Callable[[Embeddings, AllRanks], tuple[Tensor, dict[str, Tensor]]]


class Objective(nn.Module):
    """The training objective: CL2L plus, where there is one, a companion's loss. Has no parameters."""

    def __init__(self, loss: LossConfig, companion_loss: CompanionLoss | None) -> None:
        super().__init__()
        self.loss = loss
        self.companion_loss = companion_loss

    def forward(self, embeddings: Embeddings) -> LossOutput:
        """The loss of the batch of all ranks together, the same number on each; see rocket_fast/distributed.py.

        Embeddings are taken in their own dtype, under autocast too: 16-bit ones are multiplied exactly, no others are
        rounded.

        ``metrics`` (0-dimensional, detached): ``loss``; ``clip_loss`` (mean of both directions), ``clip_loss_image``,
        ``clip_loss_text``, the same with ``_global`` (weak pair) and ``_local`` (mean over strong pairs); ``clip_acc``
        (weak, image to text, percent), ``clip_acc_{image,text}_{global,local}``; ``logit_scale``, ``h_logit_scale``
        (after exp); the companion's ``siamlip_loss``, ``barlip_loss`` or ``swalip_loss`` (without its weight) and
        ``swalip_logit_scale``.
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
            if self.companion_loss is not None:
                added, companion_metrics = self.companion_loss(embeddings, ranks)
                total, metrics = total + added, metrics | companion_metrics
        metrics["loss"] = total
        return LossOutput(total=total, metrics={name: value.detach() for name, value in metrics.items()})


def build_loss(loss: LossConfig, companion: CompanionConfig | None) -> Objective:
    """The objective for a model with the given companion (None: CL2L or plain CLIP alone)."""
    return Objective(loss, None if companion is None else _companion_loss(companion))


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


def _companion_loss(config: CompanionConfig) -> CompanionLoss:
    """The loss that belongs to a companion's configuration, chosen once."""
    if isinstance(config, SiamLIPConfig | BYOLIPConfig):
        return _siamlip
    if isinstance(config, BarLIPConfig):
        return partial(_barlip, config)
    if isinstance(config, SwALIPConfig):
        return partial(_swalip, config)
    require(isinstance(config, SwALIPPrototypesConfig), "companion", config, "one of rocket_fast.models.heads' configs")
    return partial(_swalip_prototypes, config)


def _siamlip(embeddings: Embeddings, ranks: AllRanks) -> tuple[Tensor, dict[str, Tensor]]:
    heads = _outputs(embeddings)
    outputs = heads.image_p, heads.text_p, heads.image_v, heads.text_v
    if min(ranks.counts) == 0:  # there is no mean of no samples
        loss = siamlip_loss(*ranks.gather(*outputs))
    else:
        loss = mean_over_ranks(siamlip_loss(*outputs), ranks.own)  # no sample's cost depends on another
    return loss, {"siamlip_loss": loss}


def _barlip(config: BarLIPConfig, embeddings: Embeddings, ranks: AllRanks) -> tuple[Tensor, dict[str, Tensor]]:
    heads = _outputs(embeddings)
    loss = barlip_over_ranks(heads.image_v, heads.text_v, ranks, lambda_=config.lambda_, scale=config.scale)
    return loss, {"barlip_loss": loss}


def _swalip(config: SwALIPConfig, embeddings: Embeddings, ranks: AllRanks) -> tuple[Tensor, dict[str, Tensor]]:
    scale = embeddings.h_logit_scale
    require(scale is not None, "embeddings.h_logit_scale", None, "the strong head's scale, which SwALIP needs")
    assert scale is not None
    options: dict[str, Any] = {"epsilon": config.epsilon, "iterations": config.iterations}
    loss = swalip_over_ranks(embeddings.image_h, embeddings.text_h, scale, ranks, **options)
    return config.weight * loss, {"swalip_loss": loss}


def _swalip_prototypes(
    config: SwALIPPrototypesConfig, embeddings: Embeddings, ranks: AllRanks
) -> tuple[Tensor, dict[str, Tensor]]:
    heads = _outputs(embeddings)
    scale = heads.logit_scale
    require(scale is not None, "embeddings.companion.logit_scale", None, "the prototypes' own scale")
    assert scale is not None
    options: dict[str, Any] = {"epsilon": config.epsilon, "iterations": config.iterations}
    loss = swalip_prototypes_over_ranks(heads.image_p, heads.text_p, scale, ranks, **options)
    return config.weight * loss, {"swalip_loss": loss, "swalip_logit_scale": scale}
