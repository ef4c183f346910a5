"""What the ledger keeps of rollouts and groups, and what it tells others of them. Pure.

`Rollout`, `Group` and `EngineRecord` change under the hands of `book` alone; the rest is frozen and travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np

from asyncrl.buffer import staleness
from asyncrl.buffer.config import BufferConfig, StalenessConfig
from asyncrl.buffer.schema import State

Spans = list[tuple[int, int]]
"""(version, tokens), in order; the version of the environment's tokens is `schema.ENVIRONMENT`."""


def has_sampled(spans: Spans) -> bool:
    """Whether a token of these is the model's."""
    return any(staleness.is_sampled(version) for version, _ in spans)


class LedgerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the ledger of one shard goes by."""

    prompts_per_step: int
    """This shard's share: groups of its batches."""
    rollouts_per_prompt: int
    spare_rollouts_per_prompt: int = 0
    greedy_baseline: bool = False
    """Each group has one more rollout, its baseline."""
    dynamic_sampling: bool = False
    max_staleness_versions: int = 2
    over_stale: str = "mask"
    max_attempts: int = 3
    lease_timeout_s: float = 120.0
    shard: int = 0
    shards: int = 1


def share(prompts_per_step: int, shard: int, shards: int) -> int:
    """Groups of one batch that come from `shard`: as equal as can be."""
    return prompts_per_step // shards + (shard < prompts_per_step % shards)


def ledger_settings(
    config: BufferConfig,
    staleness_config: StalenessConfig,
    prompts_per_step: int,
    rollouts_per_prompt: int,
    shard: int = 0,
    *,
    greedy_baseline: bool = False,
) -> LedgerSettings:
    """The settings of one shard, from a recipe's. Raises ValueError where a shard would have no part in a batch."""
    if config.shards > prompts_per_step:
        raise ValueError(
            f"buffer.shards is {config.shards} and prompts_per_step is {prompts_per_step}: every shard gives at least one "
            f"group to each batch. Set shards to {prompts_per_step} or less (one carries most runs)"
        )
    return LedgerSettings(
        prompts_per_step=share(prompts_per_step, shard, config.shards),
        rollouts_per_prompt=rollouts_per_prompt,
        spare_rollouts_per_prompt=config.group_policy.spare_rollouts_per_prompt,
        greedy_baseline=greedy_baseline,
        dynamic_sampling=config.dynamic_sampling,
        max_staleness_versions=staleness_config.max_staleness_versions,
        over_stale=staleness_config.over_stale,
        max_attempts=config.max_attempts,
        lease_timeout_s=config.lease_timeout_s,
        shard=shard,
        shards=config.shards,
    )


@dataclass(slots=True, eq=False)
class Group:
    group_id: int
    prompt_id: str
    position: int
    """Of its prompt in the frontier."""
    prompt_tokens: int
    greedy_id: int = 0
    """Of its baseline; 0 where it has none."""
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    """Those that are not closed."""
    oldest_version: int | None = None
    """Version of the oldest sampled token of any of its rollouts; None before the first. The baseline's do not count: they
    are not trained, so nothing of them can grow stale."""
    newest_version: int = -1
    scored: int = 0
    """Without the baseline."""
    batch_id: int = 0
    """Of the batch that it was handed over in; 0 before."""


@dataclass(slots=True)
class Passed:
    """A queued rollout was passed over: its context did not fit into engines that asked."""

    times: int
    since: float
    request: int
    """The newest that passed it over."""


@dataclass(slots=True, eq=False)
class Rollout:
    rollout_id: int
    group: Group
    state: State = State.QUEUED
    lease_id: int = 0
    scored_lease_id: int = 0
    """The lease under which it was scored, so that a repeated request is recognised."""
    engine_id: str = ""
    touched: float = 0.0
    """When its lease was last used."""
    length: int = 0
    spans: Spans = field(default_factory=list)
    attempts: int = 0
    completed_version: int = -1
    finish_reason: str = ""
    reward: float = 0.0
    cost: float = 0.0
    passed: Passed | None = None
    """While it is queued. Not in the log: after a crash it is counted anew."""

    @property
    def greedy(self) -> bool:
        """It is the baseline of its group: sampled greedily, scored, handed over, and none of its tokens trained."""
        return self.rollout_id == self.group.greedy_id


@dataclass(slots=True)
class EngineRecord:
    seen: float
    """Its last heartbeat or lease. (What it appends keeps the one lease alive: `Rollout.touched`.)"""
    last_lease_id: int = 0
    generating: int = 0
    """Rollouts that it has leased and not completed."""


class Transition(NamedTuple):
    """One change of state, for the log. A rollout_id of 0 with PUBLISHED says that a version went live."""

    rollout_id: int
    group_id: int
    state: str
    version: int
    lease_id: int
    attempts: int
    batch_id: int
    engine_id: str
    reason: str
    reward: float
    cost: float


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A run of tokens of one rollout at one version (or `schema.ENVIRONMENT`), on its way from an engine."""

    rollout_id: int
    lease_id: int
    start: int
    """Index of its first token within the rollout's answer."""
    version: int
    tokens: Sequence[int] | np.ndarray
    logprobs: Sequence[float] | np.ndarray
    finish_reason: str = ""


class PromptRow(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt that asks for admission."""

    prompt_id: str
    tokens: Sequence[int]
    payload: str
    """JSON: what the reward needs to know of it."""
    position: int
    """In the frontier."""


PUBLISHED = "PUBLISHED"
RETRY = ": tried again"


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """The conservation equation, in rollouts."""

    admitted: int
    trained: int
    baselines: int
    """Of `trained`: greedy baselines, whose batch was trained and whose tokens were not."""
    dropped: dict[str, int]
    failed: dict[str, int]
    live: int

    @property
    def holds(self) -> bool:
        return (
            self.admitted == self.trained + sum(self.dropped.values()) + sum(self.failed.values()) + self.live
        )


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """What was found when the folder was opened."""

    commits: int
    cut_bytes: int
    live_rollouts: int
    live_tokens: int


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """A batch that was decided on: its groups, the most urgent first, with their rollouts."""

    batch_ids: tuple[int, ...]
    """One of each shard."""
    version: int
    group_ids: tuple[int, ...]
    rollout_ids: tuple[int, ...]
    staleness_min: int
    staleness_mean: float
    staleness_max: int
    """Over trainable tokens, in versions."""
    in_flight_mean: float
    in_queue_mean: float
    """Over these tokens, in versions: ageing while it was sampled, and while it waited."""
    tokens: int
    """Sampled; those of the environment and of baselines are not counted."""
    trainable_tokens: int


def describe(batch_id: int, version: int, groups: Sequence[Group], bound: int) -> Selection:
    """The figures of a batch that leaves at `version`."""
    rollouts = [r for g in groups for r in g.rollouts.values()]
    by_age, in_flight, in_queue = staleness.ageing(
        version, ((r.completed_version, r.spans) for r in rollouts if not r.greedy)
    )
    tokens = sum(by_age.values())
    fresh = {
        age: count for age, count in by_age.items() if staleness.is_trainable(version, version - age, bound)
    }
    trainable = sum(fresh.values())
    return Selection(
        batch_ids=(batch_id,),
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


def merge(parts: Sequence[Selection]) -> Selection:
    """One batch of the shards' parts. All must leave at the same version."""
    tokens, trainable = sum(p.tokens for p in parts), sum(p.trainable_tokens for p in parts)
    aged = [p for p in parts if p.trainable_tokens]
    return Selection(
        batch_ids=tuple(b for p in parts for b in p.batch_ids),
        version=parts[0].version,
        group_ids=tuple(g for p in parts for g in p.group_ids),
        rollout_ids=tuple(r for p in parts for r in p.rollout_ids),
        staleness_min=min((p.staleness_min for p in aged), default=0),
        staleness_mean=sum(p.staleness_mean * p.trainable_tokens for p in aged) / max(1, trainable),
        staleness_max=max((p.staleness_max for p in aged), default=0),
        in_flight_mean=sum(p.in_flight_mean * p.tokens for p in parts) / max(1, tokens),
        in_queue_mean=sum(p.in_queue_mean * p.tokens for p in parts) / max(1, tokens),
        tokens=tokens,
        trainable_tokens=trainable,
    )
