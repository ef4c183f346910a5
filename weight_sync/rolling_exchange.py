"""Rolling updates on the publisher's socket: carries out the actions of `rolling` and feeds it answers, pings and time.

It runs in steps: whoever has the publisher makes one, and nothing is lost when nobody does for a while. What came meanwhile is
read at the next step, before it looks at a deadline. Made and used by the rolling publisher, from one thread at a time.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from asyncrl.weight_sync import exchange, wire
from asyncrl.weight_sync.exchange import GONE, send
from asyncrl.weight_sync.members import Members
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.rolling import Actions, Rolling, SendApply, SendDismiss, SendPropose, Settled
from asyncrl.weight_sync.verification import strange_digest

LOOK_S: Final = 0.01
"""How long the learner waits, at most, for the publisher while engines are on their way."""


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's update, with what it said at its end."""

    settled: Settled
    probe: Probe | None
    """What it was asked."""
    answer: tuple[float, ...]
    """Probe logprobs, right ones and wrong ones; empty if it gave none."""
    ignored: dict[str, int]
    """Messages that changed nothing since the update that ended before: reason -> count."""


class Shelf(Protocol):
    """What there is to be had: the publisher, as this file sees it."""

    def offer(self, version: int, engine_id: str) -> wire.Offer:
        """Where this engine gets the bytes of `version`, which is the newest."""

    def probe(self, version: int, engine_id: str) -> Probe | None:
        """What it is asked once it runs `version`, which it has staged."""

    def digest(self, version: int) -> str:
        """Of the bytes of `version`, which is the newest."""


class RollingExchange:
    """Every engine's updates, as messages."""

    def __init__(
        self, members: Members, machine: Rolling, shelf: Shelf, ended: Callable[[Ended], None]
    ) -> None:
        """Hears what comes to `members` from now on. `ended` is told of each update that has ended."""
        self._members = members
        self._machine = machine
        self._shelf = shelf
        self._ended = ended
        self._told: dict[str, tuple[Probe | None, str]] = {}
        """By engine, of its last order to apply: what it is asked, and the digest that it should find."""
        self._ping = wire.encode(wire.Ping())
        self._next_ping = time.monotonic() + exchange.PING_S
        members.hear = self.hear

    def publish(self, version: int) -> None:
        """Propose it to whoever can take it now."""
        self._carry_out(self._machine.published(version, time.monotonic()))

    def give_up(self, version: int, replaced: int) -> None:
        """See `Rolling.give_up`."""
        self._carry_out(self._machine.give_up(version, replaced, time.monotonic()))

    def step(self, wait_s: float) -> None:
        """Take in what has come, after waiting for it up to `wait_s`; look for the dead when it is time. Returns by the machine's
        next deadline, or when a ping is due, at the latest."""
        due_s = min(self._machine.next_deadline, self._next_ping) - time.monotonic()
        self._members.socket.poll(max(math.ceil(min(wait_s, due_s) * 1000), 0))
        self._members.take_in()
        if time.monotonic() >= self._next_ping:
            self._look_for_the_dead()
            self._next_ping = time.monotonic() + exchange.PING_S
        self._carry_out(self._machine.tick(time.monotonic()))

    def hear(self, engine_id: str, message: wire.ToPublisher) -> None:
        """One message of an engine."""
        machine, now = self._machine, time.monotonic()
        if isinstance(message, wire.Join):
            self._members.roster.note(engine_id, message)
            self._carry_out(machine.joined(engine_id, message.version, now))
        elif isinstance(message, wire.Leave):
            self._members.roster.note(engine_id, message)
            self._carry_out(machine.left(engine_id, now, f"it left: {message.reason}"))
        elif isinstance(message, wire.Staged):
            self._carry_out(machine.staged(engine_id, message.attempt, now, message.stage_s))
        elif isinstance(message, wire.Applied):
            self._applied(engine_id, message, now)
        else:
            actions = machine.failed(engine_id, message.attempt, now, message.error)
            self._carry_out(actions, message.probe)

    def _applied(self, engine_id: str, message: wire.Applied, now: float) -> None:
        version = self._machine.applying(engine_id, message.attempt)
        unfit = "" if version is None else strange_digest(version, self._told[engine_id][1], message.digest)
        actions = self._machine.applied(
            engine_id, message.attempt, now, message.apply_s, message.stall_s, unfit
        )
        self._carry_out(actions, message.probe)

    def _carry_out(self, actions: Actions, answer: tuple[float, ...] = ()) -> None:
        """`answer`: the probe logprobs of the engine whose message brought them about."""
        todo = deque(actions)
        # Ends: each failed send counts one more engine out, and there are finitely many.
        while todo:
            action = todo.popleft()
            if isinstance(action, Settled):
                self._settle(action, answer)
                continue
            error = send(self._members.socket, action.member, self._encoded(action))
            # A dismissal need not arrive: an engine that is gone serves nothing.
            if error and not isinstance(action, SendDismiss):
                todo.extend(self._machine.lost(action.member, time.monotonic(), error))

    def _settle(self, settled: Settled, answer: tuple[float, ...]) -> None:
        ignored = dict(self._machine.ignored + self._members.ignored)
        self._machine.ignored.clear()
        self._members.ignored.clear()
        if settled.error:
            self._members.roster.drop(settled.member)
        elif settled.report.outcome == "applied":
            self._members.roster.took(settled.member, settled.version, probed=bool(answer))
        # Else it left, which it has said itself; or it is here anew.
        probe, _ = self._told.pop(settled.member, (None, ""))
        self._ended(Ended(settled=settled, probe=probe, answer=answer, ignored=ignored))

    def _encoded(self, action: SendPropose | SendApply | SendDismiss) -> bytes:
        if isinstance(action, SendPropose):
            offer = self._shelf.offer(action.version, action.member)
            return wire.encode(wire.Propose(attempt=action.attempt, offer=offer, timeout_s=action.timeout_s))
        if isinstance(action, SendApply):
            probe = self._shelf.probe(action.version, action.member)
            self._told[action.member] = probe, self._shelf.digest(action.version)
            return wire.encode(wire.Apply(attempt=action.attempt, probe=probe))
        return wire.encode(wire.Dismiss(attempt=action.attempt, reason=action.reason))

    def _look_for_the_dead(self) -> None:
        """A closed connection shows when it is written to. A full queue is no sign of death here."""
        for engine_id in self._machine.waiting_for:
            if send(self._members.socket, engine_id, self._ping) == GONE:
                self._carry_out(self._machine.lost(engine_id, time.monotonic(), GONE))
