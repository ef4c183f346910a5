"""Puppets of engines: they say what receivers say, over the sockets of receivers, and do in the middle of a sync what a script
asks for. Used by the random schedules of weight sync.
"""

from __future__ import annotations

import asyncio
import struct

import zmq
import zmq.asyncio

from asyncrl.weight_sync import sockets, wire
from asyncrl.weight_sync.errors import ChecksumError
from asyncrl.weight_sync.hosts import this_host
from asyncrl.weight_sync.shm import map_version


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
            if await self._does("stage", command.attempt):
                await self._stage(command)
        elif isinstance(command, wire.Apply) and await self._does("apply", command.attempt):
            offer = self.offers[command.attempt]
            mapped = map_version(offer)
            self.version, self.value = offer.version, struct.unpack("f", mapped[:4])[0]
            mapped.close()
            self.ran.append(self.version)
            answer = wire.Applied(attempt=command.attempt, apply_s=0.0, stall_s=0.0, probe=())
            await self._socket.send(wire.encode(answer))

    async def _stage(self, command: wire.Propose) -> None:
        answer: wire.Staged | wire.Failed = wire.Staged(attempt=command.attempt, stage_s=0.0)
        try:
            map_version(command.offer).close()
        except ChecksumError as error:
            answer = wire.Failed(attempt=command.attempt, error=str(error))
        await self._socket.send(wire.encode(answer))

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
        return deed == "obey"

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
