"""A version whose bytes were verified, and whose file will be opened again by another process. Called by `vllm_engine`.

The worker process opens the file by name. A publisher that gave this engine up may put another file under that name
(`asyncrl.weight_sync.slots`, `Slot.retire`), so the file that was verified is remembered by its inode.
"""

from __future__ import annotations

import os

import msgspec

from asyncrl.weight_sync.errors import SharedMemoryError
from asyncrl.weight_sync.shm import map_version
from asyncrl.weight_sync.wire import Offer


class Staged(msgspec.Struct, frozen=True, kw_only=True):
    """A verified offer."""

    offer: Offer
    inode: int

    def check(self) -> None:
        """Raises `SharedMemoryError` if the name now leads to another file."""
        if _inode(self.offer.location) != self.inode:
            raise SharedMemoryError(
                f"version {self.offer.version}: {self.offer.location} was replaced after it was staged; the old "
                f"version stays live. The publisher did not wait for this engine; stage its next offer."
            )


def verified(offer: Offer) -> Staged:
    """Verify the offer's bytes: one pass over them, for a thread. Raises `ChecksumError` and `SharedMemoryError`."""
    inode = _inode(
        offer.location
    )  # before the mapping: if the file is replaced in between, `check` will not pass
    map_version(offer).close()
    return Staged(offer=offer, inode=inode)


def _inode(location: str) -> int:
    try:
        return os.stat(location).st_ino
    except FileNotFoundError:
        return -1
