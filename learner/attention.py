"""Attention over rollouts that are packed into one row: none looks into another.

Registered with transformers under `NAME`; a model that is loaded with `attn_implementation=NAME` calls `packed_attention` in
each layer, with the `Packing` that `Policy.forward` passed down. Positions start from 0 at each rollout (`position_ids`).

Invariant: nothing is computed for padding. In 16 bits on CUDA the kernel for ragged rows does the whole row; else one call of
PyTorch's attention does neighbours of equal length (why: docs/learner.md).
Whatever else a model would have its attention do is an error: the result would be wrong and nothing would say so.
Called by `model`, through transformers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "asyncrl_packed"

WINDOW_CHUNK = 512
"""Positions of a rollout longer than the model's window that are done in one call, each call over the window before them."""

_NOT_FOR_ATTENTION = frozenset({"position_ids", "position_embeddings", "use_cache", "cache_position"})
"""What decoders pass on to every layer and attention functions do without."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where one rollout ends and the next begins. Host integers: no layer waits for the device to learn them."""

    lengths: tuple[int, ...]
    """Positions of each rollout, in order, none 0; their sum is the row's."""
    starts: torch.Tensor
    """[rollouts + 1] int32: their bounds, on the device of the row."""

    @classmethod
    def of(cls, lengths: tuple[int, ...]) -> Packing:
        return cls(lengths, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32))

    def to(self, device: torch.device) -> Packing:
        return Packing(self.lengths, self.starts.to(device))

    def runs(self) -> Iterator[tuple[int, int]]:
        """(rollouts, their length) of neighbours that are equally long."""
        for length, group in itertools.groupby(self.lengths):
            yield len(list(group)), length


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each rollout. Not compiled: lengths differ from pass to pass.

    Args:
        query: [1, heads, positions, size]; key and value: [1, key heads, positions, size].
        attention_mask: None; there is nothing to mask but what causality does.
        sliding_window: a position sees so many up to and with its own.
    Returns: [1, positions, heads, size]
    Raises ValueError where the model wants more of its attention than this.
    """
    _check_wishes(module, attention_mask, dropout, others)
    # [positions, heads, size] each
    rows = [tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value)]
    if query.is_cuda and query.dtype != torch.float32 and query.shape[-1] == value.shape[-1]:
        return _ragged(rows, packing, scaling, sliding_window)[None], None
    runs = list(packing.runs())
    parts = zip(*(torch.split(row, [count * length for count, length in runs]) for row in rows), strict=True)
    done = [
        _equally_long([part.unflatten(0, run) for part in own], scaling, sliding_window).flatten(0, 1)
        for run, own in zip(runs, parts, strict=True)
    ]
    return torch.cat(done)[None], None


def _check_wishes(
    module: torch.nn.Module, mask: torch.Tensor | None, dropout: float, others: dict[str, Any]
) -> None:
    wishes = {"attention_mask": mask, "dropout": dropout or None}
    wishes |= {name: wish for name, wish in others.items() if name not in _NOT_FOR_ATTENTION}
    causal = wishes.pop("is_causal", None)
    # Flags that are off (`output_attentions`) and what is not there (`s_aux`, `softcap`) ask for nothing.
    more = [name for name, wish in wishes.items() if wish is not None and wish is not False]
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        more.append("no causality")
    if more:
        raise ValueError(
            f"{type(module).__name__} hands its attention {', '.join(more)}, which attention over packed rollouts does not "
            "compute; its logprobs would be wrong. Use another model"
        )


def _ragged(
    rows: list[torch.Tensor], packing: Packing, scaling: float | None, window: int | None
) -> torch.Tensor:
    """[positions, heads, size], all rollouts in one kernel."""
    longest = max(packing.lengths)
    # The kernel counts how many positions are seen to the left of one's own; -1: all.
    left = -1 if window is None or longest <= window else window - 1
    query, key, value = (row.contiguous() for row in rows)
    out = varlen_attn(
        query,
        key,
        value,
        packing.starts,
        packing.starts,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor), "the normalisers come only if they are asked for"
    return out


def _equally_long(rows: list[torch.Tensor], scaling: float | None, window: int | None) -> torch.Tensor:
    """[rollouts, length, heads, size] in and out."""
    query, key, value = (row.transpose(1, 2) for row in rows)
    grouped = query.shape[1] != key.shape[1]
    if window is None or query.shape[2] <= window:
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    else:
        out = _windowed(query, key, value, scaling, window)
    return out.transpose(1, 2)


def _windowed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int
) -> torch.Tensor:
    """A stretch of positions at a time over the keys that any of them sees: cost and memory grow with length x window."""
    length = query.shape[2]
    parts = []
    for start in range(0, length, WINDOW_CHUNK):
        end, first = min(start + WINDOW_CHUNK, length), max(0, start - window + 1)
        place = torch.arange(start, end, device=query.device)[:, None]
        other = torch.arange(first, end, device=query.device)[None, :]
        seen = (other <= place) & (place - other < window)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, first:end],
                value[:, :, first:end],
                attn_mask=seen,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(parts, dim=2)


AttentionInterface.register(NAME, packed_attention)
