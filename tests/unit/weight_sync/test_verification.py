"""Engines that compute otherwise than the learner: who is asked, who is put out of service, and that no token of theirs is heard."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch
from engine_threads import Engines

from asyncrl.generators.engine import EngineDead, GenerationRequest
from asyncrl.generators.fake_engine import FakeEngine
from asyncrl.generators.fake_speech import Lengths, probe_logprobs, weights_digest
from asyncrl.weight_sync import receiver as receiver_module
from asyncrl.weight_sync.checksum import version_digest
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import ProbeMismatch
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.probe import Difference, Probe
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.report import MemberReport, SyncReport
from asyncrl.weight_sync.verification import shared_fault
from asyncrl.weight_sync.wire import SharedFile

PLAN = make_plan([("a", "float32", (64,)), ("b", "float32", (3,))], 200)
TOKENS = (1, 2, 3)


class Stale(FakeEngine):
    """From version `since` on it keeps computing with the weights before, as a packed copy that is not renewed does."""

    since = 1

    def __init__(self, **settings) -> None:
        super().__init__(lengths=Lengths(median_tokens=1e9), step_s=0.001, **settings)

    async def apply(self, offer) -> float:
        before = self._digest
        stall_s = await super().apply(offer)
        if offer.version >= self.since:
            self._digest = before
        return stall_s


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with Publisher(WeightSyncConfig(timeout_s=5.0), f"test-{uuid.uuid4().hex[:12]}", PLAN) as made:
        yield made


@pytest.fixture
def engines(publisher: Publisher) -> Iterator[Engines]:
    started = Engines(publisher.endpoint)
    yield started
    started.close()


def sync(publisher: Publisher, version: int, *, every: bool = False, error: float = 0.0) -> SyncReport:
    """Commits `version` with the probe that a learner gives whose logprobs are off by `error`."""
    publisher.begin(version)
    for bucket in PLAN.buckets:
        weights = {"a": torch.full((64,), float(version)), "b": torch.zeros(3)}
        publisher.write(bucket, cut(PLAN, bucket, weights))
    digest = weights_digest(publisher._draft.offer(SharedFile(path="")).checksums)
    right = tuple(each + error for each in probe_logprobs(digest, TOKENS))
    return publisher.commit(Probe(tokens=TOKENS, logprobs=right, tolerance=1e-6, every=every))


def join(publisher: Publisher, engines: Engines, *names: str, make=FakeEngine) -> None:
    engines.make = make
    for name in names:
        engines.start(name)
    publisher.wait_for_engines(set(names), timeout_s=20)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_stale_engine_is_out_and_the_other_goes_on(publisher, engines):
    join(publisher, engines, "stale", make=Stale)
    join(publisher, engines, "right")
    assert sync(publisher, 0).probe_max_diff == {"stale": 0.0, "right": 0.0}
    report = sync(publisher, 1)
    assert report.out_of_service.keys() == {"stale"}
    assert "engine stale at version 1, probe logprob" in report.out_of_service["stale"]
    assert report.engines["stale"].outcome == "failed" and report.engines["right"].outcome == "applied"
    assert report.probe_max_diff["right"] == 0.0 and report.probe_max_diff["stale"] > 1e-6
    assert isinstance(engines.ended("stale"), ProbeMismatch)
    assert engines.receivers["stale"].version == 0, "nobody was told that it has the version"
    assert sync(publisher, 2).engines.keys() == {"right"} and publisher.engines == {"right": 2}


def test_no_token_of_unproven_weights_is_heard(publisher, engines):
    join(publisher, engines, "stale", make=Stale)
    join(publisher, engines, "right")
    sync(publisher, 0)
    engine = engines.engines["stale"]
    heard: list[int] = []

    async def listen() -> None:
        request = GenerationRequest(
            request_id="r", tokens=[1], max_new_tokens=10**6, temperature=1.0, stop_token_ids=()
        )
        async for chunk in engine.generate(request):
            heard.extend(chunk.versions)

    listening = asyncio.run_coroutine_threadsafe(listen(), engines.loop)
    until(lambda: len(heard) >= 5)
    sync(publisher, 1)
    engines.ended("stale")
    spoken = engine.stats().generated_tokens
    until(lambda: engine.stats().generated_tokens > spoken + 20)  # it does go on, unheard
    assert not listening.done()
    engines.do(engine.shutdown())
    with pytest.raises(EngineDead, match="before its new weights were proven"):
        listening.result(timeout=10)
    assert set(heard) == {0}


def test_what_was_held_comes_out_whole_once_the_probe_is_right(publisher, engines):
    join(publisher, engines, "right", make=lambda **s: FakeEngine(lengths=Lengths(median_tokens=1e9), **s))
    sync(publisher, 0)
    engine, chunks = engines.engines["right"], []

    async def listen() -> None:
        request = GenerationRequest(
            request_id="r", tokens=[1], max_new_tokens=3000, temperature=1.0, stop_token_ids=()
        )
        async for chunk in engine.generate(request):
            chunks.append(chunk)

    listening = asyncio.run_coroutine_threadsafe(listen(), engines.loop)
    sync(publisher, 1)
    listening.result(timeout=20)
    assert sum(len(chunk.tokens) for chunk in chunks) == 3000
    versions = [version for chunk in chunks for version in chunk.versions]
    assert versions == sorted(versions)


def test_where_all_fail_the_fault_is_shared_and_the_run_is_told(publisher, engines):
    join(publisher, engines, "x", "y")
    with pytest.raises(
        ProbeMismatch, match=r"all 2 engines that were probed failed.*verify_tolerance"
    ) as caught:
        sync(publisher, 0, error=0.25)
    assert caught.value.report.out_of_service.keys() == {"x", "y"} and not publisher.engines
    assert caught.value.report.probe_max_diff == {"x": pytest.approx(0.25), "y": pytest.approx(0.25)}


def test_first_asks_each_engine_twice_whenever_it_joined(publisher, engines):
    join(publisher, engines, "early")
    asked = [set(sync(publisher, version).probe_max_diff) for version in range(3)]
    assert asked == [{"early"}, {"early"}, set()]
    join(publisher, engines, "late")
    assert set(publisher.welcome().probe_max_diff) == {"late"}
    join(publisher, engines, "later")
    asked = [set(sync(publisher, version).probe_max_diff) for version in (3, 4, 5)]
    assert asked == [{"late", "later"}, {"later"}, set()]
    engines.do(engines.leave("late"))
    until(lambda: "late" not in publisher.engines)
    join(publisher, engines, "late")
    assert set(publisher.welcome().probe_max_diff) == {"late"}, "one that comes anew proves itself anew"


def test_a_late_joiner_that_computes_otherwise_is_out_while_proven_ones_serve(publisher, engines):
    join(publisher, engines, "early")
    for version in range(3):
        sync(publisher, version)
    join(publisher, engines, "stale", make=Stale)
    report = sync(publisher, 3)
    assert report.out_of_service.keys() == {"stale"} and publisher.engines == {"early": 3}


def test_always_catches_what_turns_bad_later_and_first_does_not(publisher, engines):
    late_fault = type("LateFault", (Stale,), {"since": 3})
    join(publisher, engines, "bad", make=late_fault)
    join(publisher, engines, "good")
    for version in range(3):
        assert not sync(publisher, version).out_of_service
    assert not sync(publisher, 3).out_of_service, "proven twice, not asked any more"
    assert sync(publisher, 4, every=True).out_of_service.keys() == {"bad"}


def test_an_engine_with_other_bytes_is_out(publisher, engines, monkeypatch):
    join(publisher, engines, "x")
    assert (report := sync(publisher, 0)).digest == engines.receivers["x"].digest != ""
    monkeypatch.setattr(receiver_module, "version_digest", lambda sums: version_digest([1, *sums]))
    report = sync(publisher, 1)
    assert f"expected bytes with digest {report.digest}" in report.out_of_service["x"]
    assert engines.receivers["x"].digest in report.out_of_service["x"] and not publisher.engines


def test_the_digest_is_of_every_bucket_in_order():
    assert version_digest([]) == ""
    found = {version_digest(sums) for sums in ([1, 2], [2, 1], [1], [1, 2, 0], [1, 2**64 - 1])}
    assert len(found) == 5 and all(len(each) == 16 and int(each, 16) >= 0 for each in found)


def test_one_that_was_not_asked_shows_that_the_fault_is_not_shared():
    probe = Probe(tokens=(1, 2), logprobs=(-1.0,), tolerance=0.1)
    found = {"bad": Difference(position=0, expected=-1.0, got=-2.0, size=1.0)}
    report = SyncReport(
        version=4,
        seconds=1.0,
        write_s=0.0,
        transaction_s=1.0,
        total_bytes=4,
        engines={"bad": MemberReport(outcome="failed"), "proven": MemberReport(outcome="applied")},
        out_of_service={"bad": "why"},
        probe_max_diff={"bad": 1.0},
        ignored={},
    )
    assert shared_fault(probe, found, report) is None
    alone = msgspec.structs.replace(report, engines={"bad": MemberReport(outcome="failed")})
    assert isinstance(shared_fault(probe, found, alone), ProbeMismatch)
    assert shared_fault(probe, {}, alone) is None and shared_fault(None, {}, alone) is None
