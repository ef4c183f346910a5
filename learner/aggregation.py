"""From one loss per token to one number: weights of the tokens, so that the loss is sum(weight x loss).

Invariant: weights are computed from the columns of the whole minibatch, which every rank has. So the sum over ranks and
micro-batches is exactly the loss of the whole, however it was divided. Called by `step`.
"""

from __future__ import annotations

import torch

from asyncrl.learner.objective_config import Aggregation


def token_weights(
    aggregation: Aggregation, mask: torch.Tensor, row: torch.Tensor, divisor_tokens: int | None
) -> torch.Tensor:
    """With n_i trainable tokens in rollout i, and R rollouts that have one:

        token_mean      1 / sum(n_i)               DAPO, Yu et al. 2025, arXiv:2503.14476, equation 12
        sequence_sum    1 / R                      sequence mean of token sums: a rollout is one action
        sequence_mean   1 / (R n_i)                sequence mean of token means: GRPO, arXiv:2402.03300, equation 3
        fixed_divisor   1 / (R divisor_tokens)     Dr. GRPO, Liu et al. 2025, arXiv:2503.20783, appendix on the implementation

    A rollout with no trainable token (empty, or all of it context) is not there: it neither adds to the loss nor thins it out.

    Args: mask [tokens] bool, row [tokens] int64.
    Returns: [tokens] float32; 0 where the mask is not set. All 0 without a trainable token.
    """
    counts = torch.zeros(int(row.max()) + 1 if len(row) else 0, device=mask.device)
    counts = counts.index_add(0, row, mask.float())
    rows = int((counts > 0).sum())
    if aggregation == "token_mean":
        divisor = counts.sum().expand(len(row))
    elif aggregation == "sequence_sum":
        divisor = torch.full_like(counts, rows)[row]
    elif aggregation == "sequence_mean":
        divisor = rows * counts[row]
    else:
        assert divisor_tokens is not None, "a recipe with fixed_divisor and without divisor_tokens is refused"
        divisor = torch.full_like(counts, rows * divisor_tokens)[row]
    return torch.where(mask, 1 / divisor, 0.0)


def weighted_sum(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum(weights x losses) over the tokens with a weight: what a token without one has, NaN too, does not count."""
    return torch.where(weights > 0, weights * losses, 0.0).sum()
