"""What an engine owes the buffer: segments on their way, gathered so that one request carries many.

Invariants: the segments of one rollout arrive in order; a segment is out of the box only when the buffer has
acknowledged it; each rollout puts its next ones in when those before are acknowledged (`RolloutStream` waits), so the box
holds one handful of each rollout at most. Called from one event loop.
"""

from __future__ import annotations

import asyncio
from typing import Final

from asyncrl.buffer import BufferClient, Segment

_AT_ONCE: Final = 256
"""Rollouts whose segments go in one request: to lay out more would hold the event loop up."""


class Outbox:
    """`put` hands segments over and returns a future: whether the lease still held when the buffer took them."""

    def __init__(self, buffer: BufferClient, engine_id: str) -> None:
        self._buffer = buffer
        self._engine_id = engine_id
        self._box: list[tuple[list[Segment], asyncio.Future[bool]]] = []
        self._filled = asyncio.Event()

    def put(self, segments: list[Segment]) -> asyncio.Future[bool]:
        """Segments of one rollout, in order, at least one."""
        taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._box.append((segments, taken))
        self._filled.set()
        return taken

    async def run(self) -> None:
        """Waits for segments from the rollouts, sends all there are, and again; ends when cancelled, or with
        BufferUnreachable. While the buffer is started again, segments gather here, one handful of each rollout at most."""
        while True:
            await self._filled.wait()
            sending, self._box = self._box[:_AT_ONCE], self._box[_AT_ONCE:]
            if not self._box:
                self._filled.clear()
            await self._send(sending)

    async def _send(self, sending: list[tuple[list[Segment], asyncio.Future[bool]]]) -> None:
        segments = [segment for some, _ in sending for segment in some]
        try:
            refused = set(await self._buffer.append(self._engine_id, segments))
        except BaseException:
            # The run of this engine ends with this error; nobody shall wait for an answer that will not come.
            for _, taken in sending:
                taken.cancel()
            raise
        for some, taken in sending:
            if not taken.done():
                taken.set_result(some[0].rollout_id not in refused)
