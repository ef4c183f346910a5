"""The `tcp` transport: what an engine and the learner's chunk server say to each other. Pure.

An engine asks for ranges of a version's bytes and, where it has the version that the server has deltas against, for a
bucket's delta first. It has at most `WINDOW` questions open: the server sends nothing unasked, so what lies in queues is bounded by
what was asked for. After a broken connection it asks again what was not answered.
Called by `pull`, `pulling` and `answering`.
"""

from __future__ import annotations

from typing import Final

import msgspec

CHUNK_BYTES: Final = 4 << 20
"""Most bytes of one answer. Over loopback 988 MB took 3.2 times memcpy with 4 MiB, 4.9 with 1 MiB, 5.9 with 256 KiB: each costs both
sides a turn of their loops. Still larger ones hold the engine's loop for longer than the millisecond that one copy takes."""
WINDOW: Final = 8
"""Questions that an engine has open at once: 32 MiB fill a link of 1 GB/s with a round trip of 32 ms."""


class Find(msgspec.Struct, frozen=True, kw_only=True, tag="find"):
    """How long is the delta of this bucket? Answered by `Found`, once it was made."""

    question: int
    version: int
    digest: str
    """`checksum.version_digest`: an aborted version may come again with other bytes."""
    base: int
    base_digest: str
    """The version that the engine has, and which bytes of it."""
    bucket: int


class Get(msgspec.Struct, frozen=True, kw_only=True, tag="get"):
    """The bytes [start, start + size) of the version, or of a bucket's delta. Answered by `Chunk` and a frame of bytes."""

    question: int
    version: int
    digest: str
    start: int
    size: int
    delta: int = -1
    """The bucket whose delta is meant; -1: the version itself."""


class Found(msgspec.Struct, frozen=True, kw_only=True, tag="found"):
    question: int
    delta_bytes: int
    """0: there is none, or it would not pay."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True, tag="chunk"):
    """One frame with the bytes follows."""

    question: int


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The question cannot be answered: asking again does not help."""

    question: int
    reason: str


Question = Find | Get
Answer = Found | Chunk | Refused

encode: Final = msgspec.msgpack.Encoder().encode
decode_question: Final = msgspec.msgpack.Decoder(Question).decode
decode_answer: Final = msgspec.msgpack.Decoder(Answer).decode
"""Both decoders raise `msgspec.DecodeError` (or its subclass `ValidationError`) for anything else."""
