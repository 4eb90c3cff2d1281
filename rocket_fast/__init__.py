"""rocket_fast: vision-language pre-training with improved baselines, fast on one core and on many GPUs."""

from rocket_fast.version import __version__

__all__ = ["__version__"]
