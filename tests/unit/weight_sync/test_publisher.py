"""The publisher on its own and with engines in this process: order of calls, what interrupts it, who comes and goes."""

from __future__ import annotations

import pickle
import signal
import threading
import time
import uuid
from collections.abc import Iterator

import pytest
import torch
import zmq
from engine_threads import Engines

from asyncrl.generators.fake_engine import Fault
from asyncrl.generators.fake_speech import weights_digest
from asyncrl.weight_sync import wire
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import (
    ChecksumError,
    EnginesMissing,
    ProbeMismatch,
    SyncAborted,
    WeightSyncError,
)
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.probe import Probe, largest_difference
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.report import TransactionReport
from asyncrl.weight_sync.shm import slot_path
from asyncrl.weight_sync.wire import SharedFile

PLAN = make_plan([("a", "float32", (64,)), ("b", "bfloat16", (8, 8)), ("c", "float32", (3,))], 384)
WEIGHTS = {"a": torch.ones(64), "b": torch.ones(8, 8), "c": torch.ones(3)}


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    name = f"test-{uuid.uuid4().hex[:12]}"
    with Publisher(WeightSyncConfig(timeout_s=20.0), name, PLAN) as made:
        yield made
    assert not slot_path(name, 0).exists() and not slot_path(name, 1).exists()


@pytest.fixture
def engines(publisher: Publisher) -> Iterator:
    started: list[Engines] = []

    def start(**faults: list[Fault]) -> Engines:
        started.append(Engines(publisher.endpoint, **faults))
        publisher.wait_for_engines(set(faults), timeout_s=20)
        return started[-1]

    yield start
    for each in started:
        each.close()


def write(publisher: Publisher, version: int) -> tuple[int, ...]:
    """Returns the checksums."""
    publisher.begin(version)
    for bucket in PLAN.buckets:
        publisher.write(bucket, cut(PLAN, bucket, {name: t + version for name, t in WEIGHTS.items()}))
    return publisher._draft.offer(SharedFile(path="")).checksums


def test_calls_out_of_order_say_what_was_expected(publisher):
    first, second = (cut(PLAN, bucket, WEIGHTS) for bucket in PLAN.buckets)
    with pytest.raises(WeightSyncError, match=r"call begin\(version\) first"):
        publisher.write(PLAN.buckets[0], first)
    with pytest.raises(WeightSyncError, match=r"call begin\(version\) first"):
        publisher.commit()
    publisher.begin(0)
    with pytest.raises(WeightSyncError, match="version 0 is begun; commit or abandon"):
        publisher.begin(1)
    with pytest.raises(WeightSyncError, match="bucket 1 out of order, expected bucket 0 of 2"):
        publisher.write(PLAN.buckets[1], second)
    with pytest.raises(WeightSyncError, match="bucket 0: expected 2 pieces, got 1"):
        publisher.write(PLAN.buckets[0], first[:1])
    with pytest.raises(WeightSyncError, match="tensor 'a' of bucket 0 is not among"):
        cut(PLAN, PLAN.buckets[0], {"c": WEIGHTS["c"]})
    publisher.write(PLAN.buckets[0], first)
    with pytest.raises(WeightSyncError, match="expected 2 buckets, 1 are written"):
        publisher.commit()
    publisher.write(PLAN.buckets[1], second)
    with pytest.raises(WeightSyncError, match="out of order"):
        publisher.write(PLAN.buckets[1], second)
    publisher.commit()
    with pytest.raises(WeightSyncError, match=r"call begin\(version\) first"):
        publisher.commit()


def test_an_abandoned_version_can_be_begun_again(publisher, engines):
    engines(a=[])
    publisher.begin(0)
    publisher.abandon()
    write(publisher, 0)
    assert publisher.commit().version == 0
    with pytest.raises(WeightSyncError, match="version 0: expected one above 0"):
        publisher.begin(0)


def test_the_engine_gets_the_bytes_that_were_written(publisher, engines):
    running = engines(a=[])
    sums = write(publisher, 3)
    publisher.commit()
    assert running.engines["a"].stats().version == 3
    assert running.engines["a"]._digest == weights_digest(sums)


def test_an_engine_that_leaves_is_not_waited_for(publisher, engines):
    running = engines(a=[], b=[])
    write(publisher, 0)
    publisher.commit()
    running.do(running.leave("b"))
    write(publisher, 1)
    report = publisher.commit()
    assert report.engines.keys() == {"a"} and report.seconds < 10


@pytest.mark.parametrize("where", ["stage", "apply"])
def test_an_engine_that_leaves_in_a_sync_is_gone_on_without(publisher, engines, where):
    running = engines(a=[], b=[Fault(kind="hang", where=where, at=0)])
    write(publisher, 0)
    timer = threading.Timer(0.5, lambda: running.do(running.leave("b")))
    timer.start()
    report = publisher.commit()
    timer.join()
    assert {name: m.outcome for name, m in report.engines.items()} == {"a": "applied", "b": "left"}
    assert not report.out_of_service and report.seconds < 10 and publisher.engines == {"a": 0}


def test_an_interrupt_before_the_commit_point_aborts_everywhere(publisher, engines):
    running = engines(a=[], b=[Fault(kind="hang", where="stage", at=0)])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    write(publisher, 0)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            publisher.commit()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert publisher.version == -1
    # The engine that had staged was told to forget it; it takes the next attempt while b still hangs in the old one.
    running.do(running.leave("b"))
    write(publisher, 0)
    assert publisher.commit().engines.keys() == {"a"}
    assert running.engines["a"].stats().version == 0


def test_strangers_and_garbage_are_counted_and_change_nothing(publisher, engines):
    engines(a=[])
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.ROUTING_ID, b"stranger")
    stranger.connect(publisher.endpoint)
    stranger.send(b"\xff not a message")
    stranger.send_multipart([b"", b""])
    stranger.send(wire.encode(wire.Staged(attempt=1, stage_s=0.0)))
    nameless = context.socket(zmq.DEALER)
    nameless.connect(publisher.endpoint)
    nameless.send(wire.encode(wire.Join(version=-1)))
    try:
        with pytest.raises(EnginesMissing):
            publisher.wait_for_engines({"stranger"}, timeout_s=0.5)
        write(publisher, 0)
        report = publisher.commit()
    finally:
        stranger.close(linger=0)
        nameless.close(linger=0)
        context.term()
    assert report.engines.keys() == {"a"}
    assert report.ignored == {
        "malformed message": 2,
        "staged after its attempt": 1,
        "message without a name": 1,
    }


def test_two_connections_of_one_name_are_one_engine_the_newer(publisher):
    context = zmq.Context()
    older, newer = (context.socket(zmq.DEALER) for _ in range(2))
    try:
        for version, dealer in enumerate((older, newer)):
            dealer.setsockopt(zmq.ROUTING_ID, b"a")
            dealer.connect(publisher.endpoint)
            dealer.send(wire.encode(wire.Join(version=version)))
            publisher.wait_for_engines({"a"}, timeout_s=20)
            time.sleep(0.2)
        assert publisher.engines == {"a": 1}
        older.send(wire.encode(wire.Leave(reason="late")))
        time.sleep(0.2)
        assert publisher.engines == {"a": 1}
    finally:
        for dealer in (older, newer):
            dealer.close(linger=0)
        context.term()


def test_a_closed_publisher_frees_its_port_and_refuses(publisher):
    publisher.close()
    publisher.close()
    with pytest.raises(WeightSyncError, match="closed"):
        publisher.begin(0)
    assert publisher.welcome() is None


PROBE = Probe(tokens=(1, 2, 3), logprobs=(-1.0, -2.0), tolerance=0.01)


@pytest.mark.parametrize(
    ("answer", "position", "size"),
    [
        ([-1.0, -2.0], 0, 0.0),
        ([-1.0, -2.5], 1, 0.5),
        ([-1.75, -2.5], 0, 0.75),
        ([float("nan"), -2.0], 0, float("inf")),
        ([-1.5, float("nan")], 1, float("inf")),
        ([-1.0], 1, float("inf")),
        ([], 0, float("inf")),
    ],
)
def test_the_largest_difference_is_found_and_no_number_never_passes(answer, position, size):
    worst = largest_difference(PROBE, answer)
    assert (worst.position, worst.size) == (position, size)


def test_a_probe_needs_a_logprob_for_each_token_but_the_first():
    with pytest.raises(ValueError, match="got 3 tokens and 3 logprobs"):
        Probe(tokens=(1, 2, 3), logprobs=(0.0, 0.0, 0.0), tolerance=0.1)


def test_errors_keep_their_facts_through_pickling():
    report = TransactionReport(
        version=2, committed=False, seconds=1.0, reason="why", offered=True, members={}, ignored={}
    )
    for error in (
        ChecksumError(2, 1, 3, 4, "/dev/shm/x"),
        SyncAborted("told", report),
        EnginesMissing("told", frozenset({"a"})),
        ProbeMismatch("a", 2, 1, -1.0, -2.0, failed=2, answer=(-3.0,)),
    ):
        back = pickle.loads(pickle.dumps(error))
        assert str(back) == str(error) and vars(back) == vars(error) and type(back) is type(error)
