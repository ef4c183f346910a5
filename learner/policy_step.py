"""The policy's minibatch: its passes, the objective's gradient, the optimizer step. Called by `training`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from asyncrl.learner.batch import Batch
from asyncrl.learner.columns import Columns
from asyncrl.learner.descent import Descent
from asyncrl.learner.model import Policy
from asyncrl.learner.objective import loss_of, token_losses
from asyncrl.learner.objective_config import Objective
from asyncrl.learner.objective_needs import needs_of
from asyncrl.learner.rows import MicroBatch


class PolicyStep:
    """Logprobs are of the distribution at `temperature`, which was sampled from."""

    def __init__(self, policy: Policy, descent: Descent, objective: Objective, temperature: float) -> None:
        self._policy, self._descent = policy, descent
        self._objective, self._temperature = objective, temperature
        self._entropy = needs_of(objective).entropy

    def minibatch(
        self,
        batch: Batch,
        rows: np.ndarray,
        parts: Sequence[MicroBatch],
        columns: Columns,
        *,
        at_batch_start: bool,
    ) -> tuple[float, float]:
        """Gradients of one minibatch, and the optimizer step if they are finite. Fills its tokens' columns. A collective.

        Args: `at_batch_start`, no step was taken since then, so that its own logprobs are the proximal ones.
        Returns: loss and gradient norm.
        """

        def forward(part: MicroBatch) -> torch.Tensor:
            out = self._policy(part, self._temperature, with_entropy=self._entropy)
            return out.view(1 + self._entropy, -1).T  # type: ignore[no-any-return]

        def loss(part: MicroBatch, out: torch.Tensor) -> torch.Tensor:
            own = columns.at(part.place)
            own = dataclasses.replace(
                own,
                current=out[:, 0],
                entropy=out[:, 1] if self._entropy else own.entropy,
                proximal=out[:, 0].detach() if at_batch_start else own.proximal,
            )
            return loss_of(own, token_losses(self._objective, own))

        like = columns.current.new_zeros((batch.tokens, 1 + self._entropy))
        outputs = self._descent.gradients(parts, forward, loss, like)
        places = torch.from_numpy(batch.sequences.tokens_of(rows)).to(like.device)
        self._fill(columns, outputs, places, at_batch_start=at_batch_start)
        own = columns.at(places)
        losses = token_losses(self._objective, own)
        self._descent.check(batch, places, losses, own.trainable)
        total = float(loss_of(own, losses.double()))
        return total, self._descent.step(batch, rows, skip=not bool(own.trainable.any()))

    def _fill(
        self, columns: Columns, outputs: torch.Tensor, places: torch.Tensor, *, at_batch_start: bool
    ) -> None:
        columns.current[places] = outputs[places, 0]
        if self._entropy:
            columns.entropy[places] = outputs[places, 1]
        if at_batch_start:
            columns.proximal[places] = outputs[places, 0]
