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
    """With z = h W^T / T and p = softmax(z):

        y = z[target] - logsumexp(z)     dy/dz = onehot(target) - p
        H = -sum(p log p)                dH/dz = -p (log p + H)

    H is [0] where it is not asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        rows: int,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty_like(out)
        entropy = torch.empty(len(targets) if with_entropy else 0, device=hidden.device)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, temperature)
            normaliser[part] = torch.logsumexp(logits, dim=-1)
            out[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - normaliser[part]
            if with_entropy:
                log_p = logits.sub_(normaliser[part, None])
                entropy[part] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        ctx.temperature, ctx.rows, ctx.with_entropy = temperature, rows, with_entropy
        return out, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, entropy_grad = grads
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # A frozen head, under adapters, is spared a third of the work.
        wanted = ctx.needs_input_grad[1]
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wanted else None
        for start in range(0, len(targets), ctx.rows):
            part = slice(start, start + ctx.rows)
            scale = grad[part, None] / ctx.temperature
            log_p = _logits(hidden[part], weight, ctx.temperature).sub_(normaliser[part, None])
            pull = scale
            if ctx.with_entropy:
                pull = scale + entropy_grad[part, None] / ctx.temperature * (log_p + entropy[part, None])
            slope = log_p.exp_().mul_(-pull).scatter_add_(-1, targets[part, None], scale)
            slope = slope.to(hidden.dtype)
            torch.mm(slope, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += slope.T @ hidden[part]
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


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
    return _apply(hidden, weight, targets, temperature, rows, with_entropy=False)[0]


def token_logprobs_and_entropies(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `token_logprobs`, and the entropy of each distribution in nats, differentiable too: [tokens] float32 each."""
    return _apply(hidden, weight, targets, temperature, rows, with_entropy=True)


def _apply(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    rows: int | None,
    *,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    logprobs, entropies = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, temperature, rows or chunk_rows(len(weight)), with_entropy
    )
    return logprobs, entropies
