"""Who holds which rollout, and what may happen to it next. Pure: facts in (with `now`), decisions out.

Admission and progress are decided here, who gets which rollout in `leasing`, batches in `batches`; `book` makes the changes,
`accounts` recounts.

Invariants, checked at every commit:
- Each admitted rollout is live or in exactly one terminal state:
  admitted = trained + dropped(reason) + failed(reason) + live.
- Only the holder of the present lease can append to, finish, score or fail a rollout.
- A batch is whole: B complete groups, handed over once, every trainable token within the staleness bound.
- Held groups never exceed (K + 1) B, so that what is admitted can be trained inside the bound.
- Each request may be repeated: what it asks for is named (position, lease, start, batch), and done once.

States and their transitions are drawn in `docs/architecture.md`. Tokens are not kept here, only how many of which
version (`columns` holds them). One ledger serves one shard. Called by `shard` alone, from one thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from asyncrl.buffer import accounts, staleness
from asyncrl.buffer.batches import Batches
from asyncrl.buffer.book import Book
from asyncrl.buffer.errors import BadRequest, EngineBarred, LeaseLost
from asyncrl.buffer.leasing import UNKNOWN_ROOM, Leasing
from asyncrl.buffer.records import (
    RETRY,
    Counts,
    Group,
    LedgerSettings,
    Rollout,
    Selection,
    has_sampled,
)
from asyncrl.buffer.rows import StateRows
from asyncrl.buffer.schema import ENVIRONMENT, State
from asyncrl.buffer.staleness import is_sampled

_RECOUNT_EVERY = 16
"""Commits. The equation is checked at each; at these every live rollout is looked up too."""
_HELD = (State.LEASED, State.COMPLETE)


class Prompt(NamedTuple):
    """What the ledger wants to know of a prompt."""

    prompt_id: str
    position: int
    """In the frontier: each prompt that is drawn has the next one."""
    tokens: int
    """How many."""


class Ledger:
    """The rules of every rollout of one shard. Versions start at -1: nothing published, nothing admitted."""

    def __init__(self, settings: LedgerSettings, book: Book | None = None) -> None:
        self.settings = settings
        self.book = book or Book(settings)
        self._leasing = Leasing(self.book)
        self._batches = Batches(self.book)
        self._barred: set[str] = set()
        """Ids of engines that are dead for good: one for each death of a run."""

    @property
    def version(self) -> int:
        return self.book.version

    # ---- admission ---------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Groups that may be admitted now."""
        if not self.book.serving:
            return 0
        return staleness.admission_capacity(
            len(self.book.groups), self.settings.prompts_per_step, self.settings.max_staleness_versions
        )

    def admit(self, prompts: Sequence[Prompt]) -> list[Group | None]:
        """A new group for each prompt; None for one that was admitted before or is quarantined.

        Raises BadRequest past `capacity` (the caller asked for it before); nothing is admitted then.
        """
        book = self.book
        new = [p.position >= book.frontier and p.prompt_id not in book.quarantined for p in prompts]
        if sum(new) > self.capacity:
            raise BadRequest(
                f"admission of {sum(new)} groups refused: capacity is {self.capacity} at version {self.version}"
            )
        greedy = self.settings.greedy_baseline
        size = self.settings.rollouts_per_prompt + self.settings.spare_rollouts_per_prompt + greedy
        shard, shards = self.settings.shard, self.settings.shards
        admitted: list[Group | None] = []
        for prompt, is_new in zip(prompts, new, strict=True):
            if not is_new:
                book.frontier = max(book.frontier, prompt.position + 1)
                admitted.append(None)
                continue
            # An id modulo the number of shards names its shard.
            ids = [(book.next_rollout + i) * shards + shard for i in range(size)]
            group_id = book.next_group * shards + shard
            # The baseline comes first in the queue, as the group waits for it in any case.
            greedy_id = ids[0] if greedy else 0
            admitted.append(
                book.admit(group_id, ids, prompt.prompt_id, prompt.position, prompt.tokens, greedy_id)
            )
        book.note_admitted(group for group in admitted if group is not None)
        return admitted

    # ---- leases ------------------------------------------------------------------------------------------------

    def lease(
        self,
        engine_id: str,
        limit: int,
        now: float,
        after: int | None = None,
        *,
        next_batch_only: bool = False,
        kv_free_tokens: int = UNKNOWN_ROOM,
        request: int = 0,
    ) -> list[Rollout]:
        """Hands out up to `limit` queued rollouts, those nearest to their staleness deadline first, with their prefix.

        `after`: the last lease that the engine knows of. What it was given since did not reach it, and is given again.
        `next_batch_only` holds back all groups but those that the next batch needs (memory is short).
        `kv_free_tokens`: room in the engine's KV cache; partial rollouts that are longer are passed over (`leasing`).
        `request`: numbers the requests of the shard as they came, so that one that waits counts as one pass.
        """
        if engine_id in self._barred:
            raise EngineBarred(
                f"engine {engine_id} was given up as dead, and others have its rollouts: end it"
            )
        return self._leasing.lease(
            engine_id,
            limit,
            now,
            after,
            next_batch_only=next_batch_only,
            kv_free_tokens=kv_free_tokens,
            request=request,
        )

    @property
    def held_back(self) -> bool:
        """The last `lease` passed over what another engine may get."""
        return self._leasing.held_back

    def heartbeat(self, engine_id: str, now: float) -> None:
        """The engine lives: its leases run on. One that never leased has none, and leaves no record."""
        engine = self.book.engines.get(engine_id)
        if engine is not None:
            engine.seen = now

    def expire(self, now: float) -> list[Rollout]:
        """Takes back leases whose deadline passed; the rollouts keep what was appended."""
        book, lost = self.book, []
        while book.expiry and book.expiry[0][0] <= now:
            _, rollout_id, lease_id = heapq.heappop(book.expiry)
            rollout = book.rollouts.get(rollout_id)
            if rollout is None or rollout.lease_id != lease_id or rollout.state not in _HELD:
                continue
            seen = max(rollout.touched, book.engines[rollout.engine_id].seen)
            deadline = seen + self.settings.lease_timeout_s
            if deadline > now:
                heapq.heappush(book.expiry, (deadline, rollout_id, lease_id))
                continue
            book.requeue(rollout, "lease expired", rollout.attempts)
            lost.append(rollout)
        return lost

    def release(self, rollout_id: int, lease_id: int) -> None:
        """The engine hands a rollout back; it keeps its prefix."""
        rollout = self._held(rollout_id, lease_id, _HELD)
        self.book.requeue(rollout, "released", rollout.attempts)

    def release_engine(self, engine_id: str, *, for_good: bool = False) -> int:
        """The engine is gone; everything that it held goes back. Returns how many rollouts that were.

        `for_good`: nothing is leased under its id any more. Without that a process that is cut off from those who watch
        it, and not from here, would take what was just freed, and nobody would know that it has it.
        """
        if for_good:
            self._barred.add(engine_id)
        held = [r for r in self.book.rollouts.values() if r.lease_id and r.engine_id == engine_id]
        for rollout in held:
            self.book.requeue(rollout, "engine lost", rollout.attempts)
        return len(held)

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
        rollout = self.book.rollouts.get(rollout_id)
        if rollout is None or rollout.lease_id != lease_id or rollout.state is not State.LEASED:
            rollout = self._held(rollout_id, lease_id, _HELD)
        length = rollout.length
        if start != length or rollout.state is not State.LEASED:
            # A last segment may be empty: that it was taken shows in the state alone.
            if start + tokens <= length and (tokens or rollout.state is State.COMPLETE):
                return False
            raise BadRequest(
                f"segment of rollout {rollout_id} starts at token {start}, expected {length} "
                f"(state {rollout.state.name}): send segments in order, each once"
            )
        if not ENVIRONMENT <= version <= self.book.version + 1:
            raise BadRequest(
                f"segment of rollout {rollout_id} has version {version}, published is {self.book.version}: "
                "engines sample at a published version, or at the one that is being published"
            )
        if finish_reason and not (tokens and is_sampled(version)) and not has_sampled(rollout.spans):
            raise BadRequest(
                f"rollout {rollout_id} finished without a sampled token: an answer has at least its stop token"
            )
        rollout.touched = now
        if tokens:
            self.book.extend(rollout, version, tokens)
        if finish_reason:
            self.book.complete(rollout, finish_reason)
        return True

    def score(self, rollout_id: int, lease_id: int, reward: float, cost: float = 0.0) -> bool:
        """Reward and cost are known; the lease ends. False when it was scored before under this lease."""
        book = self.book
        rollout = book.rollouts.get(rollout_id)
        if rollout is not None and rollout.state > State.COMPLETE and rollout.scored_lease_id == lease_id:
            return False
        rollout = self._held(rollout_id, lease_id, (State.COMPLETE,))
        if book.score(rollout, reward, cost):
            self._batches.look_again()
        if not rollout.greedy and rollout.group.scored == self.settings.rollouts_per_prompt:
            self._group_full(rollout.group)
        return True

    def _group_full(self, group: Group) -> None:
        """All that it needs but, maybe, the baseline is scored."""
        sampled = [r for r in group.rollouts.values() if not r.greedy]
        for rollout in sampled:
            if rollout.state is not State.SCORED:
                self.book.close(rollout, State.DROPPED, "surplus")
        rewards = {r.reward for r in sampled if r.state is State.SCORED}
        if self.settings.dynamic_sampling and len(rewards) == 1:
            self.book.drop_group(group, "no reward spread")

    def fail(self, rollout_id: int, lease_id: int, reason: str) -> bool:
        """The attempt came to nothing. True when the rollout is tried again, from its first token.

        After `max_attempts` it is FAILED. A group that cannot be filled any more is given up and its prompt quarantined:
        one poisoned prompt must not hold a batch.
        """
        rollout = self._held(rollout_id, lease_id, _HELD)
        self._batches.look_again()  # a group that held the reader up may be gone
        if rollout.attempts + 1 < self.settings.max_attempts:
            self.book.requeue(rollout, reason + RETRY, rollout.attempts + 1)
            return True
        group = rollout.group
        self.book.close(rollout, State.FAILED, reason)
        if group.prompt_id in self.book.quarantined:
            self.book.drop_group(group, "a rollout of its group failed")
        return False

    # ---- batches -----------------------------------------------------------------------------------------------

    def select(self, after: int | None = None) -> Selection | None:
        """Decides on the next batch, or None while there is no valid one. The most urgent groups come first.

        `after`: the last batch that the reader got. One that was handed over since did not reach it: it comes again.
        """
        return self._batches.select(after)

    def commit(self, batch_id: int, version: int) -> Counts:
        """The batch was trained and `version` published. Raises BadRequest, or ConservationError if the equation does not
        hold."""
        again = self._batches.commit(batch_id, version)
        return self.check(every_rollout=again or version % _RECOUNT_EVERY == 0)

    def publish(self, version: int) -> None:
        """The engines confirmed `version`, at the start of a run or after a restore: prompts and leases may go out."""
        book = self.book
        if book.serving and version == book.version:
            return  # the same request once more
        if book.serving or version < 0 or (book.version >= 0 and version != book.version):
            raise BadRequest(
                f"version {version} published outside a commit; present version is {book.version}"
            )
        book.publish(version)
        self._batches.look_again()

    def note_restored(self) -> None:
        """After a restore: for whoever reads the log, those whose leases ended with the time that was abandoned."""
        for rollout in self.book.rollouts.values():
            if rollout.state is State.QUEUED:
                self.book.note(rollout, "restored")

    def drop_quarantined(self) -> None:
        """After a restore: prompts that were found to be bad later on are not tried again."""
        for group in list(self.book.groups.values()):
            if group.prompt_id in self.book.quarantined and not group.batch_id:
                self.book.drop_group(group, "prompt is quarantined")

    # ---- accounts ----------------------------------------------------------------------------------------------

    def counts(self) -> Counts:
        return accounts.counts(self.book)

    def check(self, *, every_rollout: bool = True) -> Counts:
        """Raises ConservationError."""
        return accounts.check(self.book, every_rollout=every_rollout)

    def take_rows(self) -> StateRows:
        """Every change of state since this was last asked, for the log."""
        taken, self.book.rows = self.book.rows, StateRows()
        return taken

    def take_closed(self) -> tuple[list[int], list[int]]:
        """Rollouts and groups that ended since this was last asked."""
        book = self.book
        taken = book.closed, book.closed_groups
        book.closed, book.closed_groups = [], []
        return taken

    # ---- inside ------------------------------------------------------------------------------------------------

    def _held(self, rollout_id: int, lease_id: int, states: tuple[State, ...]) -> Rollout:
        rollout = self.book.rollouts.get(rollout_id)
        if rollout is None or not lease_id or rollout.lease_id != lease_id or rollout.state not in states:
            now = "gone" if rollout is None else f"{rollout.state.name}, lease {rollout.lease_id}"
            raise LeaseLost(f"rollout {rollout_id}: lease {lease_id} is not valid (rollout is {now})")
        return rollout
