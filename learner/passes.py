"""Forward passes without a gradient: a column of the batch, whole on every rank. Called by `training`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from asyncrl.learner.rows import MicroBatch
from asyncrl.learner.stopwatch import Stopwatch


def whole_column(
    parts: Iterable[MicroBatch],
    compute: Callable[[MicroBatch], torch.Tensor],
    like: torch.Tensor,
    stopwatch: Stopwatch,
) -> torch.Tensor:
    """What `compute` gives for each token of the parts of every rank, 0 for tokens in none of them. A collective.

    Args: `compute`, [tokens of the part, ...] on `like`'s device; `like` [tokens, ...], of which shape and dtype are taken.
    """
    whole = torch.zeros_like(like)
    with stopwatch.measure("forward_s"):
        for part in parts:
            part = part.to(like.device)
            whole[part.place] = compute(part)
        dist.all_reduce(whole)
    return whole
