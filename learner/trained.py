"""What is trained: a sharded module with its optimizer and its schedule. The policy is one, a critic another.

Invariant: `parameters` are the sharded masters under checkpoint names, each tied one once, on every rank in the same order.
Made and stepped by `step`; saved and restored by checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from asyncrl.learner.optimizer import set_learning_rate, warmed_up_then_decayed


@dataclass(frozen=True, slots=True)
class Schedule:
    learning_rate: float
    warmup_steps: int
    decay_steps: int

    def rate(self, step: int) -> float:
        """Of optimizer step `step`, from 1."""
        return warmed_up_then_decayed(self.learning_rate, step, self.warmup_steps, self.decay_steps)


@dataclass(slots=True)
class Trained:
    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    steps_taken: int = 0
    """Optimizer steps."""

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def clip(self, max_norm: float) -> float:
        """Scales the gradients down to `max_norm` together; returns their norm before. A collective."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self) -> None:
        """One optimizer step with the schedule's rate; the gradients are gone after it."""
        self.steps_taken += 1
        set_learning_rate(self.optimizer, self.schedule.rate(self.steps_taken))
        self.optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad()
