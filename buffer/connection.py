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
from dataclasses import dataclass
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
    EngineBarred,
    LeaseLost,
)
from asyncrl.buffer.keys import ClientKeys, secure_client

logger = logging.getLogger(__name__)

GRACE_S = 60.0
"""How much longer than a request's own waiting time its answer may take: a restart of the service fits in."""
_ASK_AGAIN_S = 2.0
"""After the time at which the answer was due."""
_ASK_WAITING_S = 8.0
"""The most of a request's own waiting time that is waited for before it is asked again."""
_LOOK_S = 0.25
"""How often an asynchronous connection looks for requests that have waited long enough."""
_DISK_FULL_S = 900.0
_DISK_FULL_PAUSE_S = 1.0
_ERRORS: dict[str, type[BufferFault]] = {
    e.__name__: e for e in (LeaseLost, EngineBarred, DiskFull, ArenaUnknown)
}
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
        """Seconds to wait after each time of asking; ends when it is time to give up."""
        while (left := self._end - (now := time.monotonic())) > 0:
            yield min(ask_again_in(self._due - now), left)

    def for_disk(self, error: DiskFull) -> float:
        """The disk is full, the service lives: seconds to wait before asking again. Raises `error` in the end."""
        now = time.monotonic()
        if now >= self._disk_end:
            raise error
        self._end = now + self._total_s
        return _DISK_FULL_PAUSE_S

    def unreachable(self, endpoint: str, request: wire.Request) -> BufferUnreachable:
        return unreachable(endpoint, request, self._total_s)


def ask_again_in(waits_s: float) -> float:
    """Seconds without an answer after which to ask again for what may rightly wait for `waits_s` more.

    What may take long is asked again on the way too: a service that was started anew knows nothing of it.
    """
    return _ASK_AGAIN_S + min(_ASK_WAITING_S, max(0.0, waits_s))


def unreachable(endpoint: str, request: wire.Request, waited_s: float) -> BufferUnreachable:
    return BufferUnreachable(
        f"no answer from the buffer at {endpoint} to {type(request).__name__} within {waited_s:.0f} s; its process has "
        "ended or is stuck, or the keys are not this run's: see the supervisor's report and the run's log"
    )


def understand(frames: Sequence[bytes]) -> Answer:
    """Raises the buffer's own errors by name."""
    try:
        reply = wire.decode_reply(frames[1])
    except (msgspec.MsgspecError, IndexError) as error:
        raise BadRequest(f"the buffer's answer cannot be read ({error}): it is of another version") from error
    if isinstance(reply, wire.Problem):
        raise _ERRORS.get(reply.kind, BadRequest)(reply.message)
    return Answer(reply, memoryview(frames[2]) if len(frames) > 2 else None)


def _prepare(socket: zmq.Socket[Any], endpoint: str, keys: ClientKeys) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IDENTITY, b"a" + secrets.token_bytes(15))
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    secure_client(socket, keys)
    socket.connect(endpoint)


@dataclass(slots=True)
class Asked:
    """A request that is under way."""

    request: wire.Request
    frames: Frames
    answer: asyncio.Future[Sequence[bytes]]
    since: float
    again_at: float
    due: float
    """When the service answers at the latest."""


class Connection:
    """Asynchronous: `open` it on its event loop, then `ask`.

    The loop watches the socket's file descriptor and takes every answer that is there at once; that costs a fraction of a
    future for each frame. The descriptor tells of *changes* only, so after each send the socket is looked at too. One timer
    for all requests looks a few times a second for those that have waited long enough.
    """

    def __init__(self, endpoint: str, keys: ClientKeys) -> None:
        self.endpoint = endpoint
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        _prepare(self._socket, endpoint, keys)
        self._ids = itertools.count()
        self.asked: dict[bytes, Asked] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._take_answers)

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
        if self._timer is not None:
            self._timer.cancel()
        for asked in self.asked.values():
            asked.answer.cancel()
        self._socket.close()

    def _take_answers(self) -> None:
        """Hands every answer that has arrived to its asker."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError:
                if self._socket.closed:  # a look at it was still due
                    return
                raise
            asked = self.asked.get(frames[0])
            if asked is not None and not asked.answer.done():
                asked.answer.set_result(frames)

    async def ask(
        self, request: wire.Request, body: bytes | memoryview | None = None, timeout_s: float = 0.0
    ) -> Answer:
        """Raises BufferUnreachable, DiskFull (after a long time), LeaseLost, ArenaUnknown or BadRequest."""
        loop = self._loop
        if loop is None:
            raise RuntimeError(f"the connection to {self.endpoint} is not open")
        request_id = next(self._ids).to_bytes(8, "little")
        frames: Frames = [request_id, wire.encode(request), *([] if body is None else [body])]
        disk_end = loop.time() + _DISK_FULL_S
        try:
            # Waits for the answer; while the disk is full it asks again, until that has lasted for too long.
            while True:
                now, answer = loop.time(), loop.create_future()
                due = now + timeout_s
                self.asked[request_id] = Asked(
                    request, frames, answer, now, now + ask_again_in(timeout_s), due
                )
                if self._timer is None:
                    self._timer = loop.call_later(_LOOK_S, self._look)
                self._send(frames)
                try:
                    return understand(await answer)
                except DiskFull:
                    if loop.time() >= disk_end:
                        raise
                    await asyncio.sleep(_DISK_FULL_PAUSE_S)
        finally:
            self.asked.pop(request_id, None)

    def _look(self) -> None:
        """Asks again for what had no answer for a while, and gives up in the end."""
        self._timer = None
        if not self.asked or self._loop is None:
            return
        # First of all: whatever is thrown below, the others' deadlines are looked at again.
        self._timer = self._loop.call_later(_LOOK_S, self._look)
        now = self._loop.time()
        for asked in list(self.asked.values()):
            if asked.answer.done():
                continue
            if now >= asked.due + GRACE_S:
                asked.answer.set_exception(unreachable(self.endpoint, asked.request, now - asked.since))
            elif now >= asked.again_at:
                asked.again_at = now + ask_again_in(asked.due - now)
                logger.info("%s to %s: asking again", type(asked.request).__name__, self.endpoint)
                self._send(asked.frames)

    def _send(self, frames: Frames) -> None:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=len(frames) < 3)
        except zmq.Again:
            # The service is away and its queue is full: the request is sent again after a while.
            logger.info("%s takes no more requests for now", self.endpoint)
        if self._loop is not None and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._take_answers)


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

    def _receive(self, request_id: bytes, wait_s: float) -> Sequence[bytes] | None:
        deadline = time.monotonic() + wait_s
        # Waits for the buffer's answer; an older request's late answer is passed over; ends at the deadline.
        while self._socket.poll(max(0, int(1000 * (deadline - time.monotonic())) + 1)):
            frames = self._socket.recv_multipart()
            if frames[0] == request_id:
                return frames
        return None
