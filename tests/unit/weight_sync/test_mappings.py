"""Kept mappings: the same pages as long as the name leads to the file, and always the bytes that lie there now."""

from __future__ import annotations

import gc
import os
import uuid
from pathlib import Path

import pytest
import torch
from offers import Offers, fill, offer_of, path_of

from asyncrl.weight_sync.errors import ChecksumError, SharedMemoryError, WeightSyncError
from asyncrl.weight_sync.mappings import KEPT, Mappings, is_worth_keeping
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.slots import Slots
from asyncrl.weight_sync.version_bytes import open_version, tensors_of

WEIGHTS = {"a": torch.arange(50_000.0), "b": torch.arange(7.0)}


@pytest.fixture
def offers():
    with Offers(f"test-{uuid.uuid4().hex[:12]}", WEIGHTS) as made:
        yield made


def mapped_names():
    """Of this process's mappings of versions; a name ends in (deleted) when its file is gone."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted(
        line.split(maxsplit=5)[5] for line in lines if "/dev/shm/asyncrl-test-" in line and " r--s" in line
    )


def test_files_that_take_turns_are_mapped_once_each_and_show_what_was_written_last(offers):
    mappings = Mappings()
    seen = set()
    for version in range(6):
        weights = {name: tensor + version for name, tensor in WEIGHTS.items()}
        offer = offers.write(version, weights)
        mapped = mappings.verified(offer)
        seen.add(id(mapped.data))
        first = offer.plan.tensors[0]
        got = torch.frombuffer(
            bytearray(mapped.data[first.offset : first.offset + first.size]), dtype=torch.float32
        )
        assert torch.equal(got, weights["a"])
    assert len(seen) == 2


@pytest.mark.parametrize("private", [False, True])
def test_a_flipped_byte_in_a_kept_mapping_is_found(offers, private):
    mappings = Mappings(private=private)
    offer = offers.write(0, WEIGHTS)
    mappings.verified(offer)
    offers.corrupt(offer)
    with pytest.raises(ChecksumError):
        mappings.verified(offer)


def test_a_file_that_took_the_name_is_mapped_and_the_one_before_let_go():
    plan = make_plan([(name, "float32", tensor.shape) for name, tensor in WEIGHTS.items()], 1 << 20)
    slots = Slots(f"test-{uuid.uuid4().hex[:12]}", plan)
    try:
        mappings = Mappings()
        fill(slots.next(), plan, WEIGHTS)
        before = mappings.verified(offer_of(slots.next(), plan, 0)).inode
        slots.next().retire()
        other = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
        fill(slots.next(), plan, other)
        offer = offer_of(slots.next(), plan, 1)
        assert mappings.verified(offer).inode != before
        gc.collect()
        assert mapped_names() == [path_of(offer)]
        os.unlink(path_of(offer))
        with pytest.raises(SharedMemoryError, match="cannot be opened"):
            mappings.verified(offer)
        gc.collect()
        assert mapped_names() == []
    finally:
        slots.close()


def test_a_reader_keeps_its_pages_when_the_file_is_replaced(offers):
    mappings = Mappings()
    offer = offers.write(0, WEIGHTS)
    mapped = mappings.verified(offer)
    before = bytes(mapped.data)
    os.unlink(path_of(offer))
    with pytest.raises(SharedMemoryError):
        mappings.of(offer)
    assert bytes(mapped.data) == before


def test_what_is_written_to_a_private_mapping_does_not_reach_the_file(offers):
    offer = offers.write(0, WEIGHTS)
    Mappings(private=True).of(offer).data[0:1] = b"\xff"
    Mappings().verified(offer)


def test_a_worker_reads_each_version_from_the_file_that_was_verified_and_no_other(offers):
    engine = Mappings()
    for version in range(5):
        weights = {name: tensor + version for name, tensor in WEIGHTS.items()}
        offer = offers.write(version, weights)
        inode = engine.verified(offer).inode
        opened = open_version(offer, inode, torch.device("cpu"))
        assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors_of(offer, opened))
        opened.verify()
        opened.close()
        with pytest.raises(WeightSyncError, match="not the file that was verified"):
            open_version(offer, inode + 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("version_bytes", "files", "room_bytes", "kept"),
    [
        (10, 1, 40, True),
        (10, 1, 39, False),
        (10, 2, 40, True),
        (10, 3, 59, False),
        (10, 3, 60, True),
        (0, KEPT, 0, True),
        (0, KEPT + 1, 0, False),
    ],
)
def test_mappings_are_kept_where_two_learners_files_have_room(version_bytes, files, room_bytes, kept):
    assert is_worth_keeping(version_bytes, files, room_bytes) is kept
