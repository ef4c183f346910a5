"""What an objective's settings come to: advantages of a batch, and the loss of each token.

    rewards --overlong--> advantages (`advantages`)                                        whole batches, by `step`
    logprobs --> weight (`corrections`) x surrogate (`surrogates`) - entropy bonus         forward passes, by `step`
    sum(weights x losses) (`aggregation`)

Called by `step` for the gradient and again, without one, for the figures of the step (`metrics`).
"""

from __future__ import annotations

import torch

from asyncrl.learner.advantages import (
    discounted_returns,
    group_relative,
    leave_one_out,
    on_last_token,
    whiten,
)
from asyncrl.learner.columns import Columns
from asyncrl.learner.corrections import importance_ratio, interpolated, masked, truncated
from asyncrl.learner.objective_config import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    PPO,
    RLOO,
    VAPO,
    Correction,
    Decoupled,
    DrGRPO,
    Masked,
    NoCorrection,
    Objective,
    ReinforcePP,
    ReinforcePPBaseline,
    ReMax,
)
from asyncrl.learner.objective_needs import name_of
from asyncrl.learner.penalties import overlong_penalty
from asyncrl.learner.surrogates import (
    clip_acts,
    clipped_surrogate,
    clipped_weight_surrogate,
    log_ratio,
    sequence_log_ratio,
    weight_is_clipped,
)


def shaped_rewards(objective: Objective, rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Rewards with what the objective adds to them. Args: [rows] rewards, answer tokens. Returns: [rows] float64."""
    overlong = objective.overlong
    if overlong is None:
        return rewards.double()
    penalty = overlong_penalty(lengths, overlong.free_tokens, overlong.ramp_tokens, overlong.penalty)
    return rewards.double() + penalty


def token_advantages(
    objective: Objective,
    rewards: torch.Tensor,
    group: torch.Tensor,
    row: torch.Tensor,
    sampled: torch.Tensor,
    trainable: torch.Tensor,
) -> torch.Tensor:
    """Advantage of each token of a whole batch, for objectives that need no part beside the policy.

    Args: rewards [rows] float64, group [rows] int64, row [tokens] int64, sampled and trainable [tokens] bool.
    Returns: [tokens] float64; what the environment's tokens get has no meaning.
    """
    if isinstance(objective, ReinforcePP):
        returns = torch.zeros(len(row), dtype=rewards.dtype)
        own = row[sampled]
        returns[sampled] = discounted_returns(on_last_token(rewards, own), own, objective.discount)
        return whiten(returns, trainable)
    if isinstance(objective, ReinforcePPBaseline):
        return whiten(group_relative(rewards, group, normalise_std=False)[row], trainable)
    if isinstance(objective, RLOO):
        return leave_one_out(rewards, group)[row]
    if isinstance(objective, PPO | VAPO | ReMax):
        raise AssertionError(f"{name_of(objective)}: a learner without its parts does not start")
    normalise = isinstance(objective, DAPO) or (not isinstance(objective, DrGRPO) and objective.normalise_std)
    return group_relative(rewards, group, normalise_std=normalise)[row]


def token_losses(objective: Objective, columns: Columns) -> torch.Tensor:
    """[tokens]: constant weight x surrogate - entropy bonus. The gradient flows through `current` and `entropy`."""
    proximal = _proximal(objective.correction, columns)
    losses = _weights(objective.correction, proximal, columns) * _surrogate(objective, proximal, columns)
    return losses - objective.entropy_bonus * columns.entropy if objective.entropy_bonus else losses


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
