"""The loss functions of vision-language pre-training, as plain functions of tensors; needs torch only.

==============================  ===========================================================================
``clip_loss``                   CLIP: symmetric InfoNCE of one image and one text view
``multiview_clip_loss``         CL2L: one weak and K strong views a sample
``siglip_loss``                 SigLIP: pairwise sigmoid with a learned bias
``siamlip_loss``                SiamLIP, and BYOLIP with an averaged encoder's projections as targets
``barlip_loss``                 BarLIP: cross-correlation of image and text features
``swalip_loss``                 SwALIP: Sinkhorn-balanced soft labels on the strong similarities
``swalip_prototypes_loss``      SwALIP with prototypes
==============================  ===========================================================================

The first three are fused: no N x M matrix is made or kept, on the GPU (Triton) or the CPU. BarLIP makes no matrix of
features by features either, and SwALIP none of samples by samples beyond its workspace. ``clip_terms`` and
``multiview_clip_terms`` give their parts (per direction, with accuracies), ``log_sum_exp`` what they are made of;
``negative_cosine_loss``, ``barlow_loss`` and ``sinkhorn`` are what the others are made of.

Common to all: inputs may be float16, bfloat16, float32 or float64; sums are made in float32 (float64 stays float64),
and results are 0-dimensional tensors of that type. Everything is differentiable except where "targets" are named.
Nothing is gathered over ranks: a function sees the batch it is given. Bad arguments raise ``ValueError`` naming the
argument, the value got and the value expected.
"""

from rocket_fast.kernels.barlow import barlip_loss, barlow_loss
from rocket_fast.kernels.contrastive import (
    clip_loss,
    clip_terms,
    log_sum_exp,
    multiview_clip_loss,
    multiview_clip_terms,
)
from rocket_fast.kernels.cosine import negative_cosine_loss, siamlip_loss
from rocket_fast.kernels.reference import ClipTerms, MultiviewClipTerms, Reduction
from rocket_fast.kernels.sigmoid import siglip_loss
from rocket_fast.kernels.sinkhorn import sinkhorn, swalip_loss, swalip_prototypes_loss

__all__ = [
    "ClipTerms",
    "MultiviewClipTerms",
    "Reduction",
    "barlip_loss",
    "barlow_loss",
    "clip_loss",
    "clip_terms",
    "log_sum_exp",
    "multiview_clip_loss",
    "multiview_clip_terms",
    "negative_cosine_loss",
    "siamlip_loss",
    "siglip_loss",
    "sinkhorn",
    "swalip_loss",
    "swalip_prototypes_loss",
]
