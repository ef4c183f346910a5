"""Versions in shared memory for tests of engines: what the learner's publisher does, without sockets."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch

from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import Adapter, Plan, make_plan
from asyncrl.weight_sync.slots import Slot, Slots
from asyncrl.weight_sync.wire import Offer, SharedFile


def offer_of(slot: Slot, plan: Plan, version: int) -> Offer:
    """Of the bytes that `slot` has now."""
    sums = tuple(slot.checksum(bucket) for bucket in plan.buckets)
    return Offer(version=version, source=SharedFile(path=str(slot.path)), plan=plan, checksums=sums)


def fill(slot: Slot, plan: Plan, weights: Mapping[str, torch.Tensor]) -> None:
    for bucket in plan.buckets:
        slot.fill(bucket, cut(plan, bucket, weights))


def path_of(offer: Offer) -> str:
    assert isinstance(offer.source, SharedFile)
    return offer.source.path


class Offers:
    """Two slots of shared memory, as the learner has them; small buckets, so that there are several."""

    def __init__(
        self,
        run_id: str,
        example: Mapping[str, torch.Tensor],
        bucket_bytes: int = 64 * 1024,
        adapter: Adapter | None = None,
    ) -> None:
        self.plan: Plan = make_plan(
            [
                (name, str(tensor.dtype).removeprefix("torch."), tensor.shape)
                for name, tensor in example.items()
            ],
            bucket_bytes,
            adapter,
        )
        self._slots = Slots(run_id, self.plan)

    def __enter__(self) -> Offers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._slots.close()

    def write(self, version: int, weights: Mapping[str, torch.Tensor]) -> Offer:
        """Write `weights` to the slot whose turn it is, and return the offer of them as `version`."""
        slot = self._slots.next()
        fill(slot, self.plan, weights)
        self._slots.committed()
        return offer_of(slot, self.plan, version)

    def corrupt(self, offer: Offer) -> None:
        """Change one byte of the last tensor of `offer`, as a stray writer would."""
        with open(path_of(offer), "r+b") as file:
            file.seek(offer.plan.tensors[-1].offset)
            (byte,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte ^ 0xFF]))
