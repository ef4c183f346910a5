"""What the learner's ranks say to each other when each of them broadcasts its share: MessagePack through `Ranks`. Rank 0 decides
what is sent and how it ended; the others say how far they came. Used by the collective publisher and `CollectiveShare`.
"""

from __future__ import annotations

from typing import Final

import msgspec

from asyncrl.weight_sync.report import TransactionReport


class Stream(msgspec.Struct, frozen=True, kw_only=True, tag="stream"):
    """From rank 0 at the beginning: what every sender must know of one attempt."""

    name: str
    """Of the groups, one for each sender."""
    version: int
    size: int
    """Ranks of each group: the sender and the engines. 1: nobody is there to send to."""
    made: bool
    """Whether the groups of this name are there already."""
    timeout_s: float
    """Left until the version must have been sent."""

    @property
    def prefix(self) -> str:
        """Of this attempt's keys in each sender's store."""
        return f"{self.name}/{self.version}"


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """From rank 0 at the beginning: nothing is begun."""

    error: str


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """From each rank, when it has sent its share or cannot."""

    error: str
    """Empty: all of it."""
    checksums: tuple[int, ...]
    """Of its buckets, in their order."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """From rank 0 at the end."""

    report: TransactionReport | None
    """None: no engine had a part in it."""
    error: str
    """What every rank raises; empty: nothing."""


encode: Final = msgspec.msgpack.Encoder().encode
decode_beginning: Final = msgspec.msgpack.Decoder(Stream | Refused).decode
decode_sent: Final = msgspec.msgpack.Decoder(Sent).decode
decode_outcome: Final = msgspec.msgpack.Decoder(Outcome).decode
