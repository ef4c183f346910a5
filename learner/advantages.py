"""Advantage estimators: plain functions on tensors. Called by `step` on whole batches, before they are divided."""

from __future__ import annotations

import torch

EPSILON = 1e-6


def group_relative(rewards: torch.Tensor, group: torch.Tensor, *, normalise_std: bool) -> torch.Tensor:
    """A_i = (r_i - mean(r of i's group)) / (std(r of i's group) + 1e-6).

    GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.2. Without `normalise_std` there is no division: Dr. GRPO, Liu et al.
    2025, arXiv:2503.20783, equation 3. The standard deviation is the sample's (n - 1), as in verl and TRL. A group of one has
    no baseline: its advantage is 0.

    Args:
        rewards: [rows]; computed in their own dtype.
        group: [rows] int64, dense from 0.
    Returns:
        [rows] advantages; those of one group sum to 0.
    """
    groups = int(group.max()) + 1
    zeros = torch.zeros(groups, dtype=rewards.dtype, device=rewards.device)
    size = zeros.index_add(0, group, torch.ones_like(rewards))
    mean = zeros.index_add(0, group, rewards) / size
    centred = rewards - mean[group]
    if not normalise_std:
        return centred
    variance = zeros.index_add(0, group, centred.square()) / (size - 1).clamp(min=1)
    return centred / (variance.sqrt()[group] + EPSILON)
