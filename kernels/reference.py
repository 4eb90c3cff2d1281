"""All objectives in slow, clear torch: what the faster kernels are measured against.

Shapes: N samples, D embedding width, P projection width or prototypes, K strong views a sample.
Sources: CLIP (Radford et al. 2021, fig. 3), CL2L and companions ("Improved baselines for vision-language
pre-training", Fini et al. 2023), SimSiam (Chen and He 2021), BYOL (Grill et al. 2020), Barlow Twins (Zbontar et al.
2021), SwAV (Caron et al. 2020).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rocket_fast.errors import require
from rocket_fast.kernels.checks import (
    require_pair,
    require_same_width,
    require_scalar,
    require_smoothing,
    require_views,
)

Reduction = Literal["avg", "sum"]
View = TypeVar("View")  # a view's tensor, or several that belong together


# --- precision --------------------------------------------------------------------------------------------------------


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` in their own precision: an enclosing autocast would round the factors to 16 bits."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ y


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_precise(x), dim=-1)


def _scaled(scale: Tensor | float, logits: Tensor) -> Tensor:
    return (scale.reshape(()).to(logits.dtype) if isinstance(scale, Tensor) else scale) * logits


# --- contrastive: CLIP and CL2L ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClipTerms:
    """The two directions of one contrastive loss, each a mean over samples; 0-dimensional tensors.

    ``loss_image``: every image picks its text among all texts; ``loss_text``: the reverse. ``accuracy_image``,
    ``accuracy_text``: how often the pick is right, in percent, detached.
    """

    loss_image: Tensor
    loss_text: Tensor
    accuracy_image: Tensor
    accuracy_text: Tensor

    @property
    def loss(self) -> Tensor:
        """The mean of both directions."""
        return (self.loss_image + self.loss_text) / 2


def clip_terms(
    image_ND: Tensor,
    text_MD: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
    row_offset: int = 0,
    targets: Tensor | None = None,
    normalize: bool = False,
) -> ClipTerms:
    """Both directions of symmetric InfoNCE, with accuracies: twin of ``rocket_fast.kernels.clip_terms``."""
    require_same_width("image_ND", image_ND, "text_MD", text_MD)
    require_scalar("logit_scale", logit_scale)
    require_smoothing(label_smoothing)
    prepare = _unit if normalize else _precise
    logits_NM = _scaled(logit_scale, _matmul(prepare(image_ND), prepare(text_MD).T)) + logit_bias
    target_NM = _target_matrix(targets, row_offset, logits_NM)

    def direction(logits_NM: Tensor, target_NM: Tensor) -> tuple[Tensor, Tensor]:
        counted_N = target_NM.sum(1) > 0
        logits_PM, target_PM = logits_NM[counted_N], target_NM[counted_N]
        spread_PM = (1 - label_smoothing) * target_PM / target_PM.sum(1, keepdim=True) + label_smoothing / len(
            target_NM.T
        )
        loss = -(spread_PM * logits_PM.log_softmax(1)).sum(1).mean()
        if targets is None:
            right_P = logits_PM.argmax(1) == target_PM.argmax(1)
        else:
            right_P = logits_PM.masked_fill(target_PM <= 0, -torch.inf).amax(1) >= logits_PM.amax(1)
        return loss, 100.0 * right_P.to(loss.dtype).mean()

    loss_image, accuracy_image = direction(logits_NM, target_NM)
    loss_text, accuracy_text = direction(logits_NM.T, target_NM.T)
    return ClipTerms(
        loss_image=loss_image, loss_text=loss_text, accuracy_image=accuracy_image, accuracy_text=accuracy_text
    )


def _target_matrix(targets: Tensor | None, row_offset: int, like_NM: Tensor) -> Tensor:
    """Weights (N, M) of all positives, in any form of ``rocket_fast.kernels.clip_loss``'s targets."""
    rows, columns = like_NM.shape
    if targets is None:
        column_M = torch.arange(columns, device=like_NM.device)
        row_N = torch.arange(rows, device=like_NM.device)
        return (row_N[:, None] + row_offset == column_M).to(like_NM.dtype)
    if targets.layout != torch.strided:
        return targets.to_dense().to(like_NM.dtype)
    column_NK = targets.reshape(rows, -1).long()
    target_NM = torch.zeros(rows, columns, dtype=like_NM.dtype, device=like_NM.device)
    return target_NM.scatter_add(1, column_NK.clamp_min(0), (column_NK >= 0).to(like_NM.dtype))


def clip_loss(
    image_ND: Tensor,
    text_MD: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
    row_offset: int = 0,
    targets: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """Symmetric InfoNCE, the mean of both directions: twin of ``rocket_fast.kernels.clip_loss``."""
    return clip_terms(
        image_ND,
        text_MD,
        logit_scale,
        logit_bias=logit_bias,
        label_smoothing=label_smoothing,
        row_offset=row_offset,
        targets=targets,
        normalize=normalize,
    ).loss


def siglip_loss(
    image_ND: Tensor,
    text_MD: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    row_offset: int = 0,
    normalize: bool = False,
) -> Tensor:
    """Pairwise sigmoid loss: twin of ``rocket_fast.kernels.siglip_loss``."""
    prepare = _unit if normalize else _precise
    logits_NM = _scaled(logit_scale, _matmul(prepare(image_ND), prepare(text_MD).T)) + logit_bias
    sign_NM = 2 * _target_matrix(None, row_offset, logits_NM) - 1
    return -F.logsigmoid(sign_NM * logits_NM).sum() / len(image_ND)


@dataclass(frozen=True, kw_only=True)
class MultiviewClipTerms:
    """The parts of CL2L: the weak pair, the mean over the K x K strong pairs (None where K is 0), and both together.

    ``loss_image``, ``loss_text``: (weak + K * strong) / (1 + K) of the one and the other direction.
    """

    weak: ClipTerms
    strong: ClipTerms | None
    loss_image: Tensor
    loss_text: Tensor

    def reduce(self, reduction: Reduction) -> Tensor:
        """Both directions in one: "avg" is their mean, "sum" their sum, twice as much."""
        require(reduction in get_args(Reduction), "reduction", reduction, f"one of {get_args(Reduction)}")
        total = self.loss_image + self.loss_text
        return total if reduction == "sum" else total / 2


def multiview_clip_terms(
    image_z: Tensor,
    text_z: Tensor,
    logit_scale: Tensor | float,
    image_h: Sequence[Tensor] = (),
    text_h: Sequence[Tensor] = (),
    h_logit_scale: Tensor | float | None = None,
    *,
    label_smoothing: float = 0.0,
    normalize: bool = False,
) -> MultiviewClipTerms:
    """The parts of CL2L, pair by pair: twin of ``rocket_fast.kernels.multiview_clip_terms``."""
    require_pair("image_z", image_z, "text_z", text_z)
    require_views("image_h", image_h, "text_h", text_h)
    require_scalar("logit_scale", logit_scale)
    require_smoothing(label_smoothing)
    weak = clip_terms(image_z, text_z, logit_scale, normalize=normalize)
    if not image_h:
        return MultiviewClipTerms(weak=weak, strong=None, loss_image=weak.loss_image, loss_text=weak.loss_text)

    require(h_logit_scale is not None, "h_logit_scale", None, "a scale, since there are strong views")
    assert h_logit_scale is not None
    require_scalar("h_logit_scale", h_logit_scale)
    shape, samples = tuple(image_h[0].shape), len(image_z)
    require(shape[0] == samples, "image_h[0]", shape, f"a shape ({samples}, D), as many samples as image_z has")
    pairs = [
        clip_terms(image, text, h_logit_scale, label_smoothing=label_smoothing, normalize=normalize)
        for image, text in itertools.product(image_h, text_h)
    ]
    strong = ClipTerms(
        loss_image=_mean([pair.loss_image for pair in pairs]),
        loss_text=_mean([pair.loss_text for pair in pairs]),
        accuracy_image=_mean([pair.accuracy_image for pair in pairs]),
        accuracy_text=_mean([pair.accuracy_text for pair in pairs]),
    )
    views = len(image_h)
    return MultiviewClipTerms(
        weak=weak,
        strong=strong,
        loss_image=(weak.loss_image + views * strong.loss_image) / (1 + views),
        loss_text=(weak.loss_text + views * strong.loss_text) / (1 + views),
    )


def multiview_clip_loss(
    image_z: Tensor,
    text_z: Tensor,
    logit_scale: Tensor | float,
    image_h: Sequence[Tensor] = (),
    text_h: Sequence[Tensor] = (),
    h_logit_scale: Tensor | float | None = None,
    *,
    label_smoothing: float = 0.0,
    reduction: Reduction = "avg",
    normalize: bool = False,
) -> Tensor:
    """CL2L's loss: twin of ``rocket_fast.kernels.multiview_clip_loss``."""
    views = (image_z, text_z, logit_scale, image_h, text_h, h_logit_scale)
    return multiview_clip_terms(*views, label_smoothing=label_smoothing, normalize=normalize).reduce(reduction)


def _mean(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).mean()


def mean_over_pairs(loss: Callable[[View, View], Tensor], first: Sequence[View], second: Sequence[View]) -> Tensor:
    """Mean of ``loss`` over the weak pair (first views) and all K x K strong pairs, 1 + K * K equal terms."""
    strong = itertools.product(first[1:], second[1:])
    return _mean([loss(one, other) for one, other in [(first[0], second[0]), *strong]])


# --- negative cosine: SiamLIP and BYOLIP ------------------------------------------------------------------------------


def negative_cosine_loss(prediction_NP: Tensor, target_NP: Tensor) -> Tensor:
    """``2 - 2 cos(prediction, target)``, mean over samples, in [0, 4]; no gradient flows to the target.

    Args:
        prediction_NP: (N, P) floating point, a predictor's outputs.
        target_NP: (N, P), projections of the other side, of the same shape, dtype and device.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that differ, or no samples.

    Source: BYOL (Grill et al. 2020, eq. 2), SimSiam (Chen and He 2021, eq. 1, times 2 plus 2).
    """
    require_pair("prediction_NP", prediction_NP, "target_NP", target_NP)
    cosine_N = (_unit(prediction_NP) * _unit(target_NP.detach())).sum(dim=-1)
    return (2 - 2 * cosine_N).mean()


def siamlip_loss(
    image_p: Sequence[Tensor], text_p: Sequence[Tensor], image_v: Sequence[Tensor], text_v: Sequence[Tensor]
) -> Tensor:
    """SiamLIP: each side predicts the other's projection; BYOLIP, where the projections are an averaged encoder's.

    A pair (i, j) of an image and a text view costs the mean of ``negative_cosine_loss(image_p[i], text_v[j])`` and
    ``negative_cosine_loss(text_p[j], image_v[i])``; the loss is the mean over the weak pair and the K x K strong ones.

    Args:
        image_p, text_p: predictor outputs, 1 + K tensors (N, P) each, the weak view first.
        image_v, text_v: projections (the targets, no gradient), 1 + K tensors (N, P) each, the weak view first.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs), in [0, 4].

    Raises:
        ValueError: shapes, dtypes or devices that differ, unequal numbers of views, no views or no samples.

    Source: Fini et al. 2023 (SiamLIP, BYOLIP).
    """
    require_weak("image_p", image_p)
    for name, views in (("text_p", text_p), ("image_v", image_v), ("text_v", text_v)):
        require_views("image_p", image_p, name, views)
    from_image = mean_over_pairs(negative_cosine_loss, image_p, text_v)
    from_text = mean_over_pairs(negative_cosine_loss, text_p, image_v)
    return (from_image + from_text) / 2


def require_weak(name: str, views: Sequence[Tensor]) -> None:
    require(len(views) >= 1, f"len({name})", len(views), "at least 1: the weak view, then any strong ones")


# --- redundancy reduction: BarLIP -------------------------------------------------------------------------------------


def barlow_loss(image_NP: Tensor, text_NP: Tensor, *, lambda_: float = 5e-3, scale: float = 0.025) -> Tensor:
    """``scale * (sum_i (1 - C_ii)^2 + lambda_ * sum_{i != j} C_ij^2)`` with ``C = image^T text / N``.

    Args:
        image_NP: (N, P) floating point, projections used as they are: a batch norm at the end of the projector is what
            gives their columns mean 0 and variance 1.
        text_NP: (N, P), likewise, of the same shape, dtype and device.
        lambda_: >= 0, weight of the off-diagonal terms.
        scale: > 0, weight of the whole.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that differ, no samples, ``lambda_`` or ``scale`` out of range.

    Twin of ``rocket_fast.kernels.barlow_loss``.
    """
    require_pair("image_NP", image_NP, "text_NP", text_NP)
    require(lambda_ >= 0, "lambda_", lambda_, "a number >= 0")
    require(scale > 0, "scale", scale, "a number > 0")
    correlation_PP = _matmul(_precise(image_NP).T, _precise(text_NP)) / len(image_NP)
    diagonal_P = correlation_PP.diagonal()
    on_diagonal = (1 - diagonal_P).square().sum()
    off_diagonal = (correlation_PP - torch.diag(diagonal_P)).square().sum()
    return scale * (on_diagonal + lambda_ * off_diagonal)


# --- balanced soft labels: SwALIP -------------------------------------------------------------------------------------


@torch.no_grad()
def sinkhorn(scores_NM: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Sinkhorn-Knopp: soft assignments near ``exp(scores / epsilon)`` that use all M columns about equally.

    Columns, then rows, are scaled to equal sums, ``iterations`` times. Rows come last, so each is a distribution;
    columns sum to N / M in the limit. Computed on logarithms, hence safe for any range of scores. No gradient.

    Args:
        scores_NM: (N, M) floating point, similarity of N samples to M candidates.
        epsilon: > 0, temperature: the smaller, the harder the assignments.
        iterations: >= 1.

    Returns:
        (N, M), float32 (float64 for float64 inputs), rows summing to 1.

    Raises:
        ValueError: not a non-empty floating point matrix, ``epsilon`` or ``iterations`` out of range.

    Source: SwAV (Caron et al. 2020, section 3.1); Cuturi 2013.
    """
    shape = tuple(scores_NM.shape)
    require(scores_NM.ndim == 2 and scores_NM.numel() > 0, "scores_NM", shape, "a shape (N, M) with N, M >= 1")
    require(scores_NM.is_floating_point(), "scores_NM", scores_NM.dtype, "a floating point dtype")
    require(epsilon > 0, "epsilon", epsilon, "a number > 0")
    require(iterations >= 1, "iterations", iterations, "a number >= 1")
    log_q_NM = _precise(scores_NM) / epsilon
    for _ in range(iterations):
        log_q_NM = log_q_NM - log_q_NM.logsumexp(dim=0, keepdim=True)
        log_q_NM = log_q_NM - log_q_NM.logsumexp(dim=1, keepdim=True)
    return log_q_NM.exp()


def _soft_cross_entropy(logits_NM: Tensor, target_NM: Tensor) -> Tensor:
    return -(target_NM * logits_NM.log_softmax(dim=-1)).sum(dim=-1).mean()


def swalip_loss(
    image_h: Sequence[Tensor],
    text_h: Sequence[Tensor],
    h_logit_scale: Tensor | float,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    normalize: bool = True,
) -> Tensor:
    """SwALIP: the similarities of one strong pair are labelled by those of another, balanced by Sinkhorn-Knopp.

    The pair (i, j) of image view i and text view j learns from every pair (k, l) with k != i and l != j: cross-entropy
    between ``softmax(h_logit_scale * S_ij)`` and ``sinkhorn(S_kl)``, S being cosines, image to text and text to image.
    The loss is the mean over all of these and both directions. With K = 2, the usual case, (i, j) has one teacher.

    Args:
        image_h, text_h: K >= 2 tensors (N, D) each, strong views through head h.
        h_logit_scale: inverse temperature of the predictions, after exp; a number or a one-value tensor.
        epsilon, iterations: of ``sinkhorn``, which sees the cosines without the inverse temperature.
        normalize: scale every row to unit length first; False takes rows that are so already.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs), in nats. No gradient flows through the labels.

    Raises:
        ValueError: shapes, dtypes or devices that differ, unequal numbers of views or fewer than 2, no samples, a
            scale of several values, ``epsilon`` or ``iterations`` out of range.

    Source: Fini et al. 2023 (SwALIP).
    """
    require(len(image_h) >= 2, "len(image_h)", len(image_h), "at least 2 strong views")
    require_views("image_h", image_h, "text_h", text_h)
    require_scalar("h_logit_scale", h_logit_scale)
    prepare = _unit if normalize else _precise
    images, texts = [prepare(x) for x in image_h], [prepare(x) for x in text_h]
    pairs = list(itertools.product(range(len(images)), range(len(texts))))
    cosines = {(i, j): _matmul(images[i], texts[j].T) for i, j in pairs}
    image_labels = {pair: sinkhorn(cosines[pair], epsilon=epsilon, iterations=iterations) for pair in pairs}
    text_labels = {pair: sinkhorn(cosines[pair].T, epsilon=epsilon, iterations=iterations) for pair in pairs}
    terms = []
    for (i, j), (k, l) in itertools.product(pairs, pairs):  # noqa: E741 - i, j, k, l as in the docstring
        if k != i and l != j:
            logits_NN = _scaled(h_logit_scale, cosines[i, j])
            terms.append(_soft_cross_entropy(logits_NN, image_labels[k, l]))
            terms.append(_soft_cross_entropy(logits_NN.T, text_labels[k, l]))
    return _mean(terms)


def swalip_prototypes_loss(
    image_p: Sequence[Tensor],
    text_p: Sequence[Tensor],
    logit_scale: Tensor | float,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Tensor:
    """SwALIP with prototypes: each side predicts the other's balanced assignment to P prototypes.

    A pair of an image and a text view costs the mean of both directions of the cross-entropy between
    ``softmax(logit_scale * scores)`` and ``sinkhorn`` of the other side's scores; the loss is the mean over the weak
    pair and the K x K strong ones (the original has the weak pair only, K = 0).

    Args:
        image_p, text_p: scores against P prototypes, used as they are, 1 + K tensors (N, P) each, the weak view first.
        logit_scale: inverse temperature of the predictions, after exp; a number or a one-value tensor.
        epsilon, iterations: of ``sinkhorn``, which sees the scores without the inverse temperature.

    Returns:
        0-dimensional, float32 (float64 for float64 inputs), in nats. No gradient flows through the assignments.

    Raises:
        ValueError: shapes, dtypes or devices that differ, unequal numbers of views, no views or no samples, a scale of
            several values, ``epsilon`` or ``iterations`` out of range.

    Source: SwAV (Caron et al. 2020, eq. 1-2) between modalities; Fini et al. 2023 (SwALIP).
    """
    require_weak("image_p", image_p)
    require_views("image_p", image_p, "text_p", text_p)
    require_scalar("logit_scale", logit_scale)

    def cross_entropy(scores_NP: Tensor, labels_NP: Tensor) -> Tensor:
        return _soft_cross_entropy(_scaled(logit_scale, _precise(scores_NP)), labels_NP)

    image_labels = [sinkhorn(scores_NP, epsilon=epsilon, iterations=iterations) for scores_NP in image_p]
    text_labels = [sinkhorn(scores_NP, epsilon=epsilon, iterations=iterations) for scores_NP in text_p]
    from_image = mean_over_pairs(cross_entropy, image_p, text_labels)
    from_text = mean_over_pairs(cross_entropy, text_p, image_labels)
    return (from_image + from_text) / 2
