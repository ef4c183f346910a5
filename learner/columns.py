"""Per-token columns of one batch, as the objective sees them. Made in `preparation`, filled by the learner's passes, read by
`objective`, `critic_step` and `metrics`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True, slots=True)
class Columns:
    """[tokens] each, [tokens, outputs] where it says so; whole on every rank, or those of one forward pass (`at`), which has
    whole rollouts."""

    behaviour: torch.Tensor
    """Logprobs under the policy that sampled."""
    proximal: torch.Tensor
    """Logprobs of the learner at batch start; NaN where the objective does not need them and no pass computed them."""
    current: torch.Tensor
    """Logprobs at the token's own forward pass in training: for the first minibatch the same as `proximal`."""
    reference: torch.Tensor
    """Logprobs of the reference policy; NaN without one."""
    entropy: torch.Tensor
    """In nats, at the same pass as `current`; 0 unless the objective needs it."""
    advantages: torch.Tensor
    weights: torch.Tensor
    """Of the token's loss in its minibatch's loss (`aggregation`); 0 where it is not trainable."""
    imitation: torch.Tensor
    """Of -log pi in its minibatch's loss (`vapo`); 0 elsewhere."""
    values: torch.Tensor
    """[tokens, outputs]: what the critic at batch start gives for the state before the token. No outputs without a critic; one
    for the reward, and a second one for the cost where that is under a constraint."""
    returns: torch.Tensor
    """[tokens, outputs]: what the critic is to learn."""
    value_weights: torch.Tensor
    """Of the token's value loss in its minibatch's: 1 / trainable tokens, whatever the policy's aggregation."""
    trainable: torch.Tensor
    """bool"""
    row: torch.Tensor
    """int64: the token's rollout in the batch."""
    age: torch.Tensor
    """int64: version at hand-over - version of the token; without meaning for the environment's."""

    def at(self, place: torch.Tensor) -> Columns:
        """The columns of the tokens at `place`."""
        return Columns(**{field.name: getattr(self, field.name)[place] for field in fields(self)})
