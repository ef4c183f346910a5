"""Surrogates of the policy gradient: one loss per token, to be minimised. Plain functions on tensors, called by `objective`.

Three logprobs of the same token, by name:
    behaviour   of the engine that sampled it
    proximal    of the learner at batch start: the centre of the trust region
    current     of the learner now: the only one with a gradient
"""

from __future__ import annotations

import torch

from asyncrl.learner.corrections import row_sums


def clipped_surrogate(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(log_ratio), for A < 0 at most -dual_clip A.

    PPO, Schulman et al. 2017, arXiv:1707.06347, equation 7; two bounds as in DAPO, Yu et al. 2025, arXiv:2503.14476, equation 10;
    the dual clip is of Ye et al. 2020, arXiv:1912.09729. At r = 1 the gradient is REINFORCE's, -A grad log pi.

    Args: all [tokens]; the gradient flows through `log_ratio`. Returns: [tokens].
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)


def clip_acts(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """[tokens] bool: where `clipped_surrogate` has no gradient (the ratio left the bounds in the advantage's direction)."""
    ratio = log_ratio.exp()
    above = (ratio > 1 + clip_high) & (advantages > 0)
    below = (ratio < 1 - clip_low) & (advantages < 0)
    if dual_clip is not None:
        below = below | ((ratio > dual_clip) & (advantages < 0))
    return above | below


def log_ratio(current: torch.Tensor, proximal: torch.Tensor) -> torch.Tensor:
    """log(pi_current / pi_proximal) per token: [tokens]."""
    return current - proximal.detach()


def sequence_log_ratio(
    current: torch.Tensor, proximal: torch.Tensor, mask: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """GSPO's ratio of a rollout, s = exp(mean over its tokens of log(pi_current / pi_proximal)), for each of its tokens.

    The value is log s; the gradient is that of the token's own log pi, which in the sequence mean of token means adds up to
    that of s: Zheng et al. 2025, arXiv:2507.18071, equations 5 and 7, in its GSPO-token form. The mean is over the mask.

    Args: [tokens] each; the rollouts are whole. Returns: [tokens].
    """
    sums = row_sums((current - proximal).detach(), mask, row)
    counts = row_sums(torch.ones_like(sums)[row], mask, row).clamp(min=1)
    return (sums / counts)[row] + current - current.detach()


def clipped_weight_surrogate(
    log_ratio: torch.Tensor,
    current: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi_current: CISPO, MiniMax-M1, arXiv:2506.13585, equations 4 and 5.

    No token loses its gradient; the weight of an odd one is bounded. clip_low = 1 leaves out the lower bound, as the paper (and
    TRL) does.

    Args: all [tokens]; the gradient flows through `current`. Returns: [tokens].
    """
    weight = log_ratio.detach().exp().clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages * current


def weight_is_clipped(log_ratio: torch.Tensor, clip_low: float, clip_high: float) -> torch.Tensor:
    """[tokens] bool: where `clipped_weight_surrogate` has taken the bound in place of the ratio."""
    ratio = log_ratio.exp()
    return (ratio > 1 + clip_high) | (ratio < 1 - clip_low)
