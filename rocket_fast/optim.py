"""AdamW as the recipe uses it: who decays, the learning rate of every step as a pure function, the scale of fp16."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
    clip_norm: float | None = None
    """Largest norm of all gradients together, to which longer ones are shortened; None leaves them as they are."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "a positive number")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "a number >= 0")
        require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        require(self.eps > 0, "optim.eps", self.eps, "a positive number")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "a number >= 0")
        require(0 <= self.start_lr <= self.lr, "optim.start_lr", self.start_lr, f"a number in [0, lr = {self.lr}]")
        require(0 <= self.end_lr <= self.lr, "optim.end_lr", self.end_lr, f"a number in [0, lr = {self.lr}]")
        norm = self.clip_norm
        require(norm is None or 0 < norm < math.inf, "optim.clip_norm", norm, "a positive number or None")


def learning_rate(config: OptimConfig, step: int, *, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of ``step`` (0-based): linear from ``start_lr`` to ``lr``, then a cosine down to ``end_lr``."""
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps)
    if step < warmup:
        return config.start_lr + (config.lr - config.start_lr) * step / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    return config.end_lr + (config.lr - config.end_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over two groups: matrices and kernels decay, parameters with fewer than two dimensions do not.

    Class tokens and positions have more than two dimensions or are matrices, and decay as in the original. Learning
    rates are tensors beside the parameters: a step that is compiled is not compiled again for another rate.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2]
    plain = [p for p in trainable if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    device = trainable[0].device
    rate = torch.tensor(config.lr, device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
    return torch.optim.AdamW(groups, lr=rate, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load ``state``, an optimizer's ``state_dict()``, but for the learning rates: they are each step's to set."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


class LossScale:
    """What fp16 training multiplies the loss by, so that gradients neither vanish nor overflow.

    Halved after a step whose gradients overflow, doubled after ``GROWTH_STEPS`` without, as torch's GradScaler does;
    but all on the device, for a loop whose own check of the gradients must not wait for it either.
    """

    START, GROWTH_STEPS = 2.0**16, 2000

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), self.START, device=device)
        """Float32 ()."""
        self._good_steps = torch.zeros((), device=device)

    def update(self, overflowed: Tensor) -> None:
        """After a step; ``overflowed``: bool ()."""
        self._good_steps = torch.where(overflowed, 0, self._good_steps + 1)
        grown = self._good_steps >= self.GROWTH_STEPS
        factor = torch.where(overflowed, 0.5, torch.where(grown, 2.0, 1.0))
        self.value, self._good_steps = self.value * factor, torch.where(grown, 0, self._good_steps)

    def state_dict(self) -> dict[str, Tensor]:
        """Both numbers."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state_dict``'s."""
        self.value, self._good_steps = (state[name].to(self.value.device) for name in ("value", "good_steps"))
