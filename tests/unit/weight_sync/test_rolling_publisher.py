"""Rolling updates over real sockets and shared memory, with engines in a thread: who waits for whom, and who for nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from engine_threads import Engines

from asyncrl.generators.fake_engine import FakeEngine, Fault
from asyncrl.generators.fake_speech import probe_logprobs, weights_digest
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import Dismissed, ProbeMismatch, WeightSyncError
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.rolling_publisher import RollingPublisher
from asyncrl.weight_sync.shm import remove_leftovers
from asyncrl.weight_sync.welcomer import Welcomer
from asyncrl.weight_sync.wire import Offer, SharedFile

PLAN = make_plan([("a", "float32", (64,)), ("b", "float32", (3,))], 200)
BEAT_S = 0.3
"""What a slow engine takes; everything else takes much less."""
TOKENS = (1, 2, 3)


class SlowEngine(FakeEngine):
    """It takes its time, and keeps account."""

    def __init__(self, *, stage_s: float = 0.0, apply_s: float = 0.0, **rest) -> None:
        super().__init__(**rest)
        self.stage_s, self.apply_s = stage_s, apply_s
        self.offered: list[int] = []
        self.applied: dict[int, int] = {}
        """Version -> digest of its bytes, in order."""

    async def stage(self, offer: Offer) -> None:
        self.offered.append(offer.version)
        await asyncio.sleep(self.stage_s)
        await super().stage(offer)

    async def apply(self, offer: Offer) -> float:
        await asyncio.sleep(self.apply_s)
        stall_s = await super().apply(offer)
        self.applied[offer.version] = self._digest
        return stall_s


class Fleet:
    """A publisher, its welcomer, and engines by name."""

    def __init__(self, publisher: RollingPublisher) -> None:
        self.publisher = publisher
        self.engines = Engines(publisher.endpoint)
        self.welcomer = Welcomer(publisher)
        self.digests: dict[int, int] = {}
        """Of each version as it was written."""
        self.reports: list = []

    def start(self, name: str, *faults: Fault, stage_s: float = 0.0, apply_s: float = 0.0) -> SlowEngine:
        self.engines.make = partial(SlowEngine, stage_s=stage_s, apply_s=apply_s)
        self.engines.start(name, faults)
        with self.welcomer.paused():
            self.publisher.wait_for_engines({name}, timeout_s=20)
        return self.engines.engines[name]

    def publish(self, version: int, write_s: float = 0.0, probe: Probe | None = None):
        with self.welcomer.paused():
            self.publisher.begin(version)
            weights = {"a": torch.full((64,), float(version)), "b": torch.ones(3)}
            for bucket in PLAN.buckets:
                time.sleep(write_s / len(PLAN.buckets))
                self.publisher.write(bucket, cut(PLAN, bucket, weights))
            offer = self.publisher._draft.offer(SharedFile(path=""))
            self.digests[version] = weights_digest(offer.checksums)
            return self.publisher.commit(probe)

    def wait_for(self, version: int, *names: str) -> None:
        async def wait() -> None:
            receivers = [self.engines.receivers[name] for name in names]
            await asyncio.gather(*(each.wait_for_version(version, timeout_s=20) for each in receivers))

        self.engines.do(wait())

    def wait_for_reports(self, count: int) -> list:
        """Waits for updates to end, which they do by their deadlines; ends with so many, or at the assertion's deadline."""
        deadline = time.monotonic() + 20
        while len(self.reports) < count and time.monotonic() < deadline:
            self.welcomer.check()
            self.reports += self.welcomer.take_reports()
            time.sleep(0.005)
        assert len(self.reports) >= count
        return self.reports

    def check(self, engine: SlowEngine) -> None:
        """What it ran went up, each with the bytes of its version."""
        assert list(engine.applied) == sorted(engine.applied)
        assert all(self.digests[version] == digest for version, digest in engine.applied.items())


@contextlib.contextmanager
def fleet(max_lag: int = 2, timeout_s: float = 10.0, transport: str = "auto") -> Iterator[Fleet]:
    run_id = f"test-{uuid.uuid4().hex[:12]}"
    config = WeightSyncConfig(timeout_s=timeout_s, transport=transport)
    with RollingPublisher(config, run_id, PLAN, max_lag_versions=max_lag) as publisher:
        made = Fleet(publisher)
        try:
            yield made
        finally:
            made.engines.close()
            made.welcomer.close()
    assert remove_leftovers(run_id) == []


def outcomes(reports) -> list[tuple[str, int, str]]:
    return sorted((name, r.version, member.outcome) for r in reports for name, member in r.engines.items())


def test_a_slow_engine_holds_up_neither_a_fast_one_nor_the_learner():
    with fleet() as run:
        fast, slow = run.start("fast"), run.start("slow", stage_s=BEAT_S)
        run.publish(0)
        run.wait_for(0, "fast", "slow")
        started = time.monotonic()
        report = run.publish(1)
        assert time.monotonic() - started < BEAT_S / 2 and report.seconds < BEAT_S / 2
        run.wait_for(1, "fast")
        assert time.monotonic() - started < BEAT_S and slow.stats().version == 0
        run.wait_for(1, "slow")
        assert outcomes(run.wait_for_reports(4)) == [
            ("fast", 0, "applied"), ("fast", 1, "applied"), ("slow", 0, "applied"), ("slow", 1, "applied"),
        ]  # fmt: skip
        assert max(r.max_stall_s for r in run.reports) > 0 and report.engines == {}
        run.check(fast)
        run.check(slow)


def test_a_superseded_version_is_skipped():
    with fleet(max_lag=3) as run:
        slow = run.start("slow", stage_s=BEAT_S)
        run.publish(0)
        run.wait_for(0, "slow")
        for version in (1, 2, 3):
            assert run.publish(version).wait_s < 0.1
        run.wait_for(3, "slow")
        assert list(slow.applied) == [0, 3] and slow.offered[-1] == 3
        run.check(slow)


def test_what_it_was_told_to_apply_it_applies_and_then_takes_the_newest():
    with fleet(max_lag=3) as run:
        slow = run.start("slow", apply_s=BEAT_S)
        run.publish(0)
        run.wait_for(0, "slow")
        run.publish(1)
        time.sleep(BEAT_S / 3)
        run.publish(2)
        run.publish(3)
        run.wait_for(3, "slow")
        assert list(slow.applied) == [0, 1, 3]


def test_the_learner_waits_at_the_bound_and_no_longer_than_needed():
    with fleet(max_lag=1) as run:
        slow = run.start("slow", stage_s=BEAT_S)
        run.publish(0)
        run.wait_for(0, "slow")
        assert run.publish(1).wait_s < BEAT_S / 2
        report = run.publish(2)
        assert BEAT_S / 2 < report.wait_s < 3 * BEAT_S and report.wait_s <= report.seconds
        assert slow.stats().version == 1
        run.wait_for(2, "slow")
        assert list(slow.applied) == [0, 1, 2]


def test_engines_go_on_while_the_learner_writes():
    """Its thread has the publisher all that time, and hears what engines say between two buckets."""
    with fleet(max_lag=2) as run:
        slow = run.start("slow", stage_s=BEAT_S / 3)
        run.publish(0)
        run.wait_for(0, "slow")
        run.publish(1)
        run.publish(2, write_s=3 * BEAT_S)
        assert list(slow.applied)[:2] == [0, 1], "version 1 was not superseded before version 2 was complete"


@pytest.mark.parametrize("where", ["stage", "apply"])
def test_an_engine_that_hangs_is_late_named_once_and_held_for_no_longer_than_the_timeout(where):
    with fleet(max_lag=1, timeout_s=1.6) as run:
        good = run.start("good")
        hung = run.start("hung", Fault(kind="hang", where=where, at=1))
        run.publish(0)
        run.wait_for(0, "good", "hung")
        run.publish(1)
        held = run.publisher._held[1].slot
        inode = held.path.stat().st_ino
        started = time.monotonic()
        report = run.publish(2)
        assert time.monotonic() - started < 2.5 and report.wait_s > 0.3
        run.publish(3)
        assert held.path.stat().st_ino != inode, "its bytes stay the hung engine's"
        run.wait_for(3, "good")
        (late,) = [r for r in run.wait_for_reports(6) if r.out_of_service]
        assert late.engines["hung"].outcome in ("late", "failed") and late.out_of_service.keys() == {"hung"}
        assert run.publisher._rolling.versions == {"good": 3} and list(hung.applied) == [0]
        run.check(good)


def test_one_that_fails_is_named_and_dismissed_and_comes_again_on_the_same_path():
    with fleet() as run:
        run.publish(0)
        run.start("bad", Fault(kind="raise", where="stage", at=0))
        (report,) = run.wait_for_reports(1)
        assert report.engines["bad"].outcome == "failed" and "InjectedFault" in report.out_of_service["bad"]
        assert isinstance(run.engines.ended("bad"), Dismissed)
        again = run.start("bad")
        run.wait_for(0, "bad")
        run.check(again)


def test_one_that_leaves_and_one_that_connects_anew_are_no_faults():
    with fleet() as run:
        run.start("a", stage_s=20)
        run.publish(0)
        run.engines.do(run.engines.leave("a"))
        (left,) = run.wait_for_reports(1)
        assert left.engines["a"].outcome == "left" and left.out_of_service == {}
        run.start("b", stage_s=20)
        again = run.start("b")
        run.wait_for(0, "b")
        assert ("b", 0, "left") in outcomes(run.wait_for_reports(3))
        assert run.publisher._members.roster.versions == {"b": 0}
        run.check(again)


def test_who_just_comes_holds_nobody_up_until_it_has_been_overtaken_as_often_as_others_may_be():
    with fleet(max_lag=1) as run:
        run.publish(0)
        late = run.start("late", stage_s=BEAT_S)
        assert run.publish(1).wait_s < BEAT_S / 2
        assert run.publish(2).wait_s > BEAT_S / 2
        assert list(late.applied) == [1]


def test_bytes_that_a_joiner_was_told_not_to_stage_any_more_stay_as_they_are():
    """It may read them until it has staged what it was offered instead; nobody waits for that."""
    with fleet(max_lag=2) as run:
        run.publish(0)
        run.start("late", stage_s=BEAT_S)
        run.publish(1)
        held = run.publisher._held[0].slot
        inode = held.path.stat().st_ino
        assert run.publish(2).wait_s < BEAT_S / 2
        assert held.path.stat().st_ino != inode
        run.wait_for(2, "late")
        with run.welcomer.paused():
            assert not any(run.publisher._rolling.readers(version) for version in range(3))
        inode = run.publisher._held[1].slot.path.stat().st_ino
        run.publish(3)
        assert run.publisher._held[3].slot.path.stat().st_ino == inode, (
            "the memory of version 1 is used again"
        )


def probe_of(digest: int, error: float = 0.0) -> Probe:
    logprobs = [each + error for each in probe_logprobs(digest, TOKENS)]
    return Probe(tokens=TOKENS, logprobs=tuple(logprobs), tolerance=1e-6, every=True)


def digest_of(version: int) -> int:
    """Known before it is written: it is a function of the bytes."""
    with RollingPublisher(
        WeightSyncConfig(), f"test-{uuid.uuid4().hex[:12]}", PLAN, max_lag_versions=1
    ) as alone:
        made = Fleet(alone)
        try:
            made.publish(version)
        finally:
            made.engines.close()
            made.welcomer.close()
        return made.digests[version]


def test_an_engine_that_computes_other_logprobs_is_out_and_if_none_is_right_the_learner_hears_of_it():
    right, wrong = probe_of(digest_of(0)), probe_of(digest_of(1), error=0.5)
    with fleet() as run:
        run.start("a")
        run.publish(0, probe=right)
        run.wait_for(0, "a")
        (report,) = run.wait_for_reports(1)
        assert report.probe_max_diff == {"a": 0.0}
        run.publish(1, probe=wrong)
        deadline = time.monotonic() + 20
        while run.welcomer._error is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert isinstance(run.welcomer._error, ProbeMismatch)
        report = run.welcomer._error.report
        assert report.probe_max_diff == {"a": pytest.approx(0.5)} and report.out_of_service.keys() == {"a"}


def test_bytes_that_changed_after_they_were_written_end_the_run_and_not_one_engine_after_the_other():
    with fleet() as run:
        run.publish(0)
        path = run.publisher._held[0].slot.path
        with path.open("r+b") as file:
            file.write(b"\xff")
        run.engines.make = SlowEngine
        run.engines.start("a")
        deadline = time.monotonic() + 20
        while run.welcomer._error is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(WeightSyncError, match="not those that were written"):
            run.welcomer.check()


def test_an_abandoned_version_leaves_everything_as_it_was():
    with fleet(max_lag=1) as run:
        engine = run.start("a")
        run.publish(0)
        run.wait_for(0, "a")
        for _ in range(3):
            with run.welcomer.paused():
                run.publisher.begin(1)
                run.publisher.abandon()
        run.publish(1)
        run.wait_for(1, "a")
        run.check(engine)


def test_the_learner_gets_the_publisher_at_once_while_engines_are_on_their_way():
    with fleet() as run:
        run.publish(0)
        run.start("slow", stage_s=1.0)
        waits = []
        for _ in range(10):
            started = time.monotonic()
            with run.welcomer.paused():
                waits.append(time.monotonic() - started)
            time.sleep(0.02)
        assert sorted(waits)[5] < 0.05
        run.wait_for(0, "slow")


def test_an_engine_that_is_killed_holds_the_learner_only_until_that_is_noticed():
    with fleet(max_lag=1, timeout_s=30.0) as run:
        good = run.start("good")
        script = Path(__file__).with_name("engine_process.py")
        faults = json.dumps([{"kind": "hang", "where": "stage", "at": 1}])
        doomed = subprocess.Popen(
            [sys.executable, str(script), run.publisher.endpoint, "doomed", faults],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        try:
            with run.welcomer.paused():
                run.publisher.wait_for_engines({"doomed"}, timeout_s=60)
            run.publish(0)
            run.wait_for_reports(2)
            run.publish(1)
            threading.Timer(0.5, doomed.kill).start()
            report = run.publish(2)
            assert 0.2 < report.wait_s < 10
            run.wait_for(2, "good")
            (lost,) = [r for r in run.wait_for_reports(5) if r.out_of_service]
            assert lost.engines["doomed"].outcome == "lost" and lost.version == 1
            assert "connection is gone" in lost.out_of_service["doomed"]
            run.check(good)
        finally:
            doomed.kill()
            doomed.wait(timeout=30)


@pytest.mark.parametrize(
    ("max_lag", "transport"), [(1, "shm"), (2, "shm"), (4, "shm"), (1, "tcp"), (3, "tcp")]
)
def test_versions_only_go_up_with_the_right_bytes_whatever_the_pace(max_lag, transport):
    draw = random.Random(max_lag)
    with fleet(max_lag=max_lag, transport=transport) as run:
        engines = {
            name: run.start(name, stage_s=draw.uniform(0, 0.03), apply_s=draw.uniform(0, 0.02))
            for name in "abc"
        }
        for version in range(25):
            with run.welcomer.paused():
                run.publisher.begin(version)
                behind = [v for v in run.publisher.engines.values() if 0 <= v < version - max_lag]
                assert not behind
                run.publisher.abandon()
            run.publish(version)
            if draw.random() < 0.5:
                time.sleep(draw.uniform(0, 0.05))
        run.wait_for(24, *engines)
        for engine in engines.values():
            run.check(engine)
        assert not any(report.out_of_service for report in run.wait_for_reports(3))
