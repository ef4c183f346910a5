"""The engine's side of the `tcp` transport: pulls a version's bytes from the learner's chunk server into memory of this host.

Invariants
----------
- A bucket is verified before the next fetch may build on it (`arriving`).
- The bytes of a version are the base for deltas only if all of them were verified and none was written since: what ends a
  fetch after its first byte, a cancellation too, leaves no base, and the next fetch is a full one.
- A broken connection costs what was on its way: the same questions are asked again once it is back.
- The event loop is held for no longer than the copy of one chunk; sums and patches run in a thread, which has ended when
  `fetch` returns or raises.
One fetch at a time. Called by `fetching`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from asyncrl.weight_sync import chunks, sockets
from asyncrl.weight_sync.arriving import Arriving
from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.memory_file import MemoryFile
from asyncrl.weight_sync.sockets import Secure
from asyncrl.weight_sync.wire import Offer, Served, SharedFile

logger = logging.getLogger(__name__)


class Puller:
    """Pulls versions for one engine. Keeps the memory of one, and one bucket's delta or two."""

    def __init__(self, engine_id: str, secure: Secure | None = None) -> None:
        self.bytes_pulled = 0
        """Of the last fetch: bytes that were asked for."""
        self._engine_id = engine_id
        self._secure = secure
        self._context = zmq.asyncio.Context()
        self._memory: MemoryFile | None = None
        self._base: Offer | None = None
        """Whose bytes `_memory` holds, all of them verified."""

    async def fetch(self, offer: Offer, timeout_s: float) -> Offer:
        """See `fetching.Fetcher`. Raises `WeightSyncError` if it took longer than `timeout_s`, if the server refuses, or if its
        bytes are not those of the offer."""
        assert isinstance(offer.source, Served), f"not to be pulled: {offer.source}"
        base, self._base = self._base, None
        if base is not None and base.plan != offer.plan:
            base = None
        memory = self._memory_for(offer)
        self.bytes_pulled = 0
        # An attempt that was aborted after it was fetched, and comes again: nothing is to be pulled.
        if base is None or (base.version, base.checksums) != (offer.version, offer.checksums):
            fetch = Arriving(memory, offer, base)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._pull(fetch, offer.source.endpoint)
            except TimeoutError:
                raise WeightSyncError(
                    f"engine {self._engine_id}, version {offer.version}: expected {offer.plan.total_bytes} bytes from "
                    f"{offer.source.endpoint} within {timeout_s:g} s, {fetch.describe()}. Is the learner alive, and is "
                    f"the link fast enough? Raise weight_sync.timeout_s."
                ) from None
        self._base = offer
        return msgspec.structs.replace(offer, source=SharedFile(path=str(memory.path)))

    def close(self) -> None:
        """See `fetching.Fetcher`."""
        self._base = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self._context.term()

    def _memory_for(self, offer: Offer) -> MemoryFile:
        if self._memory is None or self._memory.size != offer.plan.total_bytes:
            if self._memory is not None:
                self._memory.close()
                self._memory = None
            self._memory = MemoryFile(f"{self._engine_id}-pulled", offer.plan.total_bytes)
        return self._memory

    async def _pull(self, fetch: Arriving, endpoint: str) -> None:
        socket, connections = sockets.dealer(self._context, endpoint, self._engine_id, self._secure)
        try:
            await _exchange(fetch, socket, connections)
        finally:
            self.bytes_pulled = fetch.pull.bytes_asked
            socket.disable_monitor()
            connections.close(linger=0)
            socket.close(linger=0)


async def _exchange(fetch: Arriving, socket: zmq.asyncio.Socket, connections: zmq.asyncio.Socket) -> None:
    """Waits for: answers, connections, and the bucket in the thread. Unblocked by: the server, and its coming back. Ends: all
    buckets are settled, or cancelled, at the deadline at the latest."""
    complete: list[int] = []
    work: asyncio.Task[bool] | None = None
    at_work = -1
    answer: asyncio.Future[Any] = asyncio.ensure_future(socket.recv_multipart(copy=False))
    connection: asyncio.Future[Any] = asyncio.ensure_future(recv_monitor_message(connections))
    try:
        while not fetch.pull.done:
            for question in fetch.pull.questions():
                await socket.send(chunks.encode(question))
            if work is None and complete:
                at_work = complete.pop(0)
                work = asyncio.create_task(asyncio.to_thread(fetch.settle, at_work))
            await asyncio.wait(
                {answer, connection, *([work] if work else [])}, return_when=asyncio.FIRST_COMPLETED
            )
            if connection.done():
                await _connected(fetch, socket)
                connection = asyncio.ensure_future(recv_monitor_message(connections))
            if answer.done():
                bucket = _taken(fetch, answer.result())
                if bucket is not None:
                    complete.append(bucket)
                answer = asyncio.ensure_future(socket.recv_multipart(copy=False))
            if work is not None and work.done():
                fetch.pull.settled(at_work) if work.result() else fetch.pull.in_full(at_work)
                work = None
    finally:
        answer.cancel()
        connection.cancel()
        # It writes to the version's memory: not left behind. One bucket's sum and patch, so it ends by itself.
        while work is not None and not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({work})


async def _connected(fetch: Arriving, socket: zmq.asyncio.Socket) -> None:
    fetch.connected += 1
    if fetch.connected > 1:
        logger.warning("connected anew, asked again: %d questions", len(fetch.pull.again()))
        for question in fetch.pull.again():
            await socket.send(chunks.encode(question))


def _taken(fetch: Arriving, frames: list[zmq.Frame]) -> int | None:
    try:
        if not 1 <= len(frames) <= 2:
            raise msgspec.DecodeError(f"expected 1 or 2 frames, got {len(frames)}")
        answer = chunks.decode_answer(frames[0].buffer)
    except msgspec.DecodeError as error:
        raise WeightSyncError(
            f"the learner's chunk server sent what is no answer ({error}); learner and engine must run the same "
            f"version of asyncrl"
        ) from error
    return fetch.take(answer, frames[1].buffer if len(frames) == 2 else memoryview(b""))
