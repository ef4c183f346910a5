"""One version of the weights at the learner: its place in shared memory, and what is known of its bytes. Used by the
publisher, for the version that is being written and for the one that is live.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from asyncrl.weight_sync.checksum import version_digest
from asyncrl.weight_sync.device_memory import DeviceSlot
from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.plan import Bucket, Plan
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.slots import Slot
from asyncrl.weight_sync.wire import DeviceMemory, Offer, Source


class Version:
    """Buckets are written once each, in the plan's order; then it can be offered, as often as engines come."""

    def __init__(self, number: int, slot: Slot | DeviceSlot, plan: Plan) -> None:
        self.number = number
        self.slot = slot
        self.started = time.monotonic()
        self.write_s = 0.0
        self.probe: Probe | None = None
        """What engines that take it are asked."""
        self._plan = plan
        self._checksums: list[int] = []

    def write(self, bucket: Bucket, pieces: Sequence[torch.Tensor]) -> None:
        """See `Publisher.write`."""
        started = time.monotonic()
        index = len(self._checksums)
        if index == len(self._plan.buckets) or bucket != self._plan.buckets[index]:
            raise WeightSyncError(
                f"version {self.number}: bucket {bucket.index} out of order, expected bucket {index} of "
                f"{len(self._plan.buckets)} of the publisher's plan"
            )
        self._checksums.append(self.slot.fill(bucket, pieces))
        self.write_s += time.monotonic() - started

    def complete(self, checksums: Mapping[int, int]) -> None:
        """Take over from the other ranks what they wrote of it, after this one's part: bucket -> checksum."""
        missing = self._plan.buckets[len(self._checksums) :]
        self._checksums += [checksums[each.index] for each in missing if each.index in checksums]

    def offer(self, source: Source) -> Offer:
        """Of these bytes, to be had from `source`. Raises `WeightSyncError` if buckets are missing."""
        self.check_complete()
        checksums = () if isinstance(source, DeviceMemory) else tuple(self._checksums)
        return Offer(version=self.number, source=source, plan=self._plan, checksums=checksums)

    @property
    def checksums(self) -> tuple[int, ...]:
        """Of each bucket that is written."""
        return tuple(self._checksums)

    @property
    def digest(self) -> str:
        """Of its bytes as they were written."""
        return version_digest(self._checksums)

    def check_complete(self) -> None:
        """Raises `WeightSyncError` if buckets are missing."""
        if len(self._checksums) < len(self._plan.buckets):
            raise WeightSyncError(
                f"version {self.number}: expected {len(self._plan.buckets)} buckets, {len(self._checksums)} are written"
            )

    def is_intact(self) -> bool:
        """Whether the bytes in shared memory are those that were written: one pass over them."""
        return [self.slot.checksum(bucket) for bucket in self._plan.buckets] == self._checksums
