"""Shared memory: what is written is what is mapped, and nothing else passes."""

from __future__ import annotations

import gc
import stat
import subprocess
import sys
import uuid

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offers import fill, offer_of, path_of

from asyncrl.weight_sync.errors import ChecksumError, SharedMemoryError, WeightSyncError
from asyncrl.weight_sync.pieces import cut, whole
from asyncrl.weight_sync.plan import DTYPE_BYTES, Plan, make_plan
from asyncrl.weight_sync.shm import map_version, remove_leftovers, slot_path
from asyncrl.weight_sync.slots import Slot, Slots
from asyncrl.weight_sync.wire import Offer, Served, SharedFile, decode_for_engine, encode


@pytest.fixture
def run_id():
    name = f"test-{uuid.uuid4().hex[:12]}"
    yield name
    assert remove_leftovers(name) == [], "a test left its shared memory behind"


def written(slot: Slot, plan: Plan, weights: dict[str, torch.Tensor]) -> Offer:
    fill(slot, plan, weights)
    return offer_of(slot, plan, 1)


def read(offer: Offer) -> dict[str, torch.Tensor]:
    mapped = map_version(offer)
    version = torch.frombuffer(bytearray(bytes(mapped)), dtype=torch.uint8)
    mapped.close()
    return {spec.name: whole(version, spec) for spec in offer.plan.tensors}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 9), max_size=3)),
        min_size=1,
        max_size=8,
    ),
    st.integers(64, 2000),
)
def test_every_dtype_and_shape_comes_back(tensors, bucket_bytes):
    torch.manual_seed(0)
    specs = [(f"w{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(tensors)]
    weights = {name: (torch.randn(shape) * 3).to(getattr(torch, dtype)) for name, dtype, shape in specs}
    plan = make_plan(specs, bucket_bytes)
    slots = Slots(f"test-{uuid.uuid4().hex[:12]}", plan)
    try:
        back = read(written(slots.next(), plan, weights))
    finally:
        slots.close()
    for name, tensor in weights.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        # Flat: an empty tensor's strides may be 0, which no view of another dtype takes.
        assert torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


PLAN = make_plan([("w", "bfloat16", (300, 4)), ("b", "float32", (7,))], 1024)


def test_casts_to_the_wire_dtype_and_takes_any_strides(run_id):
    master = torch.randn(4, 300).t()
    slots = Slots(run_id, PLAN)
    back = read(written(slots.next(), PLAN, {"w": master, "b": torch.ones(7, requires_grad=True)}))
    slots.close()
    assert torch.equal(back["w"], master.to(torch.bfloat16))
    assert torch.equal(back["b"], torch.ones(7))


def test_refuses_tensors_that_do_not_fit(run_id):
    slots = Slots(run_id, PLAN)
    bucket = PLAN.buckets[0]
    (piece,) = bucket.pieces
    with pytest.raises(WeightSyncError, match=rf"'w': expected {piece.count} elements.* got shape \(4,\)"):
        slots.next().fill(bucket, [torch.zeros(4)])
    with pytest.raises(WeightSyncError, match=r"'w': expected dtype torch.bfloat16, got torch.int64"):
        slots.next().fill(bucket, [torch.zeros(piece.count, dtype=torch.int64)])
    with pytest.raises(WeightSyncError, match=r"'w': expected shape \(300, 4\), got \(1, 4\)"):
        cut(PLAN, bucket, {"w": torch.zeros(1, 4), "b": torch.zeros(7)})
    slots.close()


def test_a_flipped_byte_names_version_bucket_and_sums(run_id):
    slots = Slots(run_id, PLAN)
    offer = written(slots.next(), PLAN, {"w": torch.randn(300, 4), "b": torch.randn(7)})
    last = PLAN.buckets[-1]
    with open(path_of(offer), "r+b") as file:
        file.seek(last.runs[0].offset)
        byte = file.read(1)[0]
        file.seek(last.runs[0].offset)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ChecksumError) as caught:
        map_version(offer)
    slots.close()
    error = caught.value
    assert (error.version, error.bucket, error.expected) == (1, last.index, offer.checksums[last.index])
    assert error.got != error.expected
    assert f"{error.expected:#018x}" in str(error) and f"{error.got:#018x}" in str(error)


def test_slots_alternate_at_commit_and_keep_their_memory(run_id):
    slots = Slots(run_id, PLAN)
    first = slots.next()
    assert slots.next() is first
    inode = first.path.stat().st_ino
    slots.committed()
    assert slots.next() is not first
    slots.committed()
    assert slots.next() is first and first.path.stat().st_ino == inode
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o600
    assert first.path.stat().st_blocks * 512 >= PLAN.total_bytes
    slots.close()
    slots.close()
    assert not first.path.exists()


def test_a_retired_slot_leaves_a_slow_reader_its_bytes(run_id):
    slots = Slots(run_id, PLAN)
    slot = slots.next()
    offer = written(slot, PLAN, {"w": torch.full((300, 4), 1.0), "b": torch.ones(7)})
    slow = map_version(offer)
    before = bytes(slow)
    slots.committed()
    slot.retire()
    assert read(offer)["w"].max() == 1.0, "engines that come later can still have it"
    slots.committed()
    assert bytes(slow) == before
    assert slots.next() is not slot and slots.next().path == slot.path
    assert slots.next() is slots.next(), "one new file is enough"
    written(slots.next(), PLAN, {"w": torch.full((300, 4), 2.0), "b": torch.zeros(7)})
    assert bytes(slow) == before
    slow.close()
    slots.close()


def test_replaces_what_a_killed_learner_left(run_id):
    code = (
        "import os, sys\nfrom asyncrl.weight_sync.plan import make_plan\nfrom asyncrl.weight_sync.slots import Slots\n"
        f"slots = Slots({run_id!r}, make_plan([('w', 'float32', (9,))], 64))\nos._exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 1
    assert slot_path(run_id, 0).exists()
    slots = Slots(run_id, PLAN)
    assert slot_path(run_id, 0).stat().st_size == PLAN.total_bytes
    slots.close()
    slot_path(run_id, 1).write_bytes(b"left")
    assert remove_leftovers(run_id) == [slot_path(run_id, 1)]


def test_the_offer_survives_the_wire(run_id):
    slots = Slots(run_id, PLAN)
    offer = written(slots.next(), PLAN, {"w": torch.randn(300, 4), "b": torch.randn(7)})
    from asyncrl.weight_sync.wire import Propose

    assert decode_for_engine(encode(Propose(attempt=1, offer=offer, timeout_s=1.0))).offer == offer
    slots.close()


def test_refuses_offers_that_are_not_to_be_trusted(run_id, tmp_path):
    slots = Slots(run_id, PLAN)
    offer = offer_of(slots.next(), PLAN, 1)
    change = msgspec.structs.replace
    elsewhere = tmp_path / "weights"
    elsewhere.write_bytes(b"\0" * PLAN.total_bytes)
    link = slot_path(run_id + "-link", 0)
    link.symlink_to(elsewhere)
    larger = make_plan([("w", "float32", (100_000,))], 10**6)
    try:
        for bad, message in [
            (change(offer, source=SharedFile(path=str(elsewhere))), "expected a file in /dev/shm"),
            (change(offer, source=Served(endpoint="tcp://x")), "got Served"),
            (change(offer, source=SharedFile(path=str(link))), "cannot be opened"),
            (change(offer, source=SharedFile(path="/dev/shm/asyncrl-nothing.weights")), "one host"),
            (change(offer, checksums=offer.checksums[:-1]), "one checksum for each"),
            (
                change(offer, plan=larger, checksums=(0,)),
                f"has {PLAN.total_bytes} bytes, expected at least 400000",
            ),
        ]:
            with pytest.raises(SharedMemoryError, match=message):
                map_version(bad)
    finally:
        link.unlink()
        slots.close()


def test_refuses_more_than_there_is_and_leaves_nothing(run_id):
    enormous = msgspec.structs.replace(PLAN, total_bytes=2**46)
    with pytest.raises(SharedMemoryError, match="bytes free"):
        Slots(run_id, enormous)
    gc.collect()


def test_a_run_id_cannot_leave_its_folder():
    with pytest.raises(SharedMemoryError, match="run id"):
        slot_path("../../etc/passwd", 0)
