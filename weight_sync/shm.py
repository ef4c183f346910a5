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
from asyncrl.weight_sync.wire import Offer, SharedFile

FOLDER: Final = Path("/dev/shm")
SLOTS: Final = 2
"""Files of a learner whose engines all take a version before the next one is begun; others have one per version of lag."""
_FETCHED: Final = re.compile(r"/proc/[0-9]+/fd/[0-9]+")
"""Memory into which an engine's process fetched a version."""
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
    folder, first = slot_path(run_id, 0).parent, slot_path(run_id, 0).name
    name = re.compile(re.escape(first.removesuffix("0.weights")) + r"[0-9]+\.weights")
    removed = sorted(path for path in folder.glob("asyncrl-*.weights") if name.fullmatch(path.name))
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def map_version(offer: Offer) -> mmap.mmap:
    """Map the bytes of `offer` read-only and verify every bucket's checksum: blocks for one pass over the bytes, and
    releases the GIL meanwhile. The caller closes the mapping.

    Raises `SharedMemoryError` if the file is not what the offer says, `ChecksumError` if its bytes are not.
    """
    mapped, _ = map_file(offer)
    try:
        verify(mapped, offer)
    except BaseException:
        mapped.close()
        raise
    return mapped


def verify(mapped: mmap.mmap, offer: Offer) -> None:
    """Raises `ChecksumError` if the bytes of a mapping are not those of `offer`, `SharedMemoryError` if it does not say which they
    are."""
    if len(offer.checksums) != len(offer.plan.buckets):
        raise SharedMemoryError(
            f"offer of version {offer.version}: expected one checksum for each of {len(offer.plan.buckets)} buckets, "
            f"got {len(offer.checksums)}"
        )
    for bucket, expected in zip(offer.plan.buckets, offer.checksums, strict=True):
        got = bucket_checksum(mapped, bucket)
        if got != expected:
            raise ChecksumError(offer.version, bucket.index, expected, got, str(shared_path(offer)))


def shared_path(offer: Offer) -> Path:
    """Where the bytes of `offer` lie on this host. Raises `SharedMemoryError` if it does not say so."""
    if isinstance(offer.source, SharedFile):
        path = Path(offer.source.path)
        if path.parent == FOLDER or _FETCHED.fullmatch(offer.source.path):
            return path
    raise SharedMemoryError(
        f"offer of version {offer.version}: expected a file in {FOLDER} or one of /proc/PID/fd, got {offer.source}"
    )


def map_file(offer: Offer, *, private: bool = False) -> tuple[mmap.mmap, int]:
    """The file of `offer`, mapped, and its inode. `private`: writable, and what is written stays here. Raises
    `SharedMemoryError`."""
    path = shared_path(offer)
    # A name under /proc is a link by nature, and leads to the memory of one process of this user.
    no_link = os.O_NOFOLLOW if path.parent == FOLDER else 0
    try:
        descriptor = os.open(path, os.O_RDONLY | no_link | os.O_CLOEXEC)
    except OSError as error:
        raise SharedMemoryError(
            f"version {offer.version}: {path} cannot be opened ({error.strerror}). Learner and engine must "
            f"run on one host, as one user, with one /dev/shm (containers: share it)."
        ) from error
    try:
        found = os.fstat(descriptor)
        if found.st_size < offer.plan.total_bytes:
            raise SharedMemoryError(
                f"version {offer.version}: {path} has {found.st_size} bytes, expected at least "
                f"{offer.plan.total_bytes} by the plan"
            )
        if private:
            # Not filled at once: that would copy every page.
            flags, access = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
        else:
            # Filling the page table at once is cheaper than a fault for each page in the pass that follows.
            flags, access = mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ
        return mmap.mmap(descriptor, offer.plan.total_bytes, flags=flags, prot=access), found.st_ino
    finally:
        os.close(descriptor)
