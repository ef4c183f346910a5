"""The journal of a log: one record of fixed size for each commit, which says how far each stream reaches and what its new
bytes hash to.

A commit counts when its record is whole, its number is the next, and the bytes that it names are there and hash to what
it says; what is behind the last such record is a torn tail, or damage where later records are whole (`whole_behind`).
Hashes are XXH3 (64 bits): they find torn and rotten bytes, not forged ones. Pure. Called by `log` and `recovery`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import xxhash

STREAMS = ("prompts", "segments", "states")
_LAYOUT = struct.Struct("<8sQ3Q3Qd")
_CHECK = struct.Struct("<Q")
RECORD_BYTES = _LAYOUT.size + _CHECK.size
_MAGIC = b"asyncrl1"


class Record(NamedTuple):
    """The state of the log after one commit."""

    number: int
    ends: tuple[int, ...]
    """Bytes of each stream, in the order of `STREAMS`."""
    hashes: tuple[int, ...]
    """Of the bytes that each stream grew by."""
    unix_s: float

    def encode(self) -> bytes:
        body = _LAYOUT.pack(_MAGIC, self.number, *self.ends, *self.hashes, self.unix_s)
        return body + _CHECK.pack(xxhash.xxh3_64_intdigest(body))


def decode(data: bytes | memoryview) -> Record | None:
    """None where the bytes are no whole record."""
    if len(data) != RECORD_BYTES:
        return None
    magic, number, a, b, c, x, y, z, unix_s = _LAYOUT.unpack_from(data)
    (check,) = _CHECK.unpack_from(data, _LAYOUT.size)
    if magic != _MAGIC or check != xxhash.xxh3_64_intdigest(data[: _LAYOUT.size]):
        return None
    return Record(number, (a, b, c), (x, y, z), unix_s)


def committed(journal: bytes | memoryview, streams: Sequence[memoryview]) -> Iterator[Record]:
    """The records that count, in order; ends at the first that does not."""
    before = Record(-1, (0,) * len(STREAMS), (), 0.0)
    for at in range(0, len(journal), RECORD_BYTES):
        record = decode(journal[at : at + RECORD_BYTES])
        if record is None or record.number != before.number + 1:
            return
        for stream, start, end, digest in zip(streams, before.ends, record.ends, record.hashes, strict=True):
            if not start <= end <= len(stream) or xxhash.xxh3_64_intdigest(stream[start:end]) != digest:
                return
        yield record
        before = record


def whole_behind(journal: bytes | memoryview, number: int) -> int:
    """How many whole records stand behind the one with this number, which does not count.

    Commits are written one after the other, so the death of a process leaves none: only a disk does.
    """
    start = (number + 1) * RECORD_BYTES
    return sum(
        decode(journal[at : at + RECORD_BYTES]) is not None for at in range(start, len(journal), RECORD_BYTES)
    )
