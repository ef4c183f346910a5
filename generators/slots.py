"""Which rollouts of one engine hold a slot, which wait in line for one, and which go back when there are fewer. Pure.

Invariants:
- At most `limit` slots are given out; after the limit was lowered, none is until so many have been given back.
- Whoever stepped out comes before new ones: `free` counts only slots that nobody waits in line for.
- When the limit falls, the newest go back: the least was put into them.
Called by the dispatcher.
"""

from __future__ import annotations

import itertools


class Slots:
    """`take` for a new rollout; `step_out` and `line_up` around what needs no engine; `end` when it is over."""

    def __init__(self, limit: int) -> None:
        self._limit = _checked(limit)
        self._ages: dict[str, int] = {}
        """Every rollout that has not ended, in order of its first slot."""
        self._holders: set[str] = set()
        self._line: dict[str, None] = {}
        self._count = itertools.count()

    @property
    def limit(self) -> int:
        return self._limit

    @property
    def used(self) -> int:
        """Slots that are given out: more than `limit` for a while after it was lowered."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """Slots for new rollouts."""
        return max(0, self._limit - len(self._holders) - len(self._line))

    @property
    def known(self) -> list[str]:
        """Every rollout that has not ended, with a slot or without, oldest first."""
        return list(self._ages)

    def take(self, key: str) -> None:
        """A new rollout gets a slot. The caller has looked at `free`."""
        assert key not in self._ages and self.free > 0
        self._ages[key] = next(self._count)
        self._holders.add(key)

    def step_out(self, key: str) -> None:
        """It needs no engine for a while."""
        self._holders.discard(key)
        self._line.pop(key, None)

    def line_up(self, key: str) -> None:
        """It wants a slot again, behind those that were in line before."""
        assert key in self._ages and key not in self._holders
        self._line[key] = None

    def admit(self) -> list[str]:
        """Gives what slots there are to the first of the line."""
        room = max(0, self._limit - len(self._holders))
        admitted = list(itertools.islice(self._line, room))
        for key in admitted:
            del self._line[key]
            self._holders.add(key)
        return admitted

    def end(self, key: str) -> None:
        self.step_out(key)
        self._ages.pop(key, None)

    def resize(self, limit: int) -> list[str]:
        """The new limit; returns whom to send back, newest first. At 0 that is everyone, also those without a slot."""
        self._limit = _checked(limit)
        if not limit:
            return self.known[::-1]
        newest = sorted(self._holders, key=self._ages.__getitem__, reverse=True)
        return newest[: max(0, len(newest) - limit)]


def _checked(limit: int) -> int:
    if limit < 0:
        raise ValueError(f"concurrency {limit}: expected 0 (paused) or more slots")
    return limit
