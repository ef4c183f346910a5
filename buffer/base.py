"""The whole state of a shard but its tokens, as one file: where a generation of the log begins.

Holds the book, the prompts of live groups, and where in the files of earlier generations the tokens of live rollouts lie.
Written beside the file and renamed, with a checksum behind it: it is there as a whole or not at all. `load(dump(x))`
is `x`, but for leases' clocks, which start anew. Called by `shard` and `recovery`.
"""

from __future__ import annotations

import heapq
import itertools
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from asyncrl.buffer.book import Book, extend_spans
from asyncrl.buffer.columns import Columns, Prompt
from asyncrl.buffer.records import EngineRecord, Group, LedgerSettings, Rollout
from asyncrl.buffer.schema import State
from asyncrl.buffer.token_files import Piece, TokenFiles

_CHECK = struct.Struct("<Q")


class GroupColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Live groups, one entry of each list, in the order of their ids."""

    group_ids: list[int]
    prompt_ids: list[str]
    positions: list[int]
    batch_ids: list[int]
    greedy_ids: list[int]
    prompts: list[bytes]
    """int32 tokens"""
    payloads: list[str]
    sizes: list[int]
    """Rollouts that are not closed."""


class RolloutColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rollouts of the groups, group by group."""

    rollout_ids: list[int]
    states: list[int]
    lease_ids: list[int]
    scored_lease_ids: list[int]
    engine_ids: list[str]
    attempts: list[int]
    completed_versions: list[int]
    finish_reasons: list[str]
    rewards: list[float]
    costs: list[float]
    pieces: list[int]
    """How many."""


class PieceColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the tokens of the rollouts lie, rollout by rollout."""

    generations: list[int]
    tokens_at: list[int]
    logprobs_at: list[int]
    lengths: list[int]
    versions: list[int]


class BaseState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a base file says. Ids are sorted, so that equal states are equal structs."""

    generation: int
    history: list[int]
    """Earlier generations that belong to this one's past; others were abandoned by a restore."""
    next_seq: int
    version: int
    serving: bool
    frontier: int
    next_ids: tuple[int, int, int, int]
    """group, rollout, lease, batch"""
    admitted: int
    trained: int
    baselines: int
    dropped: dict[str, int]
    failed: dict[str, int]
    lengths: dict[int, int]
    dropped_lengths: dict[int, int]
    spanning_trained: int
    most_versions: int
    quarantined: dict[str, str]
    engines: dict[str, int]
    """engine_id -> last lease"""
    batches: dict[int, list[int]]
    """batch_id -> group_ids in the order of hand-over"""
    groups: GroupColumns
    rollouts: RolloutColumns
    pieces: PieceColumns


def dump(book: Book, columns: Columns, generation: int, history: list[int], next_seq: int) -> BaseState:
    groups = [g for _, g in sorted(book.groups.items())]
    rollouts = [r for g in groups for r in g.rollouts.values()]
    answers = [columns.answers[r.rollout_id] for r in rollouts]
    return BaseState(
        generation=generation,
        history=history,
        next_seq=next_seq,
        version=book.version,
        serving=book.serving,
        frontier=book.frontier,
        next_ids=(book.next_group, book.next_rollout, book.next_lease, book.next_batch),
        admitted=book.admitted,
        trained=book.trained,
        baselines=book.baselines,
        dropped=dict(sorted(book.dropped.items())),
        failed=dict(sorted(book.failed.items())),
        lengths=dict(sorted(book.lengths.items())),
        dropped_lengths=dict(sorted(book.dropped_lengths.items())),
        spanning_trained=book.spanning_trained,
        most_versions=book.most_versions,
        quarantined=dict(sorted(book.quarantined.items())),
        engines={k: v.last_lease_id for k, v in sorted(book.engines.items()) if v.last_lease_id},
        batches={b: [g.group_id for g in groups] for b, groups in sorted(book.batches.items())},
        groups=_dump_groups(groups, columns),
        rollouts=_dump_rollouts(rollouts, answers),
        pieces=_dump_pieces([piece for answer in answers for piece in answer]),
    )


def _dump_groups(groups: list[Group], columns: Columns) -> GroupColumns:
    prompts = [columns.prompts[g.group_id] for g in groups]
    return GroupColumns(
        group_ids=[g.group_id for g in groups],
        prompt_ids=[g.prompt_id for g in groups],
        positions=[g.position for g in groups],
        batch_ids=[g.batch_id for g in groups],
        greedy_ids=[g.greedy_id for g in groups],
        prompts=[p.tokens.tobytes() for p in prompts],
        payloads=[p.payload for p in prompts],
        sizes=[len(g.rollouts) for g in groups],
    )


def _dump_rollouts(rollouts: list[Rollout], answers: list[list[Piece]]) -> RolloutColumns:
    return RolloutColumns(
        rollout_ids=[r.rollout_id for r in rollouts],
        states=[int(r.state) for r in rollouts],
        lease_ids=[r.lease_id for r in rollouts],
        scored_lease_ids=[r.scored_lease_id for r in rollouts],
        engine_ids=[r.engine_id for r in rollouts],
        attempts=[r.attempts for r in rollouts],
        completed_versions=[r.completed_version for r in rollouts],
        finish_reasons=[r.finish_reason for r in rollouts],
        rewards=[r.reward for r in rollouts],
        costs=[r.cost for r in rollouts],
        pieces=[len(answer) for answer in answers],
    )


def _dump_pieces(pieces: list[Piece]) -> PieceColumns:
    # Transposed at once: there may be a million, and the shard's loop stands still meanwhile.
    columns: list[list[int]] = [list(c) for c in zip(*pieces, strict=True)] or [[] for _ in Piece._fields]
    generations, tokens_at, logprobs_at, lengths, versions = columns
    return PieceColumns(
        generations=generations,
        tokens_at=tokens_at,
        logprobs_at=logprobs_at,
        lengths=lengths,
        versions=versions,
    )


def load(state: BaseState, settings: LedgerSettings, files: TokenFiles, now: float) -> tuple[Book, Columns]:
    book, columns = Book(settings), Columns(files)
    book.version, book.serving, book.frontier = state.version, state.serving, state.frontier
    book.next_group, book.next_rollout, book.next_lease, book.next_batch = state.next_ids
    book.admitted, book.trained, book.baselines = state.admitted, state.trained, state.baselines
    book.dropped, book.failed = Counter(state.dropped), Counter(state.failed)
    book.lengths, book.dropped_lengths = Counter(state.lengths), Counter(state.dropped_lengths)
    book.spanning_trained, book.most_versions = state.spanning_trained, state.most_versions
    book.quarantined = dict(state.quarantined)
    book.engines = {k: EngineRecord(now, last) for k, last in state.engines.items()}
    rollouts = _load_rollouts(state, columns, now)
    for group in _load_groups(state.groups, columns, rollouts):
        book.groups[group.group_id] = group
        book.rollouts.update(group.rollouts)
        for rollout in group.rollouts.values():
            rollout.group = group
            book.by_state[rollout.state] += 1
            if rollout.state is State.LEASED:
                book.engines[rollout.engine_id].generating += 1
        _order(group, book)
    book.batches = {b: [book.groups[g] for g in ids] for b, ids in state.batches.items()}
    return book, columns


_NOWHERE = Group(0, "", 0, 0)


def _load_rollouts(state: BaseState, columns: Columns, now: float) -> list[Rollout]:
    """Their groups are still to be set. Spans follow from the pieces."""
    r = state.rollouts
    pieces = _load_pieces(state.pieces, columns.files)
    rollouts = []
    fields = zip(
        r.rollout_ids,
        r.states,
        r.lease_ids,
        r.scored_lease_ids,
        r.engine_ids,
        r.attempts,
        r.completed_versions,
        r.finish_reasons,
        r.rewards,
        r.costs,
        r.pieces,
        strict=True,
    )
    for (
        rollout_id,
        kind,
        lease_id,
        scored_id,
        engine_id,
        attempts,
        completed,
        finish,
        reward,
        cost,
        count,
    ) in fields:
        answer = list(itertools.islice(pieces, count))
        columns.answers[rollout_id] = answer
        spans: list[tuple[int, int]] = []
        for piece in answer:
            extend_spans(spans, piece.version, piece.length)
        rollouts.append(
            Rollout(
                rollout_id=rollout_id,
                group=_NOWHERE,
                state=State(kind),
                lease_id=lease_id,
                scored_lease_id=scored_id,
                engine_id=engine_id,
                touched=now,
                length=sum(piece.length for piece in answer),
                spans=spans,
                attempts=attempts,
                completed_version=completed,
                finish_reason=finish,
                reward=reward,
                cost=cost,
            )
        )
    return rollouts


def _load_pieces(p: PieceColumns, files: TokenFiles) -> Iterator[Piece]:
    fields = zip(p.generations, p.tokens_at, p.logprobs_at, p.lengths, p.versions, strict=True)
    for piece in map(Piece._make, fields):
        files.hold(piece)
        yield piece


def _load_groups(g: GroupColumns, columns: Columns, rollouts: list[Rollout]) -> Iterator[Group]:
    left = iter(rollouts)
    fields = zip(
        g.group_ids,
        g.prompt_ids,
        g.positions,
        g.batch_ids,
        g.greedy_ids,
        g.prompts,
        g.payloads,
        g.sizes,
        strict=True,
    )
    for group_id, prompt_id, position, batch_id, greedy_id, tokens, payload, size in fields:
        prompt = Prompt(np.frombuffer(tokens, np.int32), payload)
        columns.prompts[group_id] = prompt
        members = {r.rollout_id: r for r in itertools.islice(left, size)}
        yield Group(
            group_id, prompt_id, position, len(prompt.tokens), greedy_id, rollouts=members, batch_id=batch_id
        )


def _order(group: Group, book: Book) -> None:
    """The group's and its rollouts' places in the book's orders."""
    book.find_age(group)
    group.scored = sum(
        r.state in (State.SCORED, State.BATCHED) for r in group.rollouts.values() if not r.greedy
    )
    for rollout in group.rollouts.values():
        if rollout.state is State.QUEUED:
            book.enqueue(rollout)
        if rollout.lease_id:
            deadline = rollout.touched + book.settings.lease_timeout_s
            heapq.heappush(book.expiry, (deadline, rollout.rollout_id, rollout.lease_id))
    if not group.batch_id and book.is_complete(group):
        assert group.oldest_version is not None
        heapq.heappush(book.ready, (group.oldest_version, group.group_id))


def write(path: Path, data: bytes, *, fsync: bool = True) -> None:
    """All of `data` under `path`, or nothing of it; with `fsync` also where the power fails."""
    aside = path.with_name(path.name + ".new")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        if fsync:
            os.fsync(file.fileno())
    os.replace(aside, path)
    if not fsync:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove(path: Path) -> None:
    """Takes back a `write` that failed."""
    path.unlink(missing_ok=True)
    path.with_name(path.name + ".new").unlink(missing_ok=True)


def encode(state: BaseState) -> bytes:
    body = msgspec.msgpack.encode(state)
    return body + _CHECK.pack(xxhash.xxh3_64_intdigest(body))


def decode(data: bytes) -> BaseState | None:
    """None where the bytes are not whole."""
    body, check = data[: -_CHECK.size], data[-_CHECK.size :]
    if len(check) != _CHECK.size or _CHECK.unpack(check)[0] != xxhash.xxh3_64_intdigest(body):
        return None
    return msgspec.msgpack.decode(body, type=BaseState)


def path_of(folder: Path, generation: int) -> Path:
    return folder / f"base-{generation:06d}.msgpack"
