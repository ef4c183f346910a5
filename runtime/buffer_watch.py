"""Keeps the buffer's processes running: one that dies is started again and goes on from its log.

- A death is the end of the process, by a signal or by the machine's want of memory. An error of the buffer's own
  (ConservationError, LogDamaged) is none: starting again would not repair it, and it ends the run with its traceback.
- More than `MOST_DEATHS` of one shard within `WITHIN_S` end the run: something kills it, and will go on to.
- Clients wait for a shard for `connection.GRACE_S`; what takes longer than `_RESTART_S` ends the run here, by name.
Called by the supervisor, on its event loop.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray.exceptions import ActorDiedError, RayActorError, RayError

from asyncrl.buffer import BufferAddress, BufferClient
from asyncrl.buffer.errors import BufferUnreachable
from asyncrl.buffer.wire import Status
from asyncrl.runtime.deaths import Deaths
from asyncrl.runtime.observer import Observer
from asyncrl.runtime.watch import PartFailed, Watch

MOST_DEATHS = 5
WITHIN_S = 600.0
_RESTART_S = 60.0
_TRY_AGAIN_S = 0.1


class ShardKeeper:
    """One shard's process. `keep` ends when the shard was told to stop, or with PartFailed."""

    def __init__(
        self, shard: int, actor: Any, address: BufferAddress, watch: Watch, observer: Observer
    ) -> None:
        self._part, self._shard = f"buffer-{shard}", shard
        self._actor, self._address = actor, address
        self._watch, self._observer = watch, observer
        self._deaths = Deaths(MOST_DEATHS, WITHIN_S)

    async def keep(self) -> None:
        """Waits for the end of the process that runs, and starts the next if that was a death."""
        noting: asyncio.Task[None] | None = None
        try:
            while True:
                try:
                    await self._actor.run.remote()
                    return
                except RayError as error:
                    await self._start_after(error)
                if noting is not None:
                    noting.cancel()
                noting = asyncio.create_task(self._note_recovery(), name=f"recovery of {self._part}")
        finally:
            if noting is not None:
                noting.cancel()

    async def _start_after(self, error: RayError) -> None:
        if not isinstance(error, RayActorError) or isinstance(error, ActorDiedError):
            raise PartFailed(self._watch.report(self._part, str(error))) from error
        if self._deaths.one_too_many(time.monotonic()):
            died = f"it died {MOST_DEATHS + 1} times within {WITHIN_S / 60:.0f} minutes; {error}"
            raise PartFailed(self._watch.report(self._part, died)) from error
        await self._watch.call(self._part, self._started(), _RESTART_S)

    async def _started(self) -> None:
        """Waits until Ray has the next process and it has read the log back; the caller sets the deadline."""
        while True:
            try:
                await self._actor.start.remote()
                return
            except ActorDiedError:
                raise
            except RayActorError:  # not up yet, or dead again
                await asyncio.sleep(_TRY_AGAIN_S)

    async def _note_recovery(self) -> None:
        try:
            async with BufferClient(self._address) as client:
                report = await client.ask(self._shard, Status())
        except BufferUnreachable:
            return  # dead again: the next one that lives is noted
        self._observer.recovered(self._shard, report.recovery)
