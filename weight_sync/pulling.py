"""The engine's side of the `tcp` transport: pulls a version's bytes from the learner's chunk server into memory of this host.

Invariants
----------
- A bucket is verified (xxh3_64 of the offer) before the next fetch may build on it. One that came as a delta and does not
  come out right is pulled once more in full; one that came in full and is wrong ends the fetch.
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
import secrets
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from asyncrl.weight_sync import chunks, delta, sockets
from asyncrl.weight_sync.checksum import bucket_checksum, version_digest
from asyncrl.weight_sync.chunks import Pull
from asyncrl.weight_sync.errors import ChecksumError, MalformedDelta, WeightSyncError
from asyncrl.weight_sync.memory_file import MemoryFile
from asyncrl.weight_sync.opened import gathered
from asyncrl.weight_sync.plan import Bucket
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
            fetch = _Fetch(memory, offer, base)
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

    async def _pull(self, fetch: _Fetch, endpoint: str) -> None:
        socket, connections = sockets.dealer(self._context, endpoint, self._engine_id, self._secure)
        try:
            await _exchange(fetch, socket, connections)
        finally:
            self.bytes_pulled = fetch.pull.bytes_asked
            socket.disable_monitor()
            connections.close(linger=0)
            socket.close(linger=0)


class _Fetch:
    """One version on its way into memory."""

    def __init__(self, memory: MemoryFile, offer: Offer, base: Offer | None) -> None:
        known = (base.version, version_digest(base.checksums)) if base is not None else None
        # What a fetch that was called off asked for is still answered, on this engine's next connection.
        self.pull = Pull(offer.plan, offer.checksums, offer.version, known, secrets.randbits(62))
        self.connected = 0
        """How often the connection was made."""
        self._memory = memory
        self._offer = offer
        self._base = base
        self._deltas: dict[int, bytearray] = {}
        self._came = 0

    def take(self, answer: chunks.Answer, body: memoryview) -> int | None:
        """Put what came in its place; a bucket that is complete by that, to be settled."""
        if isinstance(answer, chunks.Refused):
            if not self.pull.is_open(answer.question):
                return None
            raise WeightSyncError(
                f"version {self._offer.version}: the learner's chunk server refused: {answer.reason}"
            )
        if isinstance(answer, chunks.Found):
            self.pull.found(answer)
            return None
        arrival = self.pull.arrived(answer.question, body.nbytes)
        if arrival is None:
            return None
        self._came += arrival.size
        if arrival.delta:
            size = self.pull.delta_sizes[arrival.bucket]
            place: Any = self._deltas.setdefault(arrival.bucket, bytearray(size))
        else:
            place = self._memory.map
        place[arrival.start : arrival.start + arrival.size] = body
        return arrival.bucket if arrival.complete else None

    def settle(self, index: int) -> bool:
        """Patch and verify a complete bucket; False if it is to be pulled in full. Runs in a thread. Raises `ChecksumError`."""
        bucket, patch = self._offer.plan.buckets[index], self._deltas.pop(index, None)
        if patch is not None:
            try:
                self._patch(bucket, patch)
            except MalformedDelta as error:
                logger.warning("version=%d bucket=%d not patched: %s", self._offer.version, index, error)
                return False
        expected, got = self._offer.checksums[index], bucket_checksum(self._memory.map, bucket)
        if got != expected and patch is None:
            raise ChecksumError(self._offer.version, index, expected, got, str(self._memory.path))
        if got != expected:
            logger.warning("version=%d bucket=%d patched wrongly, pulled in full", self._offer.version, index)
        return got == expected

    def describe(self) -> str:
        if not self.connected:
            return "never connected (nobody there, or not with this run's key)"
        return f"{self._came} of {self.pull.bytes_asked} asked for came over {self.connected} connections"

    def _patch(self, bucket: Bucket, patch: bytearray) -> None:
        assert self._base is not None
        fits = (self._base.checksums[bucket.index], self._offer.checksums[bucket.index])
        if delta.sums(patch) != fits:
            raise MalformedDelta(f"delta of sums {delta.sums(patch)}: expected {fits}")
        with memoryview(self._memory.map) as whole, whole[: self._memory.size] as version:
            runs = bucket.runs
            if len(runs) == 1:
                with version[runs[0].offset : runs[0].offset + runs[0].size] as part:
                    delta.apply(part, patch)
                return
            joined = bytearray(gathered(version, bucket))
            delta.apply(memoryview(joined), patch)
            at = 0
            for run in runs:
                version[run.offset : run.offset + run.size] = joined[at : at + run.size]
                at += run.size


async def _exchange(fetch: _Fetch, socket: zmq.asyncio.Socket, connections: zmq.asyncio.Socket) -> None:
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


async def _connected(fetch: _Fetch, socket: zmq.asyncio.Socket) -> None:
    fetch.connected += 1
    if fetch.connected > 1:
        logger.warning("connected anew, asked again: %d questions", len(fetch.pull.again()))
        for question in fetch.pull.again():
            await socket.send(chunks.encode(question))


def _taken(fetch: _Fetch, frames: list[zmq.Frame]) -> int | None:
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
