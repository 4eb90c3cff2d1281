"""AdamW as the recipe uses it: who decays, and the learning rate of every step as a pure function."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from rocket_fast.errors import require


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, linear warm-up, cosine decay; all per step."""

    lr: float = 3e-3
    """Peak learning rate, reached at the end of the warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on parameters with two dimensions or more (never on biases, norms or temperatures)."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    warmup_epochs: float = 1.0
    """Length of the linear warm-up, in epochs."""
    start_lr: float = 1e-6
    """Learning rate of the first step."""
    end_lr: float = 1e-5
    """Learning rate of the last step."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "a positive number")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "a number >= 0")
        require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        require(self.eps > 0, "optim.eps", self.eps, "a positive number")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "a number >= 0")
        require(0 <= self.start_lr <= self.lr, "optim.start_lr", self.start_lr, f"a number in [0, lr = {self.lr}]")
        require(0 <= self.end_lr <= self.lr, "optim.end_lr", self.end_lr, f"a number in [0, lr = {self.lr}]")


def learning_rate(config: OptimConfig, step: int, *, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of ``step`` (0-based): linear from ``start_lr`` to ``lr``, then a cosine down to ``end_lr``."""
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps)
    if step < warmup:
        return config.start_lr + (config.lr - config.start_lr) * step / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    return config.end_lr + (config.lr - config.end_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over two groups: matrices and kernels decay, parameters with fewer than two dimensions do not.

    Class tokens and positions have more than two dimensions or are matrices, and decay as in the original.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2]
    plain = [p for p in trainable if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
