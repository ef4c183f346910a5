"""A staged version is tied to the file that was verified, not to its name."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest
import torch
from offers import fill, offer_of, path_of

from asyncrl.generators.staged import verified
from asyncrl.weight_sync.errors import SharedMemoryError
from asyncrl.weight_sync.mappings import Mappings
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.slots import Slots
from asyncrl.weight_sync.wire import Offer


@pytest.fixture
def slots() -> Iterator[Slots]:
    made = Slots(f"staged-{uuid.uuid4().hex[:8]}", make_plan([("w", "float32", (16,))], 1024))
    yield made
    made.close()


def offer(slots: Slots) -> Offer:
    plan = make_plan([("w", "float32", (16,))], 1024)
    fill(slots.next(), plan, {"w": torch.arange(16.0)})
    return offer_of(slots.next(), plan, 3)


def test_the_same_file_passes(slots: Slots) -> None:
    verified(offer(slots), Mappings()).check()


def test_a_file_put_in_its_place_does_not(slots: Slots) -> None:
    staged = verified(offer(slots), Mappings())
    slots.next().retire()  # as a publisher does that gave this engine up
    staged.check()  # until the file is wanted again
    slots.next()
    with pytest.raises(SharedMemoryError, match="replaced"):
        staged.check()


def test_a_file_that_is_gone_does_not(slots: Slots) -> None:
    made = offer(slots)
    mappings = Mappings()
    staged = verified(made, mappings)
    os.unlink(path_of(made))
    with pytest.raises(SharedMemoryError, match="replaced"):
        staged.check()
    with pytest.raises(SharedMemoryError):
        verified(made, mappings)  # though it has the bytes still
