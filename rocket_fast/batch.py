"""The typed values that cross the boundaries between loader, model and loss (B samples, D dimensions)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PackedText:
    """Captions of one view, laid end to end without padding.

    ``tokens``: int64 or int32 (T,), the ids of all captions, each from start-of-text to end-of-text.
    ``lengths``: int64 (B,), how many of them belong to each caption; ``lengths.sum() == T``. ``longest``: their
    largest, known to the host, so that nobody has to ask the device for it.
    """

    tokens: Tensor
    lengths: Tensor
    longest: int

    def __len__(self) -> int:
        return self.lengths.shape[0]

    @staticmethod
    def from_ids(captions: Sequence[Sequence[int]]) -> PackedText:
        """Pack lists of token ids."""
        lengths = [len(ids) for ids in captions]
        flat = [token for ids in captions for token in ids]
        return PackedText(
            tokens=torch.tensor(flat, dtype=torch.int64),
            lengths=torch.tensor(lengths, dtype=torch.int64),
            longest=max(lengths, default=0),
        )

    @staticmethod
    def cat(parts: Sequence[PackedText]) -> PackedText:
        """The captions of all parts, in order."""
        return PackedText(
            tokens=torch.cat([part.tokens for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
            longest=max(part.longest for part in parts),
        )

    @staticmethod
    def from_padded(tokens_BL: Tensor) -> PackedText:
        """Pack zero-padded rows (B, L), as open_clip's tokenizer makes them; end-of-text is each row's largest id."""
        lengths = tokens_BL.argmax(dim=1) + 1
        keep_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)[None, :] < lengths[:, None]
        return PackedText(tokens=tokens_BL[keep_BL], lengths=lengths, longest=int(lengths.max()))

    def padded(self) -> Tensor:
        """Zero-padded ids (B, longest caption)."""
        column_L = torch.arange(self.longest, device=self.tokens.device)
        start_B = self.lengths.cumsum(0) - self.lengths
        at_BL = (start_B[:, None] + column_L).clamp(max=self.tokens.shape[0] - 1)
        return self.tokens[at_BL].masked_fill(column_L >= self.lengths[:, None], 0)

    def split(self, sizes: Sequence[int]) -> tuple[PackedText, ...]:
        """Parts of so many captions; on the host, which has to know the lengths."""
        parts = self.lengths.split(list(sizes))
        tokens = self.tokens.split([int(part.sum()) for part in parts])
        return tuple(
            PackedText(tokens=own, lengths=part, longest=int(part.max()))
            for own, part in zip(tokens, parts, strict=True)
        )

    def to(self, device: torch.device | str) -> PackedText:
        """The same captions on another device."""
        tokens, lengths = (part.to(device, non_blocking=True) for part in (self.tokens, self.lengths))
        return PackedText(tokens=tokens, lengths=lengths, longest=self.longest)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a loader yields: B samples, each in one weak and K strong image-text views (view 0 is the weak one).

    ``images``: per view, uint8 or float (B, 3, H, W); uint8 means "not normalised yet".
    ``texts``: per view, the captions packed.
    ``keys``: per sample, ``shard/key`` as the data names it.
    ``valid``: bool (B,), False where a sample only fills up a partial batch.
    ``captions``: per sample, the raw caption, when asked for.
    ``unpaired``: of U pictures without captions, per strong view, like images (U, 3, H, W).
    """

    images: tuple[Tensor, ...]
    texts: tuple[PackedText, ...]
    keys: tuple[str, ...]
    valid: Tensor
    captions: tuple[str, ...] | None = None
    unpaired: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self.valid.shape[0]

    def split(self, parts: int) -> tuple[Batch, ...]:
        """So many parts, whose sizes differ by one at most, in samples and in unpaired pictures."""
        ends = _ends(len(self), parts)
        sizes = [end - start for start, end in pairwise(ends)]
        images = zip(*(view.split(sizes) for view in self.images), strict=True)
        texts = zip(*(view.split(sizes) for view in self.texts), strict=True)
        unpaired = [
            tuple(view[start:end] for view in self.unpaired)
            for start, end in pairwise(_ends(len(self.unpaired[0]) if self.unpaired else 0, parts))
        ]
        return tuple(
            Batch(
                images=of_images,
                texts=of_texts,
                keys=self.keys[start:end],
                valid=self.valid[start:end],
                captions=None if self.captions is None else self.captions[start:end],
                unpaired=of_unpaired,
            )
            for (start, end), of_images, of_texts, of_unpaired in zip(
                pairwise(ends), images, texts, unpaired, strict=True
            )
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the batch."""
        return (
            *self.images,
            *self.unpaired,
            *(part for text in self.texts for part in (text.tokens, text.lengths)),
            self.valid,
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            images=tuple(image.to(device, non_blocking=True) for image in self.images),
            texts=tuple(text.to(device) for text in self.texts),
            keys=self.keys,
            valid=self.valid.to(device, non_blocking=True),
            captions=self.captions,
            unpaired=tuple(image.to(device, non_blocking=True) for image in self.unpaired),
        )


def _ends(count: int, parts: int) -> list[int]:
    """Where parts of near equal size begin and end."""
    return [count * part // parts for part in range(parts + 1)]


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """What the model gives the loss; no vector is normalised yet, scales are given after exp.

    ``image_z``, ``text_z``: (B, D), the weak views through head z. ``image_h``, ``text_h``: per strong view (B, D).
    ``companion``: outputs of a self-supervised companion's heads, None where it has none. ``unpaired``: what it
    compares of pictures without captions, None where there are none.
    """

    image_z: Tensor
    text_z: Tensor
    logit_scale: Tensor
    image_h: tuple[Tensor, ...] = ()
    text_h: tuple[Tensor, ...] = ()
    h_logit_scale: Tensor | None = None
    companion: CompanionOutputs | None = None
    unpaired: UnpairedOutputs | None = None


@dataclass(frozen=True, kw_only=True)
class CompanionOutputs:
    """Projector (v) and predictor or prototype (p) outputs of the weak and the strong views, (B, P) each.

    ``image_v``/``text_v`` hold the weak view first, then the strong ones. SiamLIP: v and p of the same encoder;
    BYOLIP: v of the EMA encoder; BarLIP: v only; SwALIP prototypes: p = prototype scores, with their own scale.
    """

    image_v: tuple[Tensor, ...] = ()
    text_v: tuple[Tensor, ...] = ()
    image_p: tuple[Tensor, ...] = ()
    text_p: tuple[Tensor, ...] = ()
    logit_scale: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class UnpairedOutputs:
    """Of pictures without captions, the strong views: ``image_v`` and ``image_p`` of CompanionOutputs, (U, P) each.

    Where a companion has no heads (SwALIP), ``image_v`` comes from head h.
    """

    image_v: tuple[Tensor, ...]
    image_p: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """``total`` is what is differentiated; the rest is detached, for the log. Accuracies are in percent."""

    total: Tensor
    metrics: dict[str, Tensor]
