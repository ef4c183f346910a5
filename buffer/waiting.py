"""Requests that could not be answered yet, in the order in which they came, by kind. Pure.

Of one kind all wait for the same thing, so once there is nothing for one of them the rest need not be asked: with a thousand
engines waiting for work the loop looks at one. Where there is something, and not for this one (its engine has no room for it),
the next is asked. A request that came just now is looked at in any case (it may be owed what an answer
before it gave away). There is room for a fixed number: past it the newest is refused. Called by `service`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from asyncrl.buffer import wire
from asyncrl.buffer.errors import BadRequest

MOST_WAITING = 100_000
"""Far more than engines and clients there are: whoever comes to it asks without end."""
Key = tuple[bytes, bytes]
"""(address, request id)"""


class Look(Enum):
    """What came of looking at a request."""

    ANSWERED = "if only by an error: its wait is over"
    NOTHING = "nor is there anything for others of its kind"
    NOT_FOR_IT = "others of its kind may get something"


@dataclass(slots=True)
class Waiting:
    key: Key
    request: wire.Waits
    body: bytes | memoryview
    since: float
    deadline: float
    number: int
    """As they came, from 1 on; a request that comes once more keeps its own."""
    is_new: bool = True


class WaitingRoom:
    def __init__(self) -> None:
        self._by_kind: dict[type[wire.Waits], dict[Key, Waiting]] = {}
        self._numbers = itertools.count(1)
        self._new: dict[Key, Waiting] = {}
        """By key: while the disk is full none is looked at, and each is asked again every second."""
        self._deadlines: list[tuple[float, Key, type[wire.Waits]]] = []
        """Heap; entries of requests that were answered are passed over when they come up, or cleared away when they are most
        of it."""

    def __iter__(self) -> Iterator[Waiting]:
        for kind in self._by_kind.values():
            yield from kind.values()

    def put(self, key: Key, request: wire.Waits, body: bytes | memoryview, now: float) -> None:
        """The same request once more takes the place of the first (its asker may have lost the connection) and keeps its
        deadline: who asks again and again would else never be told that there is nothing. Raises BadRequest when full."""
        kind = self._by_kind.setdefault(type(request), {})
        first = kind.get(key)
        if first is None and sum(map(len, self._by_kind.values())) >= MOST_WAITING:
            raise BadRequest(
                f"{MOST_WAITING:,} requests wait at this shard already, and it keeps no more: {type(request).__name__} was "
                "refused; let each asker wait for its answer before it asks for more"
            )
        since, number = (first.since, first.number) if first else (now, next(self._numbers))
        waiting = kind[key] = Waiting(key, request, body, since, since + request.timeout_s, number)
        self._new[key] = waiting
        if first is None or waiting.deadline != first.deadline:
            heapq.heappush(self._deadlines, (waiting.deadline, key, type(request)))
        if len(self._deadlines) > 2 * MOST_WAITING:
            self._deadlines = [(w.deadline, w.key, type(w.request)) for w in self]
            heapq.heapify(self._deadlines)

    def serve(self, attempt: Callable[[Waiting], Look]) -> None:
        """Calls `attempt` for those that may get something now."""
        for kind in self._by_kind.values():
            for waiting in list(kind.values()):
                look = attempt(waiting)
                if look is Look.NOTHING:
                    break
                if look is Look.ANSWERED:
                    del kind[waiting.key]
        new, self._new = self._new, {}
        for waiting in new.values():
            kind = self._by_kind[type(waiting.request)]
            is_there = kind.get(waiting.key) is waiting and waiting.is_new
            if is_there and attempt(waiting) is Look.ANSWERED:
                del kind[waiting.key]
            waiting.is_new = False

    def late(self, now: float) -> Iterator[Waiting]:
        """Takes out those whose deadline is over."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, key, kind = heapq.heappop(self._deadlines)
            waiting = self._by_kind[kind].get(key)
            if waiting is not None and waiting.deadline <= now:
                del self._by_kind[kind][key]
                self._new.pop(key, None)  # while the disk is full nobody else takes it out
                yield waiting

    def clear(self) -> Iterator[Waiting]:
        """Takes out all."""
        for kind in self._by_kind.values():
            while kind:
                yield kind.popitem()[1]

    def next_deadline(self) -> float:
        """Of any that waits or waited; infinity when there is none."""
        return self._deadlines[0][0] if self._deadlines else float("inf")
