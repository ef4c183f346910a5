"""What is trained: a sharded module with its optimizer and its schedule. The policy is one, a critic another.

Invariant: `parameters` are the sharded masters under checkpoint names, each tied one once, on every rank in the same order.
Made and stepped by `step`; saved and restored by checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from asyncrl.learner.distributed import this_device
from asyncrl.learner.faults import Culprits, NonFiniteWeights, NormHistory, NormLimits, check_norm
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
    norms: NormHistory = field(default_factory=NormHistory)
    """Gradient norms of the steps before."""

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

    def step_if_fit(
        self, name: str, limits: NormLimits, culprits: Callable[[], Culprits], *, skip: bool
    ) -> float:
        """Scales the gradients down and takes the step, unless it is to be skipped; returns the norm before.

        A collective. Raises `LearnerFault`, on every rank alike: before the step where the gradient is not fit, after it where
        a weight is not finite. The gradients are gone either way. `name` is what the fault calls it.
        """
        norm = self.clip(limits.clip)
        if skip or self.norms.verdict(norm, limits) is not None:
            self.forget_gradients()
        check_norm(name, norm, self.norms, limits, culprits)
        if skip:
            return norm
        self.step()
        if not self.is_finite():
            raise NonFiniteWeights(
                f"{name}: weights are not finite after optimizer step {self.steps_taken}", culprits()
            )
        self.norms.remember(norm)
        return norm

    def take_up(self, steps_taken: int, norms: Iterable[float]) -> None:
        """Goes on from a checkpoint, of which parameters and optimizer states are there already."""
        self.steps_taken = steps_taken
        self.norms = NormHistory()
        self.norms.remember(norms)
        set_learning_rate(self.optimizer, self.schedule.rate(steps_taken) if steps_taken else 0.0)
        self.forget_gradients()

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad()

    def is_finite(self) -> bool:
        """No parameter is NaN or infinite on any rank. A collective."""
        data = [parameter.detach() for parameter in self.parameters.values()]
        device = _device_of_ranks(data[0])
        wrong = torch.zeros((), device=device)
        for each in data:
            local = each.to_local() if isinstance(each, DTensor) else each
            if local.numel():
                # Makes no copy, and a NaN is larger than all.
                largest = torch.linalg.vector_norm(local, ord=torch.inf)
                wrong += (~largest.isfinite()).float().to(device)
        dist.all_reduce(wrong)
        return not float(wrong)


def _device_of_ranks(data: torch.Tensor) -> torch.device:
    """Where collectives run: with offloading, parameters lie elsewhere."""
    return this_device(data.device_mesh.device_type) if isinstance(data, DTensor) else data.device
