"""Per-token columns of one batch, as the objective sees them. Made and filled by `step`, read by `objective` and `metrics`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True, slots=True)
class Columns:
    """[tokens] each, whole on every rank, or those of one forward pass (`at`), which has whole rollouts."""

    behaviour: torch.Tensor
    """Logprobs under the policy that sampled."""
    proximal: torch.Tensor
    """Logprobs of the learner at batch start; NaN where the objective does not need them and no pass computed them."""
    current: torch.Tensor
    """Logprobs at the token's own forward pass in training: for the first minibatch the same as `proximal`."""
    entropy: torch.Tensor
    """In nats, at the same pass; 0 unless the objective needs it."""
    advantages: torch.Tensor
    weights: torch.Tensor
    """Of the token's loss in its minibatch's loss (`aggregation`); 0 where it is not trainable."""
    trainable: torch.Tensor
    """bool"""
    row: torch.Tensor
    """int64: the token's rollout in the batch."""
    age: torch.Tensor
    """int64: version at hand-over - version of the token; without meaning for the environment's."""

    def at(self, place: torch.Tensor) -> Columns:
        """The columns of the tokens at `place`."""
        return Columns(**{field.name: getattr(self, field.name)[place] for field in fields(self)})
