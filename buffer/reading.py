"""Reads a run's rollouts from disk: the log as tables, and one row per rollout. Also while the run goes on.

What a reader relies on (the columns are `log.LAYOUTS`):
- Of what a row refers to, the writer puts prompts on disk before segments, and segments before states. So states are
  read first here, and whatever they name is there when its own file is read.
- The last message of a file may be torn. It is left out: it was acknowledged to nobody, or will be whole soon.
- `seq` orders the rows of all three files of one shard. A rollout stays in its shard.
- The run may delete old files at any moment. What is gone is null in `rollouts_table`, never a wrong value.

Called by `asyncrl inspect` and by whoever looks at a run in Python (`docs/data.md`). Needs no running process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from asyncrl.buffer.log import LAYOUTS
from asyncrl.buffer.rollout_rows import rollout_columns

SHARD: Final = pa.field("shard", pa.int32(), nullable=False)
"""The column that `read_log` adds: (shard, seq) orders the rows of a whole log."""

_READ_ORDER = ("states", "segments", "prompts")
_MOST_TOKENS = 2**31 - 1
"""What the 32-bit offsets of one Arrow list column can hold."""
_MESSAGE_MARK = b"\xff\xff\xff\xff"
"""How each message of an Arrow IPC stream begins."""


class LogError(ValueError):
    """There is no log at that place, or files in it are not of this log's layout."""


class RolloutLog(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of all shards and generations, in order of (shard, seq)."""

    prompts: pa.Table
    segments: pa.Table
    states: pa.Table
    notes: tuple[str, ...] = ()
    """What was left out, apart from torn ends, which are no loss."""


def read_log(folder: Path) -> RolloutLog:
    """The log in `folder`, such as `runs/NAME/rollouts`. Raises `LogError`."""
    shards = sorted(int(p.name) for p in folder.glob("*") if p.is_dir() and p.name.isdecimal())
    if not shards:
        raise LogError(f"{folder} holds no rollouts: expected a folder 0 with states-000001.arrows in it")
    notes: list[str] = []
    parts: dict[str, list[pa.Table]] = {stream: [] for stream in _READ_ORDER}
    for shard in shards:
        for stream in _READ_ORDER:
            for path in generations(folder / str(shard), stream):
                table = _read_file(path, LAYOUTS[stream], notes)
                column = pa.repeat(pa.scalar(shard, SHARD.type), table.num_rows)
                parts[stream].append(table.append_column(SHARD, column))
    tables = {
        stream: pa.concat_tables(found) if found else LAYOUTS[stream].append(SHARD).empty_table()
        for stream, found in parts.items()
    }
    return RolloutLog(**tables, notes=tuple(notes))


def generations(shard_folder: Path, stream: str) -> list[Path]:
    """The files of one stream, oldest first."""
    numbered = re.compile(rf"{stream}-(\d+)\.arrows")
    matches = ((numbered.fullmatch(path.name), path) for path in shard_folder.iterdir())
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def _read_file(path: Path, layout: pa.Schema, notes: list[str]) -> pa.Table:
    """Every whole batch of one file, as one chunk. A file that is gone, or damaged before its end, adds a note."""
    try:
        # Not mapped: a recovery may cut the file's torn end off, and a page that is gone kills its reader.
        data = path.read_bytes()
    except FileNotFoundError:
        notes.append(f"{path} is gone: the run deleted it while the log was read; its rows are missing")
        return layout.empty_table()
    table, damaged_at = _whole_batches(data)
    if damaged_at is not None:
        notes.append(
            f"{path} is damaged at byte {damaged_at:,} of {len(data):,}: {table.num_rows:,} rows before that were "
            "read, those after it are missing"
        )
    return _in_layout(table, layout, path).combine_chunks() if table.column_names else layout.empty_table()


def _whole_batches(data: bytes) -> tuple[pa.Table, int | None]:
    """The rows, in a table without columns where not even the schema is whole; and where the file is damaged.

    A torn message begins like every other and goes on past the end of the file; one that does not is damaged.
    """
    batches: list[pa.RecordBatch] = []
    schema, source, begins = pa.schema([]), pa.BufferReader(data), 0
    try:
        reader = pa.ipc.open_stream(source)
        schema = reader.schema
        # Ends with the stream: StopIteration where it was closed, the others where it is torn or damaged.
        while True:
            begins = source.tell()
            batches.append(reader.read_next_batch())
    except (StopIteration, pa.ArrowInvalid, OSError):
        torn = source.tell() == len(data) and _MESSAGE_MARK.startswith(data[begins : begins + 4])
        return pa.Table.from_batches(batches, schema), None if torn else begins


def _in_layout(table: pa.Table, layout: pa.Schema, path: Path) -> pa.Table:
    """The columns of `layout`; others are passed over."""
    missing = [name for name in layout.names if name not in table.column_names]
    if missing:
        raise LogError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}: was it written by "
            "another version of asyncrl?"
        )
    try:
        return table.select(layout.names).cast(layout)
    except (ValueError, TypeError, pa.ArrowNotImplementedError) as error:
        raise LogError(f"{path} has columns of other types than expected: {error}") from error


def rollouts_table(
    log: RolloutLog, rollout_ids: Sequence[int] | None = None, *, values: bool = True
) -> pa.Table:
    """One row per rollout, by ascending `rollout_id`; `docs/data.md` says what each column is. Raises `LogError`.

    `rollout_ids`: of these alone. `values=False` leaves out the columns that take memory: tokens, logprobs, versions,
    prompt_tokens and payload.
    """
    states, segments = log.states, log.segments
    if rollout_ids is not None:
        wanted = pa.array(rollout_ids, pa.int64())
        states = states.filter(pc.is_in(states["rollout_id"], wanted))
        segments = segments.filter(pc.is_in(segments["rollout_id"], wanted))
    tokens = pc.sum(pc.list_value_length(segments["tokens"])).as_py() or 0
    if tokens > _MOST_TOKENS:
        raise LogError(
            f"the log has {tokens:,} tokens, one table holds {_MOST_TOKENS:,}: pass rollout_ids and read it in parts"
        )
    return pa.table(rollout_columns(log.prompts, segments, states, values=values))
