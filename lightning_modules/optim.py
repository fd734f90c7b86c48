"""The one optimiser and its schedule."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def adamw(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    max_steps: int = -1,
) -> dict[str, Any]:
    """AdamW for ``configure_optimizers``, its rate a trapezium: up over the warm-up, level, down over the cool-down.

    Args:
        parameters: those of fewer than two dimensions (gains and biases) do not decay.
        learning_rate: on the level.
        weight_decay: decoupled (Loshchilov & Hutter 2019).
        warmup_steps: steps over which the rate rises from 0.
        cooldown_steps: the last steps before ``max_steps``, over which it falls to 0; 0 has no fall.
        max_steps: the trainer's; with −1 there is no fall.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, learning_rate)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, warmup_steps))
        if cooldown_steps == 0 or max_steps < 0:
            return rise
        return rise * min(1.0, max(0.0, (max_steps - step) / cooldown_steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
