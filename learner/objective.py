"""What an objective's settings come to: the loss of each token, and that of a minibatch.

    logprobs --> weight (`corrections`) x surrogate (`surrogates`) - entropy bonus + KL to the reference
    sum(weights x losses) (`aggregation`) + imitation of what was right (VAPO)

Advantages are there already (`estimation`). Called by `policy_step` for the gradient and again, without one, for the figures of
the step (`metrics`).
"""

from __future__ import annotations

import torch

from asyncrl.learner.aggregation import weighted_sum
from asyncrl.learner.columns import Columns
from asyncrl.learner.corrections import importance_ratio, interpolated, masked, truncated
from asyncrl.learner.objective_config import (
    CISPO,
    GRPO,
    GSPO,
    KL,
    PPO,
    Correction,
    Decoupled,
    Masked,
    NoCorrection,
    Objective,
)
from asyncrl.learner.penalties import kl_estimate
from asyncrl.learner.surrogates import (
    clip_acts,
    clipped_surrogate,
    clipped_weight_surrogate,
    log_ratio,
    sequence_log_ratio,
    weight_is_clipped,
)


def loss_of(columns: Columns, losses: torch.Tensor) -> torch.Tensor:
    """The loss of a minibatch, or a part's share in it, from its `token_losses`: sum(weights x losses), and for `vapo`
    sum(imitation x -log pi), arXiv:2504.05118, section 4.3: the mean over the tokens of what was right."""
    return weighted_sum(losses, columns.weights) + weighted_sum(-columns.current, columns.imitation)


def token_losses(objective: Objective, columns: Columns) -> torch.Tensor:
    """[tokens]: constant weight x surrogate - entropy bonus + KL. The gradient flows through `current` and `entropy`.

    The correction's weight is the surrogate's alone: entropy and KL are of the present policy, at states that another one
    may have reached.
    """
    proximal = _proximal(objective.correction, columns)
    losses = _weights(objective.correction, proximal, columns) * _surrogate(objective, proximal, columns)
    if objective.entropy_bonus:
        losses = losses - objective.entropy_bonus * columns.entropy
    if objective.kl is not None and objective.kl.place == "loss":
        losses = losses + objective.kl.coefficient * _kl(objective.kl, columns)
    return losses


def correction_weights(objective: Objective, columns: Columns) -> torch.Tensor:
    """[tokens]: what the surrogate is multiplied by; 0 where the token is not trainable."""
    return _weights(objective.correction, _proximal(objective.correction, columns), columns)


def correction_acts(objective: Objective, columns: Columns) -> torch.Tensor:
    """[tokens] bool: where the weight is not the ratio itself: at the cap, or masked."""
    correction = objective.correction
    ratio = _ratio(correction, _proximal(correction, columns), columns)
    if isinstance(correction, Masked):
        return (ratio < correction.low) | (ratio > correction.high)
    cap = None if isinstance(correction, NoCorrection) else correction.cap
    return torch.zeros_like(columns.trainable) if cap is None else ratio >= cap


def clip_bites(objective: Objective, columns: Columns) -> torch.Tensor:
    """[tokens] bool: where the clip has cut the gradient off, or (CISPO) bounded the ratio in it."""
    proximal = _proximal(objective.correction, columns)
    ratio = _log_ratio(objective, proximal, columns)
    if isinstance(objective, CISPO):
        return weight_is_clipped(ratio, objective.clip_low, objective.clip_high)
    return clip_acts(
        ratio, columns.advantages, objective.clip_low, objective.clip_high, _dual_clip(objective)
    )


def _surrogate(objective: Objective, proximal: torch.Tensor, columns: Columns) -> torch.Tensor:
    ratio, low, high = _log_ratio(objective, proximal, columns), objective.clip_low, objective.clip_high
    if isinstance(objective, CISPO):
        return clipped_weight_surrogate(ratio, columns.current, columns.advantages, low, high)
    return clipped_surrogate(ratio, columns.advantages, low, high, _dual_clip(objective))


def _log_ratio(objective: Objective, proximal: torch.Tensor, columns: Columns) -> torch.Tensor:
    if isinstance(objective, GSPO):
        ratio = sequence_log_ratio(columns.current, proximal, columns.trainable, columns.row)
    else:
        ratio = log_ratio(columns.current, proximal)
    # Of a token that is context only the ratio may be anything; where it overflows, the gradient would be NaN: 0 x inf.
    return torch.where(columns.trainable, ratio, 0.0)


def _kl(kl: KL, columns: Columns) -> torch.Tensor:
    # As in `_log_ratio`: of context alone it may be anything, and 0 x inf is NaN.
    policy = torch.where(columns.trainable, columns.current, 0.0)
    reference = torch.where(columns.trainable, columns.reference, 0.0)
    return kl_estimate(policy, reference, kl.estimator)


def _dual_clip(objective: Objective) -> float | None:
    return objective.dual_clip if isinstance(objective, GRPO | PPO) else None


def _proximal(correction: Correction, columns: Columns) -> torch.Tensor:
    if isinstance(correction, Decoupled) and correction.proximal == "interpolated":
        return interpolated(columns.current, columns.behaviour, columns.age)
    return columns.proximal


def _ratio(correction: Correction, proximal: torch.Tensor, columns: Columns) -> torch.Tensor:
    if isinstance(correction, NoCorrection):
        return torch.ones_like(proximal)
    level = "token" if isinstance(correction, Decoupled) else correction.level
    return importance_ratio(proximal, columns.behaviour, columns.trainable, columns.row, level)


def _weights(correction: Correction, proximal: torch.Tensor, columns: Columns) -> torch.Tensor:
    ratio = _ratio(correction, proximal, columns)
    if isinstance(correction, Masked):
        weights = masked(ratio, correction.low, correction.high)
    else:
        weights = truncated(ratio, None if isinstance(correction, NoCorrection) else correction.cap)
    # As in `_log_ratio`: 0 x inf.
    return torch.where(columns.trainable, weights, 0.0)
