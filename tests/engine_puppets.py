"""Puppets of engines: they say what receivers say, over the sockets of receivers, and do in the middle of a sync what a script
asks for. Used by the random schedules of weight sync.

They read as engines do: a version is mapped when it is staged, and applied from that mapping. To open the name again would be
to read what is there by then, which is a later version once the publisher has gone on without the reader. Bytes that change
under a mapping end the puppet's task with the `ChecksumError`.
"""

from __future__ import annotations

import asyncio
import mmap
import struct
from typing import Final

import zmq
import zmq.asyncio

from asyncrl.weight_sync import sockets, wire
from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.hosts import this_host
from asyncrl.weight_sync.shm import map_version, verify

SLOW_S: Final = 0.03
"""How long one that is slow reads. Short against the publisher's deadlines, long against the rest of a schedule."""


class Puppet:
    """One engine: a connection, and a task that answers on it."""

    def __init__(self, endpoint: str, name: str, index: int, stage: str, apply: str) -> None:
        self.name = name
        self.version = -1 - index
        """None, and unlike that of any other puppet, so that its join can be told from theirs."""
        self.value = float("nan")
        """The first weight of its version."""
        self.ran: list[int] = []
        """The versions that it applied, in order."""
        self.offers: dict[int, wire.Offer] = {}
        """By attempt."""
        self._staged: dict[int, mmap.mmap] = {}
        """The bytes of the last attempt, if they are staged."""
        self._reading_s = 0.0
        self.deeds = {"stage": stage, "apply": apply}
        self.alive = True
        self.dismissed = asyncio.Event()
        self._context = zmq.asyncio.Context()
        self._socket, self._events = sockets.dealer(self._context, endpoint, name)
        self.task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Waits for commands. Unblocked by the publisher. Ends when it is no longer alive, or cancelled."""
        await self._socket.send(wire.encode(wire.Join(version=self.version, host=this_host())))
        while self.alive:
            await self._obey(wire.decode_for_engine(await self._socket.recv()))

    async def _obey(self, command: wire.ToEngine) -> None:
        if isinstance(command, wire.Dismiss):
            if command.attempt in self.offers:
                self.dismissed.set()
                self.close()
        elif isinstance(command, wire.Propose):
            self.offers[command.attempt] = command.offer
            self._forget()
            if await self._does("stage", command.attempt):
                await self._stage(command)
        elif isinstance(command, wire.Apply) and await self._does("apply", command.attempt):
            await self._apply(command)

    async def _stage(self, command: wire.Propose) -> None:
        answer: wire.Staged | wire.Failed = wire.Staged(attempt=command.attempt, stage_s=0.0)
        try:
            mapped = self._staged[command.attempt] = map_version(command.offer)
        except WeightSyncError as error:  # it came too late for this version
            answer = wire.Failed(attempt=command.attempt, error=str(error))
        else:
            await self._read(mapped, command.offer)
        await self._socket.send(wire.encode(answer))

    async def _apply(self, command: wire.Apply) -> None:
        answer: wire.Applied | wire.Failed
        mapped = self._staged.get(command.attempt)
        if mapped is None:  # it was meant for the connection that this one has taken the place of
            answer = wire.Failed(attempt=command.attempt, error="not staged here")
        else:
            offer = self.offers[command.attempt]
            await self._read(mapped, offer)
            self.version, self.value = offer.version, struct.unpack("f", mapped[:4])[0]
            self.ran.append(self.version)
            self._forget()
            answer = wire.Applied(attempt=command.attempt, apply_s=0.0, stall_s=0.0, probe=())
        await self._socket.send(wire.encode(answer))

    async def _read(self, mapped: mmap.mmap, offer: wire.Offer) -> None:
        """Raises `ChecksumError`."""
        reading_s, self._reading_s = self._reading_s, 0.0
        await asyncio.sleep(reading_s)
        verify(mapped, offer)

    def _forget(self) -> None:
        while self._staged:
            self._staged.popitem()[1].close()

    async def _does(self, what: str, attempt: int) -> bool:
        """Whether it does as it is told; what it does instead is done here, once."""
        deed, self.deeds[what] = self.deeds[what], "obey"
        if deed == "die":
            self.close()
        elif deed == "fail":
            await self._socket.send(wire.encode(wire.Failed(attempt=attempt, error="scripted")))
        elif deed == "leave":
            self.leave()
        elif deed == "anew":
            await self._socket.send(wire.encode(wire.Join(version=self.version, host=this_host())))
        elif deed == "slow":
            self._reading_s = SLOW_S
        return deed in ("obey", "slow")

    def leave(self) -> None:
        self.close(farewell=wire.encode(wire.Leave(reason="scripted")))

    def close(self, farewell: bytes = b"") -> None:
        """Without a farewell it just goes, as the killed do."""
        if not self.alive:
            return
        self.alive = False
        if farewell:
            zmq.Socket.shadow(self._socket.underlying).send(farewell, zmq.NOBLOCK)
        self._socket.disable_monitor()
        self._events.close(linger=0)
        self._socket.close(linger=1000 if farewell else 0)
