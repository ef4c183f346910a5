"""One client's connection to one shard: asks, waits with a deadline, asks again when no answer comes.

A service that was restarted answers under the same endpoint and keys, so a request that is sent again reaches it; sending
again is harmless (`wire`). Answers find their request by its id. `Connection` lives on one event loop and has many requests
under way, `BlockingConnection` belongs to one thread and has one. Called by `client`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import zmq

from asyncrl.buffer import wire
from asyncrl.buffer.errors import (
    ArenaUnknown,
    BadRequest,
    BufferFault,
    BufferUnreachable,
    DiskFull,
    LeaseLost,
)
from asyncrl.buffer.keys import ClientKeys, secure_client

logger = logging.getLogger(__name__)

GRACE_S = 60.0
"""How much longer than a request's own waiting time its answer may take: a restart of the service fits in."""
_ASK_AGAIN_S = 2.0
"""After the time at which the answer was due."""
_ASK_WAITING_S = 8.0
_DISK_FULL_S = 900.0
_DISK_FULL_PAUSE_S = 1.0
_ERRORS: dict[str, type[BufferFault]] = {e.__name__: e for e in (LeaseLost, DiskFull, ArenaUnknown)}
Frames = list[bytes | memoryview]


class BufferAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the buffer's shards are, in order, and the run's client keys."""

    endpoints: tuple[str, ...]
    keys: ClientKeys


class Answer(msgspec.Struct, frozen=True):
    reply: Any
    """One of `wire.Reply`."""
    body: memoryview | None = None


class Patience:
    """How long to wait for one answer: when to ask again, when to give up. One for each request."""

    def __init__(self, timeout_s: float, grace_s: float = GRACE_S) -> None:
        now = time.monotonic()
        self._total_s = timeout_s + grace_s
        self._end = now + self._total_s
        self._due = now + timeout_s
        self._disk_end = now + _DISK_FULL_S

    def waits(self) -> Iterator[float]:
        """Seconds to wait after each time of asking; ends when it is time to give up.

        What may take long is asked again on the way too: a service that was started anew knows nothing of it.
        """
        while (left := self._end - (now := time.monotonic())) > 0:
            yield min(_ASK_AGAIN_S + min(_ASK_WAITING_S, max(0.0, self._due - now)), left)

    def for_disk(self, error: DiskFull) -> float:
        """The disk is full, the service lives: seconds to wait before asking again. Raises `error` in the end."""
        now = time.monotonic()
        if now >= self._disk_end:
            raise error
        self._end = now + self._total_s
        return _DISK_FULL_PAUSE_S

    def unreachable(self, endpoint: str, request: wire.Request) -> BufferUnreachable:
        return BufferUnreachable(
            f"no answer from the buffer at {endpoint} to {type(request).__name__} within {self._total_s:.0f} s; its "
            "process has ended or is stuck, or the keys are not this run's: see the supervisor's report and the run's log"
        )


def understand(frames: Sequence[Any]) -> Answer:
    """Raises the buffer's own errors by name."""
    try:
        reply = wire.decode_reply(frames[1].buffer)
    except (msgspec.MsgspecError, IndexError) as error:
        raise BadRequest(f"the buffer's answer cannot be read ({error}): it is of another version") from error
    if isinstance(reply, wire.Problem):
        raise _ERRORS.get(reply.kind, BadRequest)(reply.message)
    return Answer(reply, memoryview(frames[2].buffer) if len(frames) > 2 else None)


def _prepare(socket: zmq.Socket[Any], endpoint: str, keys: ClientKeys) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IDENTITY, b"a" + secrets.token_bytes(15))
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    secure_client(socket, keys)
    socket.connect(endpoint)


class Connection:
    """Asynchronous: `open` it on its event loop, then `ask`.

    The loop watches the socket's file descriptor and takes every answer that is there at once; that costs a fraction of a
    future for each frame. The descriptor tells of *changes* only, so after each send the socket is looked at too.
    """

    def __init__(self, endpoint: str, keys: ClientKeys) -> None:
        self.endpoint = endpoint
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        _prepare(self._socket, endpoint, keys)
        self._ids = itertools.count()
        self._answers: dict[bytes, asyncio.Future[Sequence[Any]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._take_answers)

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
        for answer in self._answers.values():
            answer.cancel()
        self._socket.close()

    def _take_answers(self) -> None:
        """Hands every answer that has arrived to its asker."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            answer = self._answers.get(frames[0].bytes)
            if answer is not None and not answer.done():
                answer.set_result(frames)

    async def ask(
        self, request: wire.Request, body: bytes | memoryview | None = None, timeout_s: float = 0.0
    ) -> Answer:
        """Raises BufferUnreachable, DiskFull (after a long time), LeaseLost, ArenaUnknown or BadRequest."""
        request_id = next(self._ids).to_bytes(8, "little")
        frames: Frames = [request_id, wire.encode(request), *([] if body is None else [body])]
        patience = Patience(timeout_s)
        try:
            # Waits for the answer, and asks again while none comes; ends with it, or when patience does.
            for wait_s in patience.waits():
                answer = self._answers[request_id] = asyncio.get_running_loop().create_future()
                self._send(frames)
                try:
                    # Not `wait_for`: on Python 3.11 it swallows a cancellation that comes together with the answer.
                    async with asyncio.timeout(wait_s):
                        return understand(await answer)
                except TimeoutError:
                    logger.info("%s to %s: asking again", type(request).__name__, self.endpoint)
                except DiskFull as error:
                    await asyncio.sleep(patience.for_disk(error))
            raise patience.unreachable(self.endpoint, request)
        finally:
            self._answers.pop(request_id, None)

    def _send(self, frames: Frames) -> None:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            # The service is away and its queue is full: the request is sent again with patience.
            logger.info("%s takes no more requests for now", self.endpoint)
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            asyncio.get_running_loop().call_soon(self._take_answers)


class BlockingConnection:
    """For one thread, one request at a time."""

    def __init__(self, endpoint: str, keys: ClientKeys) -> None:
        self.endpoint = endpoint
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        _prepare(self._socket, endpoint, keys)
        self._ids = itertools.count()

    def close(self) -> None:
        self._socket.close()

    def ask(
        self,
        request: wire.Request,
        body: bytes | memoryview | None = None,
        timeout_s: float = 0.0,
        grace_s: float = GRACE_S,
    ) -> Answer:
        """Raises as `Connection.ask`."""
        request_id = next(self._ids).to_bytes(8, "little")
        frames: Frames = [request_id, wire.encode(request), *([] if body is None else [body])]
        patience = Patience(timeout_s, grace_s)
        # As in `Connection.ask`.
        for wait_s in patience.waits():
            self._socket.send_multipart(frames, copy=False)
            try:
                found = self._receive(request_id, wait_s)
                if found is not None:
                    return understand(found)
            except DiskFull as error:
                time.sleep(patience.for_disk(error))
        raise patience.unreachable(self.endpoint, request)

    def _receive(self, request_id: bytes, wait_s: float) -> Sequence[Any] | None:
        deadline = time.monotonic() + wait_s
        # Waits for the buffer's answer; an older request's late answer is passed over; ends at the deadline.
        while self._socket.poll(max(0, int(1000 * (deadline - time.monotonic())) + 1)):
            frames = self._socket.recv_multipart(copy=False)
            if bytes(frames[0].buffer) == request_id:
                return frames
        return None
