"""How an attempt of the `collective` transport begins: over which group, by when, and what each engine is offered. Made and used by
the collective publisher.

Invariants
----------
- A group is named by the attempt that it was made for. It is used again only by the same members in the same epoch, and only after
  an attempt that was committed.
- An engine's rank is its place among the attempt's names, from 1.
"""

from __future__ import annotations

import time
from typing import Final

import torch

from asyncrl.weight_sync import wire
from asyncrl.weight_sync.collective_attempt import Attempt
from asyncrl.weight_sync.collective_sender import CollectiveSender
from asyncrl.weight_sync.collective_words import Stream
from asyncrl.weight_sync.exchange import Exchange
from asyncrl.weight_sync.members import Members
from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.process_group import backend_of
from asyncrl.weight_sync.publisher import STAGING_SHARE
from asyncrl.weight_sync.transaction import Transaction

SETTLE_S: Final = 5.0
"""How long engines have, after the group broke, to say that they are there."""


class Drafts:
    """Attempts of one publisher, and the group of the last one."""

    def __init__(
        self,
        members: Members,
        plan: Plan,
        sender: CollectiveSender,
        stores: tuple[str, ...],
        device: torch.device,
        timeout_s: float,
    ) -> None:
        """`stores`: the address of each sender's. `device`: what buckets are packed on. `timeout_s`: of a whole sync."""
        self.timeout_s = timeout_s
        self._members = members
        self._plan = plan
        self._sender = sender
        self._stores = stores
        self._backend = backend_of(device)
        self._group: tuple[int, tuple[str, ...], str] | None = None
        """Epoch, members and name of the group of the last version, where it can be used again."""

    @property
    def group_name(self) -> str:
        """Of the group that can be used again; empty: there is none."""
        return "" if self._group is None else self._group[2]

    def forget_group(self) -> None:
        """The next version goes over a new one."""
        self._group = None

    def draft(self, version: int, names: tuple[str, ...]) -> Attempt:
        """One to send `version` to the engines `names`. Its time runs."""
        now, attempt = time.monotonic(), self._members.next_attempt()
        staging_s = STAGING_SHARE * self.timeout_s
        settle_s = min(SETTLE_S, self.timeout_s - staging_s)
        stream = self._stream(version, names, attempt, staging_s)
        transaction = Transaction(
            version,
            names,
            now=now,
            staging_deadline=now + staging_s,
            deadline=now + self.timeout_s,
            together=True,
            settle_s=settle_s,
        )
        for reason, count in self._members.ignored.items():
            transaction.ignore(reason, count)
        self._members.ignored.clear()

        def propose_for(engine_id: str) -> wire.Propose:
            offer = self._offer(stream, 1 + names.index(engine_id))
            # They hear of it first if it is called off at the deadline.
            return wire.Propose(attempt=attempt, offer=offer, timeout_s=staging_s + settle_s)

        def probe_for(engine_id: str) -> Probe | None:
            return self._members.roster.to_ask(engine_id, made.probe)

        exchange = Exchange(self._members.socket, transaction, attempt, propose_for, probe_for)
        made = Attempt(stream, transaction, exchange, self._sender, now)
        return made

    def _stream(self, version: int, names: tuple[str, ...], attempt: int, timeout_s: float) -> Stream:
        epoch = self._members.roster.epoch
        made = self._group is not None and self._group[:2] == (epoch, names)
        name = self.group_name if made else str(attempt)
        self._group = (epoch, names, name)
        return Stream(name=name, version=version, size=1 + len(names), made=made, timeout_s=timeout_s)

    def _offer(self, stream: Stream, rank: int) -> wire.Offer:
        """What the engine of this rank is offered."""
        source = wire.Group(
            backend=self._backend,
            stores=self._stores,
            name=stream.name,
            rank=rank,
            size=stream.size,
            made=stream.made,
        )
        return wire.Offer(version=stream.version, source=source, plan=self._plan, checksums=())
