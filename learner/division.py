"""Which rows run together: lengths in, rows of each rank's forward passes out. Pure numpy; called by `batch` and `sft`.

Padding is paid in time, and so is a pass of its own; both are counted in tokens and their sum is made least.
"""

from __future__ import annotations

import numpy as np

PASS_OVERHEAD_TOKENS = 32
"""What one more forward and backward pass costs, in tokens: a row may be padded by less rather than split off."""


def divide(lengths: np.ndarray, tokens_per_pass: int, ranks: int) -> list[list[np.ndarray]]:
    """Rows of each pass of each rank: [rank][pass] -> indices into `lengths`; ranks have equally many passes.

    Rows are dealt to the ranks back and forth in order of length, so every rank gets nearly the same lengths, and its
    k-th pass is about as large as the others' k-th. A rank with fewer passes gets empty ones at the end.
    """
    order = np.argsort(-lengths, kind="stable")
    turn = np.arange(len(order)) % (2 * ranks)
    owner = np.where(turn < ranks, turn, 2 * ranks - 1 - turn)
    shares = [order[owner == rank] for rank in range(ranks)]
    passes = [_cut(share, lengths[share], tokens_per_pass) for share in shares]
    most = max(map(len, passes))
    nothing = np.zeros(0, dtype=np.int64)
    return [own + [nothing] * (most - len(own)) for own in passes]


def _cut(rows: np.ndarray, lengths: np.ndarray, limit: int) -> list[np.ndarray]:
    """Cuts rows, longest first, into runs of at most `limit` tokens with padding, at the least total cost.

    Shortest path: cost[end] = min over start of cost[start] + (end - start) * lengths[start] + overhead. A row longer than
    `limit` runs alone.
    """
    count = len(rows)
    if not count:
        return []
    cost = np.zeros(count + 1)
    came_from = np.zeros(count + 1, dtype=np.int64)
    first = 0
    for end in range(1, count + 1):
        while first < end - 1 and (end - first) * lengths[first] > limit:
            first += 1
        starts = np.arange(first, end)
        total = cost[starts] + (end - starts) * lengths[starts] + PASS_OVERHEAD_TOKENS
        best = int(np.argmin(total))
        cost[end], came_from[end] = total[best], starts[best]
    cuts = []
    end = count
    while end:
        cuts.append(rows[came_from[end] : end])
        end = int(came_from[end])
    return cuts[::-1]
