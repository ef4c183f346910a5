"""A version whose bytes were verified, and whose file will be opened again by another process. Called by `vllm_weights`.

The worker process opens the file by name. A publisher that gave this engine up may put another file under that name
(`asyncrl.weight_sync.slots`, `Slot.retire`), so the file that was verified is remembered by its inode.
"""

from __future__ import annotations

import msgspec

from asyncrl.weight_sync.errors import SharedMemoryError
from asyncrl.weight_sync.mappings import Mappings, inode_of
from asyncrl.weight_sync.shm import shared_path
from asyncrl.weight_sync.wire import DeviceMemory, Offer


class Staged(msgspec.Struct, frozen=True, kw_only=True):
    """A verified offer."""

    offer: Offer
    inode: int = -1
    """Of the file; -1 for device memory, which workers verify again while they load it."""

    def check(self) -> None:
        """Raises `SharedMemoryError` if the name now leads to another file."""
        if isinstance(self.offer.source, DeviceMemory):
            return
        path = shared_path(self.offer)
        if inode_of(path) != self.inode:
            raise SharedMemoryError(
                f"version {self.offer.version}: {path} was replaced after it was staged; the old "
                f"version stays live. The publisher did not wait for this engine; stage its next offer."
            )


def verified(offer: Offer, mappings: Mappings) -> Staged:
    """Verify the offer's bytes: one pass over them, for a thread. Raises `ChecksumError` and `SharedMemoryError`."""
    return Staged(offer=offer, inode=mappings.verified(offer).inode)
