"""Learner and a real vLLM engine on one GPU: versions over `ipc` and over `collective`, in float32 and bfloat16."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import one_gpu
import pytest
import torch
from device_peers import make_slots, peer, publish_collectively, read_versions, write
from engine_worlds import VLLMWorld

from asyncrl.learner.config import LearnerConfig
from asyncrl.learner.step import Learner
from asyncrl.weight_sync.cuda_memory import device_uuid
from asyncrl.weight_sync.device_memory import DeviceSlots
from asyncrl.weight_sync.errors import ChecksumError
from asyncrl.weight_sync.plan import Plan, make_plan
from asyncrl.weight_sync.receiver import Receiver
from asyncrl.weight_sync.wire import Offer

DEVICE = "cuda:0"
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15}
"""float32 on a GPU may sum in another order than on a CPU, bfloat16 keeps 8 bits."""
TOKENS = list(range(40))
BUCKET_BYTES = 16 * 1024

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is false"
    ),
]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMWorld]:
    made = VLLMWorld(tmp_path_factory.mktemp("model"), tied=True, device="cuda", dtype=request.param)
    made.start()
    yield made
    made.close()
    assert made.children() == []


@pytest.fixture
def slots(world: VLLMWorld) -> Iterator[DeviceSlots]:
    with contextlib.closing(make_slots(plan_of(world), torch.device(DEVICE))) as made:
        yield made


def plan_of(world: VLLMWorld) -> Plan:
    """In the engine's dtype: the learner has float32 masters and casts them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in world.weights["random"].items()}
    return make_plan([(name, world.pool.dtype, shape) for name, shape in shapes.items()], BUCKET_BYTES)


def offer(world: VLLMWorld, slots: DeviceSlots, kind: str) -> Offer:
    weights = {name: tensor.detach().to(DEVICE) for name, tensor in world.weights[kind].items()}
    return write(slots, plan_of(world), world.version + 1, weights)


async def take(world: VLLMWorld, taken: Offer) -> None:
    await world.engine.stage(taken)
    await world.engine.apply(taken)
    world.version = taken.version


def check_probe(world: VLLMWorld, kind: str) -> None:
    got = world.run(world.engine.probe(TOKENS))
    assert got == pytest.approx(world.reference(kind, TOKENS).tolist(), abs=TOLERANCE[world.pool.dtype])


def test_the_engine_says_where_it_is(world: VLLMWorld) -> None:
    assert world.run(world.vllm.gpus()) == (device_uuid(torch.device(DEVICE)),)


def test_versions_over_ipc(world: VLLMWorld, slots: DeviceSlots) -> None:
    for kind in ("random", "other", "random"):
        world.run(take(world, offer(world, slots, kind)))
        check_probe(world, kind)


def test_a_flipped_byte_over_ipc_leaves_the_old_version_live(world: VLLMWorld, slots: DeviceSlots) -> None:
    world.run(take(world, offer(world, slots, "other")))
    bad = offer(world, slots, "random")
    slots.committed()  # back to the allocation that was just written
    slots.next()._memory.data[bad.plan.tensors[0].offset] ^= 1
    with pytest.raises(ChecksumError) as caught:
        world.run(world.engine.stage(bad))
    assert caught.value.bucket == 0
    check_probe(world, "other")


def test_a_stream_goes_on_across_an_update_over_ipc(world: VLLMWorld, slots: DeviceSlots) -> None:
    world.run(take(world, offer(world, slots, "repeat")))
    old = world.version
    change = offer(world, slots, "change")

    async def spanning() -> tuple[list[int], list[int]]:
        tokens, versions = [], []
        sync: asyncio.Task[None] | None = None
        async for chunk in world.engine.generate(world.request(tokens=[5], n=700)):
            tokens += chunk.tokens
            versions += chunk.versions
            if sync is None and len(tokens) >= 20:
                sync = asyncio.create_task(take(world, change))
        assert sync is not None
        await sync
        return tokens, versions

    tokens, versions = world.run(spanning())
    assert sorted(set(versions)) == [old, old + 1] and versions == sorted(versions)
    repeats = [token == before for token, before in zip(tokens, [5, *tokens[:-1]], strict=True)]
    assert repeats == [version == old for version in versions]


def test_versions_over_a_collective(world: VLLMWorld) -> None:
    """This process is the engine's: rank 1 of the group (`conftest`). The second version goes over the group of the first."""
    gpus = torch.cuda.device_count()
    kinds = {kind: {n: t.detach() for n, t in world.weights[kind].items()} for kind in ("random", "other")}
    learner = peer(
        publish_collectively,
        f"cuda:{gpus - 1}",
        one_gpu.environment(0, gpus),
        plan_of(world),
        kinds,
    )
    with learner as publisher:
        receiver = Receiver(world.engine, publisher.answer(), "check")

        async def receive() -> None:
            receiving = asyncio.create_task(receiver.run())
            try:
                for kind in ("other", "random"):
                    version = world.version + 1
                    publisher.send((version, kind, ["check"]))
                    await receiver.wait_for_version(version, timeout_s=50.0)
                    world.version = version
                    assert await asyncio.to_thread(publisher.answer) == {}
                    got = await world.engine.probe(TOKENS)
                    wanted = world.reference(kind, TOKENS).tolist()
                    assert got == pytest.approx(wanted, abs=TOLERANCE[world.pool.dtype])
            finally:
                receiving.cancel()
                await asyncio.wait({receiving}, timeout=10)

        world.run(receive())


def test_what_a_learner_on_the_gpu_gathers_is_what_another_process_reads(world: VLLMWorld) -> None:
    """FSDP with one rank, float32 masters sent as bfloat16, from gathering to reading without the host."""
    config = LearnerConfig(learning_rate=1e-3, device=torch.device(DEVICE).type)  # type: ignore[arg-type]
    learner = Learner(config, world.vllm._core.wanted.model_path, 1.0)
    plan = learner.plan(BUCKET_BYTES, "bfloat16")
    try:
        with (
            contextlib.closing(make_slots(plan, torch.device(DEVICE))) as slots,
            peer(read_versions, DEVICE) as reader,
        ):
            slot = slots.next()
            sums = tuple(slot.fill(bucket, learner.gather(plan, bucket)) for bucket in plan.buckets)
            assert (
                reader.ask(Offer(version=1, source=slot.source(sums), plan=plan, checksums=())) == "verified"
            )
            found = reader.ask("go on")
    finally:
        learner.close()
    assert isinstance(found, dict), found
    for name, tensor in world.weights["random"].items():
        wanted = tensor.detach().bfloat16().view(torch.uint8)
        if name in found:
            assert (found[name] == wanted.numpy()).all(), name
    assert {spec.name for spec in plan.tensors} == set(found)
