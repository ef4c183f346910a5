"""Publisher here, engines in processes of their own: death, corruption and mismatch where they really happen."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator

import pytest
import torch
from engine_processes import EngineProcess

from asyncrl.generators.fake_speech import probe_logprobs, weights_digest
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import EnginesMissing, ProbeMismatch, SyncAborted
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.shm import slot_path

PLAN = make_plan([(f"layer.{i}", "bfloat16", (64, 33)) for i in range(20)], 16 * 1024)


class Fleet:
    """A publisher and the processes that were started for it."""

    def __init__(self, publisher: Publisher, run_id: str) -> None:
        self.publisher = publisher
        self.run_id = run_id
        self.engines: dict[str, EngineProcess] = {}

    def start(self, engine_id: str, *faults: dict[str, object]) -> EngineProcess:
        self.engines[engine_id] = EngineProcess(self.publisher.endpoint, engine_id, *faults)
        return self.engines[engine_id]

    def join(self) -> None:
        self.publisher.wait_for_engines(set(self.engines), timeout_s=60)

    def sync(self, version: int, probe: Probe | None = None):
        self.publisher.begin(version)
        return self.finish(version, probe)

    def finish(self, version: int, probe: Probe | None = None):
        torch.manual_seed(version)
        for bucket in PLAN.buckets:
            self.publisher.write(bucket, [torch.randn(piece.count) for piece in bucket.pieces])
        return self.publisher.commit(probe)

    def corrupt(self, slot: int) -> None:
        with open(slot_path(self.run_id, slot), "r+b") as file:
            file.seek(PLAN.buckets[1].runs[0].offset + 5)
            byte = file.read(1)[0]
            file.seek(PLAN.buckets[1].runs[0].offset + 5)
            file.write(bytes([byte ^ 0x10]))


@contextlib.contextmanager
def fleet(timeout_s: float = 30.0) -> Iterator[Fleet]:
    run_id = f"test-{uuid.uuid4().hex[:12]}"
    with Publisher(WeightSyncConfig(timeout_s=timeout_s), run_id, PLAN) as publisher:
        started = Fleet(publisher, run_id)
        try:
            yield started
        finally:
            for engine in started.engines.values():
                engine.kill()
    assert not slot_path(run_id, 0).exists() and not slot_path(run_id, 1).exists()


def test_three_engines_take_versions_and_their_probes_are_right():
    with fleet() as run:
        for name in ("a", "b", "c"):
            run.start(name)
        run.join()
        for version in range(5):
            report = run.sync(version)
            assert (
                report.engines.keys() == {"a", "b", "c"} and not report.out_of_service and not report.ignored
            )
            assert all(engine.outcome == "applied" for engine in report.engines.values())
            assert report.total_bytes == PLAN.total_bytes
            assert 0 < report.max_stall_s <= report.transaction_s <= report.seconds
        for engine in run.engines.values():
            versions = engine.versions(5)
            assert [version for version, _ in versions] == [0, 1, 2, 3, 4]
            assert len({answer for _, answer in versions}) == 5


def sums_of(run: Fleet, version: int) -> list[int]:
    """The checksums of `version` as the publisher will compute them, from a draft that is then abandoned."""
    torch.manual_seed(version)
    run.publisher.begin(version)
    for bucket in PLAN.buckets:
        run.publisher.write(bucket, [torch.randn(piece.count) for piece in bucket.pieces])
    sums = run.publisher._draft.checksums
    run.publisher.abandon()
    return sums


def test_a_probe_that_agrees_passes_and_one_that_does_not_names_the_token():
    with fleet() as run:
        run.start("a")
        run.start("b")
        run.join()
        tokens = (5, 6, 7, 8)
        right = probe_logprobs(weights_digest(sums_of(run, 0)), tokens)
        report = run.sync(0, Probe(tokens=tokens, logprobs=tuple(right), tolerance=1e-6))
        assert report.probe_max_diff == {"a": 0.0, "b": 0.0}
        wrong = probe_logprobs(weights_digest(sums_of(run, 1)), tokens)
        wrong[1] += 0.25
        with pytest.raises(ProbeMismatch) as caught:
            run.sync(1, Probe(tokens=tokens, logprobs=tuple(wrong), tolerance=1e-3))
        error = caught.value
        assert (error.version, error.position, error.expected) == (1, 1, wrong[1])
        assert error.got == pytest.approx(wrong[1] - 0.25) and error.engine in ("a", "b")
        assert error.report.probe_max_diff == {"a": pytest.approx(0.25), "b": pytest.approx(0.25)}
        assert run.sync(2).version == 2, "the mismatch is a settled sync: the next one works"


def test_an_engine_killed_while_it_stages_is_gone_on_without_within_seconds():
    with fleet() as run:
        run.start("healthy")
        doomed = run.start("doomed", {"kind": "hang", "where": "stage", "at": 1})
        run.join()
        run.sync(0)
        killer = threading.Timer(1.0, doomed.process.kill)
        killer.start()
        started = time.monotonic()
        report = run.sync(1)
        killer.join()
        assert time.monotonic() - started < 10.0, "long before the deadline of 30 s"
        assert {name: m.outcome for name, m in report.engines.items()} == {
            "doomed": "lost",
            "healthy": "applied",
        }
        assert "connection is gone" in report.out_of_service["doomed"]
        assert run.publisher.version == 1 and run.publisher.engines == {"healthy": 1}
        assert [version for version, _ in run.engines["healthy"].versions(2)] == [0, 1]


def test_an_engine_killed_while_it_applies_is_named_and_the_others_go_on():
    with fleet() as run:
        run.start("healthy")
        doomed = run.start("doomed", {"kind": "hang", "where": "apply", "at": 1})
        run.join()
        run.sync(0)
        killer = threading.Timer(1.0, doomed.process.kill)
        killer.start()
        report = run.sync(1)
        killer.join()
        assert (
            report.out_of_service.keys() == {"doomed"}
            and "connection is gone" in report.out_of_service["doomed"]
        )
        assert report.engines["healthy"].outcome == "applied"
        assert run.sync(2).engines.keys() == {"healthy"}


def test_an_engine_that_hangs_in_apply_is_late_and_gets_no_later_version():
    with fleet(timeout_s=4.0) as run:
        run.start("healthy")
        run.start("hung", {"kind": "hang", "where": "apply", "at": 0})
        run.join()
        report = run.sync(0)
        assert report.engines["hung"].outcome == "late" and 3.9 < report.seconds < 6.0
        assert "no answer within" in report.out_of_service["hung"]
        assert run.sync(1).engines.keys() == {"healthy"}


def test_an_engine_that_hangs_in_stage_is_dismissed_at_the_staging_deadline():
    with fleet(timeout_s=4.0) as run:
        run.start("healthy")
        run.start("hung", {"kind": "hang", "where": "stage", "at": 0})
        run.join()
        report = run.sync(0)
        assert report.engines["hung"].outcome in ("late", "failed") and report.out_of_service.keys() == {
            "hung"
        }
        assert report.engines["healthy"].outcome == "applied" and report.seconds < 4.0
        # Its staging was cancelled when its time was over, so it reads that it was dismissed.
        out, _ = run.engines["hung"].ended()
        assert "ended Dismissed" in out and "must be started again" in out
        assert run.sync(1).engines.keys() == {"healthy"}


def test_a_flipped_byte_is_reported_on_both_sides_and_the_old_version_stays():
    with fleet() as run:
        run.start("a")
        run.start("b")
        run.join()
        run.sync(0)
        run.publisher.begin(1)
        original = run.publisher.commit

        def commit_corrupted(probe=None):
            run.corrupt(slot=1)
            return original(probe)

        run.publisher.commit = commit_corrupted
        with pytest.raises(SyncAborted) as caught:
            run.finish(1)
        run.publisher.commit = original
        members = caught.value.report.members
        assert {name: m.outcome for name, m in members.items()} == {"a": "failed", "b": "failed"}
        assert all("ChecksumError: version 1, bucket 1 in /dev/shm/" in m.error for m in members.values())
        assert "not those that were written" in str(caught.value) and run.publisher.version == 0
        for engine in run.engines.values():
            out, err = engine.ended()
            assert "ChecksumError: version 1, bucket 1" in err
            assert [line.split(" probe ")[0] for line in out.splitlines()[:2]] == ["up", "version 0"]
            assert out.splitlines()[2].startswith("ended Dismissed")


def test_an_apply_that_raises_ends_its_receiver_and_its_traceback_is_here_too():
    with fleet() as run:
        broken = run.start("broken", {"kind": "raise", "where": "apply", "at": 0})
        run.join()
        report = run.sync(0)
        assert "InjectedFault: scripted: raise at apply 0" in report.out_of_service["broken"]
        assert run.publisher.version == 0, "the version is decided, whoever is there to run it"
        out, _ = broken.ended()
        assert "ended InjectedFault" in out


def test_an_engine_started_again_joins_under_its_old_name():
    with fleet() as run:
        first = run.start("a")
        run.join()
        run.sync(0)
        first.kill()
        assert run.sync(1).engines["a"].outcome == "lost"
        run.start("a")
        run.join()
        assert run.publisher.welcome().engines["a"].outcome == "applied"
        assert run.publisher.engines == {"a": 1}
        assert run.sync(2).engines["a"].outcome == "applied"


def test_waiting_for_engines_ends_at_its_deadline_and_names_them():
    with fleet() as run:
        run.start("here")
        run.join()
        started = time.monotonic()
        with pytest.raises(EnginesMissing, match="missing: nobody") as caught:
            run.publisher.wait_for_engines({"here", "nobody"}, timeout_s=0.5)
        assert caught.value.missing == {"nobody"} and 0.5 <= time.monotonic() - started < 5
