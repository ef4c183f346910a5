"""What a critic is for: generalised advantage estimation, and the loss that it learns by.

Plain functions on tensors. Tokens of an estimate are the sampled ones, rows one after the other: what an environment said in
between is a part of the state and takes no time. Called by `estimation` and `critic_step`.
"""

from __future__ import annotations

import torch

from asyncrl.learner.scan import discounted_sums


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    row: torch.Tensor,
    discount: float,
    gae_lambda: float | torch.Tensor,
) -> torch.Tensor:
    """A_t = delta_t + discount lambda A_(t+1), delta_t = r_t + discount V_(t+1) - V_t, V = 0 after a rollout's end.

    Schulman et al. 2016, arXiv:1506.02438, equation 16. Returns for the critic are A + V, before any normalisation.

    Args: all [sampled tokens]; `gae_lambda` one for all or [sampled tokens].
    """
    following = torch.zeros_like(values)
    following[:-1] = values[1:] * (row[1:] == row[:-1])
    return discounted_sums(rewards + discount * following - values, discount * gae_lambda, row)


def length_adaptive_lambda(lengths: torch.Tensor, length_factor: float) -> torch.Tensor:
    """lambda = 1 - 1 / (length_factor x tokens): VAPO, Yue et al. 2025, arXiv:2504.05118, section 4.2.

    Weights of the TD errors then add up to about length_factor x tokens. Below 1 / length_factor tokens the formula is negative;
    there lambda is 0, one step ahead.

    Args: lengths [rows], sampled tokens. Returns: [rows] float64.
    """
    return (1 - 1 / (length_factor * lengths.double().clamp(min=1))).clamp(min=0)


def value_losses(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2; without `clip` (V - R)^2 / 2.

    The critic's clip of OpenAI's PPO (Baselines' ppo2; Engstrom et al. 2020, arXiv:2005.12729, section 3); the half is verl's.

    Args: all [tokens]; the gradient flows through `values`. Returns: [tokens].
    """
    plain = (values - returns).square()
    if clip is None:
        return plain / 2
    near = torch.clamp(values, old_values - clip, old_values + clip)
    return torch.maximum(plain, (near - returns).square()) / 2
