"""The `shm` transport as the learner sees it: files in shared memory that take turns, two or more.

Invariants
----------
- The files get all their memory when they are created, so that a full /dev/shm is an error at start and not a bus
  error in a copy; they are reused, as the first touch of a page costs several times a copy.
- The file of the last committed version is not written while the next one is: the turn passes on at `committed`. So with N
  files a version can be offered, or read, until the N-th after it is begun.
- A file that an unaccounted engine may still read is never written again: `Slot.retire` marks it, and when its turn to be
  written comes, it is unlinked and a new one takes its name. Until then its bytes can still be offered.
- `close` unlinks all. A killed learner leaves them; `shm.remove_leftovers` clears them away.
Called by the publisher, from one thread.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from asyncrl.weight_sync.checksum import bucket_checksum
from asyncrl.weight_sync.errors import SharedMemoryError
from asyncrl.weight_sync.pieces import put_summed
from asyncrl.weight_sync.plan import Bucket, Plan
from asyncrl.weight_sync.shm import FOLDER, SLOTS, slot_path


class Slot:
    """One file, mapped for writing."""

    def __init__(self, path: Path, plan: Plan) -> None:
        """Room for a version of `plan`. Replaces a file that a killed learner left. Raises `SharedMemoryError`."""
        self.path = path
        self._plan = plan
        size = plan.total_bytes
        self.retired = False
        self._map = _create(path, size)
        self._bytes = (
            torch.frombuffer(self._map, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        )

    def fill(self, bucket: Bucket, pieces: Sequence[torch.Tensor]) -> int:
        """Write `pieces`, one tensor for each of the bucket's, and return its checksum. Raises `WeightSyncError` for one that
        is missing or does not fit."""
        return put_summed(self._bytes, self._plan, bucket, pieces)

    @property
    def view(self) -> memoryview:
        """The version's bytes, to be read."""
        return memoryview(self._map)[: self._plan.total_bytes].toreadonly()

    def checksum(self, bucket: Bucket) -> int:
        """Of the bytes as they are now in shared memory."""
        return bucket_checksum(self._map, bucket)

    def retire(self) -> None:
        """An engine that does not answer may read this file for long: leave it the bytes."""
        self.retired = True

    def close(self) -> None:
        """Unlink the file; engines that map it keep their bytes. May be called twice."""
        if self._map.closed:
            return
        self.path.unlink(missing_ok=True)
        # The tensor exports the mapping's buffer, which cannot be closed before the tensor is gone.
        self._bytes = torch.empty(0, dtype=torch.uint8)
        # A view that is on its way to an engine keeps the memory, which then goes with it.
        with contextlib.suppress(BufferError):
            self._map.close()


class Slots:
    """The files of one learner."""

    def __init__(self, run_id: str, plan: Plan, count: int = SLOTS) -> None:
        """Takes `count * plan.total_bytes` of shared memory, `count` 2 or more. Raises `SharedMemoryError`."""
        self._plan = plan
        self._slots: list[Slot] = []
        self._next = 0
        try:
            for slot in range(count):
                self._slots.append(Slot(slot_path(run_id, slot), plan))
        except BaseException:
            self.close()
            raise

    @property
    def oldest(self) -> Slot:
        """The file of the version that `next()` is written over, or is put away for."""
        return self._slots[self._next]

    def next(self) -> Slot:
        """The file to write the next version into. Raises `SharedMemoryError` if a retired one cannot be replaced."""
        slot = self._slots[self._next]
        if slot.retired:
            slot.close()
            self._slots[self._next] = Slot(slot.path, self._plan)
        return self._slots[self._next]

    def committed(self) -> None:
        """The version in `next()` is live: leave its file alone while the next version is written."""
        self._next = (self._next + 1) % len(self._slots)

    def close(self) -> None:
        """Unlink the files. May be called twice."""
        while self._slots:
            self._slots.pop().close()


def _create(path: Path, size: int) -> mmap.mmap:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        path.unlink(missing_ok=True)
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise SharedMemoryError(f"{path} cannot be created: {error.strerror}") from error
    try:
        os.posix_fallocate(descriptor, 0, max(size, 1))
        return mmap.mmap(descriptor, max(size, 1))
    except OSError as error:
        path.unlink(missing_ok=True)
        free = os.statvfs(FOLDER)
        raise SharedMemoryError(
            f"{path}: expected room for {size} bytes (needed {SLOTS} times, or max_lag_versions times if that is more), {FOLDER} has "
            f"{free.f_bavail * free.f_frsize} bytes free ({error.strerror}). Enlarge it (docker: --shm-size), or "
            f"remove leftovers of dead runs: {FOLDER}/asyncrl-*.weights"
        ) from error
    finally:
        os.close(descriptor)
