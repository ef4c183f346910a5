"""The `shm` transport as the learner sees it: two files in shared memory that take turns.

Invariants
----------
- Both files get all their memory when they are created, so that a full /dev/shm is an error at start and not a bus
  error in a copy; they are reused, as the first touch of a page costs several times a copy.
- The file of the last committed version is not written while the next one is: they alternate at `committed`. So that
  version can be offered to engines that come later, until the one after the next is begun.
- A file that an unaccounted engine may still read is never written again: `Slot.retire` marks it, and when its turn to be
  written comes, it is unlinked and a new one takes its name. Until then its bytes can still be offered.
- `close` unlinks both. A killed learner leaves them; `shm.remove_leftovers` clears them away.
Called by the publisher, from one thread.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from asyncrl.weight_sync.checksum import bucket_checksum
from asyncrl.weight_sync.errors import SharedMemoryError, WeightSyncError
from asyncrl.weight_sync.plan import Bucket, Plan, TensorSpec
from asyncrl.weight_sync.shm import FOLDER, SLOTS, slot_path


class Slot:
    """One file, mapped for writing."""

    def __init__(self, path: Path, size: int) -> None:
        """`size` in bytes. Replaces a file that a killed learner left. Raises `SharedMemoryError`."""
        self.path = path
        self.retired = False
        self._map = _create(path, size)
        self._bytes = (
            torch.frombuffer(self._map, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        )

    def write(self, spec: TensorSpec, tensor: torch.Tensor) -> None:
        """Copy `tensor` (any device, shape of `spec`) to its place: one copy, with the cast to the wire dtype in it.

        Raises `WeightSyncError` for another shape, or for a cast between floating and other kinds.
        """
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if tuple(tensor.shape) != spec.shape:
            raise WeightSyncError(
                f"tensor {spec.name!r}: expected shape {spec.shape}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
            raise WeightSyncError(f"tensor {spec.name!r}: expected dtype {dtype}, got {tensor.dtype}")
        place = self._bytes[spec.offset : spec.offset + spec.size].view(dtype).view(spec.shape)
        place.copy_(tensor.detach())

    def fill(self, bucket: Bucket, tensors: Mapping[str, torch.Tensor]) -> int:
        """Write every tensor of `bucket` and return its checksum. Raises `WeightSyncError` for a tensor that is missing
        or does not fit."""
        for spec in bucket.tensors:
            if spec.name not in tensors:
                raise WeightSyncError(
                    f"tensor {spec.name!r} of bucket {bucket.index} is not among the {len(tensors)} tensors given"
                )
            self.write(spec, tensors[spec.name])
        # One pass over the whole bucket: summing pieces while they are in the cache was measured to be slower.
        return self.checksum(bucket)

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
        self._map.close()


class Slots:
    """The two files of one learner."""

    def __init__(self, run_id: str, plan: Plan) -> None:
        """Takes `2 * plan.total_bytes` of shared memory. Raises `SharedMemoryError`."""
        self._size = plan.total_bytes
        self._slots: list[Slot] = []
        self._next = 0
        try:
            for slot in range(SLOTS):
                self._slots.append(Slot(slot_path(run_id, slot), self._size))
        except BaseException:
            self.close()
            raise

    def next(self) -> Slot:
        """The file to write the next version into. Raises `SharedMemoryError` if a retired one cannot be replaced."""
        slot = self._slots[self._next]
        if slot.retired:
            slot.close()
            self._slots[self._next] = Slot(slot.path, self._size)
        return self._slots[self._next]

    def committed(self) -> None:
        """The version in `next()` is live: leave its file alone while the next version is written."""
        self._next = (self._next + 1) % SLOTS

    def close(self) -> None:
        """Unlink both files. May be called twice."""
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
            f"{path}: expected room for {size} bytes ({SLOTS} such files are needed), {FOLDER} has "
            f"{free.f_bavail * free.f_frsize} bytes free ({error.strerror}). Enlarge it (docker: --shm-size), or "
            f"remove leftovers of dead runs: {FOLDER}/asyncrl-*.weights"
        ) from error
    finally:
        os.close(descriptor)
