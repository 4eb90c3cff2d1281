"""CL2L over ranks: which embeddings travel, and who multiplies what.

W ranks, N samples on one of them, M on all, P pairs of views (1 + K * K); D_i and D_t the widths of all image and of
all text views together, b bytes a number. What a rank sends in a step (collectives in rings), multiplies, and keeps:

==============  ==============================  ========================  ============================================
exchange        bytes sent                      products of each pair     memory that grows with W
==============  ==============================  ========================  ============================================
all_gather      2 (W - 1) N (D_i + D_t) b       4 of M x M x D            all embeddings and their gradients
one_sided       2 (W - 1) N (D_t b + 8 P)       4 of N x M x D            texts' embeddings and their gradients; some
                                                                          numbers for each text and pair
without grads   (W - 1) N (D_i + D_t) b         6 of N x M x D            all embeddings
==============  ==============================  ========================  ============================================

The first two give the loss and the gradients of one process that has all samples (see rocket_fast/distributed.py), for
local batches of any size; where a rank has none, always by all_gather.

all_gather: every rank computes everything. one_sided: a rank has all texts but only its own
images, N rows of the matrix of similarities. The rows' log-sum-exps are complete, the columns' are combined by
all-reduces of M maxima and of M sums a pair; backward, a rank's images are its own affair and the texts' gradients go
home by a reduce-scatter, in the embeddings' dtype. Half the bytes, 1/W of the products, and two or three more
collectives, all small: "auto" takes it where the products saved take longer than those, see ``COLLECTIVES_FLOP``.

Nothing is multiplied while embeddings travel: only 1/W of the tiles could be.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rocket_fast.batch import Embeddings
from rocket_fast.distributed import AllRanks, sum_over_ranks, world_size
from rocket_fast.errors import require
from rocket_fast.kernels import ClipTerms, MultiviewClipTerms, clip_terms, multiview_clip_terms
from rocket_fast.kernels import contrastive as operations
from rocket_fast.kernels.checks import require_same_rows, require_scale, require_views
from rocket_fast.kernels.contrastive import as_factors, as_number, of_all_views, workspace_bytes
from rocket_fast.kernels.tiled import compute_dtype

Exchange = Literal["auto", "one_sided", "all_gather"]

# Floating point operations that fit into the time of the one-sided scheme's additional collectives: three of 30 us at
# 500 TFLOP/s on a GPU, three of 300 us at 100 GFLOP/s on a CPU. With many ranks and D = 512 that is M = 3300 and 156.
COLLECTIVES_FLOP = {"cuda": 45e9, "cpu": 1e8}

WORKSPACE_MIB = 64.0  # scratch memory of the operations


def multiview_terms(
    own: Embeddings,
    ranks: AllRanks,
    *,
    exchange: Exchange,
    gather_grad: bool = True,
    label_smoothing: float = 0.0,
    normalize: bool = True,
) -> MultiviewClipTerms:
    """The parts of CL2L over all ranks' samples, the same on every rank; embeddings are taken in their own dtype.

    ``exchange``, ``gather_grad``, ``label_smoothing``: as in ``rocket_fast.losses.LossConfig``. ``normalize``: the
    embeddings are raw; else they are compared as they are.
    """
    if not gather_grad and world_size() > 1:
        return _without_gradients_across(own, ranks, label_smoothing, normalize)
    wanted = exchange == "one_sided" or (exchange == "auto" and _worthwhile(own, ranks))
    if wanted and world_size() > 1 and min(ranks.counts) > 0:
        return _one_sided(own, ranks, label_smoothing, normalize)
    (image_z, text_z), image_h, text_h = ranks.gather((own.image_z, own.text_z), own.image_h, own.text_h)
    return multiview_clip_terms(
        image_z,
        text_z,
        own.logit_scale,
        image_h,
        text_h,
        own.h_logit_scale,
        label_smoothing=label_smoothing,
        normalize=normalize,
        workspace_mib=WORKSPACE_MIB,
    )


def _worthwhile(own: Embeddings, ranks: AllRanks) -> bool:
    """Whether the one-sided scheme is likely faster; all ranks find the same."""
    width = own.image_z.shape[1] + sum(view.shape[1] for view in own.image_h) * len(own.text_h)
    return one_sided_pays(max(ranks.counts), ranks.samples, width, own.image_z.device.type)


def one_sided_pays(rows: int, samples: int, width: int, device_type: str) -> bool:
    """Whether the products saved take longer than the additional collectives: of a rank with so many of all
    ``samples``, where the widths of all pairs of views add up to ``width``.
    """
    saved = 8 * (samples - rows) * samples * width
    return saved > COLLECTIVES_FLOP.get(device_type, COLLECTIVES_FLOP["cuda"])


def _combined(weak: ClipTerms, strong: ClipTerms | None, views: int) -> MultiviewClipTerms:
    if strong is None:
        return MultiviewClipTerms(weak=weak, strong=None, loss_image=weak.loss_image, loss_text=weak.loss_text)
    return MultiviewClipTerms(
        weak=weak,
        strong=strong,
        loss_image=of_all_views(weak.loss_image, strong.loss_image, views),
        loss_text=of_all_views(weak.loss_text, strong.loss_text, views),
    )


def _clip_terms(terms_4: Tensor) -> ClipTerms:
    loss_image, loss_text, *accuracies = terms_4.unbind()
    accuracy_image, accuracy_text = (accuracy.detach() for accuracy in accuracies)
    return ClipTerms(
        loss_image=loss_image, loss_text=loss_text, accuracy_image=accuracy_image, accuracy_text=accuracy_text
    )


# --- no gradients across ranks ----------------------------------------------------------------------------------------


def _without_gradients_across(
    own: Embeddings, ranks: AllRanks, label_smoothing: float, normalize: bool
) -> MultiviewClipTerms:
    """What CLIP's descendants with a plain all-gather train on, SLIP's among them.

    A rank takes the mean over its own samples: image to all texts, text to all images, the gathered side constant, its
    own slice included. So images learn as those who pick, never as those picked, and texts likewise: half of the exact
    gradient's terms. The number returned is the mean of the ranks' losses, which is what DDP's averaged gradients are
    of; where local batches differ in size, samples of small ones thus weigh more, as they do there.
    """
    ranks.require_samples()
    image_z, text_z, *h = ranks.constants([own.image_z, own.text_z, *own.image_h, *own.text_h])
    views = len(own.image_h)
    require_views("image_h", own.image_h, "text_h", own.text_h)

    def pair(image: Tensor, text: Tensor, all_images: Tensor, all_texts: Tensor, scale: Tensor, e: float) -> Tensor:
        options: dict[str, Any] = {
            "label_smoothing": e,
            "row_offset": ranks.first_row,
            "normalize": normalize,
            "workspace_mib": WORKSPACE_MIB,
        }
        to_text = clip_terms(image, all_texts, scale, **options)
        to_image = clip_terms(text, all_images, scale, **options)
        return torch.stack([to_text.loss_image, to_image.loss_image, to_text.accuracy_image, to_image.accuracy_image])

    pairs = [pair(own.image_z, own.text_z, image_z, text_z, own.logit_scale, 0.0)]
    for (image, all_images), (text, all_texts) in product(
        zip(own.image_h, h[:views], strict=True), zip(own.text_h, h[views:], strict=True)
    ):
        scale = _strong_scale(own)
        pairs.append(pair(image, text, all_images, all_texts, scale, label_smoothing))
    weak, *strong = (sum_over_ranks(torch.stack(pairs)) / world_size()).unbind()
    return _combined(_clip_terms(weak), _clip_terms(torch.stack(strong).mean(0)) if strong else None, views)


def _strong_scale(own: Embeddings) -> Tensor:
    require(own.h_logit_scale is not None, "h_logit_scale", None, "a scale, since there are strong views")
    assert own.h_logit_scale is not None
    require_scale("h_logit_scale", own.h_logit_scale, own.image_z.device)
    return own.h_logit_scale


# --- one-sided --------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """One rank's rows of a stack of problems: A image views of its N samples against B text views of all M."""

    image_AND: Tensor
    text_BMD: Tensor
    scale_AB: Tensor

    @staticmethod
    def of(images: Sequence[Tensor], texts: Sequence[Tensor], scale: Tensor) -> _Block:
        """From the views of each side, one scale for all pairs."""
        image_AND, text_BMD = (torch.stack(tuple(x)) if len(x) > 1 else x[0][None] for x in (images, texts))
        return _Block(image_AND, text_BMD, as_number(scale, image_AND).expand(len(images), len(texts)))


def _one_sided(own: Embeddings, ranks: AllRanks, label_smoothing: float, normalize: bool) -> MultiviewClipTerms:
    """The scheme described above: weak pair and strong pairs share the collectives, and so do all strong pairs."""
    require_same_rows("image_z", own.image_z, "text_z", own.text_z)
    require_scale("logit_scale", own.logit_scale, own.image_z.device)
    require_views("image_h", own.image_h, "text_h", own.text_h)
    (text_z,), text_h = ranks.gather((own.text_z,), own.text_h)
    blocks = [_Block.of((own.image_z,), (text_z,), own.logit_scale)]
    if own.image_h:
        blocks.append(_Block.of(own.image_h, text_h, _strong_scale(own)))
    for block in blocks:
        as_factors("image", block.image_AND, "text", block.text_BMD)  # checks that the dtypes agree
    terms = _OneSided.apply(ranks, normalize, *(tensor for block in blocks for tensor in block))
    weak = _clip_terms(terms[0].reshape(4))
    if not own.image_h:
        return _combined(weak, None, 0)
    strong = terms[1].mean((0, 1))
    if label_smoothing:
        sides = (torch.stack(own.image_h), torch.stack(own.text_h))
        gap = _smoothing_gap(*sides, blocks[1].scale_AB, ranks.samples, normalize)
        strong = strong + label_smoothing * F.pad(gap.mean().expand(2), (0, 2))  # of both losses, no accuracy
    return _combined(weak, _clip_terms(strong), len(own.image_h))


def _smoothing_gap(image_AND: Tensor, text_BND: Tensor, scale_AB: Tensor, samples: int, normalize: bool) -> Tensor:
    """The positives' mean logit minus that of all pairs, (A, B): label smoothing e adds e times this to a loss.

    Of this rank's own embeddings, and with one all-reduce of A * B + (A + B) * D numbers: positives have both sides on
    one rank, and a mean of products is a product of means.
    """
    x_AND, y_BND = (side.to(compute_dtype(side)) for side in (image_AND, text_BND))
    if normalize:
        x_AND, y_BND = F.normalize(x_AND, dim=-1), F.normalize(y_BND, dim=-1)
    (views, _, width), text_views = x_AND.shape, len(y_BND)
    positives_AB = torch.einsum("and,bnd->ab", x_AND, y_BND)
    own = torch.cat([positives_AB.flatten(), x_AND.sum(1).flatten(), y_BND.sum(1).flatten()])
    sizes = [views * text_views, views * width, text_views * width]
    positives, x_sum, y_sum = (sum_over_ranks(own) / samples).split(sizes)
    return scale_AB * (positives.view(views, text_views) - x_sum.view(views, width) @ y_sum.view(text_views, width).T)


class _OneSided(torch.autograd.Function):
    """Blocks of all ranks -> per block (A, B, 4): loss image to text, text to image, and accuracies in percent.

    Of hard targets, over all ranks' samples, the same on every rank; gradients as rocket_fast/distributed.py has them.
    """

    @staticmethod
    def forward(ctx: Any, ranks: AllRanks, normalize: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        blocks = [_Block(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
        parts = [_OwnRows(block, ranks, normalize) for block in blocks]
        highest = _all_reduce([part.bar_ABM for part in parts], dist.ReduceOp.MAX)
        addends = [part.addends(bar_ABM) for part, bar_ABM in zip(parts, highest, strict=True)]
        totals = _all_reduce([addend for of_part in addends for addend in of_part], dist.ReduceOp.SUM)
        saved, terms = list(tensors), []
        for part, bar_ABM, log_ABM, own_AB4 in zip(parts, highest, totals[::2], totals[1::2], strict=True):
            log_ABM.log_()
            own_AB4[..., 1] += log_ABM.sum(-1)
            terms.append(own_AB4 / ranks.samples)
            saved += [part.lse_image_ABN, bar_ABM.double() + log_ABM]
        ctx.save_for_backward(*saved)
        ctx.ranks, ctx.normalize = ranks, normalize
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, *d_terms: Tensor) -> tuple[Tensor | None, ...]:
        saved, gradients = ctx.saved_tensors, []  # unpacked once: checkpointing recomputes what it unpacks
        statistics = saved[3 * len(d_terms) :]
        for index, d_terms_AB4 in enumerate(d_terms):
            lse_image_ABN, lse_text_ABM = statistics[2 * index : 2 * index + 2]
            needs = ctx.needs_input_grad[2 + 3 * index :][:3]
            # Each of the M rows and columns has its share of the loss; world_size() is what DDP's average takes away.
            share_AB4 = d_terms_AB4 * (world_size() / ctx.ranks.samples)
            gradients += operations.backward_operation(
                *saved[3 * index : 3 * index + 3],
                lse_image_ABN,
                lse_text_ABM,
                share_AB4[..., 0, None].expand_as(lse_image_ABN),
                share_AB4[..., 1, None].expand_as(lse_text_ABM),
                *_options(d_terms_AB4, ctx.ranks, ctx.normalize),
                *needs[:2],
                workspace_bytes(WORKSPACE_MIB),
            )
            gradients[-3:] = [each if needed else None for each, needed in zip(gradients[-3:], needs, strict=True)]
        return None, None, *gradients


def _options(per_pair_AB: Tensor, ranks: AllRanks, normalize: bool) -> tuple[list[float], int, bool, bool]:
    """No smoothing, row offset, with positives, whether to normalise."""
    pairs = per_pair_AB.shape[0] * per_pair_AB.shape[1]
    return [0.0] * pairs, ranks.first_row, True, normalize


class _OwnRows:
    """What a rank knows of a block before it hears of the others."""

    def __init__(self, block: _Block, ranks: AllRanks, normalize: bool) -> None:
        self.rows = block.image_AND.shape[1]
        self.first = ranks.first_row
        options = (*_options(block.scale_AB, ranks, normalize), workspace_bytes(WORKSPACE_MIB))
        found = operations.forward_operation(*block, *options)
        self.lse_image_ABN, self.lse_text_ABM, _, top_ABM, right_ABM, *terms = found
        self.terms_AB4, self.right_ABM = torch.cat(terms, dim=-1), right_ABM
        # What a column's positive must reach to be its pick, as far as these rows go: of equal logits the first is the
        # pick, so where the positive comes later, in a higher rank's rows, it must be larger.
        self.bar_ABM = top_ABM.clone()
        later_ABM = self.bar_ABM[..., self.first + self.rows :]
        later_ABM.copy_(later_ABM.nextafter(torch.full_like(later_ABM, torch.inf)))

    def _own(self, per_column_ABM: Tensor) -> Tensor:
        """The columns of this rank's samples."""
        return per_column_ABM[..., self.first : self.first + self.rows]

    def addends(self, highest_ABM: Tensor) -> tuple[Tensor, Tensor]:
        """What the ranks add up, given the highest bars of all: the columns' sums of exponentials, relative to those,
        and the terms (A, B, 4), times samples; to the text loss the logarithms of the former's totals are to be added.
        """
        beyond_ABM = (self.lse_text_ABM - highest_ABM).to(highest_ABM.dtype)
        loss_image, loss_text, accuracy_image, _ = (self.rows * self.terms_AB4).unbind(-1)
        loss_text = loss_text - self._own(beyond_ABM).sum(-1)
        right_ABN = self._own(self.right_ABM & (self.bar_ABM == highest_ABM))
        accuracy_text = 100 * right_ABN.sum(-1, dtype=accuracy_image.dtype)
        return beyond_ABM.exp(), torch.stack([loss_image, loss_text, accuracy_image, accuracy_text], dim=-1)


def _all_reduce(tensors: Sequence[Tensor], operation: Any) -> list[Tensor]:
    """Each reduced over ranks, all in one collective."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, op=operation)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
