"""What is added to rewards and losses: KL to a reference, overlong punishment, and a cost under constraint. Plain functions.

Called by `estimation`, `objective`, `preparation`, `constraint` and `metrics`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch


def kl_estimate(
    policy: torch.Tensor, reference: torch.Tensor, estimator: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """Of KL(policy || reference), per token that the policy sampled; d = log pi_policy - log pi_reference:

        k1  d                  unbiased; its gradient has mean 0, so it belongs into the reward
        k2  d^2 / 2            biased; its gradient is that of the KL
        k3  exp(-d) - 1 + d    unbiased and never negative

    Schulman 2020, "Approximating KL divergence"; on the gradients: Tang & Munos 2025, arXiv:2506.09477.

    Args: [tokens] each; the gradient flows through `policy`. Returns: [tokens].
    """
    d = policy - reference.detach()
    if estimator == "k1":
        return d
    return d.square() / 2 if estimator == "k2" else torch.expm1(-d) + d


def rewards_less_kl(rewards: torch.Tensor, kl: torch.Tensor, coefficient: float) -> torch.Tensor:
    """r_t - coefficient KL_t: the KL in the reward, Ouyang et al. 2022, arXiv:2203.02155, equation 2. [tokens] each."""
    return rewards - coefficient * kl.detach()


def overlong_penalty(
    lengths: torch.Tensor, free_tokens: int, ramp_tokens: int, penalty: float
) -> torch.Tensor:
    """0 up to `free_tokens`, then falling in a straight line to -penalty after `ramp_tokens` more, and no further.

    Soft overlong punishment: DAPO, Yu et al. 2025, arXiv:2503.14476, equation 13, where free + ramp is the longest answer.

    Args: lengths [rows], answer tokens. Returns: [rows] float64, to be added to the rewards.
    """
    return -penalty * ((lengths.double() - free_tokens) / ramp_tokens).clamp(0, 1)


def constrained_advantages(
    reward_advantages: torch.Tensor, cost_advantages: torch.Tensor, multiplier: float
) -> torch.Tensor:
    """(A_reward - multiplier A_cost) / (1 + multiplier): Safe RLHF, Dai et al. 2023, arXiv:2310.12773.

    The division keeps the size of the gradient, whatever the multiplier has grown to. [rows] or [tokens] each. Estimators that
    are linear in the reward may take this of rewards and costs instead: it is the same.
    """
    return (reward_advantages - multiplier * cost_advantages) / (1 + multiplier)


def next_multiplier(
    multiplier: float, mean_cost: float, limit: float, rate: float, max_multiplier: float
) -> float:
    """ln lambda' = ln lambda + rate lambda (mean_cost - limit), at most `max_multiplier`.

    Gradient ascent on the multiplier's logarithm, which keeps it above 0: arXiv:2310.12773.

    Raises ValueError if the mean cost is not finite: the multiplier would never come back.
    """
    if not math.isfinite(mean_cost):
        raise ValueError(
            f"mean cost of a batch must be a finite number, got {mean_cost}; look at its cost function"
        )
    grown = math.log(multiplier) + rate * multiplier * (mean_cost - limit)
    return math.exp(min(grown, math.log(max_multiplier)))
