"""Heads on the towers' features: z and h of the recipe, and those of its self-supervised companions.

A companion's configuration holds its heads' sizes and its loss's constants; rocket_fast/losses.py reads the latter.
Features come as one tensor (B, width) a view, the weak view first; batch norms see one view at a time. Source of all
sizes and constants: Fini et al. 2023, "Improved baselines for vision-language pre-training".
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rocket_fast.batch import CompanionOutputs, UnpairedOutputs
from rocket_fast.distributed import world_size
from rocket_fast.errors import require
from rocket_fast.kernels.projector import batch_norm_relu, batch_norm_relu_linear


@dataclass(frozen=True, kw_only=True)
class MLPHeadConfig:
    """Head h of its own: Linear-BatchNorm-ReLU twice, then Linear, with its own temperature."""

    hidden: int = 4096
    """Width of both hidden layers."""
    temperature: float = 0.1
    """Temperature of the strong pairs at the start; it is learned."""

    def __post_init__(self) -> None:
        require(self.hidden >= 1, "h_head.hidden", self.hidden, "a number >= 1")
        require_temperature("h_head.temperature", self.temperature)


@dataclass(frozen=True, kw_only=True)
class SharedHeadConfig:
    """Strong views go through head z and share its temperature."""


HHeadConfig = MLPHeadConfig | SharedHeadConfig


@dataclass(frozen=True, kw_only=True)
class SiamLIPConfig:
    """SimSiam between image and text: each side predicts the other's projection."""

    hidden: int = 2048
    """Width of the projectors' hidden layer."""
    out: int = 128
    """Width of the projections and predictions."""
    predictor_hidden: int = 2048
    """Width of the predictors' hidden layer."""
    separate_local: bool = False
    """Give the strong views projectors and predictors of their own (the recipe does for ViTs)."""

    def __post_init__(self) -> None:
        _require_sizes(hidden=self.hidden, out=self.out, predictor_hidden=self.predictor_hidden)


@dataclass(frozen=True, kw_only=True)
class BYOLIPConfig(SiamLIPConfig):
    """SiamLIP whose targets come from a moving average of towers and projectors."""

    momentum: float = 0.99
    """Decay of the moving average per step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum <= 1, "companion.momentum", self.momentum, "a number in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class BarLIPConfig:
    """Barlow Twins between image and text."""

    hidden: int = 3000
    """Width of the projectors' two hidden layers."""
    out: int = 8192
    """Width of the projections."""
    lambda_: float = 5e-3
    """Weight of the correlations off the diagonal."""
    scale: float = 0.025
    """Weight of the whole loss."""
    separate_local: bool = False
    """Give the strong views projectors of their own (the recipe does for ViTs)."""

    def __post_init__(self) -> None:
        _require_sizes(hidden=self.hidden, out=self.out)
        require(self.lambda_ >= 0, "companion.lambda_", self.lambda_, "a number >= 0")
        require(self.scale > 0, "companion.scale", self.scale, "a positive number")


@dataclass(frozen=True, kw_only=True)
class SwALIPConfig:
    """Similarities of one strong pair are labelled by those of another, balanced by Sinkhorn-Knopp; no heads."""

    iterations: int = 3
    """Sinkhorn-Knopp iterations."""
    epsilon: float = 0.05
    """Temperature of the labels."""
    weight: float = 0.2
    """Weight of the loss beside the contrastive one."""

    def __post_init__(self) -> None:
        _require_sinkhorn(self.iterations, self.epsilon, self.weight)


@dataclass(frozen=True, kw_only=True)
class SwALIPPrototypesConfig:
    """SwAV between image and text: each side predicts the other's balanced assignment to prototypes (weak views)."""

    hidden: int = 2048
    """Width of the projectors' hidden layer."""
    out: int = 128
    """Width of the projections and of the prototypes."""
    prototypes: int = 3000
    """Number of prototypes."""
    shared: bool = False
    """Use one set of prototypes for images and texts."""
    temperature: float = 0.1
    """Temperature of the predictions at the start; it is learned."""
    freeze_steps: int = 100
    """Steps at the start in which the prototypes do not move."""
    iterations: int = 3
    """Sinkhorn-Knopp iterations."""
    epsilon: float = 0.05
    """Temperature of the labels."""
    weight: float = 1.0
    """Weight of the loss beside the contrastive one."""

    def __post_init__(self) -> None:
        _require_sizes(hidden=self.hidden, out=self.out, prototypes=self.prototypes)
        require_temperature("companion.temperature", self.temperature)
        require(self.freeze_steps >= 0, "companion.freeze_steps", self.freeze_steps, "a number >= 0")
        _require_sinkhorn(self.iterations, self.epsilon, self.weight)


CompanionConfig = SiamLIPConfig | BYOLIPConfig | BarLIPConfig | SwALIPConfig | SwALIPPrototypesConfig


class LinearHead(nn.Linear):
    """Head z: one matrix, no bias; normal with standard deviation width^-1/2, as CLIP's projections."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, bias=False)

    def reset_parameters(self) -> None:
        """Initialise the matrix."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)


_FUSED = (nn.Linear, nn.BatchNorm1d, nn.SyncBatchNorm, nn.ReLU)  # not what was put in their place, adapters say


class MLPHead(nn.Sequential):
    """Linear layers ``fc1 ... fcN`` of the given widths with batch norm and ReLU between, initialised as torch does.

    ``bias``: whether all layers but the last have a bias; ``last_bias``: whether the last has. ``last_norm``: a batch
    norm at the end, with weight and bias (affine) or without (plain).

    In training the layers work together (kernels/projector.py): same values, gradients and running statistics, half
    the memory. Biases before a batch norm, which cancel there, get gradients that are exactly zero. The layers are not
    called then, so that hooks registered on them fire in evaluation only; those on the head always do.
    """

    synchronized = False
    """Whether batch norms take the statistics of all ranks' samples, on any device. An nn.SyncBatchNorm always does."""

    def __init__(
        self,
        *widths: int,
        bias: bool = True,
        last_bias: bool = True,
        last_norm: Literal["affine", "plain"] | None = None,
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        last = len(widths) - 1
        for number, (width_in, width) in enumerate(pairwise(widths), start=1):
            layers[f"fc{number}"] = nn.Linear(width_in, width, bias=last_bias if number == last else bias)
            if number < last:
                layers[f"bn{number}"] = nn.BatchNorm1d(width)
                layers[f"relu{number}"] = nn.ReLU(inplace=True)
        if last_norm is not None:
            layers[f"bn{last}"] = nn.BatchNorm1d(widths[-1], affine=last_norm == "affine")
        super().__init__(layers)

    def forward(self, features_BD: Tensor) -> Tensor:
        """(B, first width) to (B, last width)."""
        linear, *following = (layer for layer in self if isinstance(layer, nn.Linear))
        norms = [layer for layer in self if isinstance(layer, _BatchNorm)]
        if not self.training or not norms or not all(type(layer) in _FUSED for layer in self):
            return super().forward(features_BD)
        x_BC = F.linear(features_BD, linear.weight)  # the norm takes the bias
        for norm, after in zip(norms, following, strict=False):
            ends = after is following[-1] and len(norms) == len(following)
            vector = after.bias if ends else None
            x_BC = batch_norm_relu_linear(
                x_BC, matrix_MC=after.weight, vector_M=vector, linear_bias=linear.bias, **self._arguments(norm)
            )
            linear = after
        if len(norms) > len(following):
            x_BC = batch_norm_relu(x_BC, linear_bias=linear.bias, relu=False, **self._arguments(norms[-1]))
        return x_BC

    def _arguments(self, norm: _BatchNorm) -> dict[str, Any]:
        """A batch norm's part of a fused call; counts the batch in training, as its own forward does."""
        momentum = norm.momentum
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1 / float(norm.num_batches_tracked)
        group = None
        if norm.training and (self.synchronized or isinstance(norm, nn.SyncBatchNorm)) and world_size() > 1:
            group = getattr(norm, "process_group", None) or dist.group.WORLD
        names = ("weight", "bias", "running_mean", "running_var", "training", "eps")
        return {"momentum": momentum or 0.0, "group": group, **{name: getattr(norm, name) for name in names}}


class ViewHeads(nn.Module):
    """One head for the weak view and one for the strong views: the same one, or two of a kind."""

    def __init__(self, build: Callable[[], nn.Module], *, separate: bool) -> None:
        super().__init__()
        self.weak = build()
        self.strong = build() if separate else self.weak

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each view through its head."""
        weak, *strong = views
        return self.weak(weak), *self.of_strong(strong)

    def of_strong(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Strong views alone."""
        return tuple(self.strong(view) for view in views)


class SiamLIPHeads(nn.Module):
    """Projectors and predictors of SiamLIP and BYOLIP."""

    def __init__(self, config: SiamLIPConfig, image_width: int, text_width: int) -> None:
        super().__init__()

        def projector(width: int) -> ViewHeads:
            build = partial(MLPHead, width, config.hidden, config.out, bias=False, last_bias=False, last_norm="plain")
            return ViewHeads(build, separate=config.separate_local)

        def predictor() -> ViewHeads:
            build = partial(MLPHead, config.out, config.predictor_hidden, config.out, bias=False)
            return ViewHeads(build, separate=config.separate_local)

        self.image_projector, self.text_projector = projector(image_width), projector(text_width)
        self.image_predictor, self.text_predictor = predictor(), predictor()

    def forward(self, image_features: Sequence[Tensor], text_features: Sequence[Tensor]) -> CompanionOutputs:
        """Projections v and predictions p of every view."""
        image_v, text_v = self.image_projector(image_features), self.text_projector(text_features)
        return CompanionOutputs(
            image_v=image_v,
            text_v=text_v,
            image_p=self.image_predictor(image_v),
            text_p=self.text_predictor(text_v),
        )

    def of_unpaired(self, image_features: Sequence[Tensor]) -> UnpairedOutputs:
        """The same of strong views of pictures alone."""
        image_v = self.image_projector.of_strong(image_features)
        return UnpairedOutputs(image_v=image_v, image_p=self.image_predictor.of_strong(image_v))


class BarLIPHeads(nn.Module):
    """Projectors of BarLIP."""

    def __init__(self, config: BarLIPConfig, image_width: int, text_width: int) -> None:
        super().__init__()

        def projector(width: int) -> ViewHeads:
            build = partial(MLPHead, width, config.hidden, config.hidden, config.out, last_norm="affine")
            return ViewHeads(build, separate=config.separate_local)

        self.image_projector, self.text_projector = projector(image_width), projector(text_width)

    def forward(self, image_features: Sequence[Tensor], text_features: Sequence[Tensor]) -> CompanionOutputs:
        """Projections v of every view."""
        return CompanionOutputs(image_v=self.image_projector(image_features), text_v=self.text_projector(text_features))

    def of_unpaired(self, image_features: Sequence[Tensor]) -> UnpairedOutputs:
        """The same of strong views of pictures alone."""
        return UnpairedOutputs(image_v=self.image_projector.of_strong(image_features))


class PrototypeHeads(nn.Module):
    """Projectors, prototypes and temperature of SwALIP's prototype variant."""

    def __init__(self, config: SwALIPPrototypesConfig, image_width: int, text_width: int) -> None:
        super().__init__()
        self.freeze_steps = config.freeze_steps
        self.image_projector = MLPHead(image_width, config.hidden, config.out)
        self.text_projector = MLPHead(text_width, config.hidden, config.out)
        self.image_prototypes = Prototypes(config.out, config.prototypes)
        self.text_prototypes = self.image_prototypes if config.shared else Prototypes(config.out, config.prototypes)
        self.logit_scale = log_scale(config.temperature)

    def forward(self, image_features: Sequence[Tensor], text_features: Sequence[Tensor]) -> CompanionOutputs:
        """Projections v (not normalised) and scores p of the weak view; strong views are left alone."""
        image_v, text_v = self.image_projector(image_features[0]), self.text_projector(text_features[0])
        return CompanionOutputs(
            image_v=(image_v,),
            text_v=(text_v,),
            image_p=(self.image_prototypes(image_v),),
            text_p=(self.text_prototypes(text_v),),
            logit_scale=self.logit_scale.exp(),
        )

    def of_unpaired(self, image_features: Sequence[Tensor]) -> UnpairedOutputs:
        """The same of strong views of pictures alone."""
        image_v = tuple(self.image_projector(view) for view in image_features)
        return UnpairedOutputs(image_v=image_v, image_p=tuple(self.image_prototypes(v) for v in image_v))

    def freeze_gradients(self, step: int) -> None:
        """Take away the prototypes' gradients, weight decay with them, in the first ``freeze_steps`` steps."""
        if step < self.freeze_steps:
            self.image_prototypes.direction.grad = None
            self.text_prototypes.direction.grad = None


class Prototypes(nn.Module):
    """Cosines between vectors and prototypes; only a prototype's direction matters.

    ``gain``, (P, 1), is 1 and not trained; it exists because published weights carry it (as weight norm's ``g``).
    """

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(prototypes, width))
        self.gain = nn.Parameter(torch.ones(prototypes, 1), requires_grad=False)
        nn.init.uniform_(self.direction, -(width**-0.5), width**-0.5)

    def forward(self, v_BD: Tensor) -> Tensor:
        """(B, D) to scores (B, P)."""
        return F.linear(F.normalize(v_BD, dim=1), self.gain * F.normalize(self.direction, dim=1))


CompanionHeads = SiamLIPHeads | BarLIPHeads | PrototypeHeads


def build_companion(config: CompanionConfig | None, image_width: int, text_width: int) -> CompanionHeads | None:
    """The heads that a companion needs on features of the given widths; None where it needs none (SwALIP)."""
    if isinstance(config, SiamLIPConfig):
        return SiamLIPHeads(config, image_width, text_width)
    if isinstance(config, BarLIPConfig):
        return BarLIPHeads(config, image_width, text_width)
    if isinstance(config, SwALIPPrototypesConfig):
        return PrototypeHeads(config, image_width, text_width)
    known = config is None or isinstance(config, SwALIPConfig)
    require(known, "companion", config, "None or one of the configurations of rocket_fast.models.heads")
    return None


def log_scale(temperature: float) -> nn.Parameter:
    """A learned logit scale, held as the logarithm of 1 / temperature."""
    return nn.Parameter(torch.tensor(-math.log(temperature)))


def require_temperature(argument: str, temperature: float) -> None:
    """Temperatures lie where the clamp of the logit scales keeps them."""
    require(0.01 <= temperature <= 1, argument, temperature, "a number in [0.01, 1]")


def _require_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        require(size >= 1, f"companion.{name}", size, "a number >= 1")


def _require_sinkhorn(iterations: int, epsilon: float, weight: float) -> None:
    require(iterations >= 1, "companion.iterations", iterations, "a number >= 1")
    require(epsilon > 0, "companion.epsilon", epsilon, "a positive number")
    require(weight >= 0, "companion.weight", weight, "a number >= 0")
