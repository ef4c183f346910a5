"""The one place where sockets of weight sync are made, so that limits and authentication are set in one place.

Every socket is bounded (messages and bytes), and notices a peer that is gone without a word: TCP closes, or the
heartbeat, which libzmq's own thread answers, stays away. Called by the publisher and the receiver.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import zmq
import zmq.asyncio

Secure = Callable[[Any], None]
"""Puts a socket, not yet bound or connected, under the run's keys, so that nobody else can read, join or send."""


@dataclasses.dataclass(frozen=True)
class Secured:
    """A `Secure` for sockets that are bound: who connects is looked at in one context, which all of them belong to. Its maker
    terminates it, after they were closed."""

    context: zmq.Context[zmq.Socket[bytes]]
    secure: Callable[[Any], None]

    def __call__(self, socket: Any) -> None:
        self.secure(socket)


MESSAGES: Final = 1024
"""Bound of each peer's queue. A peer has at most one question open, besides one ping per second."""
MESSAGE_BYTES: Final = 64 * 2**20
"""Bound of one message; the largest is an offer, about 100 bytes a tensor."""
HEARTBEAT_S: Final = 2.0
SILENCE_S: Final = 15.0
"""A peer whose host or process stands still for so long is gone."""
FAREWELL_S: Final = 0.5
"""How long a closing socket may go on sending its last message (an abort, a failure), in libzmq's thread."""


def router(
    context: zmq.Context[zmq.Socket[bytes]], host: str, secure: Secure | None = None, port: int = 0
) -> tuple[zmq.Socket[bytes], str]:
    """A socket of the learner's, for its publisher or its chunk server, bound to `port` of `host` (0: a free one), and its
    endpoint."""
    socket = context.socket(zmq.ROUTER)
    _bound(socket)
    if secure is not None:
        secure(socket)
    # Sending to an engine that is gone is an error at once, not a message dropped in silence.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # An engine started again takes its id over from its dead connection.
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    try:
        if port:
            socket.bind(f"tcp://{host}:{port}")
        else:
            port = socket.bind_to_random_port(f"tcp://{host}")
    except BaseException:
        socket.close(linger=0)
        raise
    return socket, f"tcp://{host}:{port}"


def context_for(secure: Secure | None) -> zmq.Context[zmq.Socket[bytes]]:
    """The context of a socket that is to be bound under `secure`."""
    return secure.context if isinstance(secure, Secured) else zmq.Context()


def end(context: zmq.Context[zmq.Socket[bytes]], secure: Secure | None) -> None:
    """What `context_for` gave is used no more: its sockets are closed."""
    if not isinstance(secure, Secured):
        context.term()


def dealer(
    context: zmq.asyncio.Context, endpoint: str, engine_id: str, secure: Secure | None = None
) -> tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]:
    """An engine's socket, and a second one that gets an event at every (re)connection. `engine_id` (1 to 255 bytes)
    is its routing id at the publisher."""
    name = engine_id.encode()
    if not 1 <= len(name) <= 255 or name.startswith(b"\0"):
        raise ValueError(
            f"engine id {engine_id!r}: expected 1 to 255 bytes, the first not 0, got {len(name)} bytes"
        )
    socket = context.socket(zmq.DEALER)
    _bound(socket)
    if secure is not None:
        secure(socket)
    socket.setsockopt(zmq.ROUTING_ID, name)
    # Before connecting: an event that comes earlier than its watcher is lost, and with it the join.
    events = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    socket.connect(endpoint)
    return socket, events


def close(socket: zmq.Socket[bytes] | zmq.asyncio.Socket) -> None:
    """Close for good; what is still queued may leave within `FAREWELL_S`."""
    socket.close(linger=int(FAREWELL_S * 1000))


def _bound(socket: zmq.Socket[bytes] | zmq.asyncio.Socket) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, MESSAGES)
    socket.setsockopt(zmq.RCVHWM, MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(HEARTBEAT_S * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(SILENCE_S * 1000))
