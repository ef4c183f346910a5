"""Memory for one version on an engine's host, which every process of the engine can map by a name, and which cannot be left
over: it is a memfd of the process that fetched the version, named /proc/PID/fd/N.

Invariants: of full size from its making, so that a host without room is an error there; readable by this user alone; gone
when the process ends, or with `close` and the last mapping. Called by what fetches versions.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from asyncrl.weight_sync.errors import SharedMemoryError


class MemoryFile:
    """`size` bytes, mapped for writing; all 0 at first."""

    def __init__(self, name: str, size: int) -> None:
        """`name` is shown by tools that list memory. Raises `SharedMemoryError`."""
        self.size = size
        self._descriptor = os.memfd_create(f"asyncrl-{name}", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._descriptor, 0, max(size, 1))
            self.map = mmap.mmap(self._descriptor, max(size, 1))
        except OSError as error:
            os.close(self._descriptor)
            raise SharedMemoryError(
                f"{name}: expected room for {size} bytes of memory for a version of the weights ({error.strerror})"
            ) from error

    @property
    def path(self) -> Path:
        """Its name for every process of this user on this host."""
        return Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def abandon(self) -> None:
        """Give up the name; the memory goes with the last view of `map`, which somebody may be writing to still."""
        os.close(self._descriptor)

    def close(self) -> None:
        """Give the memory back once nobody maps it. May be called twice. Raises `BufferError` while a view of `map` lives."""
        if not self.map.closed:
            self.map.close()
            os.close(self._descriptor)
