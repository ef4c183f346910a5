"""One attempt to send a version from learner rank 0: while buckets travel it hears what the engines and the other ranks say, and
what they say ends the sending. Made and used by the collective publisher, from one thread at a time.

Invariants
----------
- Once `off`, nothing more is sent, and calls that send return at once. Before that, they return or raise only with the group whole.
- When it is called off, everyone's word is heard before the call returns: the report is there then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import torch

from asyncrl.weight_sync.collective_sender import CollectiveSender
from asyncrl.weight_sync.collective_words import Stream
from asyncrl.weight_sync.errors import GroupBroken
from asyncrl.weight_sync.exchange import Exchange
from asyncrl.weight_sync.plan import Bucket
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.publisher import never
from asyncrl.weight_sync.report import TransactionReport
from asyncrl.weight_sync.transaction import Transaction

STEP_S: Final = 0.01
"""Between two looks at the engines' answers while a bucket travels."""


class _Off(Exception):
    """The version is not to be sent any more."""


class Attempt:
    """Its sender has nothing else to send meanwhile."""

    def __init__(
        self,
        stream: Stream,
        transaction: Transaction,
        exchange: Exchange,
        sender: CollectiveSender,
        started: float,
    ) -> None:
        """`started`: when the time of the sync began to run."""
        self.stream = stream
        self.exchange = exchange
        self.started = started
        self.write_s = 0.0
        self.probe: Probe | None = None
        """What engines that take it are asked."""
        self.written = 0
        """Buckets of rank 0 that were handed over, sent or not."""
        self.faults: list[str] = []
        """What kept learner ranks from sending their shares."""
        self.off = not transaction.members
        """Nothing is sent any more, or there is nobody to send to."""
        self._transaction = transaction
        self._sender = sender
        self._next_step = 0.0

    @property
    def report(self) -> TransactionReport | None:
        """Once it is settled."""
        return self._transaction.report

    def start(self) -> None:
        """Make the offers, and start to make the group."""
        self.exchange.start()
        if not self.off:
            self._sender.begin(self.stream)

    def send(self, bucket: Bucket, pieces: Sequence[torch.Tensor]) -> None:
        """See `CollectiveSender.send`. Raises `WeightSyncError` for pieces that do not fit the plan."""
        self._sending(lambda: self._sender.send(bucket, pieces, self._look))

    def drain(self) -> None:
        """All that was sent has arrived, or it is off."""
        self._sending(lambda: self._sender.drain(self._look))

    def broke(self, error: str) -> None:
        """It cannot be sent as a whole."""
        self.exchange.broke(error)
        self._call_off()

    def tell_checksums(self) -> None:
        """All ranks have sent: engines may go on to verify it, unless it is off."""
        if not self.off:
            self._sender.tell_checksums()

    def see_through(self) -> TransactionReport:
        """Return when it is settled, at its deadline at the latest."""

        def watch() -> bool:
            if self._transaction.broken and not self.off:
                self._call_off()
            return False

        return self.exchange.go_on(watch)

    def _sending(self, call: Callable[[], None]) -> None:
        if self.off:
            return
        try:
            call()
        except GroupBroken as error:
            self.broke(str(error))
        except _Off:
            self._call_off()

    def _look(self) -> None:
        """Raises `_Off` or `GroupBroken` once the version is not to be sent any more."""
        now = time.monotonic()
        if now < self._next_step:
            return
        self._next_step = now + STEP_S
        self.exchange.step(0.0)
        if self._transaction.broken or self.report is not None:
            raise _Off
        if reason := self._sender.called_off():
            raise GroupBroken(reason)

    def _call_off(self) -> None:
        """Waits for: word of every engine. Unblocked by: engines, which find that it was called off, or their death. Ends: then,
        or when the transaction's time for that is over."""
        self.off = True
        self._sender.call_off(self.report.reason if self.report else self._transaction.broken)
        self.exchange.go_on(never)
