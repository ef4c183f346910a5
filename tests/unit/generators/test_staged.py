"""A staged version is tied to the file that was verified, not to its name."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest
import torch

from asyncrl.generators.staged import verified
from asyncrl.weight_sync.errors import SharedMemoryError
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.slots import Slots
from asyncrl.weight_sync.wire import Offer


@pytest.fixture
def slots() -> Iterator[Slots]:
    made = Slots(f"staged-{uuid.uuid4().hex[:8]}", make_plan([("w", "float32", (16,))], 1024))
    yield made
    made.close()


def offer_of(slots: Slots) -> Offer:
    plan = make_plan([("w", "float32", (16,))], 1024)
    slot = slots.next()
    slot.write(plan.buckets[0].tensors[0], torch.arange(16.0))
    sums = tuple(slot.checksum(bucket) for bucket in plan.buckets)
    return Offer(version=3, transport="shm", location=str(slot.path), plan=plan, checksums=sums)


def test_the_same_file_passes(slots: Slots) -> None:
    verified(offer_of(slots)).check()


def test_a_file_put_in_its_place_does_not(slots: Slots) -> None:
    staged = verified(offer_of(slots))
    slots.next().retire()  # as a publisher does that gave this engine up
    staged.check()  # until the file is wanted again
    slots.next()
    with pytest.raises(SharedMemoryError, match="replaced"):
        staged.check()


def test_a_file_that_is_gone_does_not(slots: Slots) -> None:
    offer = offer_of(slots)
    staged = verified(offer)
    os.unlink(offer.location)
    with pytest.raises(SharedMemoryError, match="replaced"):
        staged.check()
    with pytest.raises(SharedMemoryError):
        verified(offer)
