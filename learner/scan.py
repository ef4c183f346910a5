"""Linear recurrences backwards in time over flat columns of many rollouts, without a loop over tokens. Pure torch.

Called by `advantages` and `critic_advantages`.
"""

from __future__ import annotations

import torch


def discounted_sums(values: torch.Tensor, factor: float | torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """y_t = x_t + factor_t y_(t+1) within a row; y = x on a row's last token.

    By doubling: after k rounds y_t covers 2^k tokens, so there are log2(longest row) rounds over all tokens at once.

    Args:
        values: [tokens], rows one after the other.
        factor: one for all, or [tokens].
        row: [tokens] int64.
    Returns: [tokens].
    """
    reach = torch.zeros_like(values)
    reach[:-1] = (row[1:] == row[:-1]).to(values.dtype)
    reach = reach * factor
    sums = values.clone()
    step = 1
    while step < len(sums) and bool(
        reach.any()
    ):  # ends: a row's last token reaches nothing, and reach is multiplied on
        sums[:-step] += reach[:-step] * sums[step:]
        ahead = torch.zeros_like(reach)
        ahead[:-step] = reach[step:]
        reach = reach * ahead
        step *= 2
    return sums
