"""Which queued rollouts an engine gets: the most urgent first, partial ones where there is room for them. Pure.

A rollout that goes on from a prefix has all of its context prefilled before its next token, and pools differ in what their KV
caches hold. An engine says how many tokens fit into its cache, and what does not fit is passed over for it: the next in
order are taken, and another engine may have the room.

Invariants:
- What an answer gave away and did not arrive is given again, whatever the room.
- Nobody starves: an engine that generates nothing takes any rollout, and a rollout that was passed over by
  `MOST_PASSES` requests, or for `LONGEST_PASSED_S`, goes to the next engine that is looked at, also to one that waits.
- A fresh prompt takes room, and is never refused for it: any engine can hold one.
Called by `ledger`.
"""

from __future__ import annotations

import heapq

from asyncrl.buffer.book import Book, Entry
from asyncrl.buffer.records import Rollout
from asyncrl.buffer.schema import State

UNKNOWN_ROOM = -1
"""For `kv_free_tokens`: nothing is passed over."""
MOST_PASSES = 8
"""Requests, each counted once however often it is looked at while it waits."""
LONGEST_PASSED_S = 2.0
"""Where few engines ask and all of them wait there are no requests to count. Short of a lease's wait (3 s), so that the
same request still gets it, and long enough for a running engine to end some rollouts and ask with more room."""
_MOST_LOOKED_PAST = 64
"""Rollouts that one request passes over: a short look, as the loop stands still meanwhile and waiting requests look again."""


class Room:
    """What is left of one engine's KV cache while the answer to its request is put together."""

    def __init__(self, free_tokens: int, *, idle: bool, request: int, now: float) -> None:
        self._known, self._free, self._idle = free_tokens != UNKNOWN_ROOM, free_tokens, idle
        self._request, self._now = request, now

    def takes(self, rollout: Rollout) -> bool:
        """Whether it is given to this engine; the room that it needs is gone then."""
        if not self._known or rollout.finish_reason:
            return True  # one that is to be scored alone needs no room
        context = rollout.group.prompt_tokens + rollout.length
        if rollout.length and context > self._free and not self._idle and not self._is_overdue(rollout):
            return False
        self._free -= context
        self._idle = False
        return True

    def _is_overdue(self, rollout: Rollout) -> bool:
        """It was passed over long enough, or often enough by others than the request that is looked at again."""
        passed = rollout.passed
        if passed is None:
            return False
        often = passed.times >= MOST_PASSES and passed.request != self._request
        return often or self._now - passed.since >= LONGEST_PASSED_S


class Leasing:
    """Decides over the queue of `book`."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self.held_back = False
        """The last request passed over what another one may get: those behind it are worth a look."""

    def lease(
        self,
        engine_id: str,
        limit: int,
        now: float,
        after: int | None,
        *,
        next_batch_only: bool,
        kv_free_tokens: int,
        request: int,
    ) -> list[Rollout]:
        """As `Ledger.lease`."""
        book = self._book
        self.held_back = False
        if not book.serving:
            return []
        lost = self._undelivered(engine_id, after, now)
        if lost:
            return lost
        engine = book.engines.get(engine_id)
        idle = engine is None or not engine.generating
        room = Room(kv_free_tokens, idle=idle, request=request, now=now)
        leased, passed = self._choose(limit, room, self._next_batch() if next_batch_only else None)
        for rollout in passed:
            book.pass_over(rollout, request, now)
        self.held_back = bool(passed)
        if leased:
            book.lease(leased, engine_id, book.next_lease, now)
        return leased

    def _undelivered(self, engine_id: str, after: int | None, now: float) -> list[Rollout]:
        engine = self._book.engines.get(engine_id)
        if after is None or engine is None or engine.last_lease_id <= after:
            return []
        lost = [r for r in self._book.rollouts.values() if r.lease_id > after and r.engine_id == engine_id]
        for rollout in lost:
            rollout.touched = now
        engine.last_lease_id = max((r.lease_id for r in lost), default=after)
        return lost

    def _choose(
        self, limit: int, room: Room, allowed: set[int] | None
    ) -> tuple[list[Rollout], list[Rollout]]:
        """Those that are given away, which are off the queue, and those that were passed over, which are in it."""
        queue = self._book.queue
        leased, passed = list[Rollout](), list[Rollout]()
        back: list[Entry] = []
        last: Rollout | None = None
        while queue and len(leased) < limit and len(passed) < _MOST_LOOKED_PAST:
            entry = heapq.heappop(queue)
            rollout = self._valid(entry)
            if rollout is None or rollout is last:  # queued twice at one place: the entries are neighbours
                continue
            if allowed is not None and entry[1] not in allowed:
                back.append(entry)
                break  # those allowed are the most urgent of all: none comes after it
            last = rollout
            if room.takes(rollout):
                leased.append(rollout)
            else:
                passed.append(rollout)
                back.append(entry)
        for entry in back:
            heapq.heappush(queue, entry)
        return leased, passed

    def _valid(self, entry: Entry) -> Rollout | None:
        """The rollout, where the entry still holds."""
        rollout = self._book.rollouts.get(entry[2])
        if rollout is None or rollout.state is not State.QUEUED or entry[0] != Book.urgency(rollout.group):
            return None
        return rollout

    def _next_batch(self) -> set[int]:
        """The groups that can make the next batch soonest: the most urgent B that were not handed over."""
        book = self._book
        waiting = ((book.urgency(g), g.group_id) for g in book.groups.values() if not g.batch_id)
        return {group_id for _, group_id in heapq.nsmallest(book.settings.prompts_per_step, waiting)}
