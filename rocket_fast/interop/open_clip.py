"""For open_clip's users: its ``ClipLoss`` and ``SigLipLoss``, and models of this project for its evaluation.

The losses have the same constructor, call and output, and are fused inside. Change the import, keep the trainer;
open_clip itself is not imported, torch is enough::

    from rocket_fast.interop.open_clip import ClipLoss  # was: from open_clip import ClipLoss

What differs, and is meant to:

* No N x M matrix is made: memory beyond inputs and gradients is a fixed workspace, on one process and on many.
* On several processes value and gradients are those of one process on the whole batch once DistributedDataParallel has
  averaged them, whatever the flags say, and local batches may differ in size. open_clip's flags change the result:
  without ``gather_with_grad`` (its default) the features get 1/W of their gradient on W processes, the logit scale all
  of its own, and with ``local_loss`` alone the direction is wrong as well (open_clip 3.3.0, 2 and 3 processes).
  Who trains with those flags and a tuned learning rate should expect to tune it again.
* ``ClipLoss`` gives the whole batch's loss on every process; open_clip's with ``local_loss`` gives the process's part,
  whose mean over processes is the same number.
* The result is float32 (float64 for float64 features) also where features are 16-bit.
* Horovod is refused.

``load_exported`` gives what open_clip's classes do not hold (head h, both heads, the small towers of the demo) with the
interface of its models, for ``open_clip.build_zero_shot_classifier`` and the like.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from rocket_fast import distributed
from rocket_fast.batch import Embeddings
from rocket_fast.errors import optional_import, require
from rocket_fast.exchange import multiview_terms
from rocket_fast.export import WEIGHTS_FILE, ExportedModel, Head, load_model
from rocket_fast.image_augment import IMAGENET_MEAN, IMAGENET_STD
from rocket_fast.kernels import clip_loss, siglip_loss
from rocket_fast.kernels.contrastive import as_number, with_bias

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


def _require_place(rank: int, world_size: int) -> None:
    """More than one process only where a process group of that size exists and this is that rank of it."""
    if world_size == 1:
        return
    actual = distributed.world_size()
    expected = f"{actual}, the size of the initialised process group (1: there is none)"
    require(world_size == actual, "world_size", world_size, expected)
    require(rank == distributed.rank(), "rank", rank, f"{distributed.rank()}, this process's rank in its group")


def _output(loss: Tensor, output_dict: bool) -> Any:
    return {"contrastive_loss": loss} if output_dict else loss


class ClipLoss(nn.Module):
    """Symmetric InfoNCE with open_clip's interface.

    Args:
        local_loss, gather_with_grad: taken, and without effect: every process gets the exact loss of the whole batch
            and all gradients, by whichever exchange of rocket_fast/exchange.py is faster.
        cache_labels: taken, and without effect: there are no labels to keep.
        rank, world_size: this process's number and the number of processes; with more than one, torch.distributed is
            initialised by the time of the first call. 1 sees the local batch only, as open_clip's does.
        use_horovod: must be False.

    Raises:
        ValueError: horovod; at the call, a process group that is not of ``world_size`` or ``rank``, and what
            ``clip_loss`` refuses.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        require(not use_horovod, "use_horovod", use_horovod, "False: processes are joined by torch.distributed alone")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The loss of features (N, D), already of unit length; ``{"contrastive_loss": loss}`` with ``output_dict``."""
        _require_place(self.rank, self.world_size)
        if self.world_size == 1:
            return _output(clip_loss(image_features, text_features, logit_scale, logit_bias=logit_bias), output_dict)
        scale = as_number(logit_scale, image_features)
        own = Embeddings(image_z=image_features, text_z=text_features, logit_scale=scale)
        terms = multiview_terms(
            own, distributed.AllRanks(image_features, text_features), exchange="auto", normalize=False
        )
        return _output(with_bias((terms.loss_image + terms.loss_text) / 2, logit_bias, image_features), output_dict)


class SigLipLoss(nn.Module):
    """The pairwise sigmoid loss with open_clip's interface.

    Every process takes its images against all texts. Its value is its share of the whole batch's loss times
    ``world_size``, as open_clip's is: their mean is the loss, which DistributedDataParallel's mean of gradients fits.

    Args:
        cache_labels: taken, and without effect.
        rank, world_size: as in ``ClipLoss``.
        dist_impl: how open_clip moves the texts, "bidir", "shift", "reduce" or "gather"; all the same exact result
            here, the texts being gathered once.

    Raises:
        ValueError: another ``dist_impl``; at the call, a process group that does not fit, and what ``siglip_loss``
            refuses.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        require(self.dist_impl in DIST_IMPLS, "dist_impl", dist_impl, f"one of {DIST_IMPLS}")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Any:
        """The loss of features (N, D), already of unit length; ``{"contrastive_loss": loss}`` with ``output_dict``.

        ``logit_bias``: None is 0, as there.
        """
        _require_place(self.rank, self.world_size)
        bias = 0.0 if logit_bias is None else logit_bias
        if self.world_size == 1:
            return _output(siglip_loss(image_features, text_features, logit_scale, bias), output_dict)
        ranks = distributed.AllRanks(image_features, text_features)
        ranks.require_samples()
        ((texts,),) = ranks.gather((text_features,))
        loss = siglip_loss(image_features, texts, logit_scale, bias, row_offset=ranks.first_row)
        share = ranks.own * self.world_size / ranks.samples  # 1 where all processes hold equally many
        return _output(loss * share, output_dict)


class LoadedModel(NamedTuple):
    """A model with the interface of open_clip's, and open_clip's preparation of pictures and of captions for it."""

    model: ExportedModel
    preprocess: Any
    tokenizer: Any


def load_exported(path: str | Path, *, head: Head | None = None, z_weight: float | None = None) -> LoadedModel:
    """A model from safetensors of ``rocket-fast export`` or ``import`` (the file, or the folder that holds it)::

        model, preprocess, tokenizer = load_exported("out/")
        classifier_DC = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
        scores_BC = model.encode_image(pictures, normalize=True) @ classifier_DC

    ``head``, ``z_weight``: which embedding, see ``rocket_fast.export.ExportedModel``; None takes what the file says.
    Raises ``ValueError`` for other files; needs open_clip, for the two preparations.
    """
    path = Path(path)
    saved = load_model(path / WEIGHTS_FILE if path.is_dir() else path).using(head, z_weight)
    model = saved.exported()
    transform = optional_import("open_clip.transform", "eval")
    pixels = transform.PreprocessCfg(size=saved.image_size, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    tokenizer = optional_import("open_clip", "eval").SimpleTokenizer(context_length=model.context_length)
    return LoadedModel(model, transform.image_transform_v2(pixels, is_train=False), tokenizer)
