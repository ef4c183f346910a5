"""The run's rollouts on disk: append-only Arrow IPC streams, and a journal that says which of their bytes count.

`prompts-N.arrows` (what was admitted), `segments-N.arrows` (every token as it came in, with its lease and version),
`states-N.arrows` (every change of state, with its reason) and `journal-N`, for generations N = 1, 2, ... `seq` orders the
rows of all three. A commit is one message at most for each stream and one record of the journal, in this order; it
reaches the operating system (or the disk, `durability = "fsync"`) before any request that it holds is answered. A write
that fails changes nothing: the same bytes go to the same place when `commit` is called again.
Called by `shard`, from one thread. `recovery` reads it back, `reading` shows it.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from asyncrl.buffer.columns import flat_lists, list_array
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
)
LAYOUTS = dict(zip(STREAMS, (PROMPT_LOG, SEGMENT_LOG, STATE_LOG), strict=True))


def _strings(numbers: np.ndarray, names: list[str]) -> pa.Array:
    indices = pa.array(np.ascontiguousarray(numbers))
    return pa.DictionaryArray.from_arrays(indices, pa.array(names, pa.string())).dictionary_decode()


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


class Message(NamedTuple):
    """A message of the segments stream: its place in the file, its bytes, and where in the file its values begin."""

    start: int
    buffer: pa.Buffer
    tokens_at: int
    logprobs_at: int


class Stream:
    """One Arrow IPC stream that grows, written at absolute offsets."""

    def __init__(self, path: Path, layout: pa.Schema, end: int | None) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if end is None else 0)
        self._fd = os.open(path, flags, 0o644)
        self.path, self.layout = path, layout
        self.end = end or 0
        """What a commit holds; `waiting` comes behind it."""
        self.waiting: list[pa.Buffer] = [] if end else [layout.serialize()]

    @property
    def next(self) -> int:
        """Where the next message will stand."""
        size: int = sum(message.size for message in self.waiting)
        return self.end + size

    def write(self) -> int:
        """Puts what waits into the file; returns its hash. May be called again after an error."""
        digest, at = xxhash.xxh3_64(), self.end
        for message in self.waiting:
            view = memoryview(message)
            digest.update(view)
            write_at(self._fd, view, at)
            at += view.nbytes
        return digest.intdigest()

    def committed(self) -> None:
        self.end, self.waiting = self.next, []

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def write_at(fd: int, data: memoryview | bytes, at: int) -> None:
    """All of `data`, or OSError."""
    left = memoryview(data)
    # Waits for nothing but the disk; ends when all is written or the system says why not.
    while left.nbytes:
        done = os.pwrite(fd, left, at)
        left, at = left[done:], at + done


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
        """At most once for each commit, like its two sisters."""
        rollout_ids = [np.fromiter(g.rollouts, np.int64, len(g.rollouts)) for g in groups]
        self._put(
            "prompts",
            pa.array([g.group_id for g in groups], pa.int64()),
            list_array(rollout_ids, IDS),
            pa.array([g.position for g in groups], pa.int64()),
            pa.array([g.prompt_id for g in groups], pa.string()),
            list_array(tokens, TOKENS),
            pa.array(payloads, pa.string()),
        )

    def segments(self, rows: SegmentRows) -> Message:
        start = self._streams["segments"].next
        offsets = np.zeros(len(rows.lengths) + 1, np.int32)
        np.cumsum(rows.lengths, out=offsets[1:])
        message = self._put(
            "segments",
            pa.array(np.array(rows.rollout_ids, np.int64)),
            pa.array(np.array(rows.lease_ids, np.int64)),
            pa.array(np.array(rows.starts, np.int32)),
            pa.array(np.array(rows.versions, np.int32)),
            pa.array(rows.finish_reasons, pa.string()),
            flat_lists(offsets, _joined(rows.tokens), TOKENS),
            flat_lists(offsets, _joined(rows.logprobs), LOGPROBS),
        )
        batch = pa.ipc.read_record_batch(message, SEGMENT_LOG)
        tokens_at, logprobs_at = values_at(batch, message)
        return Message(start, message, start + tokens_at, start + logprobs_at)

    def states(self, rows: StateRows) -> None:
        columns = rows.columns()
        engines, reasons = list(rows.engines), list(rows.reasons)
        self._put(
            "states",
            pa.array(np.ascontiguousarray(columns["rollout_id"])),
            pa.array(np.ascontiguousarray(columns["group_id"])),
            _strings(columns["state"], STATE_NAMES),
            pa.array(np.ascontiguousarray(columns["version"])),
            pa.array(np.ascontiguousarray(columns["lease_id"])),
            pa.array(np.ascontiguousarray(columns["attempts"])),
            pa.array(np.ascontiguousarray(columns["batch_id"])),
            _strings(columns["engine"], engines),
            _strings(columns["reason"], reasons),
            pa.array(np.ascontiguousarray(columns["reward"])),
        )

    def _put(self, name: str, *columns: pa.Array) -> pa.Buffer:
        stream, rows = self._streams[name], len(columns[0])
        first, self.next_seq = self.next_seq, self.next_seq + rows
        stamp = [pa.array(np.arange(first, first + rows)), pa.array(np.full(rows, time.time()))]
        message: pa.Buffer = pa.record_batch([*stamp, *columns], schema=stream.layout).serialize()
        stream.waiting.append(message)
        return message

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
            write_at(self._journal, record.encode(), record.number * RECORD_BYTES)
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


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


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


def read_stream(path: Path) -> pa.Table:
    """Every whole message of one stream, also of one that is still written (its torn end is left out)."""
    batches = []
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_stream(source)
        while True:
            try:
                batches.append(reader.read_next_batch())
            except (StopIteration, pa.ArrowInvalid, OSError):
                # Neither end is an error: StopIteration is a whole stream, the others one that still grows.
                break
        return pa.Table.from_batches(batches, reader.schema)
