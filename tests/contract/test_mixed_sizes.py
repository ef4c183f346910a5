"""Real vLLM engines of one worker and of two that share each matrix (tensor parallel) take the same versions from one publisher, over
every transport that needs no GPU: each engine is one receiver, and its workers take their slices out of the same bytes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Iterator

import engine_worlds
import pytest

from asyncrl.weight_sync.collective_publisher import CollectivePublisher
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import Plan, make_plan
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.receiver import Receiver

PROBE = (1, 2, 3, 4, 5, 6)
BUCKET_BYTES = 2**16
KINDS = ("random", "other", "repeat")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Iterator[dict[str, engine_worlds.VLLMWorld]]:
    with contextlib.ExitStack() as stack:
        made = {}
        for workers in (1, 2):
            folder = tmp_path_factory.mktemp(f"tp{workers}") / "model"
            world = engine_worlds.VLLMWorld(folder, tied=True, tensor_parallel=workers)
            stack.callback(world.close)
            world.start()
            made[f"tp{workers}"] = world
        yield made


def publisher_of(transport: str, plan: Plan) -> Publisher | CollectivePublisher:
    config = WeightSyncConfig(transport=transport, timeout_s=60.0)
    if transport == "collective":
        return CollectivePublisher(config, plan)
    return Publisher(config, f"test-{uuid.uuid4().hex[:12]}", plan)


async def receive(world: engine_worlds.VLLMWorld, endpoint: str, name: str, done: threading.Event) -> None:
    """Until `done`, or the world's own deadline."""
    receiving = asyncio.create_task(Receiver(world.engine, endpoint, name).run())
    try:
        assert await asyncio.to_thread(done.wait, 50), "the publisher did not end"
    finally:
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)


@pytest.mark.vllm
@pytest.mark.parametrize("transport", ["shm", "tcp", "collective"])
def test_engines_of_mixed_sizes_take_the_same_versions(worlds, transport) -> None:
    reference = worlds["tp1"]
    weights = reference.weights["random"]
    plan = make_plan([(name, "float32", tuple(w.shape)) for name, w in weights.items()], BUCKET_BYTES)
    assert len(plan.buckets) > 2
    with publisher_of(transport, plan) as publisher:
        done = threading.Event()
        threads = [
            threading.Thread(target=world.run, args=(receive(world, publisher.endpoint, name, done),))
            for name, world in worlds.items()
        ]
        for thread in threads:
            thread.start()
        publisher.wait_for_engines(set(worlds), timeout_s=20)
        for version, kind in enumerate(KINDS):
            publisher.begin(version)
            for bucket in plan.buckets:
                publisher.write(bucket, cut(plan, bucket, reference.weights[kind]))
            logprobs = tuple(reference.reference(kind, PROBE).tolist())
            report = publisher.commit(Probe(tokens=PROBE, logprobs=logprobs, tolerance=1e-3))
            assert {name: member.outcome for name, member in report.engines.items()} == dict.fromkeys(
                worlds, "applied"
            ), report
        done.set()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads)
    for world in worlds.values():
        world.version = len(KINDS) - 1
        answer = world.run(world.answer(world.request(n=10)))
        expected = world.reference(KINDS[-1], [1, 2, 3, *answer.tokens])[-10:]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-3)
