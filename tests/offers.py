"""Versions in shared memory for tests of engines: what the learner's publisher does, without sockets."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch

from asyncrl.weight_sync.plan import Adapter, Plan, make_plan
from asyncrl.weight_sync.slots import Slots
from asyncrl.weight_sync.wire import Offer


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
        checksums = []
        for bucket in self.plan.buckets:
            for spec in bucket.tensors:
                slot.write(spec, weights[spec.name])
            checksums.append(slot.checksum(bucket))
        self._slots.committed()
        return Offer(
            version=version,
            transport="shm",
            location=str(slot.path),
            plan=self.plan,
            checksums=tuple(checksums),
        )

    def corrupt(self, offer: Offer) -> None:
        """Change one byte of the last tensor of `offer`, as a stray writer would."""
        with open(offer.location, "r+b") as file:
            file.seek(offer.plan.buckets[-1].tensors[-1].offset)
            (byte,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte ^ 0xFF]))
