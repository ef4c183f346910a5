"""AdamW over sharded masters and the learning rate schedules. Called by `step` and `sft`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


def adamw(
    parameters: Iterable[nn.Parameter], betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); matrices decay, norms and biases do not. Set the rate before a step."""
    every = list(parameters)
    groups = [
        {"params": [p for p in every if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=1e-8, fused=True)


def warmed_up(rate: float, step: int, warmup_steps: int) -> float:
    """Linear from rate / warmup_steps at step 1 to `rate` at step `warmup_steps`, then constant."""
    return rate * min(1.0, step / warmup_steps) if warmup_steps else rate


def warmed_up_then_decayed(rate: float, step: int, warmup_steps: int, decay_steps: int) -> float:
    """As `warmed_up`, falling in a straight line to a tenth of `rate` at step `decay_steps` and staying there; constant
    with 0."""
    decay = 1.0 - 0.9 * min(1.0, step / decay_steps) if decay_steps else 1.0
    return warmed_up(rate, step, warmup_steps) * decay


def cosine(rate: float, step: int, warmup_steps: int, steps: int) -> float:
    """As `warmed_up`, then half a cosine down to 0 at step `steps` (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    if step <= warmup_steps:
        return warmed_up(rate, step, warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return rate * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
