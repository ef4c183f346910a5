"""Reads a shard's log back: the newest base, then every commit behind it, in order.

A torn tail (bytes that no whole commit names) is cut off and reported, never guessed at. The book is rebuilt by the very
methods that the ledger calls. What is wrong beyond a torn tail raises LogDamaged. Called by `store` when a shard starts.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from asyncrl.buffer import base
from asyncrl.buffer.book import Book
from asyncrl.buffer.columns import Columns, Prompt, slices
from asyncrl.buffer.errors import LogDamaged
from asyncrl.buffer.journal import RECORD_BYTES, STREAMS, Record, committed, whole_behind
from asyncrl.buffer.log import LAYOUTS, file_of, journal_of, values_at
from asyncrl.buffer.records import LedgerSettings, Transition
from asyncrl.buffer.rows import StateRows
from asyncrl.buffer.schema import State
from asyncrl.buffer.token_files import Piece, TokenFiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    book: Book
    columns: Columns
    last: Record | None
    """None where the generation has no commit yet: its files are to be made."""
    next_seq: int
    commits: int
    cut_bytes: int


def newest_base(folder: Path) -> base.BaseState | None:
    """None in a folder where no run was."""
    paths = sorted(folder.glob("base-*.msgpack"))
    if not paths:
        return None
    state = base.decode(paths[-1].read_bytes())
    if state is None:
        raise LogDamaged(
            f"{paths[-1]} is damaged: it was written whole, so its disk is at fault. Without it the run goes on from "
            "the file before it, and loses what came after"
        )
    return state


def recover(
    folder: Path,
    state: base.BaseState,
    settings: LedgerSettings,
    files: TokenFiles,
    clock: Callable[[], float] = time.monotonic,
) -> Recovered:
    """The state after the last commit that counts. Cuts the files to it."""
    now = clock()
    _find_pieces(folder, state)
    book, columns = base.load(state, settings, files, now)
    paths = [file_of(folder, name, state.generation) for name in STREAMS]
    buffers = [_read(path) for path in paths]
    journal = _read(journal_of(folder, state.generation))
    records = list(committed(memoryview(journal), [memoryview(b) for b in buffers]))
    _refuse_damage(journal_of(folder, state.generation), journal, len(records))
    fold = _Fold(book, columns, state.generation, state.next_seq, now)
    for before, record in itertools.pairwise(records):
        for name, data, start, end in zip(STREAMS, buffers, before.ends, record.ends, strict=True):
            if end > start:
                fold.messages(name, data, start, end)
        fold.settle()
    last = records[-1] if records else None
    cut = _cut(paths, journal_of(folder, state.generation), buffers, journal, last)
    return Recovered(book, columns, last, fold.next_seq, len(records), cut)


def _refuse_damage(path: Path, journal: pa.Buffer, number: int) -> None:
    """Raises LogDamaged where commit `number` does not count and later ones are whole: they were acknowledged."""
    lost = whole_behind(memoryview(journal), number)
    if lost:
        raise LogDamaged(
            f"{path}: commit {number} or its rows are damaged, and {lost} later commits are whole. No crash of a process "
            'leaves that: the power failed while durability = "os", or the disk is at fault. Restore the files, or go on '
            f"from the commit before, without what came after: truncate -s {number * RECORD_BYTES} {path}"
        )


def _find_pieces(folder: Path, state: base.BaseState) -> None:
    """Raises LogDamaged where a file of an earlier generation does not reach as far as the base says."""
    pieces = state.pieces
    ends: dict[int, int] = {}
    columns = zip(pieces.generations, pieces.tokens_at, pieces.logprobs_at, pieces.lengths, strict=True)
    for generation, tokens_at, logprobs_at, length in columns:
        ends[generation] = max(ends.get(generation, 0), tokens_at + 4 * length, logprobs_at + 4 * length)
    for generation, end in ends.items():
        path = file_of(folder, "segments", generation)
        size = path.stat().st_size if path.exists() else 0
        if size < end:
            raise LogDamaged(
                f"{path} ends at byte {size}, and tokens of live rollouts reach to byte {end}: its disk lost them. Put "
                f"the file back; without {base.path_of(folder, state.generation).name} the run goes on from the state before"
            )


def _read(path: Path) -> pa.Buffer:
    """The file as a read-only map; empty where it is missing."""
    if not path.exists() or not path.stat().st_size:
        return pa.py_buffer(b"")
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def _cut(
    paths: list[Path], journal: Path, buffers: list[pa.Buffer], journal_data: pa.Buffer, last: Record | None
) -> int:
    """Removes what lies behind the last commit; returns how many bytes that were."""
    if last is None:
        for path in (*paths, journal):
            path.unlink(missing_ok=True)
        lost: int = sum(b.size for b in buffers) + journal_data.size
        if lost:
            logger.warning("%s: no whole commit in %d bytes of log, which are cut", journal, lost)
        return lost
    keep = [*last.ends, (last.number + 1) * RECORD_BYTES]
    cut = 0
    for path, data, end in zip((*paths, journal), (*buffers, journal_data), keep, strict=True):
        if data.size > end:
            logger.warning("%s: cut a torn tail of %d bytes at %d", path, data.size - end, end)
            os.truncate(path, end)
            cut += data.size - end
    return cut


class _Fold:
    """Applies messages of the log to the book and the columns."""

    def __init__(self, book: Book, columns: Columns, generation: int, next_seq: int, now: float) -> None:
        self._book, self._columns, self._generation, self._now = book, columns, generation, now
        self.next_seq = next_seq

    def messages(self, name: str, file: pa.Buffer, start: int, end: int) -> None:
        """Those between two offsets of the mapped `file`."""
        reader = pa.BufferReader(file)
        reader.seek(start)
        apply = {"prompts": self._prompts, "segments": self._segments, "states": self._states}[name]
        # Ends: each message has at least its frame, and the commit's last one ends at `end`.
        while (at := reader.tell()) < end:
            try:
                batch = pa.ipc.read_record_batch(pa.ipc.read_message(reader), LAYOUTS[name])
            except (pa.ArrowInvalid, OSError, EOFError) as error:
                raise LogDamaged(
                    f"{name}-{self._generation:06d} at byte {at}: the journal's hash holds, but it is no Arrow message "
                    f"of this version's layout ({error}): use the version of asyncrl that wrote it"
                ) from error
            self.next_seq = batch["seq"][-1].as_py() + 1
            apply(batch, file)

    def settle(self) -> None:
        """After each commit, as in the service: closed rollouts are freed."""
        self._columns.drop(self._book.closed, self._book.closed_groups)
        self._book.closed, self._book.closed_groups, self._book.rows = [], [], StateRows()

    def _prompts(self, batch: pa.RecordBatch, file: pa.Buffer) -> None:
        rows = zip(
            batch["group_id"].to_pylist(),
            batch["rollout_ids"].to_pylist(),
            batch["greedy_id"].to_pylist(),
            batch["prompt_id"].to_pylist(),
            batch["position"].to_pylist(),
            slices(batch["tokens"]),
            batch["payload"].to_pylist(),
            strict=True,
        )
        for group_id, rollout_ids, greedy_id, prompt_id, position, tokens, payload in rows:
            self._book.admit(group_id, rollout_ids, prompt_id, position, len(tokens), greedy_id)
            # A copy: the map of a prompt file is not to be held for one prompt.
            prompt = Prompt(tokens.copy(), payload)
            self._columns.put_prompt(group_id, prompt, rollout_ids)

    def _segments(self, batch: pa.RecordBatch, file: pa.Buffer) -> None:
        tokens_at, logprobs_at = values_at(batch, file)
        offsets = batch["tokens"].offsets.to_pylist()
        rows = zip(
            batch["rollout_id"].to_pylist(), batch["version"].to_pylist(), offsets, offsets[1:], strict=False
        )
        for rollout_id, version, first, end in rows:
            if end == first:
                continue
            self._book.extend(self._book.rollouts[rollout_id], version, end - first)
            piece = Piece(
                self._generation, tokens_at + 4 * first, logprobs_at + 4 * first, end - first, version
            )
            self._columns.append(rollout_id, piece)

    def _states(self, batch: pa.RecordBatch, file: pa.Buffer) -> None:
        columns = (batch[name].to_pylist() for name in Transition._fields)
        for row in map(Transition._make, zip(*columns, strict=True)):
            if row.state == State.QUEUED.name:
                rollout = self._book.rollouts[row.rollout_id]
                if row.attempts > rollout.attempts:
                    self._columns.restart(row.rollout_id)
            self._book.replay(row, self._now)
