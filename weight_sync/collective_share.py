"""The part of a collective publisher on learner ranks above 0, where every rank broadcasts its own share (`plan.senders`).

Invariants: rank 0 decides; this rank learns at `begin` who receives, and at `commit` how it ended. Once the version is called off, by
whichever rank, `write` does nothing more, and `commit` raises on every rank. Every call but `write` and `abandon` is a collective.
Called by the learner as a publisher is, from one thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from asyncrl.weight_sync.collective_sender import CollectiveSender, read_off
from asyncrl.weight_sync.collective_words import (
    Refused,
    Sent,
    Stream,
    decode_beginning,
    decode_outcome,
    encode,
)
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import GroupBroken, SyncAborted, WeightSyncError
from asyncrl.weight_sync.plan import Bucket, Plan
from asyncrl.weight_sync.process_group import connect_store, store_errors
from asyncrl.weight_sync.ranks import Ranks

LOOK_S: Final = 0.1
"""How soon it is noticed, at most, that another rank has called the version off."""


class CollectiveShare:
    """Of one rank above 0."""

    def __init__(
        self,
        config: WeightSyncConfig,
        plan: Plan,
        ranks: Ranks,
        host: str = "127.0.0.1",
        device: torch.device | None = None,
    ) -> None:
        """`host`: by which engines reach this rank. A collective with the making of the publisher on rank 0."""
        self._plan = plan
        self._ranks = ranks
        self._sender = CollectiveSender(
            plan, ranks.rank, host, device or torch.device("cpu"), config.timeout_s
        )
        stores = [each.decode() for each in ranks.collect(self._sender.address.encode())]
        self._word: TCPStore = connect_store(stores[0])
        """Rank 0's store, where the ranks say that a version is off."""
        self._stream: Stream | None = None
        self._written = 0
        self._error = ""
        """Why no more is sent of this version."""
        self._deadline = 0.0
        self._next_look = 0.0

    def begin(self, version: int) -> None:
        """See `CollectivePublisher.begin`."""
        decided = decode_beginning(self._ranks.share(b""))
        if isinstance(decided, Refused):
            raise WeightSyncError(decided.error)
        self._stream, self._written, self._error = decided, 0, ""
        self._deadline = time.monotonic() + decided.timeout_s
        if decided.size > 1:
            self._sender.begin(decided)

    def resend(self, version: int) -> None:
        """See `CollectivePublisher.resend`."""
        self.begin(version)

    def write(self, bucket: Bucket, pieces: Sequence[torch.Tensor]) -> None:
        """See `CollectivePublisher.write`; `bucket` is one of this rank's."""
        stream = self._begun("write")
        own = self._plan.of(self._ranks.rank)
        if self._written == len(own) or bucket != own[self._written]:
            raise WeightSyncError(
                f"version {stream.version}: bucket {bucket.index} out of order, expected bucket {self._written} of "
                f"{len(own)} that rank {self._ranks.rank} sends"
            )
        self._written += 1
        if stream.size > 1 and not self._error:
            self._sending(stream, lambda: self._sender.send(bucket, pieces, lambda: self._look(stream)))

    def abandon(self) -> None:
        """See `CollectivePublisher.abandon`; rank 0 does the same."""
        if self._stream is not None and self._stream.size > 1:
            self._sender.call_off("the learner gave it up")
        self._stream = None

    def commit(self, probe: object = None) -> None:
        """See `CollectivePublisher.commit`: of what that raises, whether the version was sent; the rest is rank 0's to say."""
        stream, self._stream = self._stream, None
        missing = len(self._plan.of(self._ranks.rank)) - self._written
        if stream is None:
            self._error = "no version is begun"
        elif missing and not self._error:
            self._error = f"{missing} of its buckets are not written"
        sends = stream is not None and stream.size > 1
        if stream is not None and sends and not self._error:
            self._sending(stream, lambda: self._sender.drain(lambda: self._look(stream)))
        if sends and not self._error:
            self._sender.tell_checksums()
        self._ranks.collect(encode(Sent(error=self._error, checksums=tuple(self._sender.checksums))))
        outcome = decode_outcome(self._ranks.share(b""))
        if outcome.report is not None and outcome.report.committed:
            self._sender.end()
        elif sends:
            self._sender.call_off(outcome.error)
        if outcome.error and outcome.report is not None:
            raise SyncAborted(outcome.error, outcome.report)
        if outcome.error:
            raise WeightSyncError(outcome.error)

    def close(self) -> None:
        """Leave the group. May be called twice."""
        self._sender.close()

    def _begun(self, what: str) -> Stream:
        if self._stream is None:
            raise WeightSyncError(f"{what}: no version is begun; call begin(version) first")
        return self._stream

    def _sending(self, stream: Stream, call: Callable[[], None]) -> None:
        try:
            call()
        except GroupBroken as error:
            self._error = str(error)
            self._sender.call_off(self._error)
            # Rank 0 may wait for engines that cannot have everything any more.
            with store_errors("learner rank 0"):
                self._word.set(f"{stream.prefix}/off", self._error)

    def _look(self, stream: Stream) -> None:
        """Raises `GroupBroken` if another rank called it off, or time is over."""
        now = time.monotonic()
        if now >= self._deadline:
            raise GroupBroken(f"learner rank {self._ranks.rank} did not send its share in time")
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        with store_errors("learner rank 0"):
            reason = read_off(self._word, stream)
        if reason:
            raise GroupBroken(reason)
