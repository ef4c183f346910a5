"""How the other parts talk to the buffer: one asynchronous client (engines, feeder) and one blocking one (learner).

Both send one request per call, wait for its answer with a deadline, and raise the buffer's own errors by name. Many
calls of the asynchronous client may be under way at once; the blocking one belongs to one thread.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import pyarrow as pa
import zmq
import zmq.asyncio

from asyncrl.buffer import wire
from asyncrl.buffer.errors import BadRequest, BufferFault, BufferUnreachable, LeaseLost
from asyncrl.buffer.records import Counts, Selection
from asyncrl.buffer.schema import BATCH, LEASES

_GRACE_S = 30.0
"""How much longer than a request's own waiting time its answer may take."""
_ERRORS: dict[str, type[BufferFault]] = {"LeaseLost": LeaseLost}


_R = TypeVar("_R", bound=wire.Reply)


def _understand(frames: Sequence[Any]) -> tuple[wire.Reply, memoryview | None]:
    reply = wire.decode_reply(frames[1].buffer)
    if isinstance(reply, wire.Problem):
        raise _ERRORS.get(reply.kind, BadRequest)(reply.message)
    return reply, memoryview(frames[2].buffer) if len(frames) > 2 else None


def _as(kind: type[_R], reply: wire.Reply) -> _R:
    if not isinstance(reply, kind):
        raise BadRequest(f"the buffer answered with {type(reply).__name__}, expected {kind.__name__}")
    return reply


def _unreachable(endpoint: str, request: wire.Request, waited_s: float) -> BufferUnreachable:
    return BufferUnreachable(
        f"no answer from the buffer at {endpoint} to {type(request).__name__} within {waited_s:.0f} s; "
        "its process has ended or is stuck: see the supervisor's report and the run's log"
    )


class BufferClient:
    """Asynchronous. Use as `async with BufferClient(endpoint) as buffer`, on one event loop."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)
        self._ids = itertools.count()
        self._answers: dict[bytes, asyncio.Future[list[Any]]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read(), name="buffer-client")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        for answer in self._answers.values():
            answer.cancel()
        self._socket.close()

    async def _read(self) -> None:
        """Waits for answers from the buffer and hands each to its asker; ends when the client is closed."""
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            answer = self._answers.pop(bytes(frames[0].buffer), None)
            if answer is not None and not answer.done():
                answer.set_result(frames)

    async def ask(
        self, request: wire.Request, body: pa.Buffer | None = None, timeout_s: float = 0.0
    ) -> tuple[wire.Reply, memoryview | None]:
        """Raises BufferUnreachable, LeaseLost or BadRequest."""
        request_id = next(self._ids).to_bytes(8, "little")
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._answers[request_id] = answer
        frames: list[bytes | memoryview] = [request_id, wire.encode(request)]
        if body is not None:
            frames.append(memoryview(body))
        await self._socket.send_multipart(frames, copy=False)
        try:
            # Not `wait_for`: on Python 3.11 it swallows a cancellation that comes together with the answer, and a
            # loop that was told to end would go on.
            async with asyncio.timeout(timeout_s + _GRACE_S):
                return _understand(await answer)
        except TimeoutError:
            raise _unreachable(self._endpoint, request, timeout_s + _GRACE_S) from None
        finally:
            self._answers.pop(request_id, None)

    async def capacity(self, timeout_s: float) -> int:
        reply, _ = await self.ask(wire.Capacity(timeout_s=timeout_s), timeout_s=timeout_s)
        return _as(wire.Number, reply).value

    async def admit(self, prompts: pa.RecordBatch) -> int:
        reply, _ = await self.ask(wire.Admit(), wire.pack_rows(prompts))
        return _as(wire.Number, reply).value

    async def lease(self, engine_id: str, limit: int, timeout_s: float) -> pa.RecordBatch:
        """`schema.LEASES` rows; none when there was nothing to do for `timeout_s`."""
        request = wire.Lease(engine_id=engine_id, limit=limit, timeout_s=timeout_s)
        _, body = await self.ask(request, timeout_s=timeout_s)
        return pa.RecordBatch.from_pylist([], LEASES) if body is None else wire.unpack_rows(body, LEASES)

    async def append(self, engine_id: str, segments: pa.RecordBatch) -> list[int]:
        """Returns the rollouts whose lease is lost."""
        reply, _ = await self.ask(wire.Append(engine_id=engine_id), wire.pack_rows(segments))
        return _as(wire.Refused, reply).rollout_ids

    async def score(self, scored: list[wire.Scored]) -> list[int]:
        reply, _ = await self.ask(wire.Score(rollouts=scored))
        return _as(wire.Refused, reply).rollout_ids

    async def fail(self, rollout_id: int, lease_id: int, reason: str) -> None:
        await self.ask(wire.Fail(rollout_id=rollout_id, lease_id=lease_id, reason=reason))

    async def release(self, leases: list[tuple[int, int]]) -> None:
        await self.ask(wire.Release(leases=leases))

    async def heartbeat(self, engine_id: str) -> None:
        await self.ask(wire.Heartbeat(engine_id=engine_id))

    async def status(self) -> wire.Report:
        reply, _ = await self.ask(wire.Status())
        return _as(wire.Report, reply)

    async def stop(self) -> Counts:
        reply, _ = await self.ask(wire.Stop())
        return _as(wire.Balance, reply).counts


class BlockingBufferClient:
    """For the learner's thread. One request at a time."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)
        self._ids = itertools.count()

    def close(self) -> None:
        self._socket.close()

    def ask(self, request: wire.Request, timeout_s: float = 0.0) -> tuple[wire.Reply, memoryview | None]:
        """Raises BufferUnreachable, LeaseLost or BadRequest."""
        request_id = next(self._ids).to_bytes(8, "little")
        self._socket.send_multipart([request_id, wire.encode(request)])
        waited_s = timeout_s + _GRACE_S
        # Waits for the buffer's answer; an older request's late answer is passed over; ends at the deadline.
        while self._socket.poll(int(1000 * waited_s)):
            frames = self._socket.recv_multipart(copy=False)
            if bytes(frames[0].buffer) == request_id:
                return _understand(frames)
        raise _unreachable(self._endpoint, request, waited_s)

    def read_batch(self, timeout_s: float) -> tuple[Selection, pa.RecordBatch] | None:
        """The next batch, or None when there was none within `timeout_s`."""
        reply, body = self.ask(wire.ReadBatch(timeout_s=timeout_s), timeout_s)
        if body is None:
            return None
        return _as(wire.Batch, reply).selection, wire.unpack_rows(body, BATCH)

    def commit(self, batch_id: int, version: int) -> Counts:
        reply, _ = self.ask(wire.Commit(batch_id=batch_id, version=version))
        return _as(wire.Balance, reply).counts

    def publish(self, version: int) -> None:
        self.ask(wire.Publish(version=version))

    def status(self) -> wire.Report:
        reply, _ = self.ask(wire.Status())
        return _as(wire.Report, reply)

    def stop(self) -> Counts:
        reply, _ = self.ask(wire.Stop())
        return _as(wire.Balance, reply).counts
