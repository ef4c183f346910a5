"""Engines that come late, die and come back: what `welcome` and `commit` do for them, one situation at a time."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator

import pytest
import torch
from engine_threads import Engines

from asyncrl.generators.fake_engine import Fault
from asyncrl.generators.fake_speech import probe_logprobs, weights_digest
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import Dismissed, ProbeMismatch, WeightSyncError
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.welcomer import Welcomer
from asyncrl.weight_sync.wire import SharedFile

PLAN = make_plan([("a", "float32", (64,)), ("b", "float32", (3,))], 200)
TIMEOUT_S = 3.0


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with Publisher(WeightSyncConfig(timeout_s=TIMEOUT_S), f"test-{uuid.uuid4().hex[:12]}", PLAN) as made:
        yield made


@pytest.fixture
def engines(publisher: Publisher) -> Iterator[Engines]:
    started = Engines(publisher.endpoint)
    yield started
    started.close()


def write(publisher: Publisher, version: int) -> int:
    """Returns the digest that an engine of this version has."""
    publisher.begin(version)
    for bucket in PLAN.buckets:
        weights = {"a": torch.full((64,), float(version)), "b": torch.zeros(3)}
        publisher.write(bucket, cut(PLAN, bucket, weights))
    return weights_digest(publisher._draft.offer(SharedFile(path="")).checksums)


def outcomes(report) -> dict[str, str]:
    return {name: member.outcome for name, member in report.engines.items()}


def test_a_version_that_nobody_is_there_for_is_committed_and_given_to_who_comes(publisher, engines):
    assert publisher.welcome() is None
    for version in range(3):
        digest = write(publisher, version)
        report = publisher.commit()
        assert report.version == version and not report.engines and report.transaction_s < 0.5
    assert publisher.welcome() is None
    engines.start("late")
    publisher.wait_for_engines({"late"}, timeout_s=20)
    assert publisher.engines == {"late": -1}
    report = publisher.welcome()
    assert report.version == 2 and outcomes(report) == {"late": "applied"} and report.write_s == 0.0
    assert engines.engines["late"].stats().version == 2 and engines.engines["late"]._digest == digest
    assert publisher.engines == {"late": 2} and publisher.welcome() is None


def test_a_welcome_concerns_nobody_who_is_up_to_date(publisher, engines):
    engines.start("early")
    publisher.wait_for_engines({"early"}, timeout_s=20)
    write(publisher, 0)
    publisher.commit()
    assert publisher.welcome() is None
    engines.start("late")
    publisher.wait_for_engines({"late"}, timeout_s=20)
    assert outcomes(publisher.welcome()) == {"late": "applied"}
    write(publisher, 1)
    assert outcomes(publisher.commit()) == {"early": "applied", "late": "applied"}


def test_the_live_version_can_be_had_while_the_next_is_written(publisher, engines):
    digest = write(publisher, 0)
    publisher.commit()
    write(publisher, 1)
    engines.start("late")
    publisher.wait_for_engines({"late"}, timeout_s=20)
    assert publisher.welcome().version == 0
    assert engines.engines["late"]._digest == digest
    assert publisher.commit().version == 1


def test_the_bytes_outlive_an_engine_that_may_still_read_them(publisher, engines):
    """After an engine was given up in `apply`, its file is not written again, and still serves who comes."""
    engines.start("hung", [Fault(kind="hang", where="apply", at=0)])
    publisher.wait_for_engines({"hung"}, timeout_s=20)
    digest = write(publisher, 0)
    held = publisher._draft.slot
    assert outcomes(publisher.commit()) == {"hung": "late"}
    before = held.path.stat().st_ino
    for name in ("x", "y"):
        engines.start(name)
        publisher.wait_for_engines({name}, timeout_s=20)
        assert outcomes(publisher.welcome()) == {name: "applied"}
        assert engines.engines[name]._digest == digest
    write(publisher, 1)
    publisher.commit()
    assert held.path.stat().st_ino == before, "the hung engine may read it"
    write(publisher, 2)
    assert held.path.stat().st_ino != before, "its bytes are the hung engine's, not version 2's"
    assert outcomes(publisher.commit()) == {"x": "applied", "y": "applied"}


@pytest.mark.parametrize("where", ["stage", "apply"])
def test_a_joiner_that_fails_is_named_and_ends_and_may_come_again(publisher, engines, where):
    write(publisher, 0)
    publisher.commit()
    engines.start("good")
    engines.start("bad", [Fault(kind="raise", where=where, at=0)])
    publisher.wait_for_engines({"good", "bad"}, timeout_s=20)
    report = publisher.welcome()
    assert outcomes(report) == {"good": "applied", "bad": "failed"}
    assert "InjectedFault" in report.out_of_service["bad"] and report.out_of_service.keys() == {"bad"}
    ended = engines.ended("bad")
    assert isinstance(ended, Dismissed) if where == "stage" else "InjectedFault" in repr(ended)
    assert publisher.engines == {"good": 0} and publisher.welcome() is None
    engines.start("bad")
    publisher.wait_for_engines({"bad"}, timeout_s=20)
    assert outcomes(publisher.welcome()) == {"bad": "applied"}


def test_a_joiner_that_computes_other_logprobs_is_out(publisher, engines):
    digest = write(publisher, 0)
    tokens = (1, 2, 3)
    right = tuple(probe_logprobs(digest, tokens))
    publisher.commit(Probe(tokens=tokens, logprobs=right, tolerance=1e-6))
    engines.start("right")
    publisher.wait_for_engines({"right"}, timeout_s=20)
    assert publisher.welcome().probe_max_diff == {"right": 0.0}
    write(publisher, 1)
    publisher.abandon()
    publisher._live.probe = Probe(tokens=tokens, logprobs=(right[0], right[1] - 0.5), tolerance=1e-6)
    engines.start("wrong")
    publisher.wait_for_engines({"wrong"}, timeout_s=20)
    report = publisher.welcome()
    assert report.probe_max_diff == {"wrong": pytest.approx(0.5)}
    assert "engine wrong at version 0, probe logprob 1" in report.out_of_service["wrong"]
    assert isinstance(engines.ended("wrong"), ProbeMismatch) and publisher.engines.keys() == {"right"}


def test_an_engine_of_the_same_name_takes_over_from_a_connection_that_lingers(publisher, engines):
    """The old one still holds its connection, and says farewell only after the new one is there."""
    first = engines.start("a")
    publisher.wait_for_engines({"a"}, timeout_s=20)
    write(publisher, 0)
    publisher.commit()
    engines.start("a")
    # Waits for the new one's join; unblocked by its connection; ends with it, or at the deadline of the assertion.
    deadline = time.monotonic() + 20
    while publisher.engines != {"a": -1} and time.monotonic() < deadline:
        time.sleep(0.02)
    assert publisher.engines == {"a": -1}
    assert outcomes(publisher.welcome()) == {"a": "applied"}
    engines.do(engines.end(first))
    time.sleep(0.3)
    assert publisher.engines == {"a": 0}, "the farewell came over the old connection"
    write(publisher, 1)
    assert outcomes(publisher.commit()) == {"a": "applied"}
    assert engines.engines["a"].stats().version == 1


def test_an_engine_that_comes_anew_in_a_sync_is_welcomed_after_it(publisher, engines):
    engines.start("a", [Fault(kind="hang", where="stage", at=0)])
    engines.start("b")
    publisher.wait_for_engines({"a", "b"}, timeout_s=20)
    write(publisher, 0)
    timer = threading.Timer(0.4, engines.start, ("a",))
    timer.start()
    report = publisher.commit()
    timer.join()
    assert outcomes(report) == {"a": "left", "b": "applied"} and not report.out_of_service
    assert publisher.engines == {"a": -1, "b": 0}
    assert outcomes(publisher.welcome()) == {"a": "applied"}


def test_nobody_who_takes_it_is_no_error_if_the_bytes_are_right(publisher, engines):
    engines.start("a", [Fault(kind="raise", where="stage", at=0)])
    publisher.wait_for_engines({"a"}, timeout_s=20)
    digest = write(publisher, 0)
    report = publisher.commit()
    assert outcomes(report) == {"a": "failed"} and report.out_of_service.keys() == {"a"}
    assert publisher.version == 0
    engines.ended("a")
    engines.start("a")
    publisher.wait_for_engines({"a"}, timeout_s=20)
    publisher.welcome()
    assert engines.engines["a"]._digest == digest


def test_a_welcome_gives_way_and_its_joiners_take_the_next_version(publisher, engines):
    write(publisher, 0)
    publisher.commit()
    engines.start("slow", [Fault(kind="hang", where="stage", at=0)])
    engines.start("quick")
    publisher.wait_for_engines({"slow", "quick"}, timeout_s=20)
    wanted = threading.Event()
    timer = threading.Timer(0.3, wanted.set)
    timer.start()
    report = publisher.welcome(wanted.is_set)
    timer.join()
    assert outcomes(report) == {"slow": "kept", "quick": "kept"} and not report.out_of_service
    assert report.seconds < 1.5 and publisher.engines == {"slow": -1, "quick": -1}


def test_the_welcomer_brings_engines_in_while_the_learner_is_busy(publisher, engines):
    welcomer = Welcomer(publisher)
    try:
        with welcomer.paused():
            write(publisher, 0)
            publisher.commit()
        for name in ("a", "b", "c"):
            engines.start(name)
        engines.do(engines.wait_for(0, timeout_s=20))
        with welcomer.paused():
            write(publisher, 1)
            assert outcomes(publisher.commit()) == {"a": "applied", "b": "applied", "c": "applied"}
        welcomed = [name for report in welcomer.take_reports() for name in report.engines]
        assert sorted(welcomed) == ["a", "b", "c"] and welcomer.take_reports() == []
    finally:
        welcomer.close()
    welcomer.close()


def test_the_learner_does_not_wait_for_a_joiner_that_hangs_in_staging(publisher, engines):
    welcomer = Welcomer(publisher)
    try:
        with welcomer.paused():
            write(publisher, 0)
            publisher.commit()
        engines.start("hung", [Fault(kind="hang", where="stage", at=0)])
        engines.wait_for_fault("hung")
        started = time.monotonic()
        with welcomer.paused():
            assert time.monotonic() - started < 0.75 * TIMEOUT_S - 0.5
    finally:
        welcomer.close()


def test_closing_the_welcomer_ends_a_welcome_under_way(publisher, engines):
    welcomer = Welcomer(publisher)
    with welcomer.paused():
        write(publisher, 0)
        publisher.commit()
    engines.start("hung", [Fault(kind="hang", where="apply", at=0)])
    engines.wait_for_fault("hung")
    started = time.monotonic()
    welcomer.close()
    assert time.monotonic() - started < 1.0


def test_what_ends_the_welcomer_is_raised_where_the_learner_sees_it(publisher):
    welcomer = Welcomer(publisher)
    write(publisher, 0)
    publisher.commit()
    publisher._members.socket.close(linger=0)
    deadline = time.monotonic() + 10
    while welcomer._thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(WeightSyncError, match="welcoming engines ended with an error"):
        welcomer.check()
    with pytest.raises(WeightSyncError, match="welcoming engines ended with an error"), welcomer.paused():
        pass
    welcomer.close()


def test_a_dismissal_of_an_engine_that_had_this_name_before_is_not_for_the_new_one(publisher, engines):
    from asyncrl.weight_sync import wire

    engines.start("a")
    publisher.wait_for_engines({"a"}, timeout_s=20)
    publisher._members.socket.send_multipart([b"a", wire.encode(wire.Dismiss(attempt=7, reason="another"))])
    write(publisher, 0)
    assert outcomes(publisher.commit()) == {"a": "applied"}
    assert not engines.receiving["a"].done()
