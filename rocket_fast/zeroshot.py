"""Zero-shot classification with one or both heads, and the pixel baseline it has to beat.

Score of a picture and a class: ``w cos(z) + (1 - w) cos(h)`` over the two heads (paper section 4). A class is the
normalised mean of its normalised template embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rocket_fast.batch import PackedText
from rocket_fast.errors import require
from rocket_fast.image_augment import normalize
from rocket_fast.models.clip import DualEncoder
from rocket_fast.tokenizer import Tokenizer

Z_WEIGHTS = tuple(round(0.1 * i, 1) for i in range(11))
"""The ensemble's weights w of head z: 0 is h alone, 1 is z alone."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Unit vectors of N pictures or texts through head z and, where the model has one, head h: (N, D) fp32, on CPU."""

    z: Tensor
    h: Tensor | None

    def __len__(self) -> int:
        return self.z.shape[0]

    def take(self, rows: Tensor) -> Encoded:
        """The rows at the given indices."""
        return Encoded(z=self.z[rows], h=None if self.h is None else self.h[rows])

    @staticmethod
    def of(z: Tensor, h: Tensor | None) -> Encoded:
        """Normalise raw head outputs."""
        unit = [None if x is None else F.normalize(x.float(), dim=1).cpu() for x in (z, h)]
        assert unit[0] is not None
        return Encoded(z=unit[0], h=unit[1])

    @staticmethod
    def cat(parts: Sequence[Encoded]) -> Encoded:
        """All parts' rows, in order."""
        h = [part.h for part in parts if part.h is not None]
        return Encoded(z=torch.cat([part.z for part in parts]), h=torch.cat(h) if h else None)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 and top-5 accuracy in percent, for each weight w of head z (w = 1 alone where there is no head h)."""

    top1: dict[float, float]
    top5: dict[float, float]
    classes: int
    pictures: int


@torch.no_grad()
def encode_images(model: DualEncoder, images_BCHW: Tensor, autocast: torch.autocast) -> Encoded:
    """Encode uint8 pictures (B, 3, H, W) with the model in its present mode, on its device."""
    device = next(model.parameters()).device
    with autocast:
        z, h = model.encode_image(normalize(images_BCHW.to(device)))
    return Encoded.of(z, h)


@torch.no_grad()
def encode_texts(
    model: DualEncoder, tokenizer: Tokenizer, texts: Sequence[str], autocast: torch.autocast, batch_size: int = 512
) -> Encoded:
    """Encode captions."""
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(texts), batch_size):
        packed: PackedText = tokenizer.pack(texts[start : start + batch_size])
        with autocast:
            z, h = model.encode_text(packed.to(device))
        parts.append(Encoded.of(z, h))
    return Encoded.cat(parts)


def encode_classes(
    model: DualEncoder,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[str],
    autocast: torch.autocast,
) -> Encoded:
    """One unit vector per class and head: normalise per template, average over templates, normalise."""
    require(len(names) > 0, "names", names, "at least one class name")
    parts = [encode_texts(model, tokenizer, [t.replace("{}", n) for n in names], autocast) for t in templates]
    h_parts = [part.h for part in parts if part.h is not None]
    z_CD = torch.stack([part.z for part in parts]).mean(0)
    return Encoded.of(z_CD, torch.stack(h_parts).mean(0) if h_parts else None)


def similarity(pictures: Encoded, classes: Encoded, z_weight: float) -> Tensor:
    """Scores (N, C): ``w cos(z) + (1 - w) cos(h)``; plain ``cos(z)`` where there is no head h."""
    scores_NC = pictures.z @ classes.z.T
    if pictures.h is None or classes.h is None:
        return scores_NC
    return z_weight * scores_NC + (1 - z_weight) * (pictures.h @ classes.h.T)


def classify(pictures: Encoded, classes: Encoded, labels: Tensor) -> Accuracy:
    """Accuracy of N pictures whose true classes are ``labels`` (N,), for every ensemble weight."""
    weights = Z_WEIGHTS if pictures.h is not None else (1.0,)
    top1, top5 = {}, {}
    for weight in weights:
        best_N5 = similarity(pictures, classes, weight).topk(min(5, len(classes)), dim=1).indices
        hits_N5 = best_N5 == labels[:, None]
        top1[weight] = 100 * hits_N5[:, 0].float().mean().item()
        top5[weight] = 100 * hits_N5.any(1).float().mean().item()
    return Accuracy(top1=top1, top5=top5, classes=len(classes), pictures=len(pictures))


def pixel_neighbour(
    queries: Iterable[Tensor],
    query_labels: Sequence[str],
    gallery: Iterable[Tensor],
    gallery_labels: Sequence[str],
    *,
    same_set: bool = False,
) -> float:
    """Top-1 accuracy in percent of the nearest neighbour on pixels (Euclidean distance).

    ``queries``, ``gallery``: batches of uint8 pictures (B, 3, 16, 16). With ``same_set`` both are the same pictures
    and none is its own neighbour.
    """
    query_NP = torch.cat([images.flatten(1).float() for images in queries])
    gallery_MP = torch.cat([images.flatten(1).float() for images in gallery])
    hits = 0
    for start in range(0, len(query_NP), 1024):
        distance_BM = torch.cdist(query_NP[start : start + 1024], gallery_MP)
        if same_set:
            distance_BM.diagonal(start).fill_(torch.inf)
        nearest = distance_BM.argmin(dim=1).tolist()
        hits += sum(query_labels[start + i] == gallery_labels[j] for i, j in enumerate(nearest))
    return 100 * hits / len(query_NP)
