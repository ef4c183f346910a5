"""The `shm` transport as engines see it: where a version's bytes lie under /dev/shm, and how to map and verify them.

Invariants
----------
- A file is created by one learner, mode 0600, of full size, and is written by nobody else.
- `map_version` returns only bytes whose checksums are those of the offer.
- A mapping is read-only and is closed by who asked for it, after it applied or discarded the version.
The writer is `slots.py`. Called by engines (`stage`); imports no torch.
"""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path
from typing import Final

from asyncrl.weight_sync.checksum import bucket_checksum
from asyncrl.weight_sync.errors import ChecksumError, SharedMemoryError
from asyncrl.weight_sync.wire import Offer

FOLDER: Final = Path("/dev/shm")
SLOTS: Final = 2
_RUN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def slot_path(run_id: str, slot: int) -> Path:
    """The file of one slot. Raises `SharedMemoryError` for a run id that cannot stand in a file name."""
    if not _RUN_ID.fullmatch(run_id):
        raise SharedMemoryError(
            f"run id {run_id!r}: expected up to 128 letters, digits, '.', '_' or '-', starting with a letter or "
            f"digit, as it becomes part of a file name in {FOLDER}"
        )
    return FOLDER / f"asyncrl-{run_id}-{slot}.weights"


def remove_leftovers(run_id: str) -> list[Path]:
    """Unlink what a killed learner of `run_id` left behind; returns what was removed. For the supervisor, after the
    learner has ended: engines that still map a file keep their bytes."""
    removed = []
    for path in (slot_path(run_id, slot) for slot in range(SLOTS)):
        if path.exists():
            path.unlink()
            removed.append(path)
    return removed


def map_version(offer: Offer) -> mmap.mmap:
    """Map the bytes of `offer` read-only and verify every bucket's checksum: blocks for one pass over the bytes, and
    releases the GIL meanwhile. The caller closes the mapping.

    Raises `SharedMemoryError` if the file is not what the offer says, `ChecksumError` if its bytes are not.
    """
    if len(offer.checksums) != len(offer.plan.buckets):
        raise SharedMemoryError(
            f"offer of version {offer.version}: expected one checksum for each of {len(offer.plan.buckets)} buckets, "
            f"got {len(offer.checksums)}"
        )
    mapped = _map(offer)
    try:
        for bucket, expected in zip(offer.plan.buckets, offer.checksums, strict=True):
            got = bucket_checksum(mapped, bucket)
            if got != expected:
                raise ChecksumError(offer.version, bucket.index, expected, got, offer.location)
    except BaseException:
        mapped.close()
        raise
    return mapped


def _map(offer: Offer) -> mmap.mmap:
    path = Path(offer.location)
    if offer.transport != "shm" or path.parent != FOLDER:
        raise SharedMemoryError(
            f"offer of version {offer.version}: expected transport 'shm' with a file in {FOLDER}, got "
            f"{offer.transport!r} with {offer.location!r}"
        )
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SharedMemoryError(
            f"version {offer.version}: {offer.location} cannot be opened ({error.strerror}). Learner and engine must "
            f"run on one host, as one user, with one /dev/shm (containers: share it)."
        ) from error
    try:
        size = os.fstat(descriptor).st_size
        if size < offer.plan.total_bytes:
            raise SharedMemoryError(
                f"version {offer.version}: {offer.location} has {size} bytes, expected at least "
                f"{offer.plan.total_bytes} by the plan"
            )
        # Filling the page table at once is cheaper than a fault for each page in the pass that follows.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        return mmap.mmap(descriptor, offer.plan.total_bytes, flags=flags, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
