"""What every transport promises, whether all engines take a version together or each by itself: the same cases for each of them.

Device memory is the host's here, in the place of a GPU's; `tests/gpu` has the real one.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator

import pytest
import torch
from device_peers import make_slots
from engine_threads import Engines
from host_memory import open_host_memory
from senders import checksums_of, tensors_of

from asyncrl.generators.fake_engine import FakeEngine, Fault
from asyncrl.generators.fake_speech import probe_logprobs, weights_digest
from asyncrl.weight_sync.checksum import bucket_checksum, version_digest
from asyncrl.weight_sync.collective_publisher import CollectivePublisher
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.device_version import DeviceVersion
from asyncrl.weight_sync.errors import SyncAborted, WeightSyncError
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.report import SyncReport
from asyncrl.weight_sync.rolling_publisher import RollingPublisher
from asyncrl.weight_sync.shm import remove_leftovers
from asyncrl.weight_sync.wire import Offer

CPU = torch.device("cpu")
TOKENS = (1, 2, 3)
PLAN = make_plan(
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
WAYS = [("shm", 0), ("tcp", 0), ("ipc", 0), ("collective", 0), ("shm", 1), ("tcp", 1), ("ipc", 1)]
TIMEOUT_S = 6.0
ATTEMPTS = 3


class OnDevice(FakeEngine):
    """Takes versions as a vLLM worker on the learner's GPU does."""

    async def stage(self, offer: Offer) -> None:
        self._check_alive()
        await self._strike("stage", offer.version)
        with contextlib.closing(DeviceVersion(offer, CPU, open_host_memory)) as version:
            version.verify()

    async def apply(self, offer: Offer) -> float:
        self._check_alive()
        await self._strike("apply", offer.version)
        with contextlib.closing(DeviceVersion(offer, CPU, open_host_memory)) as version:
            data = version.data.numpy().data
            self._digest = weights_digest([bucket_checksum(data, bucket) for bucket in offer.plan.buckets])
            version.verify()
        self._version = offer.version
        return 0.0


class World:
    """A publisher, its engines, and what is told of them."""

    def __init__(self, transport: str, lag: int) -> None:
        self.run_id = f"test-{uuid.uuid4().hex[:12]}"
        self.kind = OnDevice if transport == "ipc" else FakeEngine
        config = WeightSyncConfig(transport=transport, timeout_s=TIMEOUT_S)
        device = make_slots(PLAN, CPU) if transport == "ipc" else None
        self.publisher: Publisher | CollectivePublisher
        if transport == "collective":
            self.publisher = CollectivePublisher(config, PLAN)
        elif lag:
            self.publisher = RollingPublisher(config, self.run_id, PLAN, max_lag_versions=lag, device=device)
        else:
            self.publisher = Publisher(config, self.run_id, PLAN, device=device)
        self.engines = Engines(self.publisher.endpoint)
        self.out: dict[str, str] = {}
        """Who is out of service, and why."""

    def start(self, name: str, *faults: Fault, kind: type[FakeEngine] | None = None) -> None:
        self.engines.make = kind or self.kind
        self.engines.start(name, faults)
        self.publisher.wait_for_engines({name}, timeout_s=20)

    def leave(self, name: str) -> None:
        self.engines.do(self.engines.leave(name))
        deadline = time.monotonic() + 10
        while name in self.publisher.engines:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def write(self, version: int, *, again: bool = False) -> None:
        if not again:
            self.publisher.begin(version)
        elif isinstance(self.publisher, CollectivePublisher):
            self.publisher.resend(version)
        for bucket in PLAN.buckets:
            self.publisher.write(bucket, cut(PLAN, bucket, tensors_of(PLAN, version)))

    def send(self, version: int, *, again: bool = False) -> set[str]:
        """Who took it, once it is settled for all; sent again without those that a broadcast was called off for."""
        probe = Probe(tokens=TOKENS, logprobs=tuple(answers(version)), tolerance=1e-6, every=True)
        for _ in range(ATTEMPTS):
            self.write(version, again=again)
            try:
                return self._taken([self.publisher.commit(probe)])
            except SyncAborted as error:
                self.out |= error.report.out_of_service
        raise AssertionError(f"version {version} was called off {ATTEMPTS} times")

    def bring(self, version: int) -> set[str]:
        """Who came since `version` was sent, and has it now."""
        if isinstance(self.publisher, CollectivePublisher):
            return self.send(version, again=True)
        return self._taken([])

    def _taken(self, reports: list[SyncReport]) -> set[str]:
        # Ends: nobody is on the way any more.
        while (report := self.publisher.welcome()) is not None:
            reports.append(report)
        taken = set()
        for report in reports:
            self.out |= report.out_of_service
            taken |= {name for name, member in report.engines.items() if member.outcome == "applied"}
        return taken

    def answer(self, name: str) -> list[float]:
        """Which only the very bytes of a version bring about."""
        found: list[float] = self.engines.do(self.engines.engines[name].probe(TOKENS))
        return found

    def close(self) -> None:
        self.engines.close()
        self.publisher.close()
        assert remove_leftovers(self.run_id) == []


def answers(version: int) -> list[float]:
    return probe_logprobs(weights_digest(checksums_of(PLAN, tensors_of(PLAN, version))), TOKENS)


@pytest.fixture(params=WAYS, ids=[f"{way}, rolling" if lag else way for way, lag in WAYS])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(*request.param)
    try:
        yield made
    finally:
        made.close()


def test_every_engine_has_the_very_bytes_version_after_version(world: World) -> None:
    for name in "abc":
        world.start(name)
    for version in range(5):
        assert world.send(version) == set("abc") and not world.out
        assert world.publisher.engines == dict.fromkeys("abc", version)
        assert [world.answer(name) for name in "abc"] == [answers(version)] * 3
        expected = version_digest(checksums_of(PLAN, tensors_of(PLAN, version)))
        digests = {receiver.digest for receiver in world.engines.receivers.values()}
        assert digests == {"" if world.kind is OnDevice else expected}


def test_who_comes_late_and_who_comes_again_get_the_present_version(world: World) -> None:
    assert world.send(0) == set(), "nobody is there"
    world.start("a")
    assert world.bring(0) == {"a"} and world.answer("a") == answers(0)
    assert world.send(1) == {"a"}
    world.start("b")
    assert world.bring(1) == {"b"} and world.answer("b") == answers(1)
    world.leave("a")
    world.start("a")
    assert world.bring(1) == {"a"} and world.answer("a") == answers(1)
    assert world.send(2) == {"a", "b"} and not world.out
    assert world.answer("a") == world.answer("b") == answers(2)


@pytest.mark.parametrize("where", ["stage", "apply"])
@pytest.mark.parametrize("kind", ["raise", "die", "hang"])
def test_one_that_cannot_take_a_version_is_named_and_the_others_go_on(world: World, where, kind) -> None:
    world.start("right")
    world.start("wrong", Fault(kind=kind, where=where, at=1))
    assert world.send(0) == {"right", "wrong"}
    assert world.send(1) == {"right"} and world.out.keys() == {"wrong"}
    assert world.answer("right") == answers(1) and world.publisher.engines == {"right": 1}
    assert world.send(2) == {"right"} and world.answer("right") == answers(2)
    if (where, kind) != ("apply", "hang"):  # that one hears of nothing
        assert isinstance(world.engines.ended("wrong"), Exception)
    if kind != "hang":
        world.start("wrong")
        assert world.bring(2) == {"wrong"} and world.answer("wrong") == answers(2)


def test_one_that_computes_otherwise_is_out_before_it_is_heard(world: World) -> None:
    class Stale(world.kind):  # type: ignore[misc, name-defined]
        async def apply(self, offer: Offer) -> float:
            before = self._digest
            stall_s: float = await super().apply(offer)
            self._digest = before if offer.version else self._digest
            return stall_s

    world.start("right")
    world.start("stale", kind=Stale)
    assert world.send(0) == {"right", "stale"}
    assert world.send(1) == {"right"} and world.out.keys() == {"stale"}
    assert "engine stale at version 1, probe logprob" in world.out["stale"]
    assert world.engines.receivers["stale"].version == 0 and world.publisher.engines == {"right": 1}


def test_a_version_that_is_given_up_leaves_the_old_one_live(world: World) -> None:
    world.start("a")
    assert world.send(0) == {"a"}
    world.write(1)
    world.publisher.abandon()
    assert world.publisher.version == 0 and world.answer("a") == answers(0)
    with pytest.raises(WeightSyncError, match=r"expected one above 0, the last committed"):
        world.publisher.begin(0)
    world.publisher.abandon()
    assert world.send(1) == {"a"} and world.answer("a") == answers(1)
