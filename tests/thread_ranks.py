"""Ranks that are threads of one process, for tests of what they say to each other."""

from __future__ import annotations

import threading
from typing import Final

SOON_S: Final = 10.0


class Meeting:
    """Where they meet. A rank that does not come breaks it for all, after `SOON_S`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=SOON_S)
        self.words = [b""] * size

    def rank(self, rank: int) -> ThreadRank:
        return ThreadRank(self, rank)


class ThreadRank:
    """`weight_sync.ranks.Ranks` of one thread."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self.rank, self.size = meeting, rank, meeting.size

    def share(self, message: bytes) -> bytes:
        return self.collect(message)[0]

    def collect(self, message: bytes) -> list[bytes]:
        self._meeting.words[self.rank] = message
        self._meeting.barrier.wait()
        found = list(self._meeting.words)
        self._meeting.barrier.wait()
        return found
