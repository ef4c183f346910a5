"""What a reward model's process and the engine's process say to each other, over one socket: frames of 4 bytes of length (big
endian) and a MessagePack message of one of the structs below. Called by `reward_model` and `reward_model_process`.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from asyncrl.generators.config import RewardModelConfig

LENGTH: Final = struct.Struct(">I")
MOST_BYTES: Final = 16 * 2**20
"""Of one frame: a text of millions of tokens."""


class Load(msgspec.Struct, frozen=True, tag=True):
    """To the process, once."""

    folder: str
    config: RewardModelConfig


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """From it, once: it can read answers, or `problem` says why not."""

    problem: str = ""


class Read(msgspec.Struct, frozen=True, tag=True):
    """To the process: an answer to be scored."""

    number: int
    """Names it in what comes back."""
    payload: str
    """The prompt's JSON object."""
    answer_text: str


class Found(msgspec.Struct, frozen=True, tag=True):
    """From it."""

    number: int
    value: float


class Refused(msgspec.Struct, frozen=True, tag=True):
    """From it: this answer cannot be scored."""

    number: int
    reason: str


Message = Load | Loaded | Read | Found | Refused

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class BadFrame(EOFError):
    """The other end sends what is no message: nothing of it can be believed any more."""


def frame(message: Message) -> bytes:
    """Raises ValueError for a message of more than `MOST_BYTES`."""
    body = _encode(message)
    if len(body) > MOST_BYTES:
        raise ValueError(f"a message of {len(body):,} bytes; {MOST_BYTES:,} is the most")
    return LENGTH.pack(len(body)) + body


class Frames:
    """Messages out of bytes as they come in."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, data: bytes) -> list[Message]:
        """Every message that is whole by now. Raises BadFrame."""
        self._bytes += data
        found: list[Message] = []
        # Ends: each round takes a whole frame out of what is there.
        while len(self._bytes) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._bytes)
            if length > MOST_BYTES:
                raise BadFrame(f"the other end announced {length:,} bytes, which no message has")
            end = LENGTH.size + length
            if len(self._bytes) < end:
                break
            found.append(_message(bytes(self._bytes[LENGTH.size : end])))
            del self._bytes[:end]
        return found


def _message(body: bytes) -> Message:
    try:
        message: Message = _decode(body)
    except msgspec.DecodeError as error:
        raise BadFrame(f"the other end sent what is no message: {error}") from error
    return message
