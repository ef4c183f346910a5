"""Host memory in the place of a GPU's, where there is none: another process opens it by its handle, as CUDA's IPC does it.

Everything above `cuda_memory` then runs as it does on a GPU: slots, sums, offers, and the loading in a vLLM worker.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator

import torch

from asyncrl.weight_sync.memory_file import MemoryFile
from asyncrl.weight_sync.wire import DeviceMemory

UUID = "host"


class HostMemory:
    """A `device_memory.Memory`."""

    device = UUID

    def __init__(self, size: int) -> None:
        self._file = MemoryFile("test-device", size)
        self.data = torch.frombuffer(self._file.map, dtype=torch.uint8)
        self.handle = str(self._file.path).encode()

    def free(self) -> None:
        self.data = torch.empty(0, dtype=torch.uint8)
        self._file.close()


@contextlib.contextmanager
def open_host_memory(source: DeviceMemory, device: torch.device) -> Iterator[torch.Tensor]:
    """A `device_version.OpenMemory`. Gone at the block's end, so that a view that outlives it is a fault and not a stale value."""
    descriptor = os.open(source.handle.decode(), os.O_RDWR)
    try:
        opened = mmap.mmap(descriptor, source.allocation_bytes)
    finally:
        os.close(descriptor)
    tensor = torch.frombuffer(opened, dtype=torch.uint8)
    yield tensor
    del tensor
