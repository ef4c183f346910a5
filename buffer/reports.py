"""What the shards report, added up to what the buffer reports. Pure. Called by the clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

from asyncrl.buffer.records import Counts, Recovery
from asyncrl.buffer.wire import Report


def add_counts(parts: Sequence[Counts]) -> Counts:
    return Counts(
        admitted=sum(p.admitted for p in parts),
        trained=sum(p.trained for p in parts),
        baselines=sum(p.baselines for p in parts),
        dropped=_add(p.dropped for p in parts),
        failed=_add(p.failed for p in parts),
        live=sum(p.live for p in parts),
    )


def add_reports(parts: Sequence[Report]) -> Report:
    """One report of all shards. The version is the oldest: a commit reaches the shards one after the other."""
    return Report(
        version=min(p.version for p in parts),
        serving=all(p.serving for p in parts),
        states=_add(p.states for p in parts),
        counts=add_counts([p.counts for p in parts]),
        held_groups=sum(p.held_groups for p in parts),
        capacity_groups=sum(p.capacity_groups for p in parts),
        spanning_trained=sum(p.spanning_trained for p in parts),
        most_versions=max(p.most_versions for p in parts),
        # Everybody waits at every shard at once, so that the longest of them is the time.
        waits_s={cause: max(p.waits_s.get(cause, 0.0) for p in parts) for p in parts for cause in p.waits_s},
        frontier=max(p.frontier for p in parts),
        quarantined=sum(p.quarantined for p in parts),
        lengths=_add(p.lengths for p in parts),
        dropped_lengths=_add(p.dropped_lengths for p in parts),
        memory_bytes=sum(p.memory_bytes for p in parts),
        held_bytes=sum(p.held_bytes for p in parts),
        disk_full="; ".join(p.disk_full for p in parts if p.disk_full),
        rotations=sum(p.rotations for p in parts),
        longest_rotation_s=max(p.longest_rotation_s for p in parts),
        recovery=_recovery([p.recovery for p in parts if p.recovery]),
    )


def _recovery(parts: Sequence[Recovery]) -> Recovery | None:
    if not parts:
        return None
    return Recovery(
        commits=sum(p.commits for p in parts),
        cut_bytes=sum(p.cut_bytes for p in parts),
        live_rollouts=sum(p.live_rollouts for p in parts),
        live_tokens=sum(p.live_tokens for p in parts),
    )


_K = TypeVar("_K")


def _add(parts: Iterable[dict[_K, int]]) -> dict[_K, int]:
    total: Counter[_K] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)
