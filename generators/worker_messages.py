"""What a worker process and its pool say to each other, over one socket: frames of 4 bytes of length (big endian) and a
MessagePack message of one of the structs below. Called by `worker_pool` and `worker_process`.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

import msgspec

_LENGTH: Final = struct.Struct(">I")
MOST_BYTES: Final = 64 * 2**20
"""Of one frame: far more than a rollout has tokens."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Pool to worker, once: what it is to do, and where the parent would look for it."""

    make: str
    """`module:function` of asyncrl's own: given `setup`, it makes what answers, bytes to bytes."""
    setup: bytes
    sys_path: list[str]
    memory_bytes: int
    """Address space that it may take on top of what making the answerer took; 0: no limit."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker to pool, once: it can answer, or `problem` says why not."""

    problem: str = ""


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Pool to worker."""

    body: bytes
    timeout_s: float


class Answer(msgspec.Struct, frozen=True, tag=True):
    """Worker to pool."""

    body: bytes


class Raised(msgspec.Struct, frozen=True, tag=True):
    """Worker to pool: the function raised, or gave what it must not."""

    reason: str
    worn: bool = False
    """The worker is of no more use, as what it has no memory for may be its own: another one is to take its seat."""


Message = Hello | Ready | Ask | Answer | Raised


def send(connection: socket.socket, message: Message) -> None:
    """Raises OSError where the other end is gone, ValueError for a message of more than `MOST_BYTES`."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MOST_BYTES:
        raise ValueError(f"a message of {len(body):,} bytes; {MOST_BYTES:,} is the most")
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket) -> Message:
    """The next message; raises EOFError where the other end is gone or sends something else, TimeoutError by the socket's
    own timeout."""
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    if length > MOST_BYTES:
        raise EOFError(f"the other end announced {length:,} bytes, which no message has")
    body = _receive_exactly(connection, length)
    try:
        message: Message = msgspec.msgpack.decode(body, type=Message)
    except msgspec.DecodeError as error:
        raise EOFError(f"the other end sent what is no message: {error}") from error
    return message


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    # Waits for the other end; unblocked by its bytes, its death or the timeout; ends after `size` bytes.
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError("the other end closed the socket")
        data += part
    return bytes(data)
