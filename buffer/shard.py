"""One shard without its socket: requests in, replies out, and what they changed put into the log.

The service calls `carry_out` for each request that arrived, then `seal` (segments get their place in the log), then `attempt`
for those that wait, then `commit`; only then does it answer. Called by `service`, from one thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, assert_never

import numpy as np

from asyncrl.buffer import wire
from asyncrl.buffer.arena import boot_id
from asyncrl.buffer.columns import Prompt
from asyncrl.buffer.config import BufferConfig
from asyncrl.buffer.errors import BadRequest, DiskFull, LeaseLost
from asyncrl.buffer.handover import Layout, Places, joined, lay_out, places
from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.ledger import Prompt as Asked
from asyncrl.buffer.log import SegmentRows
from asyncrl.buffer.records import Group, LedgerSettings, Rollout, Selection
from asyncrl.buffer.staleness import oldest_trainable
from asyncrl.buffer.store import SnapshotFile, Store
from asyncrl.buffer.token_files import Piece

logger = logging.getLogger(__name__)

_ROTATE_AGAIN_S = 10.0
_LARGEST_SCORE = float(np.finfo(np.float32).max)
Body = bytes | memoryview


class Handover(NamedTuple):
    """A batch that was decided on; its body is still to be put somewhere."""

    selection: Selection
    pieces: list[Piece]
    layout: Layout


class Shard:
    """State and log of one shard, in `folder`; goes on from what it finds there."""

    def __init__(
        self,
        settings: LedgerSettings,
        config: BufferConfig,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._clock = settings, clock
        self.store = Store(folder, settings, config, clock)
        self.ledger = Ledger(settings, self.store.book)
        self._host = boot_id()
        self._frozen_until = 0.0
        self._rotate_after = 0.0
        self.rotations, self.longest_rotation_s = 0, 0.0
        self._clear()

    def _clear(self) -> None:
        self._segments = SegmentRows([], [], [], [], [], [], [], [])
        self._admitted: list[tuple[Group, Prompt]] = []

    # ---- requests that are answered at once --------------------------------------------------------------------

    def carry_out(self, request: wire.Request, body: Body) -> wire.Reply:
        """Raises BadRequest, LeaseLost or DiskFull: the asker's to hear. Nothing is changed then but what it names."""
        match request:
            case wire.Append():
                return self._append(request, body)
            case wire.Score(rollouts=scored):
                return self._score(scored)
            case wire.Fail():
                return self._fail(request)
            case wire.Release(leases=leases):
                return self._release(leases)
            case wire.Heartbeat(engine_id=engine_id):
                self.ledger.heartbeat(engine_id, self._clock())
                return wire.Number(value=0)
            case wire.EngineLost(engine_id=engine_id, for_good=for_good):
                return wire.Number(value=self.ledger.release_engine(engine_id, for_good=for_good))
            case wire.Commit(batch_id=batch_id, version=version):
                return wire.Balance(counts=self.ledger.commit(batch_id, version))
            case wire.Publish(version=version):
                self.ledger.publish(version)
                return wire.Number(value=version)
            case wire.Freeze(seconds=seconds):
                self._frozen_until = self._clock() + seconds
                return wire.Frozen(frontier=self.ledger.book.frontier)
            case wire.Snapshot(step=step, keep=keep):
                return self._snapshot(step, keep)
            case wire.Restore(step=step):
                return self._restore(step)
            case wire.Stop():
                return wire.Balance(counts=self.ledger.check())
            case (
                wire.Attach()
                | wire.Status()
                | wire.Capacity()
                | wire.Admit()
                | wire.Lease()
                | wire.ReadBatch()
            ):
                raise BadRequest(f"{type(request).__name__} is the service's to answer")
            case _:
                assert_never(request)

    def _append(self, request: wire.Append, body: Body) -> wire.Refused:
        tokens, logprobs = _flat_columns(request, body)
        append, now = self.ledger.append, self._clock()
        refused: list[int] = []
        taken: list[int] = []
        try:
            for row, (rollout_id, lease_id, start, count, version, finish_reason) in enumerate(
                zip(
                    request.rollout_ids,
                    request.lease_ids,
                    request.starts,
                    request.lengths,
                    request.versions,
                    request.finish_reasons,
                    strict=True,
                )
            ):
                try:
                    if append(rollout_id, lease_id, start, count, version, finish_reason, now):
                        taken.append(row)
                except LeaseLost:
                    refused.append(rollout_id)
        finally:
            # Rows before a bad one were taken: the log must hold exactly what the ledger holds.
            self._keep(request, taken, tokens, logprobs)
        return wire.Refused(rollout_ids=refused)

    def _keep(self, request: wire.Append, taken: list[int], tokens: np.ndarray, logprobs: np.ndarray) -> None:
        rows = self._segments
        columns = (
            (rows.rollout_ids, request.rollout_ids),
            (rows.lease_ids, request.lease_ids),
            (rows.starts, request.starts),
            (rows.versions, request.versions),
            (rows.finish_reasons, request.finish_reasons),
            (rows.lengths, request.lengths),
        )
        if len(taken) == len(request.rollout_ids):
            for mine, theirs in columns:
                mine.extend(theirs)  # type: ignore[arg-type]
            rows.tokens.append(tokens)
            rows.logprobs.append(logprobs)
            return
        ends = np.cumsum(request.lengths)
        for row in taken:
            for mine, theirs in columns:
                mine.append(theirs[row])  # type: ignore[arg-type]
            first = ends[row] - request.lengths[row]
            rows.tokens.append(tokens[first : ends[row]])
            rows.logprobs.append(logprobs[first : ends[row]])

    def _score(self, scored: list[wire.Scored]) -> wire.Refused:
        for s in scored:
            for name, value in (("reward", s.reward), ("cost", s.cost)):
                if not abs(value) <= _LARGEST_SCORE:  # nor where it is NaN
                    raise BadRequest(
                        f"{name} of rollout {s.rollout_id} is {value}: {name}s must be finite (as float32)"
                    )
        refused = []
        for s in scored:
            try:
                self.ledger.score(s.rollout_id, s.lease_id, s.reward, s.cost)
            except LeaseLost:
                refused.append(s.rollout_id)
        return wire.Refused(rollout_ids=refused)

    def _fail(self, request: wire.Fail) -> wire.Refused:
        try:
            again = self.ledger.fail(request.rollout_id, request.lease_id, request.reason)
        except LeaseLost:
            return wire.Refused(rollout_ids=[request.rollout_id])
        if again:
            self.seal()  # what was appended before the failure has its place before the restart
            self.store.columns.restart(request.rollout_id)
        return wire.Refused(rollout_ids=[])

    def _release(self, leases: list[tuple[int, int]]) -> wire.Refused:
        refused = []
        for rollout_id, lease_id in leases:
            try:
                self.ledger.release(rollout_id, lease_id)
            except LeaseLost:
                refused.append(rollout_id)
        return wire.Refused(rollout_ids=refused)

    # ---- requests that wait ------------------------------------------------------------------------------------

    def attempt(self, request: wire.Waits, body: Body, number: int = 0) -> wire.Reply | Handover | None:
        """The answer, if there is one now. `number` tells requests of this process apart: this one is looked at again."""
        match request:
            case wire.Capacity():
                capacity = 0 if self._clock() < self._frozen_until else self.ledger.capacity
                return wire.Number(value=capacity) if capacity else None
            case wire.Admit():
                return None if self._clock() < self._frozen_until else self._admit(request, body)
            case wire.Lease():
                rollouts = self.ledger.lease(
                    request.engine_id,
                    request.limit,
                    self._clock(),
                    request.after,
                    next_batch_only=self.store.files.is_full,
                    kv_free_tokens=request.kv_free_tokens,
                    request=number,
                )
                return wire.Leases(rollouts=[self._leased(r) for r in rollouts]) if rollouts else None
            case wire.ReadBatch(after=after):
                selection = self.ledger.select(after)
                return self._batch(selection) if selection else None
            case _:
                assert_never(request)

    def _admit(self, request: wire.Admit, body: Body) -> wire.Admitted:
        if (
            not len(request.positions)
            == len(request.prompt_ids)
            == len(request.payloads)
            == len(request.lengths)
        ):
            raise BadRequest("admission: positions, prompt_ids, payloads and lengths differ in length")
        if len(body) != 4 * sum(request.lengths):
            raise BadRequest(
                f"admission: {len(body)} bytes of tokens, the lengths say {4 * sum(request.lengths)}"
            )
        groups = self.ledger.admit(list(map(Asked, request.prompt_ids, request.positions, request.lengths)))
        flat, at = np.frombuffer(bytes(body), np.int32), 0
        for group, payload, length in zip(groups, request.payloads, request.lengths, strict=True):
            first, at = at, at + length
            if group is not None:
                prompt = Prompt(flat[first:at], payload)
                self.store.columns.put_prompt(group.group_id, prompt, group.rollouts)
                self._admitted.append((group, prompt))
        admitted = sum(g is not None for g in groups)
        return wire.Admitted(admitted=admitted, passed_over=len(groups) - admitted)

    def _leased(self, rollout: Rollout) -> wire.Leased:
        prompt = self.store.columns.prompts[rollout.group.group_id]
        return wire.Leased(
            rollout.rollout_id,
            rollout.lease_id,
            rollout.group.group_id,
            prompt.tokens.tobytes(),
            self._prefix(rollout) if rollout.length else b"",
            rollout.finish_reason,
            prompt.payload,
            list(rollout.spans),
            rollout.greedy,
        )

    def _prefix(self, rollout: Rollout) -> bytes:
        self.store.log.write_out()  # it may have come in this very round
        tokens = self.store.columns.tokens(rollout.rollout_id)
        self.store.files.give_back()
        return tokens

    def _batch(self, selection: Selection) -> Handover:
        rollouts = [self.ledger.book.rollouts[r] for r in selection.rollout_ids]
        oldest = oldest_trainable(selection.version, self._settings.max_staleness_versions)
        columns = self.store.columns
        pieces = [piece for rollout_id in selection.rollout_ids for piece in columns.answers[rollout_id]]
        return Handover(selection, pieces, lay_out(rollouts, pieces, columns, oldest))

    def places(self, batch: Handover) -> Places:
        """Where the body of a batch lies in the log, once that is committed."""
        return places(batch.pieces, self.store.files, self._host)

    def body(self, batch: Handover) -> memoryview:
        """The body of a batch for a reader on another host."""
        self.store.log.write_out()
        body = joined(batch.pieces, self.store.files)
        self.store.files.give_back()
        return body

    def expire(self) -> None:
        for rollout in self.ledger.expire(self._clock()):
            logger.warning(
                "lease of rollout %d expired; it goes on with %d tokens", rollout.rollout_id, rollout.length
            )

    # ---- the log -----------------------------------------------------------------------------------------------

    def seal(self) -> None:
        """Gives what came in its place in the log, so that it can be read."""
        if self._admitted:
            prompts = [prompt for _, prompt in self._admitted]
            self.store.log.prompts(
                [group for group, _ in self._admitted],
                [p.tokens for p in prompts],
                [p.payload for p in prompts],
            )
        rows = self._segments
        if rows.rollout_ids:
            tokens_at, logprobs_at = self.store.log.segments(rows)
            generation, append = self.store.log.generation, self.store.columns.append
            for rollout_id, version, count in zip(rows.rollout_ids, rows.versions, rows.lengths, strict=True):
                if count:
                    append(rollout_id, Piece(generation, tokens_at, logprobs_at, count, version))
                    tokens_at += 4 * count
                    logprobs_at += 4 * count
        if self._admitted or rows.rollout_ids:
            self._clear()

    def commit(self) -> None:
        """All changes so far are in the log when it returns. Raises DiskFull: call again, and change nothing until then."""
        self.seal()
        rows = self.ledger.take_rows()
        if len(rows):
            self.store.log.states(rows)
        self.store.log.commit()
        self.store.columns.drop(*self.ledger.take_closed())
        if self.store.wants_rotation and self._clock() >= self._rotate_after:
            self._rotate()

    def _rotate(self) -> None:
        began = self._clock()
        try:
            self.store.rotate_log()
        except DiskFull as error:
            self._rotate_after = self._clock() + _ROTATE_AGAIN_S
            logger.warning("the log's next file waits: %s", error)
            return
        self.rotations += 1
        self.longest_rotation_s = max(self.longest_rotation_s, self._clock() - began)

    # ---- snapshots ---------------------------------------------------------------------------------------------

    def _snapshot(self, step: int, keep: list[int]) -> wire.Snapshotted:
        self.commit()
        self._frozen_until = 0.0
        return _snapshotted(self.store.snapshot(step, keep))

    def _restore(self, step: int) -> wire.Snapshotted:
        self.commit()
        snapshot = self.store.restore(step)
        self.ledger = Ledger(self._settings, self.store.book)
        self.ledger.note_restored()
        self.ledger.drop_quarantined()
        self._frozen_until = 0.0
        return _snapshotted(snapshot)

    def close(self) -> None:
        self.store.close()


def _snapshotted(snapshot: SnapshotFile) -> wire.Snapshotted:
    return wire.Snapshotted(step=snapshot.step, version=snapshot.version, frontier=snapshot.frontier)


def _flat_columns(request: wire.Append, body: Body) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and logprobs of all segments, as views of `body`. Raises BadRequest where they do not fit or are not finite."""
    count = len(request.rollout_ids)
    for name in ("lease_ids", "starts", "versions", "lengths", "finish_reasons"):
        if len(getattr(request, name)) != count:
            raise BadRequest(f"append: {count} rollout_ids and {len(getattr(request, name))} {name}")
    total = sum(request.lengths)
    if len(body) != 8 * total:
        raise BadRequest(
            f"append of {total} tokens: expected a body of {8 * total} bytes (int32 tokens, then float32 logprobs), "
            f"got {len(body)}"
        )
    tokens = np.frombuffer(body, np.int32, total)
    logprobs = np.frombuffer(body, np.float32, total, 4 * total)
    # A sum is finite when all are, unless it overflows; only then they are looked at one by one.
    if total and not np.isfinite(logprobs.sum()) and not np.isfinite(logprobs).all():
        bad = int(np.flatnonzero(~np.isfinite(logprobs))[0])
        row = int(np.searchsorted(np.cumsum(request.lengths), bad, side="right"))
        raise BadRequest(
            f"append: logprob {logprobs[bad]} in the segment of rollout {request.rollout_ids[row]} sampled at version "
            f"{request.versions[row]}: the engine's numbers are broken; nothing was taken"
        )
    return tokens, logprobs
