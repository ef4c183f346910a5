"""A real vLLM engine that takes versions from device memory; on the CPU, with host memory in the place of the GPU's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec
import pytest
from engine_worlds import VLLMWorld
from host_memory import HostMemory

from asyncrl.generators import vllm_settings
from asyncrl.generators.engine import EngineDead
from asyncrl.weight_sync.device_memory import DeviceSlots
from asyncrl.weight_sync.errors import ChecksumError, DeviceMemoryError
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.wire import DeviceMemory, Offer

pytestmark = pytest.mark.vllm
TOKENS = list(range(40))


class DeviceWorld(VLLMWorld):
    """Its versions lie in device memory."""

    def write(self, kind: str, slots: DeviceSlots) -> Offer:
        plan, slot = self.offers.plan, slots.next()
        sums = tuple(slot.fill(bucket, cut(plan, bucket, self.weights[kind])) for bucket in plan.buckets)
        slots.committed()
        return Offer(version=self.version + 1, source=slot.source(sums), plan=plan, checksums=())

    async def take(self, offer: Offer) -> None:
        await self.engine.stage(offer)
        assert await self.engine.apply(offer) > 0
        self.version = offer.version


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceWorld]:
    made = DeviceWorld(tmp_path_factory.mktemp("model"), tied=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_settings, "WORKER_EXTENSION", "host_memory_worker.Extension")
        made.start()
    yield made
    made.close()
    assert made.children() == []


@pytest.fixture
def slots(world: DeviceWorld) -> Iterator[DeviceSlots]:
    with contextlib.closing(DeviceSlots(world.offers.plan, HostMemory, 2)) as made:
        yield made


def test_versions_are_loaded_whole(world: DeviceWorld, slots: DeviceSlots) -> None:
    """The vocabulary is padded, so vLLM reads the embedding at the very end of its reload."""
    assert world.run(world.vllm.gpus()) == ()
    for kind in ("other", "random", "other"):
        world.run(world.take(world.write(kind, slots)))
        got = world.run(world.engine.probe(TOKENS))
        assert got == pytest.approx(world.reference(kind, TOKENS).tolist(), abs=1e-4)
        assert world.engine.stats().version == world.version


def test_a_flipped_byte_leaves_the_old_version_live(world: DeviceWorld, slots: DeviceSlots) -> None:
    world.run(world.take(world.write("random", slots)))
    offer = world.write("other", slots)
    slots.committed()  # back to the allocation that was just written
    slots.next()._memory.data[offer.plan.tensors[-1].offset] ^= 1
    with pytest.raises(ChecksumError) as caught:
        world.run(world.engine.stage(offer))
    assert caught.value.bucket == len(offer.plan.buckets) - 1
    with pytest.raises(RuntimeError, match="applied but not staged"):
        world.run(world.engine.apply(offer))
    answer = world.run(world.answer(world.request(n=5)))
    assert set(answer.versions) == {world.version}
    got = world.run(world.engine.probe(TOKENS))
    assert got == pytest.approx(world.reference("random", TOKENS).tolist(), abs=1e-4)


def test_what_leads_nowhere_is_refused(world: DeviceWorld, slots: DeviceSlots) -> None:
    offer = world.write("other", slots)
    assert isinstance(offer.source, DeviceMemory)
    small = msgspec.structs.replace(offer.source, allocation_bytes=64)
    wrong = msgspec.structs.replace(offer, source=small)
    with pytest.raises(DeviceMemoryError, match=r"expected \d+ bytes and \d+ sums by the plan, got 64"):
        world.run(world.engine.stage(wrong))
    world.run(world.take(offer))


def test_a_version_that_is_overwritten_while_it_loads_ends_the_engine(
    world: DeviceWorld, slots: DeviceSlots
) -> None:
    """The last test of this engine: nobody can say what its weights are."""
    late = world.write("other", slots)
    world.run(world.engine.stage(late))
    slots.committed()
    world.write("random", slots)
    with pytest.raises(EngineDead, match="half written"):
        world.run(world.engine.apply(late))
    with pytest.raises(EngineDead):
        world.run(world.answer(world.request(n=5)))
