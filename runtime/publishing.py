"""A learner rank's part in sending versions: which publisher rank 0 has, and what the others have beside it. The one place where
a `Way` is turned into code.

                 rank 0                                     the other ranks, where each sends its rows
    host         Publisher, or RollingPublisher with a lag  ShareWriter: they write into rank 0's memory
    device       the same, in the memory of its GPU         -
    collective   CollectivePublisher                        CollectiveShare: they broadcast

Called by `learner_part`.
"""

from __future__ import annotations

from functools import partial

import torch

from asyncrl.recipes import Recipe
from asyncrl.runtime.sync_choice import Way, is_over_nccl
from asyncrl.weight_sync.collective_publisher import CollectivePublisher
from asyncrl.weight_sync.collective_share import CollectiveShare
from asyncrl.weight_sync.device_memory import slots_on
from asyncrl.weight_sync.hosts import this_host
from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.ranks import Ranks
from asyncrl.weight_sync.rolling_publisher import RollingPublisher
from asyncrl.weight_sync.share import ShareWriter
from asyncrl.weight_sync.sockets import Secure

AnyPublisher = Publisher | CollectivePublisher
Share = ShareWriter | CollectiveShare


def open_publisher(
    recipe: Recipe,
    way: Way,
    plan: Plan,
    ranks: Ranks,
    device: torch.device,
    *,
    run_id: str,
    host: str,
    secure: Secure,
) -> AnyPublisher:
    """Rank 0's. A collective where every rank sends over `collective`, with `open_share` on the others."""
    sync, lag = recipe.weight_sync, recipe.max_lag_versions
    if way == "collective":
        return CollectivePublisher(sync, plan, host, secure, ranks=ranks, device=_groups_on(recipe, device))
    kind = partial(RollingPublisher, max_lag_versions=lag) if lag else Publisher
    slots = slots_on(device, plan) if way == "device" else None
    return kind(sync, run_id, plan, host, secure, device=slots, ranks=ranks)


def open_share(
    recipe: Recipe, way: Way, plan: Plan, ranks: Ranks, device: torch.device, *, host: str
) -> Share | None:
    """Of a rank above 0; None where it sends nothing."""
    if plan.senders == 1:
        return None
    if way == "collective":
        return CollectiveShare(recipe.weight_sync, plan, ranks, host, _groups_on(recipe, device))
    return ShareWriter(plan, ranks, this_host())


def _groups_on(recipe: Recipe, device: torch.device) -> torch.device:
    """What buckets are packed on, and so whether NCCL or gloo carries them, on every rank alike."""
    return device if is_over_nccl(recipe) else torch.device("cpu")
