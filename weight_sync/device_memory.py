"""The `ipc` transport as the learner sees it: versions in memory of its own GPU, which engines on the same GPU open.

    gather -> fill: one copy on the device, one pass for the sum -> wire.DeviceMemory -> `device_version` in the engine's worker

Invariants
----------
- Two allocations take turns, as the files of `slots` do, where `slots_that_fit` finds room for both beside the learner's and
  the engines' memory. With one, the last version's bytes are gone when the next is begun: an engine that joins meanwhile waits
  for the commit. Which it is, the log says once.
- `fill` returns when the bucket's bytes are complete on the device, so an offer needs no event.
- An allocation is written again when its turn comes, also while an engine that was given up may still read it: CUDA has no
  unlinking, and engines verify again after they have loaded (`device_version`), so such a read ends that engine.
- `close` frees the memory: at the learner's end, when no engine is told to take a version any more.
Called by the publisher, from one thread at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch

from asyncrl.weight_sync.cuda_memory import Allocation
from asyncrl.weight_sync.device_sum import bucket_sum
from asyncrl.weight_sync.errors import DeviceMemoryError
from asyncrl.weight_sync.pieces import put_all
from asyncrl.weight_sync.plan import Bucket, Plan
from asyncrl.weight_sync.wire import DeviceMemory

logger = logging.getLogger(__name__)

_VERSIONS_FREE: Final = 4
"""Versions' worth of free memory from which on two allocations are taken: as much again stays free for activations and engines."""


class Memory(Protocol):
    """Memory that another process can open: see `cuda_memory.Allocation`."""

    data: torch.Tensor
    handle: bytes
    device: str

    def free(self) -> None: ...


Allocate = Callable[[int], Memory]


class DeviceSlot:
    """One allocation, which holds one version."""

    retired = False

    def __init__(self, memory: Memory, plan: Plan) -> None:
        self._memory = memory
        self._plan = plan

    def fill(self, bucket: Bucket, pieces: Sequence[torch.Tensor]) -> int:
        """Write `pieces`, one tensor for each of the bucket's, and return its sum. Raises `WeightSyncError` for one that is
        missing or does not fit."""
        put_all(self._memory.data, self._plan, bucket, pieces)
        return self.checksum(bucket)

    def checksum(self, bucket: Bucket) -> int:
        """Of the bytes as they are now."""
        return bucket_sum(self._memory.data, bucket)

    @property
    def path(self) -> str:
        """What errors call it."""
        return f"memory of GPU {self._memory.device}"

    def source(self, sums: Sequence[int]) -> DeviceMemory:
        """Where engines find the bytes, of which `fill` returned `sums`."""
        return DeviceMemory(
            device=self._memory.device,
            handle=self._memory.handle,
            allocation_bytes=self._plan.total_bytes,
            sums=tuple(sums),
        )

    def retire(self) -> None:
        """Changes nothing: see the invariants."""

    def close(self) -> None:
        """Give the memory back. May be called twice."""
        self._memory.free()


class DeviceSlots:
    """The allocations of one learner."""

    def __init__(self, plan: Plan, allocate: Allocate, count: int) -> None:
        """Takes `count` times `plan.total_bytes`, 1 or 2. Raises `DeviceMemoryError` where there is no room."""
        if plan.senders != 1:
            raise DeviceMemoryError(
                f"a plan of {plan.senders} senders: expected one, as the versions are in the memory of rank 0's GPU. "
                f'Set weight_sync.senders = "one", or another weight_sync.transport'
            )
        self._slots: list[DeviceSlot] = []
        self._next = 0
        try:
            for _ in range(count):
                self._slots.append(DeviceSlot(allocate(plan.total_bytes), plan))
        except BaseException:
            self.close()
            raise
        logger.info("versions in device memory slots=%d bytes_each=%d", count, plan.total_bytes)

    @property
    def count(self) -> int:
        return len(self._slots)

    @property
    def oldest(self) -> DeviceSlot:
        """That which `next()` returns."""
        return self._slots[self._next]

    def next(self) -> DeviceSlot:
        """The allocation to write the next version into: with one, that of the last committed version."""
        return self._slots[self._next]

    def committed(self) -> None:
        """The version in `next()` is live."""
        self._next = (self._next + 1) % len(self._slots)

    def close(self) -> None:
        """Free all. May be called twice."""
        while self._slots:
            self._slots.pop().close()


def slots_on(device: torch.device, plan: Plan) -> DeviceSlots:
    """As many as fit on a GPU. Raises `DeviceMemoryError` where there is none, or no room."""
    if not torch.cuda.is_available():
        raise DeviceMemoryError(f"{device}: no CUDA device here (torch.cuda.is_available() is false)")
    free, _ = torch.cuda.mem_get_info(device)
    return DeviceSlots(plan, lambda size: Allocation(size, device), slots_that_fit(free, plan.total_bytes))


def slots_that_fit(free_bytes: int, version_bytes: int) -> int:
    """1 or 2, by the memory that is free before the first is taken."""
    return 2 if free_bytes >= _VERSIONS_FREE * version_bytes else 1
