"""What a training step keeps and moves beside its matrix products, in numbers a sample, from formulas and from counts.

Transformer blocks by formula, since what is kept of them depends on the checkpointing; all else is counted on the model
itself, run without memory on the meta device. Two kinds of numbers are told apart: those of the residual stream stay
float32 under autocast, all others take the precision computed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rocket_fast.config import TrainConfig
from rocket_fast.models.attention import Checkpointing
from rocket_fast.models.clip import DualEncoder
from rocket_fast.models.heads import MLPHead
from rocket_fast.models.vision import ViTConfig
from rocket_fast.plan import Heads, UnpairedHeads, unpaired_share, without_checkpointing


@dataclass(frozen=True)
class Numbers:
    """Of the residual stream, always float32; and in the precision computed in."""

    residual: float = 0.0
    computed: float = 0.0

    def __add__(self, other: Numbers) -> Numbers:
        return Numbers(self.residual + other.residual, self.computed + other.computed)

    def __sub__(self, other: Numbers) -> Numbers:
        return Numbers(self.residual - other.residual, self.computed - other.computed)

    def __mul__(self, count: float) -> Numbers:
        return Numbers(self.residual * count, self.computed * count)

    def bytes(self, itemsize: int) -> float:
        """With computed numbers of ``itemsize`` bytes."""
        return 4 * self.residual + itemsize * self.computed


@dataclass(frozen=True, kw_only=True)
class Style:
    """How elementwise work is done: ``fused`` (compiled) or operation by operation; ``fused_attention``: no attention
    weight is ever written to memory; ``itemsize``: bytes of a computed number, 2 under autocast.
    """

    fused: bool = True
    fused_attention: bool = True
    itemsize: int = 2

    @property
    def narrow(self) -> bool:
        """Whether numbers are cast on their way out of the residual stream."""
        return self.itemsize < 4


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The transformer blocks of a tower, and what one sample sends through them in all its views.

    ``tokens``: of all views. ``weights``: attention weights of one block, heads x the views' squared lengths, masked
    ones included. ``quick_gelu``: QuickGELU, which takes three operations where GELU takes one.
    """

    layers: int
    width: int
    mlp_width: int
    tokens: float
    weights: float
    quick_gelu: bool

    def kept(self, policy: Checkpointing, style: Style) -> Numbers:
        """Of one block, from its forward to its backward pass; W of its input is what the norm (or a replay) needs."""
        width, mlp = self.width, self.mlp_width
        unfused = 0 if style.fused_attention else self.weights
        if policy == "blocks":
            return Numbers(width, 0) * self.tokens
        if policy == "cheap":  # results of products and attention: q k v, attention, its projection, both of the MLP
            return Numbers(width, 6 * width + mlp) * self.tokens + Numbers(0, unfused)
        copies = 0 if style.fused_attention else 3 * width  # q, k and v, each by itself
        # Both norms' inputs; the norms' results, q k v, attention; the MLP's hidden layer before and after.
        return Numbers(2 * width, 6 * width + 2 * mlp + copies) * self.tokens + Numbers(0, unfused)

    def working(self, policy: Checkpointing, style: Style) -> Numbers:
        """What the backward pass of one block has beside: gradients of the hidden layer, and what it makes anew."""
        gradients = Numbers(2 * self.width, 2 * self.mlp_width) * self.tokens
        return gradients + self.kept("none", style) - self.kept(policy, style)

    def moved(self, policy: Checkpointing, style: Style, *, replays: int = 0) -> Numbers:
        """Of one block, to and from memory: forward, backward, what is computed again, and whole passes forward."""
        forward, attention = self._forward(style)
        again = {"none": Numbers(), "cheap": forward, "blocks": forward + attention}[policy]
        return (forward + attention) * (1 + replays) + self._backward(style) + again

    def _forward(self, style: Style) -> tuple[Numbers, Numbers]:
        """Without attention, and attention alone."""
        width, mlp = self.width, self.mlp_width
        if style.fused:  # a kernel from each product to the next: residual in and out, norm out; product in; activation
            rest = Numbers(4 * width, 4 * width + 2 * mlp)
        else:
            casts = Numbers(2 * width, 2 * width) if style.narrow else Numbers()
            rest = Numbers(8 * width, 2 * width + (6 if self.quick_gelu else 2) * mlp) + casts
        if style.fused_attention:
            return rest * self.tokens, Numbers(0, 4 * width) * self.tokens
        return rest * self.tokens, Numbers(0, 11 * width) * self.tokens + Numbers(0, 6 * self.weights)

    def _backward(self, style: Style) -> Numbers:
        width, mlp = self.width, self.mlp_width
        biases = 5 * width + mlp  # their gradients are sums over all tokens
        if style.fused:
            rest = Numbers(6 * width, 4 * width + 3 * mlp + biases)
        else:
            casts = Numbers(4 * width, 4 * width) if style.narrow else Numbers()
            rest = Numbers(10 * width, 2 * width + (7 if self.quick_gelu else 3) * mlp + biases) + casts
        if style.fused_attention:
            return (rest + Numbers(0, 9 * width)) * self.tokens
        return (rest + Numbers(0, 15 * width)) * self.tokens + Numbers(0, 7 * self.weights)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tower, or all heads: of one sample in all its views.

    ``kept``, ``moved`` (forward and backward): outside of transformer blocks. ``working``: two gradients of the largest
    result of a layer there. ``batch_norms``, ``layers``: passes of a step through batch norms and through leaf modules,
    outside of blocks; they do not grow with the batch.
    """

    blocks: Blocks | None = None
    kept: Numbers = field(default_factory=Numbers)
    working: Numbers = field(default_factory=Numbers)
    moved: Numbers = field(default_factory=Numbers)
    batch_norms: int = 0
    layers: int = 0

    def beside(self, other: Part, share: float) -> Part:
        """With ``share`` of another's sample to each of this one's."""
        if not share:
            return self
        widest = max(self.working, other.working * share, key=lambda numbers: numbers.computed)
        return Part(
            kept=self.kept + other.kept * share,
            working=widest,
            moved=self.moved + other.moved * share,
            batch_norms=self.batch_norms + other.batch_norms,
            layers=self.layers + other.layers,
        )


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Of one sample, with its share of unpaired pictures; ``pixels``: numbers of its pictures in all views."""

    image: Part
    text: Part
    heads: Part
    pixels: float


def volume(config: TrainConfig, *, tokens: int) -> Volume:
    """Count; every caption has ``tokens`` tokens."""
    sizes, share = [view.size for view in config.image.views], unpaired_share(config)
    shares = [(size, 1.0) for size in sizes] + [(size, share) for size in sizes[1:] if share]
    with torch.device("meta"):
        model = DualEncoder(without_checkpointing(config.model)).train()
        features = [torch.zeros(2, width) for width in (model.visual.width, model.text.width) for _ in sizes]
        pictures = [torch.zeros(2, 3, size, size) for size in sizes]
    vision, heads = config.model.vision, _counted(Heads(model), features, together=True)
    image = _vit(vision, shares) if isinstance(vision, ViTConfig) else _counted(model.visual, pictures)
    if share:
        heads = heads.beside(_counted(UnpairedHeads(model), features[1 : len(sizes)], together=True), share)
        image = image if image.blocks else image.beside(_counted(model.visual, pictures[1:]), share)
    return Volume(
        image=image,
        text=_text(config, len(sizes), min(tokens, config.model.text.context_length)),
        heads=heads,
        pixels=_pixels(shares),
    )


def _pixels(shares: Sequence[tuple[int, float]]) -> float:
    return 3 * sum(share * size**2 for size, share in shares)


def _vit(vision: ViTConfig, shares: Sequence[tuple[int, float]]) -> Part:
    """Of views of these sizes, each with how many a sample has of it."""
    patches = [(size // vision.patch_size) ** 2 for size, _ in shares]
    lengths = [1 + (count if vision.patch_keep == 1 else max(1, round(vision.patch_keep * count))) for count in patches]
    blocks = Blocks(
        layers=vision.layers,
        width=vision.width,
        mlp_width=round(vision.width * vision.mlp_ratio),
        tokens=sum(length * share for length, (_, share) in zip(lengths, shares, strict=True)),
        weights=vision.heads * sum(length**2 * share for length, (_, share) in zip(lengths, shares, strict=True)),
        quick_gelu=vision.activation == "quick_gelu",
    )
    # Pictures normalised, put side by side and cast; tokens of patches, positions added, class token before them.
    pixels = _pixels(shares)
    moved = Numbers(5 * pixels + 7 * blocks.tokens * vision.width, pixels + 2 * blocks.tokens * vision.width)
    return Part(blocks=blocks, moved=moved, layers=4)


def _text(config: TrainConfig, views: int, tokens: int) -> Part:
    text = config.model.text
    blocks = Blocks(
        layers=text.layers,
        width=text.width,
        mlp_width=4 * text.width,
        tokens=views * tokens,
        weights=views * text.heads * tokens**2,
        quick_gelu=text.activation == "quick_gelu",
    )
    return Part(blocks=blocks, moved=Numbers(8 * views * tokens * text.width), layers=4)


def _counted(module: nn.Module, inputs: Sequence[Tensor], *, together: bool = False) -> Part:
    """On meta tensors of two samples: what autograd keeps, what leaf modules read and write; backward moves it twice.

    Products' own reading and writing is their efficiency's affair. ``together``: one call with all inputs, else one for
    each.
    """
    kept: dict[int, Tensor] = {}
    found: dict[str, float] = {"moved": 0, "largest": 0, "batch_norms": 0, "layers": 0}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def note(leaf: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        tensors = [each for each in (*arguments, output) if isinstance(each, Tensor)]
        if not isinstance(leaf, nn.Linear | nn.modules.conv._ConvNd):
            found["moved"] += sum(tensor.numel() for tensor in tensors)
        found["largest"] = max(found["largest"], *(tensor.numel() for tensor in tensors))
        found["batch_norms"] += isinstance(leaf, nn.modules.batchnorm._BatchNorm)
        found["layers"] += 1

    def note_fused(head: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        """In training an MLPHead calls no layer: kernels/projector.py's passes, ten in all, a third of them here."""
        norms = [layer for layer in head if isinstance(layer, nn.modules.batchnorm._BatchNorm)]  # type: ignore
        numbers = [len(output) * norm.num_features for norm in norms]
        found["moved"] += 10 * sum(numbers) / 3
        found["largest"] = max(found["largest"], *numbers)
        found["batch_norms"] += len(norms)
        found["layers"] += len(list(head.children()))

    handles = [
        module.register_forward_hook(note_fused if isinstance(module, MLPHead) else note)
        for module in module.modules()
        if isinstance(module, MLPHead) or not list(module.children())
    ]
    outputs = []  # alive, so that no storage takes another's place
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for arguments in [inputs] if together else [[each] for each in inputs]:
            outputs.append(module(*arguments))
    for handle in handles:
        handle.remove()
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    sizes = [tensor.untyped_storage().nbytes() / 4 for key, tensor in kept.items() if key not in own]
    return Part(
        kept=Numbers(0, sum(sizes) / 2),
        working=Numbers(0, 2 * found["largest"] / 2),
        moved=Numbers(0, 3 * found["moved"] / 2),
        batch_norms=int(found["batch_norms"]),
        layers=int(found["layers"]),
    )
