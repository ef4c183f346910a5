"""What the learner's ranks say to each other during a sync: small messages, from rank 0 to all or from each to all.

Invariants: both calls are collectives: every rank makes the same ones in the same order; a message is bytes, never pickled.
The learner implements `Ranks` over its process group; one rank by itself is `Alone`. Called by the publishers and by `share`.
"""

from __future__ import annotations

from typing import Protocol


class Ranks(Protocol):
    """This process among the learner's ranks. Each call ends within the process group's timeout, whoever is missing."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def share(self, message: bytes) -> bytes:
        """Rank 0's message, on every rank; what the others give is not looked at. A collective."""
        ...

    def collect(self, message: bytes) -> list[bytes]:
        """Every rank's message, in the order of ranks, on every rank. A collective."""
        ...


class Alone:
    """One rank: what it says is all there is to hear."""

    rank = 0
    size = 1

    def share(self, message: bytes) -> bytes:
        return message

    def collect(self, message: bytes) -> list[bytes]:
        return [message]
