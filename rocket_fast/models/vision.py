"""Vision towers: normalised pictures (B, 3, H, W) to features (B, width).

A tower with batch norm sees one view at a time, so that each view has its own statistics, as in the original recipe.
Shapes: B pictures, C channels, H x W pixels or positions, L tokens, D tower width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rocket_fast.errors import InvalidArgument, optional_import, require
from rocket_fast.models.attention import Checkpointing, TransformerBlock, require_checkpointing, run_block
from rocket_fast.models.text import ACTIVATIONS, Activation, require_activation


def _require_heads(width: int, heads: int) -> None:
    require(heads >= 1, "vision.heads", heads, "a number >= 1")
    require(width >= 1 and width % heads == 0, "vision.width", width, f"a positive multiple of heads = {heads}")


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer with class token and pre-norm (Dosovitskiy et al. 2021); the default is ViT-B/16.

    Published weights need the options from ``activation`` to ``norm_eps``: OpenAI's have QuickGELU, a norm before the
    blocks, no bias in the patch layer, and eps 1e-5.
    """

    image_size: int = 224
    """Side of the square pictures, in pixels."""
    patch_size: int = 16
    """Side of the square patches, in pixels."""
    width: int = 768
    """Width of the tokens and of the features."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads of each block."""
    activation: Activation = "gelu"
    """What stands between the two layers of each MLP."""
    norm_pre: bool = False
    """A layer norm between the positions and the first block."""
    patch_bias: bool = True
    """A bias in the layer that makes tokens of patches."""
    norm_eps: float = 1e-6
    """What the layer norms add to the variance."""
    mlp_ratio: float = 4.0
    """Width of a block's hidden layer as a multiple of the width."""
    checkpointing: Checkpointing = "none"
    """What the backward pass computes again instead of keeping."""
    any_size: bool = False
    """Take pictures of any size in whole patches, with positions interpolated from those of image_size."""
    patch_keep: float = 1.0
    """In training, the part of a picture's patches that are looked at, drawn anew each time (Li et al. 2023, FLIP)."""

    def __post_init__(self) -> None:
        require(self.patch_size >= 1, "vision.patch_size", self.patch_size, "a number >= 1")
        fits = self.image_size >= 1 and self.image_size % self.patch_size == 0
        require(fits, "vision.image_size", self.image_size, f"a positive multiple of patch_size = {self.patch_size}")
        require(self.layers >= 1, "vision.layers", self.layers, "a number >= 1")
        _require_heads(self.width, self.heads)
        require_activation("vision.activation", self.activation)
        require(self.norm_eps > 0, "vision.norm_eps", self.norm_eps, "a positive number")
        require(self.mlp_ratio > 0, "vision.mlp_ratio", self.mlp_ratio, "a positive number")
        require(0 < self.patch_keep <= 1, "vision.patch_keep", self.patch_keep, "a number in (0, 1]")
        require_checkpointing("vision.checkpointing", self.checkpointing)


@dataclass(frozen=True, kw_only=True)
class ConvStemViTConfig:
    """For small pictures: a residual CNN, then transformer blocks on its positions (perhaps none), then their mean."""

    image_size: int = 32
    """Side of the square pictures, in pixels."""
    stem_widths: tuple[int, ...] = (64, 128, 256)
    """Channels of each stage of the CNN; every stage begins with a convolution that halves the resolution."""
    stem_blocks: tuple[int, ...] = (1, 1, 1)
    """Residual blocks in each stage, after that convolution."""
    width: int = 256
    """Width of the tokens and of the features."""
    layers: int = 0
    """Transformer blocks after the CNN."""
    heads: int = 4
    """Attention heads of each transformer block."""
    mlp_ratio: float = 4.0
    """Width of a block's hidden layer as a multiple of the width."""

    def __post_init__(self) -> None:
        widths_fit = len(self.stem_widths) >= 1 and all(width >= 1 for width in self.stem_widths)
        require(widths_fit, "vision.stem_widths", self.stem_widths, "one or more numbers >= 1")
        stride = 2 ** len(self.stem_widths)
        fits = self.image_size >= 1 and self.image_size % stride == 0
        require(fits, "vision.image_size", self.image_size, f"a positive multiple of the stem's stride, {stride}")
        blocks_fit = len(self.stem_blocks) == len(self.stem_widths) and all(blocks >= 0 for blocks in self.stem_blocks)
        expected = f"one number >= 0 for each of the {len(self.stem_widths)} stages"
        require(blocks_fit, "vision.stem_blocks", self.stem_blocks, expected)
        require(self.layers >= 0, "vision.layers", self.layers, "a number >= 0")
        _require_heads(self.width, self.heads)
        require(self.mlp_ratio > 0, "vision.mlp_ratio", self.mlp_ratio, "a positive number")


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """A convolutional network of the timm package, from scratch, with timm's initialisation and its pooled features."""

    name: Literal["resnet50", "convnext_tiny"]
    """Name of the architecture in timm."""

    def __post_init__(self) -> None:
        known = ("resnet50", "convnext_tiny")
        require(self.name in known, "vision.name", self.name, f"one of {known}")


VisionConfig = ViTConfig | ConvStemViTConfig | TimmConfig

VIT_S16 = ViTConfig(width=384, heads=12)
"""ViT-S/16 with the 12 heads of MoCo-v3's and the recipe's (timm's and DeiT's has 6)."""

VIT_B16 = ViTConfig()
VIT_B32 = ViTConfig(patch_size=32)
VIT_L16 = ViTConfig(width=1024, layers=24, heads=16)


class VisionTower(nn.Module):
    """Normalised pictures, floating point (B, 3, H, W), to features (B, ``width``)."""

    width: int

    @property
    def per_view(self) -> bool:
        """Whether pictures of a batch know of each other, through batch norm: then views must not be mixed."""
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules())


def build_vision(config: VisionConfig) -> VisionTower:
    """The tower that a configuration describes, freshly initialised."""
    if isinstance(config, ViTConfig):
        return ViT(config)
    if isinstance(config, ConvStemViTConfig):
        return ConvStemViT(config)
    require(isinstance(config, TimmConfig), "vision", config, "one of the configurations of rocket_fast.models.vision")
    return TimmTower(config)


class ViT(VisionTower):
    """Vision transformer; the features are the class token's, normalised.

    Initialised as timm's: weights and positions from a normal (std .02, cut at 2), class token from one of std 1e-6,
    biases 0, the patch convolution as ``nn.Conv2d``'s.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.width
        patches = (config.image_size // config.patch_size) ** 2
        size, activation = config.patch_size, ACTIVATIONS[config.activation]
        self.patch_embed = nn.Conv2d(3, config.width, size, stride=size, bias=config.patch_bias)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, config.width))
        self.norm_pre = nn.LayerNorm(config.width, eps=config.norm_eps) if config.norm_pre else nn.Identity()
        self.blocks = _transformer(
            config.width, config.layers, config.heads, config.mlp_ratio, norm_eps=config.norm_eps, activation=activation
        )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Features (B, D). Raises ``ValueError`` for a size of pictures that the configuration does not admit."""
        if not self.config.any_size:
            _require_size(image_BCHW, self.config.image_size)
        patch_BLD = self.patch_embed(image_BCHW).flatten(2).transpose(1, 2)
        class_position, position_1LD = self.pos_embed[:, :1], self._positions(*image_BCHW.shape[2:])
        patch_BLD = self._drop_patches(patch_BLD + position_1LD)
        class_BLD = (self.cls_token + class_position).expand(patch_BLD.shape[0], -1, -1)
        x_BLD = self.norm_pre(torch.cat([class_BLD, patch_BLD], dim=1))
        for block in self.blocks:
            x_BLD = run_block(block, x_BLD, checkpointing=self.config.checkpointing)
        return self.norm(x_BLD[:, 0])

    def _positions(self, height: int, width: int) -> Tensor:
        """The patches' positions (1, L, D); for pictures of other sizes interpolated as timm does (bicubic, smooth)."""
        patch_size, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        position_1LD = self.pos_embed[:, 1:]
        if height == width == self.config.image_size:
            return position_1LD
        if height % patch_size or width % patch_size:
            raise InvalidArgument(
                f"image: got {height} x {width} pixels, expected multiples of patch_size = {patch_size}"
            )
        grid_1DHW = position_1LD.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
        grid = (height // patch_size, width // patch_size)
        grid_1DHW = F.interpolate(grid_1DHW, grid, mode="bicubic", antialias=True, align_corners=False)
        return grid_1DHW.flatten(2).transpose(1, 2).to(position_1LD.dtype)

    def _drop_patches(self, patch_BLD: Tensor) -> Tensor:
        """Some of the patches, other ones for every picture; all of them outside training."""
        if self.config.patch_keep == 1 or not self.training:
            return patch_BLD
        batch, count = patch_BLD.shape[0], int(patch_BLD.shape[1])
        keep = max(1, round(self.config.patch_keep * count))
        kept_Bk = torch.rand(batch, count, device=patch_BLD.device).argsort(dim=1)[:, :keep]
        first_B1 = count * torch.arange(batch, device=patch_BLD.device)[:, None]
        rows = patch_BLD.flatten(0, 1).index_select(0, (kept_Bk + first_B1).flatten())
        return rows.view(batch, keep, -1)


class ConvStemViT(VisionTower):
    """Residual CNN, transformer blocks, mean over positions, layer norm.

    Initialised: convolutions as He et al. 2015 (normal, fan out), each residual branch's last norm with weight 0, so
    that the CNN starts as a plain chain of its shortcuts; the transformer as ``ViT``'s.
    """

    def __init__(self, config: ConvStemViTConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.width
        side = config.image_size // 2 ** len(config.stem_widths)
        self.stem = _residual_stem(config.stem_widths, config.stem_blocks)
        stem_width = config.stem_widths[-1]
        self.to_tokens = nn.Identity() if stem_width == config.width else nn.Conv2d(stem_width, config.width, 1)
        self.pos_embed = nn.Parameter(torch.empty(1, side * side, config.width)) if config.layers else None
        self.blocks = _transformer(config.width, config.layers, config.heads, config.mlp_ratio)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.to(memory_format=torch.channels_last)  # what CPUs' and GPUs' fast convolutions work on

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Features (B, D). Raises ``ValueError`` where the pictures have another size than the configuration's."""
        _require_size(image_BCHW, self.config.image_size)
        image_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
        x_BLD = self.to_tokens(self.stem(image_BCHW)).flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            x_BLD = x_BLD + self.pos_embed
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.norm(x_BLD.mean(dim=1))


class TimmTower(VisionTower):
    """A timm network without its classifier, ``trunk``."""

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        self.trunk = optional_import("timm", "train").create_model(config.name, pretrained=False, num_classes=0)
        self.width = self.trunk.num_features
        self.to(memory_format=torch.channels_last)  # what CPUs' and GPUs' fast convolutions work on

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Features (B, D), averaged over positions; any picture size."""
        return self.trunk(image_BCHW.contiguous(memory_format=torch.channels_last))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norms beside an identity shortcut (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels)
        self.norm2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        branch_BCHW = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x_BCHW)))))
        return F.relu(x_BCHW + branch_BCHW)


def _residual_stem(widths: tuple[int, ...], blocks: tuple[int, ...]) -> nn.Sequential:
    """A stage a width: a convolution that halves the resolution, batch norm, ReLU, then residual blocks."""
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    for number, ((width_in, width), count) in enumerate(zip(pairwise((3, *widths)), blocks, strict=True)):
        down = [_conv(width_in, width, stride=2), nn.BatchNorm2d(width), nn.ReLU()]
        stages[f"stage{number}"] = nn.Sequential(*down, *(ResidualBlock(width) for _ in range(count)))
    return nn.Sequential(stages)


def _conv(channels_in: int, channels: int, *, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _transformer(
    width: int,
    layers: int,
    heads: int,
    mlp_ratio: float,
    *,
    norm_eps: float = 1e-6,
    activation: Callable[[Tensor], Tensor] = F.gelu,
) -> nn.ModuleList:
    mlp_width = round(width * mlp_ratio)
    blocks = nn.ModuleList(
        TransformerBlock(width, heads, mlp_width, norm_eps=norm_eps, activation=activation, causal=False)
        for _ in range(layers)
    )
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return blocks


def _require_size(image_BCHW: Tensor, size: int) -> None:
    got = tuple(image_BCHW.shape)
    if got[1:] != (3, size, size):  # formatting only now keeps the compiled tower general in the batch size
        raise InvalidArgument(f"image: got shape {got}, expected shape (B, 3, {size}, {size})")
