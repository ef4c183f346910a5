"""Logprobs of chosen tokens straight from hidden states, without ever holding [tokens, vocabulary].

The plain way keeps logits, their float32 copy and the softmax for backward: three times tokens x vocabulary. Here one
chunk of tokens at a time is in memory, and backward computes the chunk again.
Called by `model` inside the forward pass of the sharded root, where the output weight is whole.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_BYTES = 64 * 2**20
"""Float32 logits that may be held at once: 110 tokens of a vocabulary of 152,000."""


def chunk_rows(vocabulary: int) -> int:
    """Tokens per chunk, at least 1."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


class _TokenLogprobs(torch.autograd.Function):
    """y = h . W[target] / T - logsumexp(h W^T / T);  dy/dlogits = (onehot(target) - softmax) / T."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        rows: int,
    ) -> torch.Tensor:
        out = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty_like(out)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, temperature)
            normaliser[part] = torch.logsumexp(logits, dim=-1)
            out[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - normaliser[part]
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.temperature, ctx.rows = temperature, rows
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grads[0]
        hidden, weight, targets, normaliser = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, len(targets), ctx.rows):
            part = slice(start, start + ctx.rows)
            scale = grad[part, None] / ctx.temperature
            slope = _logits(hidden[part], weight, ctx.temperature).sub_(normaliser[part, None]).exp_()
            slope.mul_(-scale).scatter_add_(-1, targets[part, None], scale)
            slope = slope.to(hidden.dtype)
            torch.mm(slope, weight, out=grad_hidden[part])
            grad_weight += slope.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = (hidden @ weight.T).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    rows: int | None = None,
) -> torch.Tensor:
    """log softmax(hidden @ weight.T / temperature)[target], float32.

    Args:
        hidden: [tokens, width]; row i predicts `targets[i]`.
        weight: [vocabulary, width], of the same dtype as `hidden`.
        targets: [tokens] int64.
        rows: tokens per chunk; by default what `CHUNK_BYTES` allows.
    Returns:
        [tokens] float32, differentiable in `hidden` and `weight` (once).
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    out = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, temperature, rows or chunk_rows(len(weight))
    )
    assert isinstance(out, torch.Tensor)
    return out
