"""The learner's side of the buffer: batches, commits, snapshots. Blocking, for one thread; one reader for a run.

A batch is read in parts, one of each shard, and committed to each; a part that came is kept while the others are waited for.
What a reader got is named in its next request, so that a batch whose answer was lost comes again, and no other twice.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import pyarrow as pa

from asyncrl.buffer import wire
from asyncrl.buffer.connection import Answer, BlockingConnection, BufferAddress
from asyncrl.buffer.errors import SnapshotUneven
from asyncrl.buffer.handover import FilesUnreadable, LogFiles, arrive, split
from asyncrl.buffer.records import Counts, Selection, merge
from asyncrl.buffer.reports import add_counts, add_reports

logger = logging.getLogger(__name__)

_FREEZES_S = (30.0, 60.0, 120.0)
"""Of each try: what was too short is doubled. A reader that dies leaves the shards frozen for as long."""
_SNAPSHOT_S = 120.0


class BlockingBufferClient:
    """Raises BufferUnreachable, DiskFull, LeaseLost or BadRequest."""

    def __init__(self, address: BufferAddress) -> None:
        self._shards = [BlockingConnection(endpoint, address.keys) for endpoint in address.endpoints]
        self._parts: dict[int, tuple[Selection, pa.RecordBatch]] = {}
        self._last_batch = [0] * len(self._shards)
        self._files = LogFiles()
        self._far: set[int] = set()
        """Shards whose files cannot be read from here."""

    def close(self) -> None:
        for connection in self._shards:
            connection.close()

    def ask(self, shard: int, request: wire.Request, timeout_s: float = 0.0) -> Any:
        return self._shards[shard].ask(request, timeout_s=timeout_s).reply

    def _ask_all(self, request: wire.Request, timeout_s: float = 0.0) -> list[Any]:
        return [self.ask(shard, request, timeout_s) for shard in range(len(self._shards))]

    # ---- batches -----------------------------------------------------------------------------------------------

    def read_batch(self, timeout_s: float) -> tuple[Selection, pa.RecordBatch] | None:
        """The next batch (`schema.BATCH` rows), or None when it was not whole within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        for shard in range(len(self._shards)):
            if shard in self._parts:
                continue
            part = self._read_part(shard, max(0.0, deadline - time.monotonic()))
            if part is None:
                return None
            self._parts[shard] = part
            self._last_batch[shard] = part[0].batch_ids[0]
        parts = [self._parts[shard] for shard in range(len(self._shards))]
        self._parts.clear()
        if len(parts) == 1:
            return parts[0]
        rows = pa.Table.from_batches([rows for _, rows in parts]).combine_chunks().to_batches()[0]
        return merge([selection for selection, _ in parts]), rows

    def _read_part(self, shard: int, timeout_s: float) -> tuple[Selection, pa.RecordBatch] | None:
        answer = self._ask_for_batch(shard, timeout_s)
        if not isinstance(answer.reply, wire.Batch):
            return None
        if answer.reply.places is not None:
            try:
                columns = self._files.read(answer.reply.places, answer.reply.layout)
            except FilesUnreadable as reason:
                logger.info("shard %d: batches come through the socket: %s", shard, reason)
                self._far.add(shard)
                answer = self._ask_for_batch(shard, timeout_s)  # the same batch once more
                if not isinstance(answer.reply, wire.Batch):
                    return None
        selection, layout = answer.reply.selection, answer.reply.layout
        if answer.body is not None:
            columns = split(answer.body, layout.tokens)
        return selection, arrive(layout, selection.rollout_ids, *columns)

    def _ask_for_batch(self, shard: int, timeout_s: float) -> Answer:
        near = shard not in self._far
        request = wire.ReadBatch(after=self._last_batch[shard], timeout_s=timeout_s, from_files=near)
        return self._shards[shard].ask(request, timeout_s=timeout_s)

    def commit(self, batch_ids: tuple[int, ...], version: int) -> Counts:
        """The batch is trained and `version` is published, on every shard."""
        replies = [
            self.ask(shard, wire.Commit(batch_id=batch_id, version=version))
            for shard, batch_id in enumerate(batch_ids)
        ]
        return add_counts([reply.counts for reply in replies])

    # ---- the run -----------------------------------------------------------------------------------------------

    def publish(self, version: int) -> None:
        """`version`, the present one, is live on the engines: at the start of a run, or after `restore`."""
        self._ask_all(wire.Publish(version=version))

    def snapshot(self, step: int, keep: tuple[int, ...] = ()) -> wire.Snapshotted:
        """Ties the buffer's state to a learner checkpoint of `step`; of the others those in `keep` stay.

        No prompt is admitted between the first shard's snapshot and the last one's: they show one frontier. A freeze does
        not outlive its shard's process, nor its time, and then a prompt before the furthest frontier could be in no
        snapshot. So the frontiers are compared, and where one has moved all is done again. Raises SnapshotUneven in the end.
        """
        request = wire.Snapshot(step=step, keep=list(keep))
        if len(self._shards) == 1:
            return self.ask(0, request, _SNAPSHOT_S)  # type: ignore[no-any-return]
        for freeze_s in _FREEZES_S:
            frozen = [reply.frontier for reply in self._ask_all(wire.Freeze(seconds=freeze_s))]
            replies = self._ask_all(request, _SNAPSHOT_S)
            taken = [reply.frontier for reply in replies]
            if taken == frozen:
                return _one(replies)
            logger.warning("snapshot of step %d: frontiers %s have become %s", step, frozen, taken)
        raise SnapshotUneven(
            f"snapshot of step {step}: expected the shards' frontiers to stay at {frozen} for {freeze_s:g} s, they came to {taken} "
            f"in the last of {len(_FREEZES_S)} tries: shards start again and again (see their logs), or their disk takes longer "
            "than that. Restore an earlier step; this one would leave prompts out"
        )

    def restore(self, step: int) -> wire.Snapshotted:
        """Back to the state at `step`: what was trained since is trainable again, what was admitted since will be admitted
        again (walk the frontier from `frontier`). Then publish its version, and go on."""
        replies = self._ask_all(wire.Restore(step=step), _SNAPSHOT_S)
        self._parts.clear()
        self._last_batch = [0] * len(self._shards)
        return _one(replies)

    def status(self) -> wire.Report:
        return add_reports(self._ask_all(wire.Status()))

    def stop(self) -> Counts:
        return add_counts([reply.counts for reply in self._ask_all(wire.Stop())])


def _one(replies: list[wire.Snapshotted]) -> wire.Snapshotted:
    """Of all shards. The frontier is the furthest: no prompt was admitted between their snapshots."""
    return wire.Snapshotted(
        step=replies[0].step,
        version=replies[0].version,
        frontier=max(reply.frontier for reply in replies),
    )
