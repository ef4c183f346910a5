"""What an engine owes the buffer: segments on their way, gathered so that one request carries many.

Invariants: the segments of one rollout arrive in order; a segment is out of the box only when the buffer has
acknowledged it; each rollout has at most one segment in the box (`Dispatcher` waits for the one before), so the box
holds at most as many segments as rollouts. Called from one event loop.
"""

from __future__ import annotations

import asyncio

from asyncrl.buffer import BufferClient, Segment


class Outbox:
    """`put` hands a segment over and returns a future: whether the lease still held when the buffer took it."""

    def __init__(self, buffer: BufferClient, engine_id: str) -> None:
        self._buffer = buffer
        self._engine_id = engine_id
        self._box: list[tuple[Segment, asyncio.Future[bool]]] = []
        self._filled = asyncio.Event()

    def put(self, segment: Segment) -> asyncio.Future[bool]:
        taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._box.append((segment, taken))
        self._filled.set()
        return taken

    async def run(self) -> None:
        """Waits for segments from the rollouts, sends all there are, and again; ends when cancelled, or with
        BufferUnreachable. While the buffer is started again, segments gather here, one of each rollout at most."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            sending, self._box = self._box, []
            if sending:
                await self._send(sending)

    async def _send(self, sending: list[tuple[Segment, asyncio.Future[bool]]]) -> None:
        try:
            refused = set(await self._buffer.append(self._engine_id, [s for s, _ in sending]))
        except BaseException:
            # The run of this engine ends with this error; nobody shall wait for an answer that will not come.
            for _, taken in sending:
                taken.cancel()
            raise
        for segment, taken in sending:
            if not taken.done():
                taken.set_result(segment.rollout_id not in refused)
