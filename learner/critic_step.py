"""The critic's minibatch: its passes, the value loss, the optimizer step. Called by `training`, after the policy's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from asyncrl.learner.aggregation import weighted_sum
from asyncrl.learner.batch import Batch
from asyncrl.learner.columns import Columns
from asyncrl.learner.critic import Critic
from asyncrl.learner.critic_advantages import value_losses
from asyncrl.learner.descent import Descent
from asyncrl.learner.objective_config import PPO, VAPO, Objective
from asyncrl.learner.passes import whole_column
from asyncrl.learner.rows import MicroBatch
from asyncrl.learner.stopwatch import Stopwatch


class CriticStep:
    """What a batch has to do with the critic: its values at the start, and its minibatches."""

    def __init__(
        self, critic: nn.Module, descent: Descent, objective: Objective, stopwatch: Stopwatch
    ) -> None:
        assert isinstance(critic, Critic) and isinstance(objective, PPO | VAPO)
        self._critic, self._descent, self._clip = critic, descent, objective.value_clip
        self._stopwatch = stopwatch

    def values(self, parts: Sequence[MicroBatch], batch: Batch, like: torch.Tensor) -> torch.Tensor:
        """[tokens, outputs]: whole. A collective. Raises `NonFiniteLoss` if one is not finite: advantages are made of them."""
        values = whole_column(parts, self._critic.values_no_grad, like, self._stopwatch)
        every = torch.arange(len(values), device=values.device)
        sampled = torch.from_numpy(batch.sampled).to(values.device)
        self._descent.check(batch, every, values.sum(-1), sampled, "value")
        return values

    def minibatch(
        self, batch: Batch, rows: np.ndarray, parts: Sequence[MicroBatch], columns: Columns
    ) -> tuple[float, float]:
        """Gradients of one minibatch, and the optimizer step if they are finite. A collective.

        Returns: the value loss, a mean over trainable tokens, and the gradient norm.
        """

        def loss(part: MicroBatch, out: torch.Tensor) -> torch.Tensor:
            own = columns.at(part.place)
            return weighted_sum(self._losses(own, out), own.value_weights)

        values = self._descent.gradients(parts, self._critic, loss, columns.values)
        places = torch.from_numpy(batch.sequences.tokens_of(rows)).to(values.device)
        own = columns.at(places)
        losses = self._losses(own, values[places])
        self._descent.check(batch, places, losses, own.trainable)
        total = float(weighted_sum(losses.double(), own.value_weights))
        return total, self._descent.step(batch, rows, skip=not bool(own.trainable.any()))

    def _losses(self, own: Columns, values: torch.Tensor) -> torch.Tensor:
        """[tokens]: of all outputs together."""
        return value_losses(values, own.values, own.returns, self._clip).sum(-1)
