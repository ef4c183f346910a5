"""The `collective` transport over gloo: engines in threads where all goes well, in processes where they are killed or stopped."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from engine_processes import EngineProcess
from engine_threads import Engines
from senders import Sender, checksums_of, send, tensors_of, thread_ranks

from asyncrl.generators.fake_engine import Fault
from asyncrl.generators.fake_speech import probe_logprobs, weights_digest
from asyncrl.weight_sync.checksum import version_digest
from asyncrl.weight_sync.collective_publisher import CollectivePublisher
from asyncrl.weight_sync.collective_share import CollectiveShare
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import SyncAborted, WeightSyncError
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import Plan, make_plan
from asyncrl.weight_sync.probe import Probe

TOKENS = (1, 2, 3)
MIXED = make_plan(
    [
        ("empty", "float32", (0, 4)),
        ("flags", "uint8", (3,)),
        ("large", "bfloat16", (300, 65)),
        ("scale", "float32", ()),
        ("tail", "float16", (7, 5)),
        ("counts", "int64", (11,)),
    ],
    4096,
)
LARGE = make_plan([(f"layer.{i}", "bfloat16", (512, 515)) for i in range(12)], 2**20)


def shared_by_two(rows: int) -> Plan:
    """Two ranks have the first and the last rows of each matrix; what follows `bias` at the second one travels at odd places."""
    specs = [(f"layer.{i}", "bfloat16" if i % 2 else "float32", (rows, 33)) for i in range(8)]
    half = (rows + 1) // 2
    shares = {name: ((0, half * 33), (half * 33, (rows - half) * 33)) for name, _, _ in specs}
    return make_plan([("bias", "uint8", (5,)), *specs], 8192, shares={**shares, "bias": ((0, 3), (3, 2))})


def answers(plan: Plan, seed: int) -> list[float]:
    """What an engine answers to the probe of `TOKENS` if it has the bytes of this version."""
    return probe_logprobs(weights_digest(checksums_of(plan, tensors_of(plan, seed))), TOKENS)


@contextlib.contextmanager
def publishing(plan: Plan, timeout_s: float = 30.0) -> Iterator[list[Sender]]:
    """One sender for each of the plan's: rank 0's publisher, then the shares."""
    settings = WeightSyncConfig(timeout_s=timeout_s)
    ranks = thread_ranks(plan.senders)
    made: dict[int, Sender] = {}

    def share(rank: int) -> None:
        made[rank] = CollectiveShare(settings, plan, ranks[rank])

    others = [threading.Thread(target=share, args=(rank,)) for rank in range(1, plan.senders)]
    for other in others:
        other.start()
    made[0] = CollectivePublisher(settings, plan, ranks=ranks[0])
    for other in others:
        other.join()
    try:
        yield [made[rank] for rank in range(plan.senders)]
    finally:
        for sender in made.values():
            sender.close()


@contextlib.contextmanager
def engines_of(publisher: CollectivePublisher, *names: str, **faults: list[Fault]) -> Iterator[Engines]:
    engines = Engines(publisher.endpoint, **{name: [] for name in names}, **faults)
    try:
        publisher.wait_for_engines({*names, *faults}, 20)
        yield engines
    finally:
        engines.close()


@pytest.mark.parametrize("plan", [MIXED, shared_by_two(40)], ids=["one sender", "two senders"])
def test_every_engine_has_the_very_bytes_version_after_version(plan):
    with publishing(plan) as senders, engines_of(senders[0], "a", "b", "c") as engines:
        names = set()
        for version in range(4):
            report = send(plan, senders, version)
            names.add(senders[0]._drafts.group_name)
            assert {name: each.outcome for name, each in report.engines.items()} == dict.fromkeys(
                "abc", "applied"
            )
            digest = version_digest(checksums_of(plan, tensors_of(plan, version)))
            assert report.digest == digest and not report.ignored
            for name in "abc":
                assert engines.do(engines.engines[name].probe(TOKENS)) == answers(plan, version)
                assert engines.receivers[name].digest == digest
        assert len(names) == 1, "the members stay, and so does their group"


def test_a_probe_is_asked_of_every_engine_and_a_wrong_one_is_out_of_service():
    with publishing(MIXED) as senders, engines_of(senders[0], "a", "b") as engines:
        (publisher,) = senders
        tensors = tensors_of(MIXED, 0)
        publisher.begin(0)
        for bucket in MIXED.buckets:
            publisher.write(bucket, cut(MIXED, bucket, tensors))
        right = Probe(tokens=TOKENS, logprobs=tuple(answers(MIXED, 0)), tolerance=1e-6)
        report = publisher.commit(right)
        assert report.probe_max_diff == {"a": 0.0, "b": 0.0} and not report.out_of_service
        assert publisher.engines == {"a": 0, "b": 0} and engines.receivers["a"].version == 0


def test_without_engines_a_version_is_committed_and_a_joiner_gets_it_when_it_is_sent_again():
    with publishing(MIXED) as senders:
        (publisher,) = senders
        assert send(MIXED, senders, 0).engines == {} and publisher.version == 0 and publisher.behind == []
        with engines_of(publisher, "a") as engines:
            assert publisher.behind == ["a"] and publisher.welcome() is None
            assert send(MIXED, senders, 0, again=True).engines["a"].outcome == "applied"
            assert publisher.behind == [] and publisher.version == 0
            send(MIXED, senders, 1)
            engines.start("b")
            publisher.wait_for_engines({"a", "b"}, 20)
            assert publisher.behind == ["b"]
            report = send(MIXED, senders, 1, again=True)
            assert report.engines.keys() == {"b"}, "who has it goes on undisturbed"
            assert send(MIXED, senders, 2).engines.keys() == {"a", "b"}
            for name in "ab":
                assert engines.do(engines.engines[name].probe(TOKENS)) == answers(MIXED, 2)


def test_versions_go_up_and_buckets_come_in_order():
    with publishing(MIXED) as senders:
        (publisher,) = senders
        with pytest.raises(WeightSyncError, match="no version is begun"):
            publisher.commit()
        with pytest.raises(WeightSyncError, match="expected -1, the last committed"):
            publisher.resend(0)
        send(MIXED, senders, 3)
        with pytest.raises(WeightSyncError, match="expected one above 3"):
            publisher.begin(3)
        publisher.begin(4)
        with pytest.raises(WeightSyncError, match="another version is begun"):
            publisher.begin(5)
        with pytest.raises(WeightSyncError, match="bucket 1 out of order, expected bucket 0"):
            publisher.write(MIXED.buckets[1], [])
        with pytest.raises(WeightSyncError, match="0 are written"):
            publisher.commit()
        assert publisher.version == 3
        send(MIXED, senders, 4)


def test_a_version_that_is_given_up_leaves_the_old_one_live():
    with publishing(MIXED) as senders, engines_of(senders[0], "a", "b") as engines:
        (publisher,) = senders
        send(MIXED, senders, 0)
        publisher.begin(1)
        tensors = tensors_of(MIXED, 1)
        publisher.write(MIXED.buckets[0], cut(MIXED, MIXED.buckets[0], tensors))
        publisher.abandon()
        publisher.abandon()
        report = send(MIXED, senders, 1, seed=7)
        assert report.engines.keys() == {"a", "b"} and not report.out_of_service
        for name in "ab":
            assert engines.do(engines.engines[name].probe(TOKENS)) == answers(MIXED, 7)


def test_an_engine_that_fails_to_stage_takes_the_attempt_with_it_and_the_rest_gets_the_version_next():
    fault = [Fault(kind="raise", where="stage", at=1)]
    with publishing(MIXED) as senders, engines_of(senders[0], "a", "b", bad=fault) as engines:
        (publisher,) = senders
        send(MIXED, senders, 0)
        with pytest.raises(SyncAborted) as caught:
            send(MIXED, senders, 1)
        members = caught.value.report.members
        assert {name: each.outcome for name, each in members.items()} == {
            "a": "kept",
            "b": "kept",
            "bad": "failed",
        }
        assert "InjectedFault" in members["bad"].error and "InjectedFault" in str(caught.value)
        assert publisher.version == 0 and engines.receivers["a"].version == 0
        assert "put out of service" in str(engines.ended("bad"))
        assert send(MIXED, senders, 1).engines.keys() == {"a", "b"}


def test_an_engine_that_fails_to_apply_is_alone_with_it():
    fault = [Fault(kind="raise", where="apply", at=0)]
    with publishing(MIXED) as senders, engines_of(senders[0], "a", bad=fault):
        report = send(MIXED, senders, 0)
        assert report.engines["a"].outcome == "applied" and report.out_of_service.keys() == {"bad"}
        assert send(MIXED, senders, 1).engines.keys() == {"a"}


def test_an_engine_that_leaves_and_comes_again_is_in_a_new_group():
    with publishing(MIXED) as senders, engines_of(senders[0], "a", "b") as engines:
        (publisher,) = senders
        send(MIXED, senders, 0)
        first = publisher._drafts.group_name
        engines.do(engines.leave("a"))
        deadline = time.monotonic() + 10
        while "a" in publisher.engines and time.monotonic() < deadline:
            time.sleep(0.01)
        assert publisher.engines == {"b": 0}
        engines.start("a")
        publisher.wait_for_engines({"a", "b"}, 20)
        assert {name: each.outcome for name, each in send(MIXED, senders, 1).engines.items()} == {
            "a": "applied",
            "b": "applied",
        }
        assert publisher._drafts.group_name != first


def test_a_group_that_an_engine_no_longer_has_is_nobodys_fault_and_is_made_anew():
    with publishing(MIXED) as senders, engines_of(senders[0], "a", "b") as engines:
        send(MIXED, senders, 0)
        engines.receivers["a"]._fetching._fetchers["collective"]._drop_groups()
        with pytest.raises(SyncAborted, match="engine a is no longer in group") as caught:
            send(MIXED, senders, 1)
        assert caught.value.report.out_of_service == {}
        report = send(MIXED, senders, 1)
        assert {name: each.outcome for name, each in report.engines.items()} == dict.fromkeys("ab", "applied")


def test_pieces_that_do_not_fit_the_plan_are_refused_and_the_version_can_be_given_up():
    with publishing(MIXED) as senders, engines_of(senders[0], "a"):
        (publisher,) = senders
        publisher.begin(0)
        first = MIXED.buckets[0]
        pieces = cut(MIXED, first, tensors_of(MIXED, 0))
        with pytest.raises(WeightSyncError, match=f"expected {len(pieces)} pieces, got"):
            publisher.write(first, pieces[:-1])
        publisher.abandon()
        assert send(MIXED, senders, 0).engines["a"].outcome == "applied"


class Processes:
    """Engine processes of one publisher."""

    def __init__(self, publisher: CollectivePublisher, *names: str) -> None:
        self._publisher = publisher
        self.engines = {name: EngineProcess(publisher.endpoint, name) for name in names}
        publisher.wait_for_engines(set(names), 60)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for engine in self.engines.values():
            engine.kill()

    def signal(self, name: str, which: int) -> None:
        self.engines[name].process.send_signal(which)


@pytest.mark.parametrize("plan", [LARGE, shared_by_two(4000)], ids=["one sender", "two senders"])
def test_an_engine_killed_mid_bucket_is_named_and_the_others_get_the_version_at_once(plan):
    with publishing(plan) as senders, Processes(senders[0], "a", "b", "c") as run:
        send(plan, senders, 0)
        started = time.monotonic()
        with pytest.raises(SyncAborted) as caught:
            send(plan, senders, 1, halfway=lambda rank: rank or run.signal("b", signal.SIGKILL))
        assert time.monotonic() - started < 8.0, "long before the deadline of 30 s"
        report = caught.value.report
        assert {name: each.outcome for name, each in report.members.items()} == {
            "a": "kept",
            "b": "lost",
            "c": "kept",
        }
        assert report.out_of_service.keys() == {"b"} and "connection is gone" in report.out_of_service["b"]
        assert senders[0].version == 0
        started = time.monotonic()
        again = send(plan, senders, 1)
        assert time.monotonic() - started < 8.0, "what hangs of the old group stands in nobody's way"
        assert {name: each.outcome for name, each in again.engines.items()} == {
            "a": "applied",
            "c": "applied",
        }
        for name in "ac":
            ran = [(version, answer.strip()) for version, answer in run.engines[name].versions(2)]
            assert ran == [(version, str(answers(plan, version))) for version in (0, 1)]


def test_an_engine_that_dies_before_the_group_is_made_holds_nobody():
    with publishing(LARGE) as senders, Processes(senders[0], "a", "b") as run:
        run.signal("b", signal.SIGSTOP)  # so that it cannot come to the group
        killer = threading.Timer(1.0, run.signal, ("b", signal.SIGKILL))
        killer.start()
        started = time.monotonic()
        with pytest.raises(SyncAborted) as caught:
            send(LARGE, senders, 0)
        killer.join()
        assert time.monotonic() - started < 8.0
        outcomes = {name: each.outcome for name, each in caught.value.report.members.items()}
        assert outcomes == {"a": "kept", "b": "lost"}
        assert send(LARGE, senders, 0).engines["a"].outcome == "applied"


def test_an_engine_stopped_mid_bucket_is_late_by_the_deadline_and_nobody_else_is():
    with publishing(LARGE) as senders, Processes(senders[0], "a", "b", "c") as run:
        (publisher,) = senders
        send(LARGE, senders, 0)
        # Staged by 4.5 s; then those that are there have 1.5 s to say so.
        publisher._drafts.timeout_s = 6.0
        started = time.monotonic()
        with pytest.raises(SyncAborted) as caught:
            send(LARGE, senders, 1, halfway=lambda rank: run.signal("c", signal.SIGSTOP))
        assert time.monotonic() - started < 7.0
        report = caught.value.report
        assert {name: each.outcome for name, each in report.members.items()} == {
            "a": "kept",
            "b": "kept",
            "c": "late",
        }
        assert all("called off" in report.members[name].error for name in "ab")
        publisher._drafts.timeout_s = 30.0
        assert send(LARGE, senders, 1).engines.keys() == {"a", "b"}
        run.signal("c", signal.SIGCONT)
        out, _ = run.engines["c"].ended()
        assert "ended Dismissed" in out and "version 1" not in out


def test_a_sender_that_dies_leaves_engines_with_their_version_and_says_so_there():
    script = (
        "import os, signal, sys\n"
        "from asyncrl.weight_sync.collective_publisher import CollectivePublisher\n"
        "from asyncrl.weight_sync.config import WeightSyncConfig\n"
        "from asyncrl.weight_sync.pieces import cut\n"
        "from asyncrl.weight_sync.plan import make_plan\n"
        "from senders import send, tensors_of\n"
        "plan = make_plan([(f'layer.{i}', 'bfloat16', (512, 515)) for i in range(12)], 2**20)\n"
        "publisher = CollectivePublisher(WeightSyncConfig(timeout_s=30), plan)\n"
        "print(publisher.endpoint, flush=True)\n"
        "publisher.wait_for_engines({'a', 'b'}, 60)\n"
        "send(plan, [publisher], 0)\n"
        "send(plan, [publisher], 1, halfway=lambda rank: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    learner = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(EngineProcess.folder), "PYTHONSAFEPATH": "1", "PATH": ""},
    )
    assert learner.stdout is not None
    endpoint = learner.stdout.readline().strip()
    engines = [EngineProcess(endpoint, name) for name in "ab"]
    try:
        assert learner.wait(60) == -signal.SIGKILL
        died = time.monotonic()
        for engine in engines:
            assert "the sender's store is gone" in engine.error_line("not staged")
            assert time.monotonic() - died < 8.0
            assert [version for version, _ in engine.versions(1)] == [0]
            assert engine.process.poll() is None, "the engine goes on with what it has"
    finally:
        learner.kill()
        for engine in engines:
            engine.kill()


@pytest.mark.parametrize("wait_s", [0.0, 1.0], ids=["at once", "an engine says first that it was called off"])
def test_a_rank_that_does_not_send_its_share_is_named_on_every_rank(wait_s):
    plan = shared_by_two(40)
    with publishing(plan) as senders, engines_of(senders[0], "a") as engines:
        send(plan, senders, 0)

        def fails(rank: int) -> None:
            if rank == 1:
                senders[1].abandon()
                senders[1].write = lambda bucket, pieces: None
            time.sleep(wait_s)

        with pytest.raises(SyncAborted, match="learner rank 1: no version is begun"):
            send(plan, senders, 1, halfway=fails)
        del senders[1].write
        assert engines.receivers["a"].version == 0
        assert send(plan, senders, 1).engines["a"].outcome == "applied"
        assert engines.do(engines.engines["a"].probe(TOKENS)) == answers(plan, 1)


def test_a_bucket_that_changed_on_its_way_is_found_where_it_is_staged():
    with publishing(MIXED) as senders, engines_of(senders[0], "a") as engines:
        (publisher,) = senders
        send(MIXED, senders, 0)
        publisher.begin(1)
        tensors = tensors_of(MIXED, 1)
        for bucket in MIXED.buckets:
            publisher.write(bucket, cut(MIXED, bucket, tensors))
        publisher._sender.checksums[1] ^= 1 << 17
        with pytest.raises(SyncAborted, match="ChecksumError: version 1, bucket 1"):
            publisher.commit()
        assert engines.do(engines.engines["a"].probe(TOKENS)) == answers(MIXED, 0)


def test_memory_is_two_buckets_of_the_learner_and_one_version_of_the_engine():
    with publishing(LARGE) as senders, engines_of(senders[0], "a"):
        (publisher,) = senders
        sizes = []
        send(
            LARGE,
            senders,
            0,
            halfway=lambda rank: sizes.append([b._bytes.numel() for b in publisher._sender._buffers]),
        )
        assert sizes == [[max(bucket.size for bucket in LARGE.buckets)] * 2]
        assert publisher._sender._buffers == [], "and none between two versions"
