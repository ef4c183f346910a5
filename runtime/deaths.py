"""When a process died, and what follows: is it started again, and after how long. Pure. Called by the keepers of buffer
shards and of engines, and `ends_the_run` by whoever hears of an engine's fault."""

from __future__ import annotations

from collections import deque
from typing import Final

from asyncrl.generators.score import CostMissing

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0

_OF_THE_RECIPE: Final = (CostMissing,)


def ends_the_run(raised: BaseException | None) -> bool:
    """A mistake of the recipe, which every other process would meet as well: no death to recover from. `raised`: by the part."""
    return isinstance(raised, _OF_THE_RECIPE)


class Deaths:
    """The deaths of one process, as far back as they matter."""

    def __init__(self, most: int, within_s: float) -> None:
        """More than `most` deaths within `within_s` are too many."""
        self.most, self.within_s = most, within_s
        self.total = 0
        self._times: deque[float] = deque(maxlen=most + 1)

    def one_too_many(self, now: float) -> bool:
        """Notes a death at `now`, in seconds of any one clock."""
        self.total += 1
        self._times.append(now)
        return len(self._times) > self.most and now - self._times[0] <= self.within_s

    def wait_s(self, now: float) -> float:
        """How long to wait before the next start: twice as long after each of the recent deaths."""
        recent = sum(now - time <= self.within_s for time in self._times)
        return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** max(0, recent - 1))
