"""Work beside its caller: what runs at once, what waits, and where errors go."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.pipeline import Pipeline
from asyncrl.weight_sync.ranks import Alone

SOON_S = 5.0


def soon() -> float:
    return time.monotonic() + SOON_S


class Gate:
    """Work that goes on when it is let."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.started = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def __call__(self, item: int) -> None:
        self.started.release()
        assert self.go.acquire(timeout=SOON_S)
        if item < 0:
            raise ValueError(f"item {item}")
        self.done.append(item)


def test_items_are_worked_on_in_order_and_the_caller_goes_on_meanwhile():
    gate = Gate()
    with Pipeline(gate) as pipeline:
        pipeline.put(0, soon())
        assert gate.started.acquire(timeout=SOON_S)
        assert gate.done == []  # the caller is here while 0 is in work
        gate.go.release(3)
        pipeline.put(1, soon())
        pipeline.put(2, soon())
        pipeline.finish(soon())
    assert gate.done == [0, 1, 2]


def test_a_third_item_is_not_taken_while_the_first_is_in_work():
    gate = Gate()
    with Pipeline(gate) as pipeline:
        pipeline.put(0, soon())
        with pytest.raises(WeightSyncError, match="work on the item before"):
            pipeline.put(1, time.monotonic() + 0.05)
        gate.go.release(2)
        pipeline.put(2, soon())
        pipeline.finish(soon())
    assert gate.done == [0, 2]


def test_the_works_error_is_the_callers_and_ends_the_work():
    gate = Gate()
    gate.go.release(9)
    with Pipeline(gate) as pipeline:
        pipeline.put(-1, soon())
        for _ in range(2):
            with pytest.raises(ValueError, match="item -1"):
                pipeline.put(1, soon())
        with pytest.raises(ValueError, match="item -1"):
            pipeline.finish(soon())
    assert gate.done == []


def test_an_error_of_the_last_item_is_not_lost():
    gate = Gate()
    gate.go.release()
    with Pipeline(gate) as pipeline, pytest.raises(ValueError, match="item -7"):
        pipeline.put(-7, soon())
        pipeline.finish(soon())


def test_after_closing_nothing_is_in_work_and_nothing_is_taken():
    gate = Gate()
    pipeline = Pipeline(gate)
    pipeline.put(0, soon())
    assert gate.started.acquire(timeout=SOON_S)
    threading.Timer(0.1, gate.go.release).start()
    pipeline.close()
    assert gate.done == [0]  # it waited for the work under way
    pipeline.close()
    with pytest.raises(WeightSyncError, match="after it was closed"):
        pipeline.put(1, soon())
    assert not [thread for thread in threading.enumerate() if thread.name == "asyncrl-pipeline"]


class Weighty:
    pass


def test_an_item_is_let_go_of_as_soon_as_its_work_is_done():
    with Pipeline(lambda item: None) as pipeline:
        item = Weighty()
        gone = weakref.ref(item)
        pipeline.put(item, soon())
        del item
        with pipeline._condition:
            pipeline._condition.wait_for(lambda: not pipeline._busy, timeout=SOON_S)
        gc.collect()
        assert gone() is None


def test_one_rank_alone_hears_itself():
    alone = Alone()
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.share(b"begin") == b"begin"
    assert alone.collect(b"sums") == [b"sums"]
