"""Who holds which rollout, and what may happen to it next. Pure: facts in (with `now`), decisions out.

Invariants, checked at every commit:
- Each admitted rollout is live or in exactly one terminal state:
  admitted = trained + dropped(reason) + failed(reason) + live.
- Only the holder of the present lease can append to, finish, score or fail a rollout.
- A batch is whole: B complete groups, handed over once, every trainable token within the staleness bound.
- Held groups never exceed (K + 1) B, so that what is admitted can be trained inside the bound.

States and their transitions are drawn in `docs/architecture.md`. Tokens are not kept here, only how many of which
version (`columns.py` holds them). Called by the buffer service alone, from one thread.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from asyncrl.buffer import staleness
from asyncrl.buffer.errors import BadRequest, ConservationError, LeaseLost
from asyncrl.buffer.records import Counts, Group, Rollout, Selection, Transition, describe
from asyncrl.buffer.schema import State

OverStale = Literal["mask", "wait", "drop"]


class Ledger:
    """The state machine of every rollout of a run. Versions start at -1: nothing published, nothing admitted."""

    def __init__(
        self,
        *,
        prompts_per_step: int,
        rollouts_per_prompt: int,
        max_staleness_versions: int,
        over_stale: OverStale,
        max_attempts: int,
        lease_timeout_s: float,
    ) -> None:
        self.version = -1
        self._prompts_per_step = prompts_per_step
        self._rollouts_per_prompt = rollouts_per_prompt
        self._bound = max_staleness_versions
        self._over_stale = over_stale
        self._max_attempts = max_attempts
        self._lease_timeout_s = lease_timeout_s
        self.rollouts: dict[int, Rollout] = {}
        self.groups: dict[int, Group] = {}
        self._queue: list[tuple[int, int]] = []
        self._batches: dict[int, Selection] = {}
        self._next_rollout = self._next_group = self._next_lease = self._next_batch = 1
        self._admitted = self._trained = 0
        self._dropped: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self.spanning_trained = 0
        """Trained rollouts whose tokens are of two or more versions."""
        self.most_versions = 0
        self._transitions: list[Transition] = []
        self.closed: list[int] = []
        """Rollouts that reached a terminal state since the service last took this list."""

    # ---- admission ---------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Groups that may be admitted now."""
        if self.version < 0:
            return 0
        return staleness.admission_capacity(len(self.groups), self._prompts_per_step, self._bound)

    def admit(self, groups: int) -> list[Group]:
        """Admits so many new groups. Raises BadRequest past `capacity` (the caller asked for it before)."""
        if groups > self.capacity:
            raise BadRequest(
                f"admission of {groups} groups refused: capacity is {self.capacity} at version {self.version}"
            )
        admitted = []
        for _ in range(groups):
            ids = tuple(range(self._next_rollout, self._next_rollout + self._rollouts_per_prompt))
            group = Group(self._next_group, ids, unscored=len(ids))
            self._next_rollout += len(ids)
            self._next_group += 1
            self.groups[group.group_id] = group
            for rollout_id in ids:
                self.rollouts[rollout_id] = Rollout(rollout_id, group.group_id)
                heapq.heappush(self._queue, (group.group_id, rollout_id))
                self._note(self.rollouts[rollout_id])
            self._admitted += len(ids)
            admitted.append(group)
        return admitted

    # ---- leases ------------------------------------------------------------------------------------------------

    def has_queued(self) -> bool:
        while self._queue and not self._is_queued(self._queue[0][1]):
            heapq.heappop(self._queue)
        return bool(self._queue)

    def lease(self, engine_id: str, limit: int, now: float) -> list[Rollout]:
        """Hands out up to `limit` queued rollouts, those of the oldest groups first, with whatever prefix they have."""
        leased: list[Rollout] = []
        while len(leased) < limit and self.has_queued():
            _, rollout_id = heapq.heappop(self._queue)
            rollout = self.rollouts[rollout_id]
            rollout.state = State.LEASED
            rollout.lease_id = self._next_lease
            self._next_lease += 1
            rollout.engine_id = engine_id
            rollout.lease_deadline = now + self._lease_timeout_s
            self._note(rollout)
            leased.append(rollout)
        return leased

    def heartbeat(self, engine_id: str, now: float) -> None:
        """The engine lives: its leases run on."""
        for rollout in self.rollouts.values():
            if rollout.engine_id == engine_id and rollout.lease_id:
                rollout.lease_deadline = now + self._lease_timeout_s

    def expire(self, now: float) -> list[Rollout]:
        """Takes back leases whose deadline passed; the rollouts keep what was appended."""
        lost = [r for r in self.rollouts.values() if r.lease_id and r.lease_deadline <= now]
        for rollout in lost:
            self._requeue(rollout, "lease expired")
        return lost

    def release(self, rollout_id: int, lease_id: int) -> None:
        """The engine hands a rollout back; it keeps its prefix."""
        self._requeue(self._held(rollout_id, lease_id, (State.LEASED, State.COMPLETE)), "released")

    def release_engine(self, engine_id: str) -> None:
        """The engine is gone; everything that it held goes back."""
        for rollout in [r for r in self.rollouts.values() if r.lease_id and r.engine_id == engine_id]:
            self._requeue(rollout, "engine lost")

    # ---- progress ----------------------------------------------------------------------------------------------

    def append(
        self,
        rollout_id: int,
        lease_id: int,
        start: int,
        tokens: int,
        version: int,
        finish_reason: str,
        now: float,
    ) -> bool:
        """Adds a segment. False when it was appended before (a retry after a lost reply): nothing to store then."""
        rollout = self._held(rollout_id, lease_id, (State.LEASED, State.COMPLETE))
        if start + tokens <= rollout.length and (tokens or rollout.state is State.COMPLETE):
            return False
        if rollout.state is State.COMPLETE or start != rollout.length:
            raise BadRequest(
                f"segment of rollout {rollout_id} starts at token {start}, expected {rollout.length} "
                f"(state {rollout.state.name}): send segments in order, each once"
            )
        if not 0 <= version <= self.version + 1:
            raise BadRequest(
                f"segment of rollout {rollout_id} has version {version}, published is {self.version}"
            )
        if finish_reason and not rollout.length + tokens:
            raise BadRequest(
                f"rollout {rollout_id} finished without a token: an answer has at least its stop token"
            )
        rollout.lease_deadline = now + self._lease_timeout_s
        if tokens:
            self._extend(rollout, version, tokens)
        if finish_reason:
            rollout.state = State.COMPLETE
            rollout.finish_reason = finish_reason
            rollout.completed_version = max(self.version, version)
            self._note(rollout, finish_reason)
        return True

    def _extend(self, rollout: Rollout, version: int, tokens: int) -> None:
        rollout.length += tokens
        if rollout.spans and rollout.spans[-1][0] == version:
            rollout.spans[-1] = (version, rollout.spans[-1][1] + tokens)
        else:
            rollout.spans.append((version, tokens))
        group = self.groups[rollout.group_id]
        group.oldest_version = version if group.oldest_version is None else min(group.oldest_version, version)

    def score(self, rollout_id: int, lease_id: int, reward: float) -> bool:
        """The reward is known; the lease ends. False when it was scored before under this lease."""
        done = self.rollouts.get(rollout_id)
        if (
            done is not None
            and done.state in (State.SCORED, State.BATCHED)
            and done.scored_lease_id == lease_id
        ):
            return False
        rollout = self._held(rollout_id, lease_id, (State.COMPLETE,))
        rollout.state = State.SCORED
        rollout.reward = reward
        rollout.lease_id, rollout.scored_lease_id = 0, lease_id
        self.groups[rollout.group_id].unscored -= 1
        self._note(rollout, reward=reward)
        return True

    def fail(self, rollout_id: int, lease_id: int, reason: str) -> bool:
        """The attempt came to nothing. True when the rollout is tried again, from its first token.

        After `max_attempts` it is FAILED and its group is given up: one poisoned prompt must not hold a batch.
        """
        rollout = self._held(rollout_id, lease_id, (State.LEASED, State.COMPLETE))
        rollout.attempts += 1
        if rollout.attempts < self._max_attempts:
            rollout.length, rollout.spans, rollout.finish_reason = 0, [], ""
            self._requeue(rollout, reason)
            return True
        group = self.groups[rollout.group_id]
        self._close(rollout, State.FAILED, reason)
        self._drop_group(group, "a rollout of its group failed")
        return False

    # ---- batches -----------------------------------------------------------------------------------------------

    def select(self) -> Selection | None:
        """Decides on the next batch, or None while there is no valid one. Groups are taken oldest first."""
        if self.version < 0:
            return None
        ready = sorted(self._ready(), key=lambda g: (self._deadline(g), g.group_id))
        if len(ready) < self._prompts_per_step:
            return None
        chosen = ready[: self._prompts_per_step]
        if self._over_stale == "wait" and not self._may_leave(chosen):
            return None
        return self._hand_over(chosen)

    def _ready(self) -> list[Group]:
        ready = [g for g in self.groups.values() if g.unscored == 0 and not g.batched]
        stale = [g for g in ready if self._is_over_stale(g)]
        for group in stale:
            self._drop_group(group, "over_stale")
        return [g for g in ready if g.group_id in self.groups]

    def _is_over_stale(self, group: Group) -> bool:
        if self._over_stale == "drop":
            return self._deadline(group) < self.version
        spans = (span for r in group.rollout_ids for span in self.rollouts[r].spans)
        return not any(staleness.is_trainable(self.version, version, self._bound) for version, _ in spans)

    def _may_leave(self, chosen: Sequence[Group]) -> bool:
        taken = {g.group_id for g in chosen}
        left = [g for g in self.groups.values() if g.group_id not in taken and not g.batched]
        deadlines = [self._deadline(g) for g in left if g.oldest_version is not None]
        return staleness.may_hand_over(self.version, deadlines, self._prompts_per_step)

    def _deadline(self, group: Group) -> int:
        oldest = self.version if group.oldest_version is None else group.oldest_version
        return staleness.deadline(oldest, self._bound)

    def _hand_over(self, groups: Sequence[Group]) -> Selection:
        rollouts = [self.rollouts[r] for g in groups for r in g.rollout_ids]
        for group in groups:
            group.batched = True
        for rollout in rollouts:
            rollout.state = State.BATCHED
            self._note(rollout)
        selection = describe(self._next_batch, self.version, groups, rollouts, self._bound)
        self._batches[selection.batch_id] = selection
        self._next_batch += 1
        return selection

    def commit(self, batch_id: int, version: int) -> Counts:
        """The batch was trained and `version` published. Raises ConservationError if the equation does not hold."""
        if version != self.version + 1:
            raise BadRequest(
                f"commit of batch {batch_id} publishes version {version}, expected {self.version + 1}"
            )
        batch = self._batches.pop(batch_id, None)
        if batch is None:
            raise BadRequest(f"batch {batch_id} is not handed over (open: {sorted(self._batches)})")
        self.version = version
        for rollout_id in batch.rollout_ids:
            rollout = self.rollouts[rollout_id]
            versions = len({v for v, _ in rollout.spans})
            self.spanning_trained += versions > 1
            self.most_versions = max(self.most_versions, versions)
            self._close(rollout, State.TRAINED, "")
        for group_id in batch.group_ids:
            del self.groups[group_id]
        return self.check()

    def publish(self, version: int) -> None:
        """The first version of the run: engines confirmed it, prompts may be admitted."""
        if self.version != -1:
            raise BadRequest(
                f"version {version} published outside a commit; present version is {self.version}"
            )
        self.version = version

    # ---- accounts ----------------------------------------------------------------------------------------------

    def counts(self) -> Counts:
        return Counts(
            admitted=self._admitted,
            trained=self._trained,
            dropped=dict(self._dropped),
            failed=dict(self._failed),
            live=len(self.rollouts),
        )

    def check(self) -> Counts:
        """Recounts the equation from the live rollouts and groups, not from the counters alone."""
        counts = self.counts()
        members = sum(len(g.rollout_ids) for g in self.groups.values())
        orphans = [r for g in self.groups.values() for r in g.rollout_ids if r not in self.rollouts]
        if not counts.holds or members != counts.live or orphans:
            raise ConservationError(
                f"at version {self.version}: {counts}, rollouts of live groups {members}, missing {orphans[:5]}"
            )
        return counts

    def by_state(self) -> dict[str, int]:
        states = Counter(r.state for r in self.rollouts.values())
        return {s.name.lower(): states[s] for s in State if s <= State.BATCHED}

    def take_transitions(self) -> list[Transition]:
        taken, self._transitions = self._transitions, []
        return taken

    def take_closed(self) -> list[int]:
        taken, self.closed = self.closed, []
        return taken

    # ---- inside ------------------------------------------------------------------------------------------------

    def _is_queued(self, rollout_id: int) -> bool:
        rollout = self.rollouts.get(rollout_id)
        return rollout is not None and rollout.state is State.QUEUED

    def _held(self, rollout_id: int, lease_id: int, states: tuple[State, ...]) -> Rollout:
        rollout = self.rollouts.get(rollout_id)
        if rollout is None or not lease_id or rollout.lease_id != lease_id or rollout.state not in states:
            now = "gone" if rollout is None else f"{rollout.state.name}, lease {rollout.lease_id}"
            raise LeaseLost(f"rollout {rollout_id}: lease {lease_id} is not valid (rollout is {now})")
        return rollout

    def _requeue(self, rollout: Rollout, reason: str) -> None:
        # A complete rollout that lost its scorer is leased again with all its tokens, only to be scored.
        rollout.state = State.QUEUED
        rollout.lease_id, rollout.engine_id = 0, ""
        heapq.heappush(self._queue, (rollout.group_id, rollout.rollout_id))
        self._note(rollout, reason)

    def _drop_group(self, group: Group, reason: str) -> None:
        for rollout_id in group.rollout_ids:
            if rollout_id in self.rollouts:
                self._close(self.rollouts[rollout_id], State.DROPPED, reason)
        del self.groups[group.group_id]

    def _close(self, rollout: Rollout, state: State, reason: str) -> None:
        rollout.state, rollout.lease_id = state, 0
        if state is State.TRAINED:
            self._trained += 1
        else:
            (self._dropped if state is State.DROPPED else self._failed)[reason] += 1
        self._note(rollout, reason)
        del self.rollouts[rollout.rollout_id]
        self.closed.append(rollout.rollout_id)

    def _note(self, rollout: Rollout, reason: str = "", reward: float = 0.0) -> None:
        self._transitions.append(
            Transition(
                rollout.rollout_id,
                rollout.group_id,
                rollout.state,
                self.version,
                rollout.engine_id,
                reason,
                reward,
            )
        )
