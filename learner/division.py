"""Which rows run together: lengths in, rows of each rank's forward passes out. Pure numpy; called by `batch` and `sft`.

Rows of a pass are packed one after the other, so a pass computes its tokens and no padding. What is left to decide is which
rank does what: ranks meet in the collectives of every layer of every pass, so a pass takes as long as its slowest rank.

Invariants: each row is in one pass of one rank; ranks have equally many passes; within a pass rows stand by length, so that
equally long ones are neighbours (attention runs them together).
"""

from __future__ import annotations

import numpy as np

LINEAR = float("inf")
"""`even_length` of a model whose attention costs nothing: rows count by their tokens alone."""


def divide(
    lengths: np.ndarray, tokens_per_pass: int, ranks: int, even_length: float = LINEAR
) -> list[list[np.ndarray]]:
    """Rows of each pass of each rank: [rank][pass] -> indices into `lengths`, longest first.

    As few passes as the budget allows; a row longer than the budget runs alone. Ranks that have no row for a pass get an
    empty one.

    Args:
        lengths: [rows] tokens.
        tokens_per_pass: at most so many tokens run in one pass on one rank.
        even_length: the length at which a row's attention costs as much as all the rest of the model: a row of L tokens costs
            L + L^2 / even_length.
    """
    cost = lengths * (1.0 + lengths / even_length)
    count = _least_passes(lengths, tokens_per_pass, ranks)
    while (bins := _spread(lengths, cost, tokens_per_pass, count * ranks)) is None:
        count += 1
    return _deal([np.array(rows, dtype=np.int64) for rows in bins], cost, ranks)


def _least_passes(lengths: np.ndarray, limit: int, ranks: int) -> int:
    """No division has fewer passes: rows over the budget have a bin each, the others fill theirs at best."""
    over = lengths > limit
    bins = int(over.sum()) + -(-int(lengths[~over].sum()) // limit)
    return max(1, -(-bins // ranks))


def _spread(lengths: np.ndarray, cost: np.ndarray, limit: int, count: int) -> list[list[int]] | None:
    """Rows over `count` bins of at most `limit` tokens, evenly by cost; None if they did not fit.

    Longest first, each into the least costly bin that has room for it (Graham's LPT rule: with room everywhere, no two bins
    differ by more than the costliest row).
    """
    tokens, load = np.zeros(count, dtype=np.int64), np.zeros(count)
    bins: list[list[int]] = [[] for _ in range(count)]
    for row in np.argsort(-lengths, kind="stable"):
        room = (tokens == 0) | (tokens + lengths[row] <= limit)
        chosen = int(np.argmin(np.where(room, load, np.inf)))
        if not room[chosen]:
            return None
        tokens[chosen] += lengths[row]
        load[chosen] += cost[row]
        bins[chosen].append(int(row))
    return bins


def _deal(bins: list[np.ndarray], cost: np.ndarray, ranks: int) -> list[list[np.ndarray]]:
    """Bins of nearly the same cost run at the same time, and the costliest of them goes to the rank that has least so far."""
    load = np.array([cost[rows].sum() for rows in bins])
    order = np.argsort(-load, kind="stable")
    total = np.zeros(ranks)
    parts: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    for turn in order.reshape(-1, ranks):
        for rank, chosen in zip(np.argsort(total, kind="stable"), turn, strict=True):
            parts[rank].append(bins[chosen])
            total[rank] += load[chosen]
    return parts
