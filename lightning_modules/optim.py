"""The one optimiser and its schedule."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clipward.errors import InputError


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) with a rate that rises, stays level, and falls.

    Args:
        learning_rate: on the level.
        weight_decay: of parameters of two dimensions or more; gains and biases do not decay.
        warmup_steps: steps over which the rate rises from 0.
        cooldown_steps: the last steps before ``trainer.max_steps``, over which it falls to 0; 0 has no fall.
    """

    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    warmup_steps: int = 0
    cooldown_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "warmup_steps", "cooldown_steps"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InputError(f"optim.{name}: got {value}, expected a finite number of 0 or more")

    def factor(self, step: int, max_steps: int) -> float:
        """What the level is multiplied by after ``step`` steps; with ``max_steps`` −1 there is no fall."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.cooldown_steps == 0 or max_steps < 0:
            return rise
        return rise * min(1.0, max(0.0, (max_steps - step) / self.cooldown_steps))


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig, max_steps: int) -> dict[str, Any]:
    """What ``configure_optimizers`` returns."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, config.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.factor(step, max_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
