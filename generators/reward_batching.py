"""Which answers that wait are read by a reward model together, and when. Pure. Called by `reward_model_process`.

A batch is a rectangle of `rows x longest` tokens and costs its padding too. So the answer that has waited longest picks its
company by length, the nearest first, as long as the rectangle holds `tokens_per_batch`. It leaves when it is full or when its
first answer has waited `wait_s`; nobody waits for more than the batches before its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Waiting(NamedTuple):
    """One answer."""

    arrived_s: float
    tokens: int


class Batch(NamedTuple):
    """Read these now."""

    indices: list[int]


class Later(NamedTuple):
    """Look again when more have come, or after `seconds`."""

    seconds: float


def next_batch(waiting: Sequence[Waiting], now: float, tokens_per_batch: int, wait_s: float) -> Batch | Later:
    """`waiting`: in order of arrival, at least one. The first of them is in every batch that is decided on."""
    first = waiting[0]
    chosen = fitting([one.tokens for one in waiting], tokens_per_batch)
    left_s = first.arrived_s + wait_s - now
    is_full = len(chosen) < len(waiting) or first.tokens >= tokens_per_batch
    return Batch(chosen) if is_full or left_s <= 0 else Later(left_s)


def fitting(lengths: Sequence[int], tokens_per_batch: int) -> list[int]:
    """Indices of the first and of those nearest to it in length, ascending, whose rectangle holds `tokens_per_batch`."""
    nearest = sorted(range(1, len(lengths)), key=lambda i: (abs(lengths[i] - lengths[0]), i))
    chosen, longest = [0], lengths[0]
    for index in nearest:
        wider = max(longest, lengths[index])
        if (len(chosen) + 1) * wider > tokens_per_batch:
            continue
        chosen.append(index)
        longest = wider
    return sorted(chosen)
