"""Versions in a GPU's memory, on host memory in its place: both sides but for the driver's calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec
import pytest
import torch
from host_memory import UUID, HostMemory, open_host_memory

from asyncrl.weight_sync import wire
from asyncrl.weight_sync.cuda_memory import Allocation, opened
from asyncrl.weight_sync.device_memory import DeviceSlot, DeviceSlots, slots_on, slots_that_fit
from asyncrl.weight_sync.device_version import DeviceVersion, open_memory
from asyncrl.weight_sync.errors import ChecksumError, DeviceMemoryError, WeightSyncError
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import Plan, make_plan
from asyncrl.weight_sync.version_bytes import open_version, tensors_of
from asyncrl.weight_sync.wire import Offer

CPU = torch.device("cpu")
WEIGHTS = {
    "a": torch.arange(60, dtype=torch.float32).reshape(3, 20),
    "b": torch.randn(7, generator=torch.Generator().manual_seed(0)),
    "c": torch.arange(9, dtype=torch.int64),
}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def plan(bucket_bytes: int = 128) -> Plan:
    return make_plan([("a", "bfloat16", (3, 20)), ("b", "float32", (7,)), ("c", "int64", (9,))], bucket_bytes)


@pytest.fixture
def slots() -> Iterator[DeviceSlots]:
    with contextlib.closing(DeviceSlots(plan(), HostMemory, 2)) as made:
        yield made


def fill(slot: DeviceSlot, version: int, add: int = 0) -> Offer:
    laid, weights = plan(), {name: tensor + add for name, tensor in WEIGHTS.items()}
    sums = tuple(slot.fill(bucket, cut(laid, bucket, weights)) for bucket in laid.buckets)
    return Offer(version=version, source=slot.source(sums), plan=laid, checksums=())


def test_a_version_comes_over_whole(slots: DeviceSlots) -> None:
    offer = fill(slots.next(), 1)
    assert len(offer.plan.buckets) > 1
    # As it travels to the engine, and on to vLLM's worker.
    travelled = msgspec.msgpack.Decoder(Offer).decode(wire.encode(offer))
    assert msgspec.convert(msgspec.to_builtins(travelled), Offer) == offer
    with contextlib.closing(DeviceVersion(travelled, CPU, open_host_memory)) as version:
        version.verify()
        found = {name: tensor.clone() for name, tensor in tensors_of(travelled, version)}
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], WEIGHTS[name].to(found[name].dtype)) for name in found)
    assert found["a"].dtype == torch.bfloat16


def test_the_last_version_stays_while_the_next_is_written(slots: DeviceSlots) -> None:
    first = fill(slots.next(), 1)
    slots.committed()
    second = fill(slots.next(), 2, add=1)
    for offer, add in ((first, 0), (second, 1)):
        with contextlib.closing(DeviceVersion(offer, CPU, open_host_memory)) as version:
            version.verify()
            assert dict(tensors_of(offer, version))["c"].tolist() == [x + add for x in range(9)]


def test_one_allocation_holds_the_newest_only() -> None:
    with contextlib.closing(DeviceSlots(plan(), HostMemory, 1)) as slots:
        first = fill(slots.next(), 1)
        slots.committed()
        fill(slots.next(), 2, add=1)
        with (
            contextlib.closing(DeviceVersion(first, CPU, open_host_memory)) as version,
            pytest.raises(ChecksumError, match=f"version 1, bucket 0 in memory of GPU {UUID}"),
        ):
            version.verify()


@pytest.mark.parametrize("bucket", range(len(plan().buckets)))
def test_a_flipped_byte_is_caught_in_its_bucket(slots: DeviceSlots, bucket: int) -> None:
    offer = fill(slots.next(), 3)
    run = offer.plan.buckets[bucket].runs[-1]
    with contextlib.closing(DeviceVersion(offer, CPU, open_host_memory)) as version:
        version.data[run.offset + run.size - 1] ^= 0x40
        with pytest.raises(ChecksumError) as caught:
            version.verify()
    assert (caught.value.version, caught.value.bucket) == (3, bucket)
    assert slots.next().checksum(offer.plan.buckets[bucket]) == caught.value.got


def test_bytes_that_change_after_they_were_verified_are_caught_after_they_were_read(
    slots: DeviceSlots,
) -> None:
    """The schedule: an engine verifies, is given up, and loads while the learner writes a later version there."""
    slot = slots.next()
    late = fill(slot, 1)
    with contextlib.closing(DeviceVersion(late, CPU, open_host_memory)) as version:
        version.verify()
        slot.retire()
        fill(slot, 3, add=5)
        torn = dict(tensors_of(late, version))
        assert not torch.equal(torn["c"], WEIGHTS["c"])
        with pytest.raises(ChecksumError):
            version.verify()


def test_an_offer_that_does_not_add_up_is_refused(slots: DeviceSlots) -> None:
    offer = fill(slots.next(), 1)
    assert isinstance(offer.source, wire.DeviceMemory)
    fewer = msgspec.structs.replace(offer.source, sums=offer.source.sums[1:])
    short = msgspec.structs.replace(offer, source=fewer)
    small = msgspec.structs.replace(offer, source=msgspec.structs.replace(offer.source, allocation_bytes=64))
    other = msgspec.structs.replace(offer, source=wire.SharedFile(path="/dev/shm/x"))
    for wrong in (short, small, other):
        with pytest.raises(DeviceMemoryError, match="version 1: expected"):
            DeviceVersion(wrong, CPU, open_host_memory)


def test_pieces_that_do_not_fit_are_refused(slots: DeviceSlots) -> None:
    laid = plan()
    pieces = cut(laid, laid.buckets[0], WEIGHTS)
    with pytest.raises(WeightSyncError, match="expected 1 pieces, got 2"):
        slots.next().fill(laid.buckets[0], [*pieces, *pieces])


def test_several_senders_are_refused() -> None:
    shares = {"a": ((0, 64), (64, 64))}
    with pytest.raises(DeviceMemoryError, match="2 senders: expected one"):
        DeviceSlots(make_plan([("a", "float32", (128,))], 1024, shares=shares), HostMemory, 2)


def test_what_was_taken_is_given_back_when_the_second_has_no_room() -> None:
    taken: list[HostMemory] = []

    def allocate(size: int) -> HostMemory:
        if taken:
            raise DeviceMemoryError("full")
        taken.append(HostMemory(size))
        return taken[0]

    with pytest.raises(DeviceMemoryError, match="full"):
        DeviceSlots(plan(), allocate, 2)
    assert taken[0].data.numel() == 0


def test_closing_twice() -> None:
    slots = DeviceSlots(plan(), HostMemory, 2)
    slots.close()
    slots.close()


@pytest.mark.parametrize(
    ("free", "version", "expected"), [(400, 100, 2), (399, 100, 1), (50, 100, 1), (0, 1, 1)]
)
def test_two_allocations_leave_as_much_again(free: int, version: int, expected: int) -> None:
    assert slots_that_fit(free, version) == expected


@no_gpu
def test_without_a_gpu_it_says_so(slots: DeviceSlots) -> None:
    gpu = torch.device("cuda", 0)
    offer = fill(slots.next(), 1)
    for attempt in (
        lambda: slots_on(gpu, plan()),
        lambda: Allocation(64, gpu),
        lambda: open_version(offer, -1, gpu),
        lambda: open_memory(slots.next().source([]), gpu),
    ):
        with pytest.raises(DeviceMemoryError, match="no CUDA device here"):
            attempt()


@pytest.mark.parametrize(("handle", "size"), [(b"short", 64), (bytes(64), 0)])
def test_no_handle_at_all(handle: bytes, size: int) -> None:
    with (
        pytest.raises(DeviceMemoryError, match="expected a handle of 64 bytes"),
        opened(handle, size, torch.device("cuda", 0)),
    ):
        pass
