"""The publisher with versions in device memory (the host's in its place): engines take, miss and refuse them."""

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

from asyncrl.generators.fake_engine import FakeEngine
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.device_version import DeviceVersion
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.rolling_publisher import RollingPublisher
from asyncrl.weight_sync.shm import slot_path
from asyncrl.weight_sync.version_bytes import tensors_of
from asyncrl.weight_sync.wire import Offer

CPU = torch.device("cpu")
PLAN = make_plan([("a", "float32", (64,)), ("b", "bfloat16", (8, 8)), ("c", "float32", (3,))], 384)
WEIGHTS = {"a": torch.ones(64), "b": torch.ones(8, 8), "c": torch.ones(3)}
CONFIG = WeightSyncConfig(transport="ipc", timeout_s=20.0)


class DeviceEngine(FakeEngine):
    """Takes what a vLLM worker would: opened and verified, loaded, verified again."""

    applied: tuple[int, dict[str, float]] = (-1, {})

    async def stage(self, offer: Offer) -> None:
        with contextlib.closing(DeviceVersion(offer, CPU, open_host_memory)) as version:
            version.verify()

    async def apply(self, offer: Offer) -> float:
        with contextlib.closing(DeviceVersion(offer, CPU, open_host_memory)) as version:
            self.applied = (
                offer.version,
                {name: float(t.float().mean()) for name, t in tensors_of(offer, version)},
            )
            version.verify()
        return 0.001


class World:
    def __init__(self, slots: int, lag: int = 0) -> None:
        self.run_id = f"test-{uuid.uuid4().hex[:12]}"
        device = make_slots(PLAN, CPU, slots)
        if lag:
            self.publisher: Publisher = RollingPublisher(
                CONFIG, self.run_id, PLAN, max_lag_versions=lag, device=device
            )
        else:
            self.publisher = Publisher(CONFIG, self.run_id, PLAN, device=device)
        self.engines = Engines(self.publisher.endpoint)
        self.engines.make = DeviceEngine

    def start(self, *names: str) -> None:
        for name in names:
            self.engines.start(name)
        self.publisher.wait_for_engines(set(names), timeout_s=20)

    def write(self, version: int) -> None:
        self.publisher.begin(version)
        for bucket in PLAN.buckets:
            self.publisher.write(bucket, cut(PLAN, bucket, {n: t + version for n, t in WEIGHTS.items()}))

    def applied(self, name: str) -> tuple[int, dict[str, float]]:
        engine = self.engines.engines[name]
        assert isinstance(engine, DeviceEngine)
        return engine.applied


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(*request.param)
    yield made
    made.engines.close()
    made.publisher.close()


def means(version: int) -> tuple[int, dict[str, float]]:
    return version, dict.fromkeys("abc", 1.0 + version)


@pytest.mark.parametrize("world", [(1,), (2,)], indirect=True)
def test_versions_are_taken_and_a_joiner_gets_the_live_one(world: World) -> None:
    world.start("first")
    for version in range(3):
        world.write(version)
        assert world.publisher.commit().out_of_service == {}
        assert world.applied("first") == means(version)
    world.start("second")
    report = world.publisher.welcome()
    assert report is not None and report.out_of_service == {}
    assert world.applied("second") == means(2)
    assert not slot_path(world.run_id, 0).exists(), "no shared memory is taken"


@pytest.mark.parametrize(("world", "welcomed"), [((1,), -1), ((2,), 0)], indirect=["world"])
def test_who_joins_while_a_version_is_begun_and_abandoned(world: World, welcomed: int) -> None:
    """With one allocation the live version's bytes are gone then: nobody is offered half of the next one."""
    world.start("first")
    world.write(0)
    world.publisher.commit()
    world.write(1)
    world.publisher.abandon()
    world.start("second")
    report = world.publisher.welcome()
    assert (report is None) is (welcomed < 0)
    assert world.applied("second")[0] == welcomed
    world.write(1)
    assert world.publisher.commit().out_of_service == {}
    assert world.applied("first") == world.applied("second") == means(1)


@pytest.mark.parametrize("world", [(2,)], indirect=True)
def test_an_engine_that_cannot_open_it_is_out_of_service_and_named(world: World) -> None:
    world.start("here")
    world.engines.make = FakeEngine  # as one on another GPU or host: it knows files only
    world.start("elsewhere")
    world.write(0)
    report = world.publisher.commit()
    assert set(report.out_of_service) == {"elsewhere"}
    assert "DeviceMemory(" in report.out_of_service["elsewhere"]
    assert world.applied("here") == means(0)


def test_rolling_over_one_allocation_is_refused() -> None:
    with (
        contextlib.closing(make_slots(PLAN, CPU, 1)) as device,
        pytest.raises(ValueError, match="max_lag_versions: expected 0"),
    ):
        RollingPublisher(CONFIG, "test", PLAN, max_lag_versions=1, device=device)


@pytest.mark.parametrize("world", [(2, 1)], indirect=True)
def test_rolling(world: World) -> None:
    world.start("first", "second")
    for version in range(4):
        world.write(version)
        world.publisher.commit()
        world.publisher.welcome()
    deadline = time.monotonic() + 20
    while {world.applied(name)[0] for name in ("first", "second")} != {3} and time.monotonic() < deadline:
        world.publisher.welcome()
    assert world.applied("first") == world.applied("second") == means(3)
