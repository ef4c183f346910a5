"""The `ipc` transport as an engine's worker sees it: a version in memory of its own GPU, verified before and after it is loaded.

Invariants
----------
- `data` may be read until `close`, and are not this process's: whoever keeps a tensor copies it. vLLM keeps views of layers
  that it could not complete until the end of its reload, so `close` comes after that.
- The learner gives up an engine that is late, and writes the memory again. Reading it is therefore like reading under a
  sequence lock: verify, read, verify again. A version that passes both was never torn while it was read.
Called by `vllm_worker`, in the process that owns the engine's CUDA context.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from asyncrl.weight_sync import cuda_memory
from asyncrl.weight_sync.device_sum import bucket_sum
from asyncrl.weight_sync.errors import ChecksumError, DeviceMemoryError
from asyncrl.weight_sync.wire import DeviceMemory, Offer

OpenMemory = Callable[[DeviceMemory, torch.device], contextlib.AbstractContextManager[torch.Tensor]]


def open_memory(
    source: DeviceMemory, device: torch.device
) -> contextlib.AbstractContextManager[torch.Tensor]:
    """The bytes of `source` on this process's `device`. Raises `DeviceMemoryError` if that is another GPU, or the handle leads
    nowhere."""
    here = cuda_memory.device_uuid(device)
    if here != source.device:
        raise DeviceMemoryError(
            f"the version lies in memory of GPU {source.device}, this worker computes on GPU {here}: expected one GPU. Let "
            f'weight_sync.transport be "auto" or "shm"'
        )
    return cuda_memory.opened(source.handle, source.allocation_bytes, device)


class DeviceVersion:
    """The bytes of one offer, opened."""

    def __init__(self, offer: Offer, device: torch.device, open_memory: OpenMemory = open_memory) -> None:
        """Raises `DeviceMemoryError` if the offer is none of this GPU's memory, or does not add up."""
        source = offer.source
        if not isinstance(source, DeviceMemory):
            raise DeviceMemoryError(f"version {offer.version}: expected device memory, got {source}")
        if source.allocation_bytes < offer.plan.total_bytes or len(source.sums) != len(offer.plan.buckets):
            raise DeviceMemoryError(
                f"version {offer.version}: expected {offer.plan.total_bytes} bytes and {len(offer.plan.buckets)} sums by the "
                f"plan, got {source.allocation_bytes} and {len(source.sums)}"
            )
        self._offer, self._sums = offer, source.sums
        self._where = f"memory of GPU {source.device}"
        self._stack = contextlib.ExitStack()
        self.data = self._stack.enter_context(open_memory(source, device))
        """uint8, at least [total_bytes]."""

    def verify(self) -> None:
        """One pass over the bytes, on the device. Raises `ChecksumError` for the first bucket that is not what was written."""
        for bucket, expected in zip(self._offer.plan.buckets, self._sums, strict=True):
            got = bucket_sum(self.data, bucket)
            if got != expected:
                raise ChecksumError(self._offer.version, bucket.index, expected, got, self._where)

    def close(self) -> None:
        """Wait for the device, and leave the memory to the learner. May be called twice."""
        self.data = torch.empty(0, dtype=torch.uint8)
        self._stack.close()
