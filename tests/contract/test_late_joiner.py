"""A real vLLM engine that comes late: versions were published without it, and it runs the last one before it serves."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Iterator

import engine_worlds
import pytest

from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.receiver import Receiver
from asyncrl.weight_sync.welcomer import Welcomer

PROBE = (1, 2, 3, 4, 5, 6)


@pytest.fixture
def world(tmp_path) -> Iterator[engine_worlds.VLLMWorld]:
    made = engine_worlds.VLLMWorld(tmp_path / "model", tied=True)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.mark.vllm
def test_a_late_engine_serves_the_present_version_from_its_first_token(world) -> None:
    weights = world.weights["random"]
    plan = make_plan([(name, "float32", tuple(w.shape)) for name, w in weights.items()], 2**20)
    with Publisher(WeightSyncConfig(), f"test-{uuid.uuid4().hex[:12]}", plan) as publisher:
        for version, kind in enumerate(("random", "repeat", "other")):
            publisher.begin(version)
            for bucket in plan.buckets:
                publisher.write(bucket, cut(plan, bucket, world.weights[kind]))
            logprobs = tuple(world.reference(kind, PROBE).tolist())
            assert not publisher.commit(Probe(tokens=PROBE, logprobs=logprobs, tolerance=1e-3)).engines
        welcomer = Welcomer(publisher)
        try:
            world.run(joins_and_serves(world, publisher.endpoint))
        finally:
            welcomer.close()
        (report,) = welcomer.take_reports()
        assert report.version == 2 and report.engines["late"].outcome == "applied"
        assert report.probe_max_diff["late"] < 1e-3 and not report.out_of_service


async def joins_and_serves(world: engine_worlds.VLLMWorld, endpoint: str) -> None:
    receiver = Receiver(world.engine, endpoint, "late")
    receiving = asyncio.create_task(receiver.run())
    try:
        await receiver.wait_for_version(0, timeout_s=30)
        answer = await world.answer(world.request(n=30))
        assert set(answer.versions) == {2}
        expected = world.reference("other", [1, 2, 3, *answer.tokens])[-30:]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-3)
    finally:
        receiving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await receiving
