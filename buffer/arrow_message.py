"""Arrow IPC messages without a copy: the frame is made here, the columns are written from where they lie.

pyarrow takes a hundred microseconds and a copy of every value to make a message of a dozen columns. In messages of one schema
without nulls only counts differ, and each of them is an int64 at a fixed place of the metadata (a flatbuffer: see "Encapsulated
message format" and `Message.fbs` in the Arrow columnar specification). So one message is made by pyarrow, the places are looked up in it,
and later ones are that metadata with other counts. A pyarrow that lays its messages out differently is noticed when the
template is made. Readers see nothing but Arrow IPC. Pure. Called by `log`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

Part = Any
"""Something with a buffer: numpy array, bytes, memoryview."""
_Q = struct.Struct("<q")
_PADDING = bytes(8)


class Values(NamedTuple):
    """A column of fixed width: its values in one piece or several."""

    parts: Sequence[Part]


class Strings(NamedTuple):
    offsets: np.ndarray
    """int32 [rows + 1], from 0"""
    parts: Sequence[Part]
    """UTF-8 bytes"""


class Lists(NamedTuple):
    offsets: np.ndarray
    """int32 [rows + 1], from 0"""
    parts: Sequence[Part]
    """Values of all lists, one behind the other."""


Column = Values | Strings | Lists


class Message(NamedTuple):
    """An encapsulated record batch in parts, to be written one behind the other."""

    parts: list[Part]
    nbytes: int
    values_at: list[int]
    """Where each column's values begin, in bytes from the start of the message."""


class MessageTemplate:
    """Messages of one schema whose columns are fixed-width numbers, strings, and lists of numbers, none of them null.

    Raises ValueError for another schema.
    """

    def __init__(self, schema: pa.Schema) -> None:
        _refuse(schema)
        self._lists = [pa.types.is_list(field.type) for field in schema]
        rows = 1009  # a count that stands nowhere else in the metadata
        columns = [_sample(field.type, rows + 2 * i) for i, field in enumerate(schema)]
        sample = pa.record_batch([column.slice(0, rows) for column in columns], schema=schema).serialize()
        message = bytes(memoryview(sample))
        (length,) = struct.unpack_from("<i", message, 4)
        self._head = bytearray(message[: 8 + length])
        body = len(message) - len(self._head)
        read = pa.ipc.read_record_batch(sample, schema)
        nodes, buffers = _counts(read, sample.address + len(self._head))
        self._nodes_at = self._place(struct.pack(f"<{len(nodes)}q", *nodes))
        self._buffers_at = self._place(struct.pack(f"<{len(buffers)}q", *buffers))
        # Other counts may be the same as one of these two.
        spans = ((self._nodes_at, len(nodes)), (self._buffers_at, len(buffers)))
        elsewhere = {at + 8 * i for at, count in spans for i in range(count)}
        self._body_at = self._place(_Q.pack(body), elsewhere)
        self._rows_at = self._place(_Q.pack(rows), elsewhere)
        self._pack_nodes = struct.Struct(f"<{len(nodes)}q").pack_into
        self._pack_buffers = struct.Struct(f"<{len(buffers)}q").pack_into

    def _place(self, pattern: bytes, but_for: Set[int] = frozenset()) -> int:
        ends = range(0, len(self._head) - len(pattern) + 1, 8)
        places = [at for at in ends if at not in but_for and self._head.startswith(pattern, at)]
        if len(places) != 1:
            raise RuntimeError(
                f"pyarrow {pa.__version__} lays out its messages in another way than this code knows: counts found at "
                f"{places}, expected one place"
            )
        return places[0]

    def message(self, rows: int, columns: Sequence[Column]) -> Message:
        """`columns` in the schema's order, contiguous and little-endian. They are not copied: keep them until written."""
        nodes: list[int] = []
        buffers: list[int] = []
        parts: list[Part] = [b""]
        at, values_at = 0, []
        for column, is_list in zip(columns, self._lists, strict=True):
            nodes += (rows, 0)
            buffers += (at, 0)  # no validity bits: nothing is null
            if not isinstance(column, Values):
                offsets = column.offsets
                parts.append(offsets)
                buffers += (at, offsets.nbytes)
                at = _pad(parts, at + offsets.nbytes)
                if is_list:
                    nodes += (int(offsets[-1]), 0)
                    buffers += (at, 0)
            size = 0
            for part in column.parts:
                parts.append(part)
                size += len(part) if isinstance(part, bytes) else part.nbytes
            values_at.append(len(self._head) + at)
            buffers += (at, size)
            at = _pad(parts, at + size)
        head = bytearray(self._head)
        _Q.pack_into(head, self._rows_at, rows)
        _Q.pack_into(head, self._body_at, at)
        self._pack_nodes(head, self._nodes_at, *nodes)
        self._pack_buffers(head, self._buffers_at, *buffers)
        parts[0] = head
        return Message(parts, len(head) + at, values_at)


def _refuse(schema: pa.Schema) -> None:
    if not len(schema):
        raise ValueError("a message needs a column: the schema has none")
    for field in schema:
        is_list = pa.types.is_list(field.type)
        kind = field.type.value_type if is_list else field.type
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not is_number and (is_list or not pa.types.is_string(kind)):
            raise ValueError(
                f"column {field.name} is {field.type}: messages are made of integers, floats, strings (of 32-bit offsets) and "
                "lists of numbers; for others take pyarrow's own `RecordBatch.serialize`"
            )


def _pad(parts: list[Part], at: int) -> int:
    """Every buffer begins at a multiple of eight bytes."""
    left = -at % 8
    if left:
        parts.append(_PADDING[:left])
    return at + left


def _sample(kind: pa.DataType, count: int) -> pa.Array:
    if pa.types.is_list(kind):
        return pa.array([[1] * (1 + (i % 2)) for i in range(count)], kind)
    if pa.types.is_string(kind):
        return pa.array(["ab"] * count, kind)
    return pa.array(np.ones(count), pa.float64()).cast(kind)


def _counts(batch: pa.RecordBatch, body: int) -> tuple[list[int], list[int]]:
    """Of a message that pyarrow read: (length, nulls) of each node, (offset, bytes) of each buffer, in the format's order."""
    nodes: list[int] = []
    places: list[tuple[int | None, int]] = []
    for column in batch.columns:
        nodes += (len(column), 0)
        if pa.types.is_list(column.type):
            nodes += (len(column.values), 0)
        for buffer in column.buffers():
            places.append((None, 0) if buffer is None else (buffer.address - body, buffer.size))
    buffers: list[int] = []
    end = 0
    for offset, size in places:
        at = end if offset is None else offset
        buffers += (at, size)
        end = at + size + -size % 8
    return nodes, buffers


def string_column(numbers: np.ndarray, names: Sequence[str]) -> Strings:
    """The names that `numbers` stand for."""
    encoded = [name.encode() for name in names]
    offsets = np.zeros(len(numbers) + 1, np.int32)
    np.cumsum(np.array([len(name) for name in encoded], np.int32)[numbers], out=offsets[1:])
    return Strings(offsets, [b"".join([encoded[i] for i in numbers.tolist()])])


def strings(values: Sequence[str]) -> Strings:
    encoded = [value.encode() for value in values]
    return Strings(offsets_of(list(map(len, encoded))), [b"".join(encoded)])


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """int32 [rows + 1]"""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
