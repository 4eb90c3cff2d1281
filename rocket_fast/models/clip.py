"""The dual encoder: two towers, heads z and h, and a companion's heads.

``forward`` takes every sample's views, the weak one first; ``encode_image`` and ``encode_text`` take one view, to
evaluate. Nothing here normalises an embedding: the losses and the evaluation do.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rocket_fast.batch import Embeddings, PackedText, UnpairedOutputs
from rocket_fast.errors import require
from rocket_fast.models.heads import (
    BYOLIPConfig,
    CompanionConfig,
    HHeadConfig,
    LinearHead,
    MLPHead,
    MLPHeadConfig,
    PrototypeHeads,
    SharedHeadConfig,
    SiamLIPHeads,
    SwALIPConfig,
    build_companion,
    log_scale,
    require_temperature,
)
from rocket_fast.models.text import TextConfig, TextTower
from rocket_fast.models.vision import VisionConfig, VisionTower, build_vision

MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """A dual encoder. CL2L has a head h for its strong views, plain CLIP has none and takes weak views only."""

    vision: VisionConfig
    """The image tower."""
    text: TextConfig
    """The text tower."""
    embed_dim: int = 256
    """Width of the embeddings that images and texts share."""
    temperature: float = 0.07
    """Temperature of the weak pair at the start; it is learned."""
    h_head: HHeadConfig | None = field(default_factory=MLPHeadConfig)
    """Where strong views go: an MLP of their own, head z (shared), or None: there are no strong views."""
    companion: CompanionConfig | None = None
    """A self-supervised companion beside the contrastive loss."""

    def __post_init__(self) -> None:
        require(self.embed_dim >= 1, "model.embed_dim", self.embed_dim, "a number >= 1")
        require_temperature("model.temperature", self.temperature)
        possible = self.h_head is not None or not isinstance(self.companion, SwALIPConfig)
        require(possible, "model.h_head", self.h_head, "a head for the strong views, which SwALIP works on")


class DualEncoder(nn.Module):
    """Two towers and their heads, freshly initialised as ``config`` says.

    ``visual`` and ``text`` are the towers; ``image_z``, ``text_z``, ``image_h``, ``text_h`` the heads (with a shared
    head, h's are z's); ``logit_scale``, ``h_logit_scale`` logarithms of the scales; ``companion`` the companion's
    heads; ``momentum`` BYOLIP's averaged encoder. What a model lacks is None.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.visual: VisionTower = build_vision(config.vision)
        self.text = TextTower(config.text)
        image_width, text_width = self.visual.width, self.text.width

        self.image_z = LinearHead(image_width, config.embed_dim)
        self.text_z = LinearHead(text_width, config.embed_dim)
        self.image_h, self.text_h = self._strong_heads(image_width, text_width)
        self.logit_scale = log_scale(config.temperature)
        self.h_logit_scale = log_scale(config.h_head.temperature) if isinstance(config.h_head, MLPHeadConfig) else None

        self.companion = build_companion(config.companion, image_width, text_width)
        self.momentum = None
        if isinstance(config.companion, BYOLIPConfig):
            assert isinstance(self.companion, SiamLIPHeads)
            self.momentum = MomentumEncoder(self.visual, self.text, self.companion, decay=config.companion.momentum)

    def forward(
        self, images: tuple[Tensor, ...], texts: tuple[PackedText, ...], unpaired: tuple[Tensor, ...] = ()
    ) -> Embeddings:
        """Embed 1 + K views of B samples, weak ones first: normalised pictures (B, 3, H, W) and captions of each view.

        ``unpaired``: K strong views of other pictures, (U, 3, H, W) each, for the companion. Batch norms take each
        view's own statistics, so that nothing else depends on them.

        Raises ``ValueError`` where the numbers of views differ, or there are strong views and no head for them, or
        unpaired ones and no companion.
        """
        self._require_views(len(images), len(texts), len(unpaired))
        every_feature = encode_pictures(self.visual, (*images, *unpaired))
        image_features, unpaired_features = every_feature[: len(images)], every_feature[len(images) :]
        text_features = encode_captions(self.text, texts)
        image_h, text_h, h_logit_scale = self._strong_embeddings(image_features[1:], text_features[1:])
        companion = None if self.companion is None else self.companion(image_features, text_features)
        alone = self.of_unpaired(unpaired_features) if unpaired else None
        if self.momentum is not None:
            assert companion is not None
            image_v, text_v, unpaired_v = self.momentum(images, texts, unpaired)
            companion = dataclasses.replace(companion, image_v=image_v, text_v=text_v)
            alone = None if alone is None else dataclasses.replace(alone, image_v=unpaired_v)
        return Embeddings(
            image_z=self.image_z(image_features[0]),
            text_z=self.text_z(text_features[0]),
            logit_scale=self.logit_scale.exp(),
            image_h=image_h,
            text_h=text_h,
            h_logit_scale=h_logit_scale,
            companion=companion,
            unpaired=alone,
        )

    def of_unpaired(self, features: Sequence[Tensor]) -> UnpairedOutputs:
        """What the companion compares of unpaired pictures' features (U, width), of their strong views."""
        if self.companion is not None:
            return self.companion.of_unpaired(features)
        assert self.image_h is not None, "SwALIP has a head h"
        return UnpairedOutputs(image_v=tuple(self.image_h(view) for view in features))

    def encode_image(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, D) of normalised pictures through head z and through head h, None where h is z or absent."""
        features = self.visual(image_BCHW)
        return self.image_z(features), self.image_h(features) if isinstance(self.image_h, MLPHead) else None

    def encode_text(self, text: PackedText) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, D) of captions through head z and through head h, None where h is z or absent."""
        features = self.text(text)
        return self.text_z(features), self.text_h(features) if isinstance(self.text_h, MLPHead) else None

    @torch.no_grad()
    def clamp_logit_scales_(self) -> None:
        """Keep every scale between 1 and 100: its logarithm in [0, 4.6052]. To be called after each step."""
        own = self.companion.logit_scale if isinstance(self.companion, PrototypeHeads) else None
        for scale in (self.logit_scale, self.h_logit_scale, own):
            if scale is not None:
                scale.clamp_(0, MAX_LOG_SCALE)

    def update_momentum_(self) -> None:
        """Move BYOLIP's averaged encoder towards this one. To be called after each step; else nothing to do."""
        if self.momentum is not None:
            assert isinstance(self.companion, SiamLIPHeads)
            self.momentum.update_(self.visual, self.text, self.companion)

    def freeze_gradients(self, step: int) -> None:
        """Drop gradients that must not act in ``step`` (0-based): those of SwALIP's prototypes at the start."""
        if isinstance(self.companion, PrototypeHeads):
            self.companion.freeze_gradients(step)

    def _strong_heads(self, image_width: int, text_width: int) -> tuple[nn.Module | None, nn.Module | None]:
        config, out = self.config.h_head, self.config.embed_dim
        if isinstance(config, MLPHeadConfig):
            hidden = config.hidden
            return MLPHead(image_width, hidden, hidden, out), MLPHead(text_width, hidden, hidden, out)
        if isinstance(config, SharedHeadConfig):
            return self.image_z, self.text_z
        return None, None

    def _require_views(self, images: int, texts: int, unpaired: int) -> None:
        require(images >= 1, "images", f"{images} views", "at least the weak view")
        require(texts == images, "texts", f"{texts} views", f"as many as images, {images}")
        if self.image_h is None:
            require(images == 1, "images", f"{images} views", "the weak view alone: model.h_head is None")
        if self.config.companion is None:
            require(unpaired == 0, "unpaired", f"{unpaired} views", "none: model.companion is None")
        else:
            fits = unpaired == 0 or unpaired >= 2
            require(fits, "unpaired", f"{unpaired} views", "two strong views or more, to be compared")

    def _strong_embeddings(
        self, image_features: Sequence[Tensor], text_features: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        if self.image_h is None or self.text_h is None:
            return (), (), None
        scale = self.logit_scale if self.h_logit_scale is None else self.h_logit_scale
        image_h = tuple(self.image_h(features) for features in image_features)
        return image_h, tuple(self.text_h(features) for features in text_features), scale.exp()


def encode_pictures(tower: VisionTower, images: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Features of each view; views of one size in one pass, unless batch norm takes each view's own statistics."""
    if tower.per_view:
        return tuple(tower(image) for image in images)
    features: dict[int, Tensor] = {}
    sizes = [image.shape[1:] for image in images]
    for size in dict.fromkeys(sizes):
        views = [view for view, other in enumerate(sizes) if other == size]
        together = torch.cat([images[view] for view in views]) if len(views) > 1 else images[views[0]]
        features |= zip(views, tower(together).split([len(images[view]) for view in views]), strict=True)
    return tuple(features[view] for view in range(len(images)))


def encode_captions(tower: TextTower, texts: Sequence[PackedText]) -> tuple[Tensor, ...]:
    """Features of each view's captions, the weak view first; all views' tokens in one pass."""
    features = tower(PackedText.cat(texts), dropout_from=texts[0].tokens.shape[0])
    return features.split([len(text) for text in texts])


class MomentumEncoder(nn.Module):
    """BYOLIP's target: copies of the towers and projectors whose parameters are moving averages of the trained ones.

    Buffers are not averaged: the copies' batch norms see the same views and keep running statistics of their own.
    """

    def __init__(self, visual: VisionTower, text: TextTower, heads: SiamLIPHeads, *, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.visual, self.text = copy.deepcopy(visual), copy.deepcopy(text)
        self.image_projector = copy.deepcopy(heads.image_projector)
        self.text_projector = copy.deepcopy(heads.text_projector)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(
        self, images: tuple[Tensor, ...], texts: tuple[PackedText, ...], unpaired: tuple[Tensor, ...] = ()
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Projections of every view of images, texts and unpaired pictures, (B or U, P) each, no gradient.

        Strong texts have dropout as in the trained tower.
        """
        features = encode_pictures(self.visual, (*images, *unpaired))
        text_features = encode_captions(self.text, texts)
        image_v = self.image_projector(features[: len(images)])
        return image_v, self.text_projector(text_features), self.image_projector.of_strong(features[len(images) :])

    @torch.no_grad()
    def update_(self, visual: VisionTower, text: TextTower, heads: SiamLIPHeads) -> None:
        """``average = decay * average + (1 - decay) * trained``, for every parameter."""
        pairs = (
            (self.visual, visual),
            (self.text, text),
            (self.image_projector, heads.image_projector),
            (self.text_projector, heads.text_projector),
        )
        averages: list[Tensor] = [p for average, _ in pairs for p in average.parameters()]
        trained: list[Tensor] = [p for _, module in pairs for p in module.parameters()]
        torch._foreach_lerp_(averages, trained, 1 - self.decay)
