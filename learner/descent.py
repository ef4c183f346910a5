"""What the minibatches of policy and critic have in common: gradients of this rank's passes, checks, the optimizer step.

Invariants:
- No optimizer step is taken on a loss or gradient that is not fit; all ranks then raise the same `LearnerFault`.
- The gradient is that of a sum over the tokens of all ranks, however they are divided.
Called by `policy_step` and `critic_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from asyncrl.learner.batch import Batch
from asyncrl.learner.faults import NonFiniteLoss, NormLimits, culprits_of
from asyncrl.learner.rows import MicroBatch
from asyncrl.learner.stopwatch import Stopwatch
from asyncrl.learner.trained import Trained


class Descent:
    """One `Trained`, and how it takes a minibatch: `gradients`, `check`, `step`. Each is a collective."""

    def __init__(self, name: str, trained: Trained, limits: NormLimits, stopwatch: Stopwatch) -> None:
        """`name` is what a fault calls it."""
        self._name, self._trained, self._limits, self._stopwatch = name, trained, limits, stopwatch

    def gradients(
        self,
        parts: Sequence[MicroBatch],
        forward: Callable[[MicroBatch], torch.Tensor],
        loss: Callable[[MicroBatch, torch.Tensor], torch.Tensor],
        like: torch.Tensor,
    ) -> torch.Tensor:
        """Adds up the gradients of all ranks' passes. Returns their outputs, whole, with the shape of `like`, 0 elsewhere.

        Args: `forward`, a part's outputs [tokens of the part, ...]; `loss`, the part's share in the minibatch's loss.
        """
        outputs = torch.zeros_like(like)
        for part in parts:
            with self._stopwatch.measure("forward_s"):
                part = part.to(like.device)
                out = forward(part)
                outputs[part.place] = out.detach()
                # FSDP averages gradients over the ranks; the loss is a sum over them.
                share = loss(part, out) * dist.get_world_size()
            with self._stopwatch.measure("backward_s"):
                share.backward()  # type: ignore[no-untyped-call]
        dist.all_reduce(outputs)
        return outputs

    def check(
        self,
        batch: Batch,
        places: torch.Tensor,
        numbers: torch.Tensor,
        chosen: torch.Tensor,
        what: str = "loss",
    ) -> None:
        """Raises `NonFiniteLoss`, on every rank alike, if a chosen token's number is not finite. [tokens] of `places` each."""
        wrong = places[~numbers.isfinite() & chosen]
        if len(wrong):
            self._trained.forget_gradients()
            rows = np.unique(batch.sequences.row_of_token()[wrong.cpu().numpy()])
            raise NonFiniteLoss(
                f"{self._name}: {what} is not finite on {len(wrong)} tokens", culprits_of(batch, rows)
            )

    def step(self, batch: Batch, rows: np.ndarray, *, skip: bool) -> float:
        """The optimizer step, unless it is to be skipped. Returns the gradient's norm before clipping. Raises `LearnerFault`."""
        with self._stopwatch.measure("optimizer_s"):
            return self._trained.step_if_fit(
                self._name, self._limits, lambda: culprits_of(batch, rows), skip=skip
            )
