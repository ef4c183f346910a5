"""One transaction on the publisher's socket: carries out its actions and feeds it answers, pings and time, until it
is finished. The transaction decides; this file only talks. Made and used by the publisher, in `commit` and `welcome`.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
import zmq

from asyncrl.weight_sync import wire
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.report import TransactionReport
from asyncrl.weight_sync.transaction import Transaction
from asyncrl.weight_sync.transaction_actions import (
    Actions,
    Finished,
    SendAbort,
    SendApply,
    SendDismiss,
    SendOffer,
)

logger = logging.getLogger(__name__)

PING_S: Final = 0.5
"""How soon an engine that died in a sync is noticed, at most."""
LOOK_S: Final = 0.05
"""How soon it is noticed, at most, that the sync is to give way."""


GONE: Final = "its connection is gone: the process ended, or its host stands still"


def send(socket: zmq.Socket[bytes], engine_id: str, message: bytes) -> str:
    """Empty, or why it cannot be sent: `GONE`, or its queue is full. Never blocks."""
    try:
        socket.send_multipart([engine_id.encode(), message], flags=zmq.NOBLOCK)
    except zmq.Again:
        return "its queue is full: it has read nothing for long"
    except zmq.ZMQError as error:
        if error.errno != zmq.EHOSTUNREACH:
            raise
        return GONE
    return ""


def messages(socket: zmq.Socket[bytes], ignored: Counter[str]) -> Iterator[tuple[str, wire.ToPublisher]]:
    """What has arrived by now, with the engine that sent it; what is no message of an engine is counted in `ignored`."""
    # Ends: as soon as the queue, which is bounded, is empty.
    while socket.poll(0):
        frames = socket.recv_multipart()
        if frames[0].startswith(b"\0"):
            # A name that the socket made up: whoever it is, it is no receiver.
            ignored["message without a name"] += 1
            continue
        try:
            engine_id = frames[0].decode()
            if len(frames) != 2:
                raise msgspec.DecodeError(f"expected 2 frames, got {len(frames)}")
            message = wire.decode_for_publisher(frames[1])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            ignored["malformed message"] += 1
            logger.warning("engine=%r sent a malformed message: %s", frames[0], error)
            continue
        yield engine_id, message


class Exchange:
    """The way of one version through the engines."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        transaction: Transaction,
        attempt: int,
        propose_for: Callable[[str], wire.Propose],
        probe_for: Callable[[str], Probe | None],
    ) -> None:
        """`propose_for`: what each member is offered. `probe_for`: what it is asked after it applied."""
        self.answers: dict[str, tuple[float, ...]] = {}
        """Probe logprobs by engine, of those that were asked: right ones and wrong ones."""
        self.digests: dict[str, str] = {}
        """Of the bytes that each engine applied, where it says so."""
        self.comings: dict[str, wire.Join | wire.Leave] = {}
        """Who came and went meanwhile: the last that each said of it."""
        self._socket = socket
        self._transaction = transaction
        self._attempt = attempt
        self._propose_for = propose_for
        self._probe_for = probe_for
        self._ping = wire.encode(wire.Ping())
        self._next_ping = time.monotonic() + PING_S

    def start(self) -> None:
        """Make the offers."""
        self._carry_out(self._transaction.begin(time.monotonic()))

    def step(self, wait_s: float) -> None:
        """Take in what has come, after waiting for it up to `wait_s`; look for the dead when it is time; never past the
        transaction's next deadline."""
        wait_s = min(wait_s, self._transaction.next_deadline - time.monotonic())
        self._socket.poll(max(math.ceil(wait_s * 1000), 0))
        self._take_in()
        if time.monotonic() >= self._next_ping:
            self._look_for_the_dead()
            self._next_ping = time.monotonic() + PING_S
        self._carry_out(self._transaction.tick(time.monotonic()))

    def run(self, give_way: Callable[[], bool]) -> TransactionReport:
        """Make the offers; return when the transaction is finished, at its deadline at the latest.

        Once `give_way()` is true, it is withdrawn if that can still be. What interrupts it (Ctrl-C, or what `give_way`
        raises) withdraws it too; after the commit point, it is taken as the deadline.
        """
        try:
            self.start()
            return self.go_on(give_way)
        except BaseException as error:
            self.interrupt(error)
            raise

    def go_on(self, give_way: Callable[[], bool]) -> TransactionReport:
        """As `run`, once it is started."""
        transaction = self._transaction
        # Waits for: answers. Unblocked by: engines, or the time of the next look. Ends: finished, which
        # `tick` brings about at the deadline.
        while transaction.report is None:
            self.step(LOOK_S)
            if give_way():
                self.withdraw("it gave way to another")
        return transaction.report

    def broke(self, error: str) -> None:
        """Sending to the members failed."""
        self._carry_out(self._transaction.broke(time.monotonic(), error))

    def withdraw(self, reason: str) -> None:
        """Abort, if that can still be."""
        self._carry_out(self._transaction.withdraw(time.monotonic(), reason))

    def interrupt(self, error: BaseException) -> None:
        """End it now: aborted if that can still be, else as at the deadline."""
        self.withdraw(f"interrupted by {error!r}")
        self._carry_out(self._transaction.tick(math.inf))

    def dismiss(self, engine_id: str, reason: str) -> None:
        """Put a member out of service after the end, if it can be told."""
        self._send(engine_id, wire.encode(wire.Dismiss(attempt=self._attempt, reason=reason)))

    def _take_in(self) -> None:
        malformed: Counter[str] = Counter()
        for engine_id, message in messages(self._socket, malformed):
            self._carry_out(self._decide(engine_id, message))
        for reason, count in malformed.items():
            self._transaction.ignore(reason, count)

    def _decide(self, engine_id: str, message: wire.ToPublisher) -> Actions:
        now, transaction = time.monotonic(), self._transaction
        if isinstance(message, wire.Join | wire.Leave):
            self.comings[engine_id] = message
            if engine_id not in transaction.members:
                return []
            why = "it connected anew" if isinstance(message, wire.Join) else f"it left: {message.reason}"
            return transaction.left(engine_id, now, why)
        if message.attempt != self._attempt:
            transaction.ignore(f"{type(message).__name__.lower()} of an earlier attempt")
            return []
        if isinstance(message, wire.Staged):
            return transaction.staged(engine_id, now, message.stage_s)
        if isinstance(message, wire.Applied):
            self._note(engine_id, message)
            self.digests.setdefault(engine_id, message.digest)
            return transaction.applied(engine_id, now, message.apply_s, message.stall_s)
        self._note(engine_id, message)
        if message.cut:
            return transaction.cut(engine_id, now, message.error)
        return transaction.failed(engine_id, now, message.error)

    def _note(self, engine_id: str, message: wire.Applied | wire.Failed) -> None:
        if message.probe:
            self.answers.setdefault(engine_id, message.probe)

    def _carry_out(self, actions: Actions) -> None:
        todo = deque(actions)
        # Ends: each failed send counts one more member out, and a transaction has finitely many.
        while todo:
            action = todo.popleft()
            if isinstance(action, Finished):
                continue
            error = self._send(action.member, self._encoded(action))
            # Neither an abort nor a dismissal need arrive: an engine that is gone holds nothing.
            if error and not isinstance(action, SendAbort | SendDismiss):
                todo.extend(self._transaction.lost(action.member, time.monotonic(), error))

    def _encoded(self, action: SendOffer | SendApply | SendAbort | SendDismiss) -> bytes:
        if isinstance(action, SendOffer):
            return wire.encode(self._propose_for(action.member))
        if isinstance(action, SendApply):
            return wire.encode(wire.Apply(attempt=self._attempt, probe=self._probe_for(action.member)))
        if isinstance(action, SendDismiss):
            return wire.encode(wire.Dismiss(attempt=self._attempt, reason=action.reason))
        report = self._transaction.report
        reason = report.reason if report else ""
        return wire.encode(wire.Abort(attempt=self._attempt, reason=reason))

    def _send(self, engine_id: str, message: bytes) -> str:
        return send(self._socket, engine_id, message)

    def _look_for_the_dead(self) -> None:
        """A closed connection shows when it is written to. A full queue is no sign of death here."""
        for engine_id in self._transaction.waiting_for:
            error = self._send(engine_id, self._ping)
            if error == GONE:
                self._carry_out(self._transaction.lost(engine_id, time.monotonic(), error))
