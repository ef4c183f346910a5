"""Publisher and receivers over `tcp`: engines elsewhere pull versions, beside others that read the learner's shared memory."""

import contextlib
import time
import uuid

import torch
import zmq
from engine_threads import Engines

from asyncrl.generators.fake_engine import Fault
from asyncrl.weight_sync import chunks, credit, hosts, receiver, served
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.shm import remove_leftovers
from tests.chunk_worlds import Link
from tests.engine_processes import EngineProcess

PLAN = make_plan(
    [("a", "float32", (3000,)), ("b", "bfloat16", (200, 300)), ("c", "bfloat16", (7,))], 64 * 1024
)


class Run:
    """A publisher whose versions differ by one last bit in a hundredth of the weights."""

    def __init__(self, publisher):
        self.publisher = publisher
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            spec.name: torch.randn(spec.shape, generator=generator).to(getattr(torch, spec.dtype))
            for spec in PLAN.tensors
        }

    @property
    def server(self):
        return self.publisher._served._server

    def sync(self, version):
        self.write(version)
        return self.publisher.commit()

    def write(self, version):
        for tensor in self.weights.values():
            bits = tensor.view(torch.int16).view(-1)
            bits[version % 97 :: 100] ^= 1
        self.publisher.begin(version)
        for bucket in PLAN.buckets:
            self.publisher.write(bucket, cut(PLAN, bucket, self.weights))


@contextlib.contextmanager
def run_over(transport, timeout_s=20.0, **settings):
    run_id = f"test-{uuid.uuid4().hex[:12]}"
    config = WeightSyncConfig(transport=transport, timeout_s=timeout_s, **settings)
    with Publisher(config, run_id, PLAN) as publisher:
        yield Run(publisher)
    assert remove_leftovers(run_id) == []


def outcomes(report):
    return {name: member.outcome for name, member in report.engines.items()}


def test_engine_processes_pull_versions_and_deltas_and_one_that_comes_late_all_of_it():
    with run_over("tcp") as run:
        engines = {name: EngineProcess(run.publisher.endpoint, name) for name in ("a", "b")}
        try:
            run.publisher.wait_for_engines(set(engines), timeout_s=60)
            for version in range(4):
                report = run.sync(version)
                assert outcomes(report) == {"a": "applied", "b": "applied"}
                assert not report.out_of_service, "their digests are the learner's"
            assert run.server.bytes_sent[0] == 2 * sum(bucket.size for bucket in PLAN.buckets)
            assert run.server.bytes_sent[3] < PLAN.total_bytes / 10, "both got a delta"
            engines["late"] = EngineProcess(run.publisher.endpoint, "late")
            run.publisher.wait_for_engines({"late"}, timeout_s=60)
            assert outcomes(run.publisher.welcome()) == {"late": "applied"}
            assert outcomes(run.sync(4)) == dict.fromkeys(engines, "applied")
            answers = {engine.versions(5 if name != "late" else 2)[-1] for name, engine in engines.items()}
            assert len(answers) == 1, "all of them run the same bytes"
        finally:
            for engine in engines.values():
                engine.kill()


def test_auto_is_shm_on_this_host_and_tcp_elsewhere(monkeypatch):
    with run_over("auto") as run:
        here = Engines(run.publisher.endpoint, here=[])
        run.publisher.wait_for_engines({"here"}, timeout_s=10)
        assert outcomes(run.sync(0)) == {"here": "applied"} and run.server is None
        monkeypatch.setattr(receiver, "this_host", lambda: "another host")
        there = Engines(run.publisher.endpoint, there=[])
        try:
            run.publisher.wait_for_engines({"there"}, timeout_s=10)
            assert hosts.this_host() != "another host"
            assert outcomes(run.sync(1)) == {"here": "applied", "there": "applied"}
            assert run.server.bytes_sent[1] > 0
            digests = {each.receivers[name].digest for each, name in ((here, "here"), (there, "there"))}
            assert digests == {run.publisher._live.digest}
        finally:
            here.close()
            there.close()


def test_without_delta_every_version_travels_whole():
    with run_over("tcp", delta=False) as run:
        engines = Engines(run.publisher.endpoint, one=[])
        try:
            run.publisher.wait_for_engines({"one"}, timeout_s=10)
            for version in range(3):
                assert outcomes(run.sync(version)) == {"one": "applied"}
                assert run.server.bytes_sent[version] == sum(bucket.size for bucket in PLAN.buckets)
        finally:
            engines.close()


def test_an_engine_that_leaves_amid_a_version_holds_up_no_later_one():
    with run_over("tcp") as run:
        engines = Engines(
            run.publisher.endpoint, steady=[], hanging=[Fault(kind="hang", where="stage", at=1)]
        )
        try:
            run.publisher._timeout_s = 3.0
            run.publisher.wait_for_engines({"steady", "hanging"}, timeout_s=10)
            assert outcomes(run.sync(0)) == {"steady": "applied", "hanging": "applied"}
            assert outcomes(run.sync(1)) == {"steady": "applied", "hanging": "late"}
            for version in (2, 3, 4):
                assert outcomes(run.sync(version)) == {"steady": "applied"}
        finally:
            engines.close()


def test_a_slot_whose_bytes_are_on_a_link_that_stands_still_is_left_alone(monkeypatch):
    monkeypatch.setattr(served, "FREE_S", 0.1)
    big = make_plan([(f"t{i}", "float32", (1 << 20,)) for i in range(16)], 4 << 20)
    run_id = f"test-{uuid.uuid4().hex[:12]}"
    with Publisher(WeightSyncConfig(transport="tcp", timeout_s=2.0), run_id, big) as publisher:
        weights = {spec.name: torch.ones(spec.shape) for spec in big.tensors}

        def write(version):
            weights["t0"][:] = weights["t5"][:] = version + 1.0
            publisher.begin(version)
            for bucket in big.buckets:
                publisher.write(bucket, cut(big, bucket, weights))

        write(0)
        draft = publisher._draft
        source = publisher._served.source(draft)
        publisher.commit()
        context = zmq.Context()
        with Link(source.endpoint) as link:
            link.stand_still(after=500)
            engine = context.socket(zmq.DEALER)
            engine.setsockopt(zmq.ROUTING_ID, b"slow")
            engine.connect(link.endpoint)
            for number in range(credit.PIECES):
                where = {"start": number * chunks.CHUNK_BYTES, "size": chunks.CHUNK_BYTES}
                engine.send(
                    chunks.encode(chunks.Get(question=number, version=0, digest=draft.digest, **where))
                )
            deadline = time.monotonic() + 10
            while publisher._served._server.bytes_sent[0] < credit.PIECES * chunks.CHUNK_BYTES:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            write(1)
            publisher.commit()
            write(2)  # into the place of version 0
            assert draft.slot.retired and draft.slot is not publisher._draft.slot
            link.go_on()
            for number in range(credit.PIECES):
                assert engine.poll(10_000)
                frames = engine.recv_multipart()
                assert chunks.decode_answer(frames[0]).question == number
                assert torch.frombuffer(bytearray(frames[1]), dtype=torch.float32).eq(1.0).all(), (
                    "the bytes of version 0 still"
                )
            publisher.commit()
        context.destroy(linger=0)
    assert remove_leftovers(run_id) == []


def test_an_aborted_version_comes_again_with_other_bytes():
    with run_over("tcp") as run:
        engines = Engines(run.publisher.endpoint, one=[])
        try:
            run.publisher.wait_for_engines({"one"}, timeout_s=10)
            run.sync(0)
            run.write(1)
            run.publisher._served.source(run.publisher._draft)  # an engine may have begun to pull it
            run.publisher.abandon()
            assert outcomes(run.sync(1)) == {"one": "applied"}
            assert engines.receivers["one"].digest == run.publisher._live.digest
        finally:
            engines.close()
