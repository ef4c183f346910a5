"""Attention over rollouts that are packed into one row: none looks into another.

Registered with transformers under `NAME`; a model that is loaded with `attn_implementation=NAME` calls `packed_attention` in
each layer, with the `Packing` that `Policy.forward` passed down. Positions start from 0 at each rollout (`position_ids`).
Called by `model`, through transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "asyncrl_packed"


@dataclass(frozen=True, slots=True)
class Packing:
    """Where one rollout ends and the next begins. Host integers: no layer waits for the device to learn them."""

    lengths: tuple[int, ...]
    """Positions of each rollout, in order; their sum is the row's."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each rollout.

    Args:
        query: [1, heads, positions, size]; key and value: [1, key heads, positions, size].
        attention_mask: None; there is nothing to mask but what causality does.
        sliding_window: a position sees so many up to and with its own.
    Returns: [1, positions, heads, size]
    """
    if attention_mask is not None or dropout:
        raise ValueError(f"{type(module).__name__}: packed rollouts take neither a mask nor dropout")
    parts = [
        _causal(q, k, v, scaling, sliding_window)
        for q, k, v in zip(
            *(torch.split(tensor, packing.lengths, dim=2) for tensor in (query, key, value)), strict=True
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if window is None or length <= window:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    place = torch.arange(length, device=query.device)
    distance = place[:, None] - place[None, :]
    seen = (distance >= 0) & (distance < window)
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=grouped)


AttentionInterface.register(NAME, packed_attention)
