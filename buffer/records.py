"""What the ledger keeps of rollouts and groups, and what it tells others of them. Pure.

`Rollout` and `Group` change under the ledger's hands alone; the rest is frozen and travels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from asyncrl.buffer import staleness
from asyncrl.buffer.schema import State


@dataclass(slots=True)
class Rollout:
    rollout_id: int
    group_id: int
    state: State = State.QUEUED
    lease_id: int = 0
    scored_lease_id: int = 0
    """The lease under which it was scored, so that a repeated request is recognised."""
    engine_id: str = ""
    lease_deadline: float = 0.0
    length: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    """(version, tokens), in order of sampling."""
    attempts: int = 0
    completed_version: int = -1
    finish_reason: str = ""
    reward: float = 0.0


@dataclass(slots=True)
class Group:
    group_id: int
    rollout_ids: tuple[int, ...]
    oldest_version: int | None = None
    """Version of the oldest token of any of its rollouts; None before the first."""
    unscored: int = 0
    batched: bool = False


class Transition(msgspec.Struct, frozen=True):
    """One change of state, for the log."""

    rollout_id: int
    group_id: int
    state: State
    version: int
    engine_id: str = ""
    reason: str = ""
    reward: float = 0.0


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """The conservation equation, in rollouts."""

    admitted: int
    trained: int
    dropped: dict[str, int]
    failed: dict[str, int]
    live: int

    @property
    def holds(self) -> bool:
        return (
            self.admitted == self.trained + sum(self.dropped.values()) + sum(self.failed.values()) + self.live
        )


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """A batch that was decided on: its groups, oldest first, with their rollouts."""

    batch_id: int
    version: int
    group_ids: tuple[int, ...]
    rollout_ids: tuple[int, ...]
    staleness_min: int
    staleness_mean: float
    staleness_max: int
    """Over trainable tokens, in versions."""
    in_flight_mean: float
    in_queue_mean: float
    """Over all tokens, in versions: ageing while it was sampled, and while it waited."""
    tokens: int
    trainable_tokens: int


def describe(
    batch_id: int, version: int, groups: Sequence[Group], rollouts: Sequence[Rollout], bound: int
) -> Selection:
    """The figures of a batch that leaves at `version`."""
    by_age: Counter[int] = Counter()
    in_flight = in_queue = 0
    for rollout in rollouts:
        for token_version, count in rollout.spans:
            by_age[staleness.staleness(version, token_version)] += count
        flight, queue = staleness.ages(version, rollout.completed_version, rollout.spans)
        in_flight, in_queue = in_flight + flight, in_queue + queue
    tokens = sum(by_age.values())
    fresh = {
        age: count for age, count in by_age.items() if staleness.is_trainable(version, version - age, bound)
    }
    trainable = sum(fresh.values())
    return Selection(
        batch_id=batch_id,
        version=version,
        group_ids=tuple(g.group_id for g in groups),
        rollout_ids=tuple(r.rollout_id for r in rollouts),
        staleness_min=min(fresh, default=0),
        staleness_mean=sum(age * count for age, count in fresh.items()) / max(1, trainable),
        staleness_max=max(fresh, default=0),
        in_flight_mean=in_flight / max(1, tokens),
        in_queue_mean=in_queue / max(1, tokens),
        tokens=tokens,
        trainable_tokens=trainable,
    )
