"""Real vLLM engines and versions that are not what they should be: each fault is named, and the engine never speaks under it."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import engine_worlds
import pytest
import torch
from offers import Offers

from asyncrl.generators import vllm_settings
from asyncrl.generators.fake_engine import FakeEngine
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import ChecksumError, Dismissed, IncompleteWeights, ProbeMismatch
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.receiver import Receiver
from asyncrl.weight_sync.report import SyncReport

pytestmark = pytest.mark.vllm
PROBE = (1, 2, 3, 4, 5, 6)
K_PROJ, Q_PROJ = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.q_proj.weight"
NORM, DOWN = "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[engine_worlds.VLLMWorld]:
    made = engine_worlds.VLLMWorld(tmp_path_factory.mktemp("verified") / "model", tied=True)
    try:
        made.start()
        made.run(made.publish("random"))
        yield made
    finally:
        made.close()


def without(*names: str):
    return lambda weights: {name: weight for name, weight in weights.items() if name not in names}


def with_shape(name: str, *shape: int):
    return lambda weights: weights | {name: torch.zeros(shape)}


BROKEN = {
    "a norm is missing": (without(NORM), NORM),
    "a part of a fused matrix is missing": (without(K_PROJ), "layers.1.self_attn.qkv_proj.weight"),
    "a bias is missing": (without(K_PROJ.replace("weight", "bias")), "layers.1.self_attn.qkv_proj.bias"),
    "the embedding is missing": (without(EMBEDDING), EMBEDDING),
    "too many rows": (with_shape(Q_PROJ, 96, 64), Q_PROJ),
    "too few rows": (with_shape(Q_PROJ, 32, 64), "layers.0.self_attn.q"),
    "transposed": (with_shape(DOWN, 128, 64), DOWN),
    "another vocabulary": (with_shape(EMBEDDING, 40, 64), EMBEDDING),
    "a vector that is too long": (with_shape(NORM, 65), NORM),
    "a tensor that the model lacks": (with_shape("model.layers.7.mlp.up_proj.weight", 128, 64), "layers.7"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_does_not_fit_is_refused_before_a_byte_is_written(world, fault):
    change, named = BROKEN[fault]
    weights = change(dict(world.weights["other"]))
    with (
        Offers(f"test-{uuid.uuid4().hex[:12]}", weights) as offers,
        pytest.raises(IncompleteWeights, match=named),
    ):
        world.run(world.engine.stage(offers.write(world.version + 1, weights)))
    answer = world.run(world.answer(world.request(n=10, temperature=0.0)))
    assert set(answer.versions) == {world.version}
    assert world.run(world.engine.probe(PROBE)) == pytest.approx(
        world.reference("random", PROBE).tolist(), abs=1e-3
    )


def test_a_flipped_byte_leaves_the_old_version_live(world):
    offer = world.offer("other")
    world.offers.corrupt(offer)
    with pytest.raises(ChecksumError, match=r"bucket \d+ in /dev/shm"):
        world.run(world.engine.stage(offer))
    answer = world.run(world.answer(world.request(n=10)))
    assert set(answer.versions) == {world.version}


def test_after_all_that_it_takes_a_right_version(world):
    world.run(world.publish("other"))
    assert world.run(world.engine.probe(PROBE)) == pytest.approx(
        world.reference("other", PROBE).tolist(), abs=1e-3
    )
    world.run(world.publish("random"))


@contextlib.asynccontextmanager
async def joined(engine, publisher: Publisher, name: str):
    receiver = Receiver(engine, publisher.endpoint, name)
    receiving = asyncio.create_task(receiver.run())
    try:
        await asyncio.to_thread(publisher.wait_for_engines, {name}, 20.0)
        yield receiving
    finally:
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)


def sync(
    publisher: Publisher, version: int, weights: Mapping[str, torch.Tensor], probe: Probe | None
) -> SyncReport:
    publisher.begin(version)
    for bucket in publisher._plan.buckets:
        publisher.write(bucket, cut(publisher._plan, bucket, weights))
    return publisher.commit(probe)


def opened(weights: Mapping[str, torch.Tensor]) -> Publisher:
    plan = make_plan([(name, "float32", tuple(w.shape)) for name, w in weights.items()], 2**20)
    return Publisher(WeightSyncConfig(timeout_s=60.0), f"test-{uuid.uuid4().hex[:12]}", plan)


def test_an_engine_of_another_model_is_dismissed_and_the_other_goes_on(world):
    weights = without(K_PROJ)(dict(world.weights["other"]))

    async def scenario() -> None:
        fake = FakeEngine()
        async with joined(world.engine, publisher, "vllm") as ends, joined(fake, publisher, "fake"):
            report = await asyncio.to_thread(sync, publisher, 0, weights, None)
            assert report.engines["fake"].outcome == "applied" and report.engines["vllm"].outcome == "failed"
            assert "qkv_proj" in report.out_of_service["vllm"] and publisher.engines.keys() == {"fake"}
            await asyncio.wait({ends}, timeout=10)
            assert isinstance(ends.exception(), Dismissed)

    with opened(weights) as publisher:
        world.run(scenario())


@pytest.fixture
def stale(world, tmp_path: Path, monkeypatch) -> Iterator[engine_worlds.VLLMWorld]:
    """On the event loop of `world`, as one publisher talks to both."""
    monkeypatch.setattr(vllm_settings, "WORKER_EXTENSION", "stale_head.StaleHead")
    made = engine_worlds.VLLMWorld(tmp_path / "model", tied=True)
    try:
        world.run(made.engine.start())
        monkeypatch.undo()
        yield made
    finally:
        world.run(made.engine.shutdown())
        made.close()


def test_a_stale_packed_head_is_caught_before_it_is_heard(world, stale):
    async def scenario() -> None:
        async with joined(world.engine, publisher, "right"), joined(stale.engine, publisher, "stale") as ends:
            logprobs = tuple(world.reference("other", PROBE).tolist())
            probe = Probe(tokens=PROBE, logprobs=logprobs, tolerance=1e-3)
            report = await asyncio.to_thread(sync, publisher, 5, world.weights["other"], probe)
            assert report.out_of_service.keys() == {"stale"} and report.probe_max_diff["right"] < 1e-3
            assert "engine stale at version 5, probe logprob" in report.out_of_service["stale"]
            assert report.probe_max_diff["stale"] > 0.1
            await asyncio.wait({ends}, timeout=10)
            assert isinstance(ends.exception(), ProbeMismatch)
            heard = asyncio.create_task(stale.answer(stale.request(n=20)))
            assert not (await asyncio.wait({heard}, timeout=1.0))[0], "it must not speak"
            await stale.engine.shutdown()
            assert isinstance((await asyncio.gather(heard, return_exceptions=True))[0], Exception)
            answer = await world.answer(world.request(n=10))
            assert set(answer.versions) == {5}

    with opened(world.weights["other"]) as publisher:
        world.run(scenario())


@pytest.fixture
def halved(tmp_path: Path) -> Iterator[engine_worlds.VLLMWorld]:
    made = engine_worlds.VLLMWorld(tmp_path / "model", tied=True, dtype="bfloat16")
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_float32_masters_are_cast_before_they_are_sent_to_a_bfloat16_engine(halved):
    """Half the bytes travel, and the engine computes with the masters rounded once: as a model of these weights does, but for
    sums and activations in 8 bits of mantissa."""
    masters = halved.weights["other"]
    example = {name: weight.bfloat16() for name, weight in masters.items()}
    with Offers(f"test-{uuid.uuid4().hex[:12]}", example) as offers:
        assert offers.plan.total_bytes < 0.51 * halved.offers.plan.total_bytes
        offer = offers.write(0, masters)
        halved.run(halved.engine.stage(offer))
        halved.run(halved.engine.apply(offer))
    got = torch.tensor(halved.run(halved.engine.probe(PROBE)))
    model = halved.models["other"]
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    assert (got - halved.reference("other", PROBE)).abs().max() < 0.15
    assert (got - halved.reference("random", PROBE)).abs().max() > 0.5
