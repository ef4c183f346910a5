"""Every rollout's record, and the only hands that change it. Pure.

The ledger decides and calls; a recovery calls the same methods from the rows of the log (`replay`). So what is rebuilt
after a crash is what was there before it. Each change leaves its row in `rows` (for the log), closed rollouts and groups
are listed for whoever holds their tokens. Heaps are lazy: an entry that no longer holds is passed over when it comes up.
Called by `ledger` and `recovery`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from asyncrl.buffer.records import (
    PUBLISHED,
    EngineRecord,
    Group,
    LedgerSettings,
    Passed,
    Rollout,
    Spans,
    Transition,
)
from asyncrl.buffer.rows import StateRows
from asyncrl.buffer.schema import ENVIRONMENT, State

Entry = tuple[int, int, int]
"""Of the queue: (oldest version of its group, group_id, rollout_id)."""
_FRESH = 1 << 60
"""Queue key of groups without a token: nothing of theirs can grow stale, so they come after all others."""
_QUEUED, _LEASED, _COMPLETE, _SCORED, _BATCHED = (
    State.QUEUED,
    State.LEASED,
    State.COMPLETE,
    State.SCORED,
    State.BATCHED,
)


def extend_spans(spans: Spans, version: int, tokens: int) -> None:
    if spans and spans[-1][0] == version:
        spans[-1] = (version, spans[-1][1] + tokens)
    else:
        spans.append((version, tokens))


_MOST_REASONS = 64
"""Reasons may name prompts: past so many, failures are counted by the part of their reason before the first colon."""


def _counted_as(failed: Mapping[str, int], reason: str) -> str:
    """The log keeps every reason as it is."""
    if reason in failed or len(failed) < _MOST_REASONS:
        return reason
    kind = reason.partition(":")[0]
    return kind if kind in failed or len(failed) < 2 * _MOST_REASONS else "other reasons"


class Book:
    """Records by id, and the orders in which they are wanted."""

    def __init__(self, settings: LedgerSettings) -> None:
        self.settings = settings
        self.version = -1
        self.serving = False
        """The present version is live on the engines: prompts and leases may go out."""
        self.frontier = 0
        """Prompts that were drawn from the source so far, those passed over included."""
        self.rollouts: dict[int, Rollout] = {}
        self.groups: dict[int, Group] = {}
        self.batches: dict[int, list[Group]] = {}
        """Handed over and not committed."""
        self.engines: dict[str, EngineRecord] = {}
        self.quarantined: dict[str, str] = {}
        """prompt_id -> why."""
        self.next_group = self.next_rollout = self.next_lease = self.next_batch = 1
        self.admitted = self.trained = self.baselines = 0
        self.dropped: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        """Answer tokens -> closed rollouts; `dropped_lengths` of them were dropped."""
        self.dropped_lengths: Counter[int] = Counter()
        self.spanning_trained = self.most_versions = 0
        self.by_state = [0] * len(State)
        self.queue: list[Entry] = []
        """Heap."""
        self.expiry: list[tuple[float, int, int]] = []
        """Heap of (earliest time at which it can be late, rollout_id, lease_id)."""
        self.ready: list[tuple[int, int]] = []
        """Heap of complete groups: (oldest version, group_id). Another version than the group's is outdated."""
        self.ages: Counter[int] = Counter()
        """Oldest version -> groups that have tokens and were not handed over."""
        self.rows = StateRows()
        self.closed: list[int] = []
        self.closed_groups: list[int] = []

    # ---- changes -----------------------------------------------------------------------------------------------

    def admit(
        self,
        group_id: int,
        rollout_ids: Sequence[int],
        prompt_id: str,
        position: int,
        prompt_tokens: int,
        greedy_id: int = 0,
    ) -> Group:
        """`greedy_id`: which of the rollouts is the baseline, 0 for none."""
        group = self.groups[group_id] = Group(group_id, prompt_id, position, prompt_tokens, greedy_id)
        for rollout_id in rollout_ids:
            group.rollouts[rollout_id] = self.rollouts[rollout_id] = Rollout(rollout_id, group)
            heapq.heappush(self.queue, (_FRESH, group_id, rollout_id))
        shards = self.settings.shards
        self.next_group = max(self.next_group, group_id // shards + 1)
        self.next_rollout = max(self.next_rollout, rollout_ids[-1] // shards + 1)
        self.frontier = max(self.frontier, position + 1)
        self.by_state[_QUEUED] += len(rollout_ids)
        self.admitted += len(rollout_ids)
        return group

    def note_admitted(self, groups: Iterable[Group]) -> None:
        self.rows.add_many([r for g in groups for r in g.rollouts.values()], self.version)

    def lease(self, rollouts: Sequence[Rollout], engine_id: str, first_lease_id: int, now: float) -> None:
        """Leases of consecutive ids, all of one engine."""
        deadline = now + self.settings.lease_timeout_s
        expiry, lease_id = self.expiry, first_lease_id
        for rollout in rollouts:
            rollout.state = _LEASED
            rollout.lease_id, rollout.engine_id, rollout.touched = lease_id, engine_id, now
            rollout.passed = None
            heapq.heappush(expiry, (deadline, rollout.rollout_id, lease_id))
            lease_id += 1
        self.by_state[_QUEUED] -= len(rollouts)
        self.by_state[_LEASED] += len(rollouts)
        engine = self.engines.get(engine_id)
        if engine is None:
            engine = self.engines[engine_id] = EngineRecord(now)
        engine.seen, engine.last_lease_id = now, max(engine.last_lease_id, lease_id - 1)
        engine.generating += len(rollouts)
        self.next_lease = max(self.next_lease, lease_id)
        self.rows.add_many(rollouts, self.version)

    @staticmethod
    def pass_over(rollout: Rollout, request: int, now: float) -> None:
        """It stays queued. A request counts once, however often it is looked at."""
        passed = rollout.passed
        if passed is None:
            rollout.passed = Passed(1, now, request)
        elif request > passed.request:
            passed.times, passed.request = passed.times + 1, request

    def requeue(self, rollout: Rollout, reason: str, attempts: int) -> None:
        """Takes the lease away. With one more attempt than before its tokens are forgotten too."""
        if attempts > rollout.attempts:
            rollout.attempts = attempts
            rollout.length, rollout.spans, rollout.finish_reason = 0, [], ""
            self.find_age(rollout.group)
        self._move(rollout, _QUEUED)
        rollout.lease_id, rollout.engine_id = 0, ""
        self.enqueue(rollout)
        self.note(rollout, reason)

    def extend(self, rollout: Rollout, version: int, tokens: int) -> None:
        rollout.length += tokens
        extend_spans(rollout.spans, version, tokens)
        if version == ENVIRONMENT or rollout.greedy:
            return
        group = rollout.group
        if version > group.newest_version:
            group.newest_version = version
        oldest = group.oldest_version
        if oldest is None or version < oldest:
            group.oldest_version = version
            self._aged(group, oldest)

    def complete(self, rollout: Rollout, finish_reason: str) -> None:
        self._move(rollout, _COMPLETE)
        rollout.finish_reason = finish_reason
        rollout.completed_version = max(self.version, *(v for v, _ in rollout.spans))
        self.note(rollout, finish_reason)

    def score(self, rollout: Rollout, reward: float, cost: float = 0.0) -> bool:
        """True when its group is complete by it."""
        self._move(rollout, _SCORED)
        # As the log keeps them.
        rollout.reward, rollout.cost = float(np.float32(reward)), float(np.float32(cost))
        rollout.scored_lease_id = rollout.lease_id
        self.note(rollout, reward=reward, cost=cost)
        rollout.lease_id = 0
        group = rollout.group
        if not rollout.greedy:
            group.scored += 1
        if not self.is_complete(group):
            return False
        assert group.oldest_version is not None
        heapq.heappush(self.ready, (group.oldest_version, group.group_id))
        return True

    def is_complete(self, group: Group) -> bool:
        """It can be handed over: as many rollouts as it needs are scored, and its baseline is."""
        baseline = group.rollouts.get(group.greedy_id)
        is_full = group.scored == self.settings.rollouts_per_prompt
        return is_full and (baseline is None or baseline.state in (_SCORED, _BATCHED))

    def batch(self, groups: list[Group], batch_id: int) -> None:
        self.batches[batch_id] = groups
        self.next_batch = max(self.next_batch, batch_id + 1)
        rollouts = [r for group in groups for r in group.rollouts.values()]
        for group in groups:
            self.mark_batched(group, batch_id)
        for rollout in rollouts:
            rollout.state = _BATCHED
        self.by_state[_SCORED] -= len(rollouts)
        self.by_state[_BATCHED] += len(rollouts)
        self.rows.add_many(rollouts, self.version)

    def mark_batched(self, group: Group, batch_id: int) -> None:
        group.batch_id = batch_id
        if group.oldest_version is not None:
            self._count_age(group.oldest_version, -1)

    def close(self, rollout: Rollout, state: State, reason: str) -> None:
        """The end of a rollout that is not trained; with its last rollout a group ends, with its last group a batch."""
        group = rollout.group
        self._leave(rollout)
        if rollout.state is _SCORED and not rollout.greedy:
            group.scored -= 1
        rollout.state = state
        self.lengths[rollout.length] += 1
        if state is State.DROPPED:
            self.dropped[reason] += 1
            self.dropped_lengths[rollout.length] += 1
        else:
            self.failed[_counted_as(self.failed, reason)] += 1
        self.note(rollout, reason)
        del self.rollouts[rollout.rollout_id], group.rollouts[rollout.rollout_id]
        rollout.lease_id = 0
        self.closed.append(rollout.rollout_id)
        if state is State.FAILED and not self._can_be_filled(group):
            self.quarantined.setdefault(group.prompt_id, reason)
        if not group.rollouts:
            self._close_group(group)
        elif rollout.spans and not group.batch_id:
            self.find_age(group)  # its tokens are in no batch any more

    def _can_be_filled(self, group: Group) -> bool:
        has_baseline = group.greedy_id in group.rollouts
        left = len(group.rollouts) - has_baseline
        return left >= self.settings.rollouts_per_prompt and (has_baseline or not group.greedy_id)

    def drop_group(self, group: Group, reason: str) -> None:
        for rollout in list(group.rollouts.values()):
            self.close(rollout, State.DROPPED, reason)

    def train(self, rollouts: Sequence[Rollout]) -> None:
        """The end of rollouts that were handed over."""
        for rollout in rollouts:
            rollout.state = State.TRAINED
        self.rows.add_many(rollouts, self.version)
        self.by_state[_BATCHED] -= len(rollouts)
        self.trained += len(rollouts)
        for rollout in rollouts:
            rollout_id, spans, group = rollout.rollout_id, rollout.spans, rollout.group
            self.lengths[rollout.length] += 1
            self.baselines += rollout.greedy
            versions = 1 if len(spans) == 1 else len({v for v, _ in spans if v != ENVIRONMENT})
            if versions > 1:
                self.spanning_trained += 1
            if versions > self.most_versions:
                self.most_versions = versions
            del self.rollouts[rollout_id], group.rollouts[rollout_id]
            self.closed.append(rollout_id)
            if not group.rollouts:
                self._close_group(group)

    def publish(self, version: int) -> None:
        self.version, self.serving = version, True
        self.rows.published(version)

    # ---- what follows from a change ----------------------------------------------------------------------------

    def _move(self, rollout: Rollout, state: State) -> None:
        self._leave(rollout)
        self.by_state[state] += 1
        rollout.state = state

    def _leave(self, rollout: Rollout) -> None:
        """Its state ends."""
        self.by_state[rollout.state] -= 1
        if rollout.state is _LEASED:
            self.engines[rollout.engine_id].generating -= 1

    @staticmethod
    def urgency(group: Group) -> int:
        """First part of the queue's key. An entry with another one is outdated: there is a newer one."""
        return _FRESH if group.oldest_version is None else group.oldest_version

    def enqueue(self, rollout: Rollout) -> None:
        group = rollout.group
        heapq.heappush(self.queue, (self.urgency(group), group.group_id, rollout.rollout_id))

    def find_age(self, group: Group) -> None:
        """Finds the group's oldest and newest version anew, and the places in the heaps that follow from it."""
        before = group.oldest_version
        sampled = (r for r in group.rollouts.values() if not r.greedy)
        versions = [v for r in sampled for v, _ in r.spans if v != ENVIRONMENT]
        group.oldest_version = min(versions, default=None)
        group.newest_version = max(versions, default=-1)
        if group.oldest_version != before:
            self._aged(group, before)

    def _aged(self, group: Group, before: int | None) -> None:
        """Its oldest version was `before`."""
        if not group.batch_id:
            if before is not None:
                self._count_age(before, -1)
            if group.oldest_version is not None:
                self._count_age(group.oldest_version, 1)
                if self.is_complete(group):
                    heapq.heappush(self.ready, (group.oldest_version, group.group_id))
        for rollout in group.rollouts.values():
            if rollout.state is _QUEUED:
                self.enqueue(rollout)

    def _count_age(self, version: int, change: int) -> None:
        self.ages[version] += change
        if not self.ages[version]:
            del self.ages[version]

    def _close_group(self, group: Group) -> None:
        del self.groups[group.group_id]
        self.closed_groups.append(group.group_id)
        if not group.batch_id:
            if group.oldest_version is not None:
                self._count_age(group.oldest_version, -1)
            return
        if not any(g.rollouts for g in self.batches.get(group.batch_id, ())):
            self.batches.pop(group.batch_id, None)

    def note(self, rollout: Rollout, reason: str = "", reward: float = 0.0, cost: float = 0.0) -> None:
        group = rollout.group
        self.rows.add(
            rollout.rollout_id,
            group.group_id,
            rollout.state,
            self.version,
            rollout.lease_id,
            rollout.attempts,
            group.batch_id,
            rollout.engine_id,
            reason,
            reward,
            cost,
        )

    # ---- from the log ------------------------------------------------------------------------------------------

    def replay(self, row: Transition, now: float) -> None:
        """Makes the change that `row` tells of. The rows that it leaves are the caller's to throw away."""
        self.version = max(self.version, row.version)
        if row.state == PUBLISHED:
            self.publish(row.version)
            return
        rollout, state = self.rollouts[row.rollout_id], State[row.state]
        match state:
            case State.QUEUED:
                if rollout.state is not _QUEUED:  # else it tells of the admission
                    self.requeue(rollout, row.reason, row.attempts)
            case State.LEASED:
                self.lease([rollout], row.engine_id, row.lease_id, now)
            case State.COMPLETE:
                self.complete(rollout, row.reason)
            case State.SCORED:
                self.score(rollout, row.reward, row.cost)
            case State.BATCHED:
                self._replay_batched(rollout, row.batch_id)
            case State.TRAINED:
                self.train([rollout])
            case _:
                self.close(rollout, state, row.reason)

    def _replay_batched(self, rollout: Rollout, batch_id: int) -> None:
        group = rollout.group
        if not group.batch_id:
            self.batches.setdefault(batch_id, []).append(group)
            self.next_batch = max(self.next_batch, batch_id + 1)
            self.mark_batched(group, batch_id)
        self._move(rollout, _BATCHED)
