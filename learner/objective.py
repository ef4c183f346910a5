"""Objectives: plain functions on tensors, one value per token, and the aggregation that makes them one loss.

Three logprobs of the same token, by name:
    behaviour   of the engine that sampled it
    proximal    of the learner at batch start: the centre of the trust region
    current     of the learner now: the only one with a gradient
Called by `step` for the gradient and again, without one, for the figures of the step.
"""

from __future__ import annotations

import torch


def clipped_surrogate(
    current: torch.Tensor, proximal: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi_current / pi_proximal.

    PPO, Schulman et al. 2017, arXiv:1707.06347, equation 7; the two bounds are DAPO's, Yu et al. 2025, arXiv:2503.14476,
    equation 10. No dual clip.

    Args: all [tokens]; the gradient flows through `current` only.
    Returns: [tokens] loss, to be minimised.
    """
    ratio = (current - proximal.detach()).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clip_acts(
    current: torch.Tensor, proximal: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    """[tokens] bool: where the clip has cut the gradient off (the ratio left the bounds in the advantage's direction)."""
    ratio = (current - proximal).exp()
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))


def importance_weights(proximal: torch.Tensor, behaviour: torch.Tensor, cap: float) -> torch.Tensor:
    """w = min(pi_proximal / pi_behaviour, cap), a constant: [tokens].

    Truncated importance sampling per token (Ionides 2008, doi:10.1198/106186008X320456), between engine and learner as in Yao
    et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; with the clip around the proximal
    policy it is decoupled PPO (Hilton et al. 2021, arXiv:2110.00641, equation 2; AReaL, arXiv:2505.24298, equation 5).
    """
    return (proximal - behaviour).detach().exp().clamp(max=cap)


def token_mean(losses: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """sum of the masked losses / `count`: DAPO's token-level loss (arXiv:2503.14476, equation 12).

    `count` is the number of trainable tokens of the whole minibatch, over all ranks and micro-batches, so that the sum of
    the parts is the loss of the whole, however it was divided.

    Args: losses [tokens], mask [tokens] bool.
    """
    return torch.where(mask, losses, 0.0).sum() / count
