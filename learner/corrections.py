"""Off-policy corrections: constant weights for tokens that another policy sampled than the one whose gradient is taken.

All of them are made of one ratio, pi_proximal / pi_behaviour, of a token or of a whole rollout. Called by `objective`.
"""

from __future__ import annotations

import torch

from asyncrl.learner.objective_config import Level


def importance_ratio(
    proximal: torch.Tensor, behaviour: torch.Tensor, mask: torch.Tensor, row: torch.Tensor, level: Level
) -> torch.Tensor:
    """pi_proximal / pi_behaviour as a constant: of the token, or of its rollout: exp(sum of the log ratios over the mask).

    Tokens outside the mask are context: they count for no rollout's ratio.

    Args: [tokens] each; the rollouts are whole. Returns: [tokens].
    """
    log_ratio = (proximal - behaviour).detach()
    return (log_ratio if level == "token" else row_sums(log_ratio, mask, row)[row]).exp()


def truncated(ratio: torch.Tensor, cap: float | None) -> torch.Tensor:
    """min(ratio, cap): truncated importance sampling (Ionides 2008, doi:10.1198/106186008X320456), between engine and learner
    as in Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".

    With the surrogate's clip around the proximal policy it is decoupled PPO (Hilton et al. 2021, arXiv:2110.00641, equation 2),
    there without a cap, with one in AReaL (arXiv:2505.24298, equation 5).
    """
    return ratio if cap is None else ratio.clamp(max=cap)


def masked(ratio: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The ratio where low <= ratio <= high, else 0: masked importance sampling (IcePop, Ling team 2025, arXiv:2510.18855).

    What is masked so still counts in the loss's divisor: the other tokens do not weigh more for it (AReaL takes it out). A
    ratio that is NaN stays NaN, and stops the step.
    """
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def interpolated(current: torch.Tensor, behaviour: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
    """log pi_proximal = log pi_behaviour + a (log pi_current - log pi_behaviour), a = (age - 1) / age; a = 0 at ages below 2.

    Stands for the policy one version before the learner's, on the straight line (in log space) from the one that sampled:
    A-3PO, arXiv:2512.06547. For a fresh token (age 0) it is the behaviour policy, which is the learner's at batch
    start, so the clip acts as in PPO.

    Args: [tokens] each; `age`: version at hand-over - version of the token. Returns: [tokens], a constant.
    """
    share = (age - 1).clamp(min=0) / age.clamp(min=1)
    return (behaviour + share * (current.detach() - behaviour)).detach()


def row_sums(values: torch.Tensor, mask: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Sum of each rollout's values over the mask: [rows up to the last one with a token]."""
    zeros = torch.zeros(int(row.max()) + 1 if len(row) else 0, dtype=values.dtype, device=values.device)
    return zeros.index_add(0, row, torch.where(mask, values, 0.0))
