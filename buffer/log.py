"""The run's rollouts on disk: append-only Arrow IPC streams, and a journal that says which of their bytes count.

`prompts-N.arrows` (what was admitted), `segments-N.arrows` (every token as it came in, with its lease and version),
`states-N.arrows` (every change of state, with its reason) and `journal-N`, for generations N = 1, 2, ... `seq` orders the
rows of all three. A commit is messages of the streams and one record of the journal, in this order; it
reaches the operating system (or the disk, `durability = "fsync"`) before any request that it holds is answered. A write
that fails changes nothing: the same bytes go to the same place when `commit` is called again.
Called by `shard`, from one thread. `recovery` reads it back, `reading` shows it.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from asyncrl.buffer.arrow_message import (
    Column,
    Lists,
    Message,
    MessageTemplate,
    Part,
    Values,
    offsets_of,
    string_column,
    strings,
)
from asyncrl.buffer.errors import DiskFull
from asyncrl.buffer.journal import RECORD_BYTES, STREAMS, Record
from asyncrl.buffer.records import Group
from asyncrl.buffer.rows import STATE_NAMES, StateRows
from asyncrl.buffer.schema import IDS, LOGPROBS, TOKENS


def _layout(*fields: tuple[str, pa.DataType]) -> pa.Schema:
    stamp = (("seq", pa.int64()), ("unix_s", pa.float64()))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in (*stamp, *fields)])


PROMPT_LOG = _layout(
    ("group_id", pa.int64()),
    ("rollout_ids", IDS),
    ("greedy_id", pa.int64()),  # of its baseline, 0 for none
    ("position", pa.int64()),
    ("prompt_id", pa.string()),
    ("tokens", TOKENS),
    ("payload", pa.string()),
)
SEGMENT_LOG = _layout(
    ("rollout_id", pa.int64()),
    ("lease_id", pa.int64()),
    ("start", pa.int32()),
    ("version", pa.int32()),
    ("finish_reason", pa.string()),
    ("tokens", TOKENS),
    ("logprobs", LOGPROBS),
)
STATE_LOG = _layout(
    ("rollout_id", pa.int64()),
    ("group_id", pa.int64()),
    ("state", pa.string()),
    ("version", pa.int32()),
    ("lease_id", pa.int64()),
    ("attempts", pa.int32()),
    ("batch_id", pa.int64()),
    ("engine_id", pa.string()),
    ("reason", pa.string()),
    ("reward", pa.float32()),
    ("cost", pa.float32()),
)
LAYOUTS = dict(zip(STREAMS, (PROMPT_LOG, SEGMENT_LOG, STATE_LOG), strict=True))


_MOST_PARTS = 1000
"""Of one call: the system takes 1024."""


@functools.cache
def _template(stream: str) -> MessageTemplate:
    return MessageTemplate(LAYOUTS[stream])


class SegmentRows(NamedTuple):
    """Columns of segments that were taken, one row each; the values of all rows one behind the other."""

    rollout_ids: list[int]
    lease_ids: list[int]
    starts: list[int]
    versions: list[int]
    finish_reasons: list[str]
    lengths: list[int]
    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]


class Stream:
    """One Arrow IPC stream that grows, written at absolute offsets."""

    def __init__(self, path: Path, layout: pa.Schema, end: int | None) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if end is None else 0)
        self._fd = os.open(path, flags, 0o644)
        self.path, self.layout = path, layout
        self.end = end or 0
        """What a commit holds; `waiting` comes behind it."""
        self.waiting: list[Part] = [] if end else [memoryview(layout.serialize())]
        """Messages in parts, to be written one behind the other."""
        self.next = self.end + sum(len(part) for part in self.waiting)
        """Where the next message will stand."""
        self._written = self.end
        """What is in the file, committed or not."""

    def put(self, message: Message) -> int:
        """Returns where it will stand."""
        start = self.next
        self.waiting += message.parts
        self.next += message.nbytes
        return start

    def write(self) -> int:
        """Puts what waits into the file; returns its hash. May be called again after an error."""
        digest, views = xxhash.xxh3_64(), self._views()
        for view in views:
            digest.update(view)
        self._write(views)
        value: int = digest.intdigest()
        return value

    def write_out(self) -> None:
        """So that it can be read; it counts from the next commit."""
        self._write(self._views())

    def _write(self, views: list[memoryview]) -> None:
        """Nothing, where all that waits was written since the last of it came."""
        if self._written < self.next:
            write_at(self._fd, views, self.end)
            self._written = self.next

    def _views(self) -> list[memoryview]:
        return [memoryview(part).cast("B") for part in self.waiting if len(part)]

    def committed(self) -> None:
        self.end, self.waiting = self.next, []

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def write_at(fd: int, parts: Sequence[memoryview], at: int) -> None:
    """All parts, one behind the other, or OSError."""
    left = list(parts)
    # Waits for nothing but the disk; ends when all is written or the system says why not.
    while left:
        done = os.pwritev(fd, left[:_MOST_PARTS], at)
        at += done
        while left and done >= left[0].nbytes:
            done -= left.pop(0).nbytes
        if done:
            left[0] = left[0][done:]


class Log:
    """The streams of one generation of one shard, in `folder`. `last` continues it behind that record."""

    def __init__(
        self, folder: Path, generation: int, *, fsync: bool, next_seq: int = 0, last: Record | None = None
    ) -> None:
        self.folder, self.generation, self._fsync = folder, generation, fsync
        self.next_seq = next_seq
        self._record = last or Record(-1, (0,) * len(STREAMS), (), 0.0)
        ends = dict(zip(STREAMS, last.ends, strict=True)) if last else {}
        self._streams = {
            name: Stream(file_of(folder, name, generation), layout, ends.get(name))
            for name, layout in LAYOUTS.items()
        }
        self._journal = os.open(
            journal_of(folder, generation),
            os.O_RDWR | os.O_CLOEXEC | (0 if last else os.O_CREAT | os.O_EXCL),
            0o644,
        )
        try:
            self.commit()
        except BaseException:
            self.close()
            raise

    @property
    def segment_bytes(self) -> int:
        return self._streams["segments"].end

    def prompts(self, groups: Sequence[Group], tokens: Sequence[np.ndarray], payloads: Sequence[str]) -> None:
        ids = [list(g.rollouts) for g in groups]
        self._put(
            "prompts",
            len(groups),
            Values([np.array([g.group_id for g in groups], np.int64)]),
            Lists(offsets_of([len(i) for i in ids]), [np.array(list(itertools.chain(*ids)), np.int64)]),
            Values([np.array([g.greedy_id for g in groups], np.int64)]),
            Values([np.array([g.position for g in groups], np.int64)]),
            strings([g.prompt_id for g in groups]),
            Lists(offsets_of([len(t) for t in tokens]), tokens),
            strings(payloads),
        )

    def segments(self, rows: SegmentRows) -> tuple[int, int]:
        """Where in the file the tokens and the logprobs will begin. They are written from where they lie: the askers'
        memory, which is theirs again once they are answered."""
        offsets = offsets_of(rows.lengths)
        start, values_at = self._put(
            "segments",
            len(rows.rollout_ids),
            Values([np.array(rows.rollout_ids, np.int64)]),
            Values([np.array(rows.lease_ids, np.int64)]),
            Values([np.array(rows.starts, np.int32)]),
            Values([np.array(rows.versions, np.int32)]),
            strings(rows.finish_reasons),
            Lists(offsets, rows.tokens),
            Lists(offsets, rows.logprobs),
        )
        return start + values_at[-2], start + values_at[-1]

    def states(self, rows: StateRows) -> None:
        columns = rows.columns()
        self._put(
            "states",
            len(rows),
            _plain(columns["rollout_id"]),
            _plain(columns["group_id"]),
            string_column(columns["state"], STATE_NAMES),
            _plain(columns["version"]),
            _plain(columns["lease_id"]),
            _plain(columns["attempts"]),
            _plain(columns["batch_id"]),
            string_column(columns["engine"], list(rows.engines)),
            string_column(columns["reason"], list(rows.reasons)),
            _plain(columns["reward"]),
            _plain(columns["cost"]),
        )

    def _put(self, name: str, rows: int, *columns: Column) -> tuple[int, list[int]]:
        first, self.next_seq = self.next_seq, self.next_seq + rows
        seq, unix_s = np.arange(first, first + rows), np.full(rows, time.time())
        message = _template(name).message(rows, [Values([seq]), Values([unix_s]), *columns])
        return self._streams[name].put(message), message.values_at

    def write_out(self) -> None:
        """Has the tokens that came in this round in their file, where they can be read; they count from the next commit.
        Raises DiskFull or OSError."""
        try:
            self._streams["segments"].write_out()
        except OSError as error:
            raise disk_full(self.folder, error) from error

    def commit(self) -> None:
        """Writes what waits. Raises DiskFull (nothing is lost: call again) or OSError."""
        if not any(stream.waiting for stream in self._streams.values()):
            return
        try:
            hashes = tuple(stream.write() for stream in self._streams.values())
            ends = tuple(stream.next for stream in self._streams.values())
            record = Record(self._record.number + 1, ends, hashes, time.time())
            if self._fsync:
                for stream in self._streams.values():
                    if stream.waiting:
                        stream.sync()
            write_at(self._journal, [memoryview(record.encode())], record.number * RECORD_BYTES)
            if self._fsync:
                os.fdatasync(self._journal)
        except OSError as error:
            raise disk_full(self.folder, error) from error
        self._record = record
        for stream in self._streams.values():
            stream.committed()

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        os.close(self._journal)


def _plain(field: np.ndarray) -> Values:
    return Values([np.ascontiguousarray(field)])


def disk_full(folder: Path, error: Exception) -> Exception:
    """`error` by its right name: DiskFull where the disk or the quota is full, else itself."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"{folder} has no room for the log ({error.strerror}): free some; the run goes on by itself, and nothing is lost"
        )
    return error


def values_at(segments: pa.RecordBatch, within: pa.Buffer) -> tuple[int, int]:
    """Where the values of tokens and logprobs begin in the buffer that the batch was read from."""
    tokens, logprobs = segments["tokens"].values, segments["logprobs"].values
    if not len(tokens):
        return 0, 0
    return tokens.buffers()[1].address - within.address, logprobs.buffers()[1].address - within.address


def file_of(folder: Path, stream: str, generation: int) -> Path:
    return folder / f"{stream}-{generation:06d}.arrows"


def journal_of(folder: Path, generation: int) -> Path:
    return folder / f"journal-{generation:06d}"
