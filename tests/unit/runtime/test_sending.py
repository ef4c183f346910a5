"""How ranks send together: order, agreement, and another attempt where a version was called off. Ranks are threads here; gathering
is a meeting of all of them, as the learner's is."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # what tests share

from thread_ranks import SOON_S, Meeting, ThreadRank

from asyncrl.runtime.sending import Sender
from asyncrl.weight_sync.errors import SyncAborted, WeightSyncError
from asyncrl.weight_sync.plan import Bucket, Plan, make_plan
from asyncrl.weight_sync.report import SyncReport, TransactionReport

ONE = make_plan([(f"w{index}", "float32", (16,)) for index in range(5)], 64)
ALL = make_plan(
    [(f"w{index}", "float32", (16,)) for index in range(5)],
    64,
    shares={f"w{index}": [(0, 8), (8, 8)] for index in range(5)},
)


class Gatherer:
    """A learner as far as it sends."""

    def __init__(self, ranks: ThreadRank) -> None:
        self.ranks = ranks
        self.gathered: list[int] = []
        self.fails_at = -1

    def gather(self, plan: Plan, bucket: Bucket) -> list[torch.Tensor]:
        if plan.senders == 1:
            self.ranks.collect(b"rows")  # a collective: who is missing breaks it
        if bucket.index == self.fails_at:
            raise MemoryError(f"no room for bucket {bucket.index}")
        self.gathered.append(bucket.index)
        return (
            [torch.zeros(piece.count) for piece in bucket.pieces] if bucket.sender == self.ranks.rank else []
        )


class Writer:
    """A publisher, or a share of one, that does what it is told to."""

    def __init__(self, *faults: tuple[str, int]) -> None:
        self.faults = list(faults)
        """(method, at which of its calls), counted from the last one that was taken."""
        self.calls: list[str] = []
        self.threads: set[str] = set()

    def _note(self, call: str, number: int) -> None:
        self.calls.append(call)
        if self.faults and self.faults[0] == (call.split()[0], number):
            method, _ = self.faults.pop(0)
            if method == "commit":
                raise SyncAborted("called off", _REPORT)
            raise OSError(f"no {call}")

    def begin(self, version: int) -> None:
        self._note(f"begin {version}", 0)

    def write(self, bucket: Bucket, pieces: list[torch.Tensor]) -> None:
        assert len(pieces) == len(bucket.pieces)
        self.threads.add(threading.current_thread().name)
        self._note(f"write {bucket.index}", bucket.index)

    def abandon(self) -> None:
        self.calls.append("abandon")

    def commit(self, probe: object) -> SyncReport | None:
        self._note("commit", 0)
        return None


_REPORT = TransactionReport(
    version=0, committed=False, seconds=0.0, reason="an engine died", offered=True, members={}, ignored={}
)


class World:
    """Two ranks: learners, writers, and what `send` raised on each."""

    def __init__(self, plan: Plan, first: Writer, second: Writer | None, attempts: int = 1) -> None:
        meeting = Meeting(2)
        self.learners = [Gatherer(meeting.rank(rank)) for rank in range(2)]
        self.senders = [
            Sender(learner, plan, writer, SOON_S, attempts)  # type: ignore[arg-type]
            for learner, writer in zip(self.learners, (first, second), strict=True)
        ]

    def send(self, version: int) -> list[BaseException | None]:
        with ThreadPoolExecutor(2) as threads:
            sent = [threads.submit(each.send, version, None) for each in self.senders]
            return [each.exception(timeout=2 * SOON_S) for each in sent]


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    assert not [each.name for each in threading.enumerate() if each.name == "asyncrl-pipeline"]


def test_buckets_are_written_in_order_beside_the_thread_that_gathers() -> None:
    first, second = Writer(), Writer()
    world = World(ALL, first, second)
    assert world.send(7) == [None, None]
    assert first.calls == ["begin 7", *(f"write {index}" for index in range(3)), "commit"]
    assert second.calls == ["begin 7", *(f"write {index}" for index in range(3, 6)), "commit"]
    assert world.learners[1].gathered == [3, 4, 5] and first.threads == {"asyncrl-pipeline"}


def test_where_one_rank_sends_the_other_gives_its_rows() -> None:
    first = Writer()
    world = World(ONE, first, None)
    assert world.send(0) == [None, None]
    assert world.learners[1].gathered == list(range(5)) and len(first.calls) == 7


@pytest.mark.parametrize("fault", [("begin", 0), ("write", 0), ("write", 2), ("write", 4)])
def test_a_writer_that_fails_leaves_nobody_waiting_in_a_gather(fault: tuple[str, int]) -> None:
    first = Writer(fault)
    world = World(ONE, first, None)
    own, other = world.send(0)
    assert isinstance(own, OSError) and type(other) is WeightSyncError
    assert "learner rank 0: OSError: no" in str(other)
    assert world.learners[1].gathered == list(range(5)) and first.calls[-1] == "abandon"
    assert world.send(1) == [None, None]


@pytest.mark.parametrize("fault", [("begin", 0), ("write", 3), ("write", 5)])
def test_a_share_that_is_not_written_is_everyones_error(fault: tuple[str, int]) -> None:
    first, second = Writer(), Writer(fault)
    world = World(ALL, first, second)
    own, other = world.send(0)
    assert type(own) is WeightSyncError and isinstance(other, OSError)
    assert "commit" not in first.calls + second.calls
    assert first.calls[-1] == second.calls[-1] == "abandon"
    assert world.send(1) == [None, None]


def test_rows_that_a_rank_cannot_give_of_itself_are_everyones_error_too() -> None:
    first, second = Writer(), Writer()
    world = World(ALL, first, second)
    world.learners[0].fails_at = 1
    own, other = world.send(0)
    assert isinstance(own, MemoryError) and "no room for bucket 1" in str(other)


def test_a_version_that_was_called_off_is_sent_again_by_all() -> None:
    first = Writer(("commit", 0))
    world = World(ONE, first, None, attempts=2)
    assert world.send(0) == [None, None]
    assert first.calls.count("begin 0") == first.calls.count("commit") == 2
    assert world.learners[1].gathered == 2 * list(range(5))


def test_after_the_last_attempt_it_is_over() -> None:
    first = Writer(("commit", 0), ("commit", 0))
    world = World(ONE, first, None, attempts=2)
    own, other = world.send(0)
    assert isinstance(own, SyncAborted) and other is None  # the others hear of it where they meet rank 0 next
    assert world.send(1) == [None, None]
