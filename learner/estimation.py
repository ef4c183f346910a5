"""What an objective makes of a batch before any loss: rewards and costs in, advantages and the critic's returns out. Pure.

    rewards --overlong--> less KL --> estimator (`advantages`, `critic_advantages`) --> normalised over group or batch
    costs   -------------- plus KL --> the same one     \\-- combined by the multiplier before it is normalised

Called by `preparation`, on every rank with the same whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from asyncrl.learner.advantages import (
    above_greedy,
    discounted_returns,
    group_relative,
    leave_one_out,
    on_last_token,
    whiten,
)
from asyncrl.learner.critic_advantages import gae, length_adaptive_lambda
from asyncrl.learner.objective_config import (
    DAPO,
    PPO,
    RLOO,
    VAPO,
    DrGRPO,
    Objective,
    ReinforcePP,
    ReinforcePPBaseline,
    ReMax,
)
from asyncrl.learner.penalties import constrained_advantages, overlong_penalty, rewards_less_kl


@dataclass(frozen=True, slots=True)
class Layout:
    """Which token belongs where."""

    group: torch.Tensor
    """[rows] int64, dense from 0."""
    row: torch.Tensor
    """[tokens] int64"""
    sampled: torch.Tensor
    """[tokens] bool"""
    trainable: torch.Tensor
    """[tokens] bool"""


@dataclass(frozen=True, slots=True)
class Signal:
    """What rollouts earned, or what they cost."""

    earned: torch.Tensor
    """[rows] float64"""
    greedy: torch.Tensor
    """[rows] float64: what the greedy answer to the rollout's prompt earned; NaN without one."""
    kl: torch.Tensor
    """[tokens] float64: KL to the reference at each sampled token."""
    kl_coefficient: float
    """So many times `kl` is taken off what was earned at its token."""


def shaped_rewards(objective: Objective, rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Rewards with what the objective adds to them. Args: [rows] rewards, answer tokens. Returns: [rows] float64."""
    overlong = objective.overlong
    if overlong is None:
        return rewards.double()
    penalty = overlong_penalty(lengths, overlong.free_tokens, overlong.ramp_tokens, overlong.penalty)
    return rewards.double() + penalty


def advantages_and_returns(
    objective: Objective,
    signals: Sequence[Signal],
    multiplier: float,
    layout: Layout,
    values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token of a whole batch.

    Args:
        signals: the reward's, and the cost's where that is under a constraint.
        multiplier: the cost's; without meaning where there is none.
        values: [tokens, outputs] float64, one output a signal; no outputs for an objective without a critic.
    Returns: advantages [tokens] and returns [tokens, outputs], float64; what the environment's tokens get has no meaning.
    """
    if isinstance(objective, PPO | VAPO):
        return _with_critic(objective, signals, multiplier, layout, values)
    # Estimators are linear up to their normalisation, so the combination of rewards is that of advantages.
    signal = signals[0] if len(signals) == 1 else _combined(*signals, multiplier=multiplier)
    return _without_critic(objective, signal, layout), torch.zeros_like(values)


def _combined(reward: Signal, cost: Signal, *, multiplier: float) -> Signal:
    return Signal(
        earned=constrained_advantages(reward.earned, cost.earned, multiplier),
        greedy=constrained_advantages(reward.greedy, cost.greedy, multiplier),
        kl=reward.kl,
        kl_coefficient=(reward.kl_coefficient - multiplier * cost.kl_coefficient) / (1 + multiplier),
    )


def _without_critic(objective: Objective, signal: Signal, layout: Layout) -> torch.Tensor:
    row, group = layout.row, layout.group
    if isinstance(objective, ReinforcePP):
        own, returns = row[layout.sampled], torch.zeros(len(row), dtype=signal.earned.dtype)
        rewards = _token_rewards(signal, own, layout.sampled)
        returns[layout.sampled] = discounted_returns(rewards, own, objective.discount)
        return whiten(returns, layout.trainable)
    rewards = _rollout_rewards(signal, layout)
    if isinstance(objective, ReinforcePPBaseline):
        return whiten(group_relative(rewards, group, normalise_std=False)[row], layout.trainable)
    if isinstance(objective, RLOO):
        return leave_one_out(rewards, group)[row]
    if isinstance(objective, ReMax):
        return above_greedy(rewards, signal.greedy)[row]
    assert not isinstance(objective, PPO | VAPO), "an objective with a critic has advantages of its own"
    normalise = isinstance(objective, DAPO) or (not isinstance(objective, DrGRPO) and objective.normalise_std)
    return group_relative(rewards, group, normalise_std=normalise)[row]


def _with_critic(
    objective: PPO | VAPO, signals: Sequence[Signal], multiplier: float, layout: Layout, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    own, kept = layout.row[layout.sampled], layout.sampled
    lambdas = _lambdas(objective, own, rows=len(layout.group))
    raw, returns = [], torch.zeros_like(values)
    for output, signal in enumerate(signals):
        rewards, value = _token_rewards(signal, own, kept), values[kept, output]
        estimates = [gae(rewards, value, own, objective.discount, factor) for factor in lambdas]
        raw.append(estimates[0])
        returns[kept, output] = estimates[-1] + value
    advantages = torch.zeros(len(layout.row), dtype=values.dtype)
    advantages[kept] = raw[0] if len(raw) == 1 else constrained_advantages(raw[0], raw[1], multiplier)
    return whiten(advantages, layout.trainable), returns


def _lambdas(objective: PPO | VAPO, own: torch.Tensor, rows: int) -> list[float | torch.Tensor]:
    """The policy's and, last, the critic's: one for all or [sampled tokens]."""
    if isinstance(objective, PPO):
        return [objective.gae_lambda]
    lengths = torch.bincount(own, minlength=rows)
    return [length_adaptive_lambda(lengths, objective.length_factor)[own], objective.critic_lambda]


def _token_rewards(signal: Signal, own: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """[sampled tokens]: the rollout's on its last token, and the KL where it arose."""
    return rewards_less_kl(on_last_token(signal.earned, own), signal.kl[sampled], signal.kl_coefficient)


def _rollout_rewards(signal: Signal, layout: Layout) -> torch.Tensor:
    """[rows]: with the KL of all its sampled tokens."""
    kl = torch.zeros_like(signal.earned).index_add(
        0, layout.row[layout.sampled], signal.kl[layout.sampled].to(signal.earned.dtype)
    )
    return rewards_less_kl(signal.earned, kl, signal.kl_coefficient)
