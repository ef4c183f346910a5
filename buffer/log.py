"""The run's rollouts on disk: three append-only Arrow IPC streams, readable with any Arrow tool while the run goes on.

`prompts.arrows` (what was admitted), `segments.arrows` (every token as it came in, with its lease and version) and
`states.arrows` (every change of state, with its reason). `seq` orders the rows of all three. Rows reach the operating
system before the request that made them is answered (`flush`), so a crash of the buffer process loses nothing that it
acknowledged. Called by the buffer service, from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from asyncrl.buffer.records import Transition
from asyncrl.buffer.schema import PROMPTS, SEGMENTS

_STAMP = [pa.field("seq", pa.int64(), nullable=False), pa.field("unix_s", pa.float64(), nullable=False)]

PROMPT_LOG = pa.schema([*_STAMP, pa.field("group_id", pa.int64(), nullable=False), *PROMPTS])
SEGMENT_LOG = pa.schema([*_STAMP, *SEGMENTS])
STATE_LOG = pa.schema(
    [
        *_STAMP,
        pa.field("rollout_id", pa.int64(), nullable=False),
        pa.field("group_id", pa.int64(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("version", pa.int32(), nullable=False),
        pa.field("engine_id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("reward", pa.float32(), nullable=False),
    ]
)


class Stream:
    """One Arrow IPC stream that grows. Batches are gathered until `flush`."""

    def __init__(self, path: Path, layout: pa.Schema) -> None:
        self._file = path.open("xb", buffering=0)
        self._layout = layout
        self._writer = pa.ipc.new_stream(self._file, layout)
        self._waiting: list[pa.RecordBatch] = []

    def put(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)

    def flush(self) -> None:
        if self._waiting:
            joined = pa.Table.from_batches(self._waiting, self._layout).combine_chunks()
            self._writer.write_table(joined)
            self._waiting = []

    def close(self) -> None:
        self.flush()
        self._writer.close()
        self._file.close()


class Log:
    """The three streams of one run, in `folder` (made here; must not hold a log yet)."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._prompts = Stream(folder / "prompts.arrows", PROMPT_LOG)
        self._segments = Stream(folder / "segments.arrows", SEGMENT_LOG)
        self._states = Stream(folder / "states.arrows", STATE_LOG)
        self._seq = 0

    def prompts(self, group_ids: Sequence[int], rows: pa.RecordBatch) -> None:
        ids = pa.array(group_ids, pa.int64())
        self._prompts.put(pa.record_batch([*self._stamp(len(ids)), ids, *rows.columns], schema=PROMPT_LOG))

    def segments(self, rows: pa.RecordBatch) -> None:
        self._segments.put(pa.record_batch([*self._stamp(rows.num_rows), *rows.columns], schema=SEGMENT_LOG))

    def states(self, rows: Sequence[Transition]) -> None:
        if not rows:
            return
        columns = [
            pa.array([r.rollout_id for r in rows], pa.int64()),
            pa.array([r.group_id for r in rows], pa.int64()),
            pa.array([r.state.name for r in rows], pa.string()),
            pa.array([r.version for r in rows], pa.int32()),
            pa.array([r.engine_id for r in rows], pa.string()),
            pa.array([r.reason for r in rows], pa.string()),
            pa.array([r.reward for r in rows], pa.float32()),
        ]
        self._states.put(pa.record_batch([*self._stamp(len(rows)), *columns], schema=STATE_LOG))

    def flush(self) -> None:
        for stream in (self._prompts, self._segments, self._states):
            stream.flush()

    def close(self) -> None:
        for stream in (self._prompts, self._segments, self._states):
            stream.close()

    def _stamp(self, rows: int) -> list[pa.Array]:
        first, self._seq = self._seq, self._seq + rows
        now = time.time()
        return [pa.array(range(first, first + rows), pa.int64()), pa.array([now] * rows, pa.float64())]


def read_stream(path: Path) -> pa.Table:
    """Every whole batch of a stream, also of one that is still written (its torn end is left out)."""
    batches = []
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_stream(source)
        while True:
            try:
                batches.append(reader.read_next_batch())
            except (StopIteration, pa.ArrowInvalid, OSError):
                # Neither end is an error: StopIteration is a closed stream, the others one that still grows.
                break
        return pa.Table.from_batches(batches, reader.schema)
