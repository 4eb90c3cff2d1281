"""rocket_fast: vision-language pre-training with improved baselines, fast on one core and on many GPUs.

``rocket-fast --help`` trains, evaluates, imports and exports. For other trainers: ``rocket_fast.kernels`` has the
losses as functions of tensors, ``rocket_fast.losses`` takes them over ranks, ``rocket_fast.interop.open_clip`` has them
with open_clip's interface, and ``rocket_fast.accumulation.cached_step`` for batches that do not fit.
"""

from rocket_fast.version import __version__

__all__ = ["__version__"]
