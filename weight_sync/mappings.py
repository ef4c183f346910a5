"""Mappings of versions' files that are kept from one version to the next, as the files take turns (`slots`).

To fill the page table of a mapping costs twice the pass that verifies the bytes behind it (988 MB: 70 ms and 36 ms), and in a
worker, where it comes while generation is paused, as much again as loading.

Invariants
----------
- What is returned is of the file to which the name leads at that moment; one that has been replaced since is forgotten.
- The mappings kept are few: of names that still lead to their files, at most `KEPT`, and only where /dev/shm has room for two
  learners' files, as engines that outlive their learner hold its memory until the next version.
- A mapping goes with the last reference to it, never under a reader.
Called by engines, in threads, and by vLLM's workers; imports no torch.
"""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from asyncrl.weight_sync.shm import FOLDER, SLOTS, map_file, shared_path, verify
from asyncrl.weight_sync.wire import Offer

KEPT: Final = 8


@dataclass(frozen=True, slots=True)
class Mapped:
    """The bytes of a version, and the inode of the file that they are in."""

    data: mmap.mmap
    inode: int


class Mappings:
    """Those of one engine's process."""

    def __init__(self, *, private: bool = False) -> None:
        """`private`: writable, though never written to, for readers that take no other buffer; the pages are the file's."""
        self._private = private
        self._kept: dict[Path, Mapped] = {}
        self._lock = threading.Lock()

    def of(self, offer: Offer) -> Mapped:
        """The bytes of `offer` as they are. Raises `SharedMemoryError` if the file is not what the offer says."""
        path, size = shared_path(offer), offer.plan.total_bytes
        with self._lock:
            self._forget_replaced()
            found = self._kept.pop(path, None)
            if found is None or len(found.data) < size:
                found = Mapped(*map_file(offer, private=self._private))
            if is_worth_keeping(size, len(self._kept) + 1, _room()):
                self._kept[path] = found
            return found

    def verified(self, offer: Offer) -> Mapped:
        """`of`, and one pass over the bytes, which releases the GIL. Raises `ChecksumError`, too."""
        mapped = self.of(offer)
        verify(mapped.data, offer)
        return mapped

    def _forget_replaced(self) -> None:
        for path, mapped in list(self._kept.items()):
            if inode_of(path) != mapped.inode:
                del self._kept[path]


def is_worth_keeping(version_bytes: int, files: int, room_bytes: int) -> bool:
    """Whether `files` of a version each may be kept: shared memory of `room_bytes` in all could hold as many of another learner."""
    return files <= KEPT and 2 * max(files, SLOTS) * version_bytes <= room_bytes


def inode_of(path: Path) -> int:
    """-1 if there is no such file."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return -1


def _room() -> int:
    folder = os.statvfs(FOLDER)
    return folder.f_blocks * folder.f_frsize
