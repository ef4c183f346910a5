"""Advantage estimators without a critic: plain functions on tensors. Called by `objective` on whole batches, before they are
divided."""

from __future__ import annotations

import torch

from asyncrl.learner.scan import discounted_sums

EPSILON = 1e-6
WHITEN_EPSILON = 1e-8


def group_relative(rewards: torch.Tensor, group: torch.Tensor, *, normalise_std: bool) -> torch.Tensor:
    """A_i = (r_i - mean(r of i's group)) / (std(r of i's group) + 1e-6).

    GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.2. Without `normalise_std` there is no division: Dr. GRPO, Liu et al.
    2025, arXiv:2503.20783, equation 3. The standard deviation is the sample's (n - 1), as in verl and TRL; the epsilon is
    verl's (TRL: 1e-4). A group of one has no baseline: its advantage is 0.

    Args:
        rewards: [rows]; computed in their own dtype.
        group: [rows] int64, dense from 0.
    Returns:
        [rows] advantages; those of one group sum to 0.
    """
    size, mean = _size_and_mean(rewards, group)
    centred = rewards - mean[group]
    if not normalise_std:
        return centred
    variance = torch.zeros_like(mean).index_add(0, group, centred.square()) / (size - 1).clamp(min=1)
    return centred / (variance.sqrt()[group] + EPSILON)


def leave_one_out(rewards: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """A_i = r_i - mean(r of the others of i's group) = n / (n - 1) (r_i - mean(r of i's group)).

    RLOO, Ahmadian et al. 2024, arXiv:2402.14740. A group of one has no others: its advantage is 0 (others take
    the raw reward there).

    Args: rewards [rows], group [rows] int64, dense from 0. Returns: [rows].
    """
    size, mean = _size_and_mean(rewards, group)
    return (rewards - mean[group]) * (size / (size - 1).clamp(min=1))[group]


def above_greedy(rewards: torch.Tensor, greedy: torch.Tensor) -> torch.Tensor:
    """A_i = r_i - r(greedy answer to i's prompt): ReMax, Li et al. 2023, arXiv:2310.10505. All [rows]."""
    return rewards - greedy


def discounted_returns(rewards: torch.Tensor, row: torch.Tensor, discount: float) -> torch.Tensor:
    """G_t = r_t + discount G_(t+1) within a rollout: the returns of REINFORCE++, Hu 2025, arXiv:2501.03262.

    The tokens are the sampled ones, as they are what the policy does: what an environment said in between takes no time.

    Args: rewards [sampled tokens], row [sampled tokens] int64, rows one after the other. Returns: [sampled tokens].
    """
    return discounted_sums(rewards, discount, row)


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the tokens of `mask`, var with n - 1: the batch normalisation of REINFORCE++
    (arXiv:2501.03262) and of PPO's advantages. 0 outside the mask.

    Without a second token there is no variance, and the values are only centred.

    Args: values [tokens], mask [tokens] bool.
    """
    kept = values[mask]
    centred = kept - kept.mean()
    variance = centred.square().sum() / max(len(kept) - 1, 1)
    out = torch.zeros_like(values)
    out[mask] = centred * (variance + WHITEN_EPSILON).rsqrt()
    return out


def on_last_token(rewards: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """A rollout's reward on its last token, 0 on the others.

    Args: rewards [rows]; row [tokens] int64, rows one after the other (a row may have no token). Returns: [tokens].
    """
    out = torch.zeros(len(row), dtype=rewards.dtype, device=rewards.device)
    last = torch.ones(len(row), dtype=torch.bool, device=row.device)
    last[:-1] = row[1:] != row[:-1]
    out[last] = rewards[row[last]]
    return out


def _size_and_mean(rewards: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    zeros = torch.zeros(int(group.max()) + 1, dtype=rewards.dtype, device=rewards.device)
    size = zeros.index_add(0, group, torch.ones_like(rewards))
    return size, zeros.index_add(0, group, rewards) / size
