"""What a rival of the buffer is, and what those without flow control or columns of their own share.

A rival is a class in a module that spawned children can import by its name: who starts a run has `tools/` on `sys.path`.
"""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.synchronize import Semaphore
from typing import ClassVar, Final

import numpy as np
from rival_workload import PRODUCERS, Push, Rollout, Workload, make_rollouts

SPAWN: Final = multiprocessing.get_context("spawn")
START_S: Final = 180.0
"""Until every process is ready; Ray, TensorFlow and torch take their time."""
WAIT_S: Final = 60.0
"""Of one push, or for one."""
RUN_S: Final = 900.0

Send = Callable[[Sequence[Rollout]], object]
"""Waits while too much is under way."""
Receive = Callable[[int], Push]
"""Some rollouts, where so many are still wanted; waits for at least one push."""


class Rival(ABC):
    """One way to move rollouts. The parent makes and opens it; by spawn it comes to the workers, who use one side."""

    name: ClassVar[str]
    package: ClassVar[str] = ""
    """Must be there to import, besides what asyncrl always has."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def open(self, resources: ExitStack) -> None:  # noqa: B027 - most have nothing to open
        """In the parent, before the workers: starts servers, and gives `resources` what ends them."""

    @abstractmethod
    def sending(self, producer: int) -> Iterator[Send]:
        """In a producer: yields once, when connected."""

    def finish(self) -> None:  # noqa: B027 - most have sent when `send` returns
        """In a producer, after its last push, and after those that warm it up: sees them on their way."""

    @abstractmethod
    def receiving(self) -> Iterator[Receive]:
        """In the consumer: yields once, when connected."""

    def most_tokens(self) -> int:
        """Of one push."""
        sent = (push for producer in range(PRODUCERS) for push in make_rollouts(self.workload, producer))
        return max(sum(len(rollout.ids) for rollout in push) for push in sent)


class Turns:
    """Flow control for stores that have none: each producer fills its slots in order, the consumer empties them in
    order. What is counted here is of this process; between processes only semaphores speak."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._free = [SPAWN.Semaphore(slots) for _ in range(PRODUCERS)]
        self._filled = [SPAWN.Semaphore(0) for _ in range(PRODUCERS)]
        self._any_filled = SPAWN.Semaphore(0)
        self._amounts = SPAWN.Array("q", PRODUCERS * slots, lock=False)
        self._used = [0] * PRODUCERS

    def _next_of(self, producer: int) -> int:
        self._used[producer] += 1
        return producer * self.slots + (self._used[producer] - 1) % self.slots

    def claim(self, producer: int) -> int:
        """A free slot. Waits until the consumer has released one."""
        acquire(self._free[producer], f"producer {producer} for a free slot")
        return self._next_of(producer)

    def publish(self, slot: int, amount: int) -> None:
        self._amounts[slot] = amount
        self._filled[slot // self.slots].release()
        self._any_filled.release()

    def take(self) -> tuple[int, int]:
        """A filled slot and its amount. Waits until a producer has published one."""
        acquire(self._any_filled, "the consumer for a push")
        slot = self._next_of(next(i for i, filled in enumerate(self._filled) if filled.acquire(block=False)))
        return slot, self._amounts[slot]

    def release(self, slot: int) -> None:
        self._free[slot // self.slots].release()


def acquire(semaphore: Semaphore, who: str) -> None:
    if not semaphore.acquire(timeout=WAIT_S):
        raise TimeoutError(f"{who}: waited {WAIT_S:.0f} s; the other side stands still or rollouts were lost")


def write_slot(slot: np.ndarray, rollouts: Sequence[Rollout]) -> int:
    """Into int32 words: rollouts, lengths, versions, ids, logprobs. Returns the words used."""
    rows, tokens = len(rollouts), sum(len(rollout.ids) for rollout in rollouts)
    first = 1 + 2 * rows
    slot[0] = rows
    slot[1 : 1 + rows] = [len(rollout.ids) for rollout in rollouts]
    slot[1 + rows : first] = [rollout.version for rollout in rollouts]
    np.concatenate([rollout.ids for rollout in rollouts], out=slot[first : first + tokens])
    logprobs = slot[first + tokens : first + 2 * tokens].view(np.float32)
    np.concatenate([rollout.logprobs for rollout in rollouts], out=logprobs)
    return first + 2 * tokens


def read_slot(words: np.ndarray) -> Push:
    """A copy of the words that were used."""
    copy = words.copy()
    lengths, versions, columns = np.split(copy[1:], [copy[0], 2 * copy[0]])
    ids, logprobs = np.split(columns, 2)
    return Push(ids, logprobs.view(np.float32), lengths, versions)
