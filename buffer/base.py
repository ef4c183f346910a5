"""The whole state of a shard but its tokens, as one file: where a generation of the log begins.

Holds the book, the prompts of live groups, and where in the files of earlier generations the tokens of live rollouts lie.
Written beside the file and renamed, with a checksum behind it: it is there as a whole or not at all. `load(dump(x))`
is `x`, but for leases' clocks, which start anew. Called by `shard` and `recovery`.
"""

from __future__ import annotations

import heapq
import os
import struct
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from asyncrl.buffer.blocks import Block, Blocks, Piece
from asyncrl.buffer.book import Book
from asyncrl.buffer.columns import Columns, Prompt
from asyncrl.buffer.records import EngineRecord, Group, LedgerSettings, Rollout
from asyncrl.buffer.schema import State

_CHECK = struct.Struct("<Q")


class RolloutState(msgspec.Struct, frozen=True, array_like=True):
    rollout_id: int
    state: int
    lease_id: int
    scored_lease_id: int
    engine_id: str
    spans: list[tuple[int, int]]
    attempts: int
    completed_version: int
    finish_reason: str
    reward: float
    pieces: list[tuple[int, int, int, int, int]]
    """(generation, tokens_at, logprobs_at, count, version)"""


class GroupState(msgspec.Struct, frozen=True, array_like=True):
    group_id: int
    prompt_id: str
    position: int
    batch_id: int
    tokens: bytes
    payload: str
    rollouts: list[RolloutState]


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
    groups: list[GroupState]


def dump(book: Book, columns: Columns, generation: int, history: list[int], next_seq: int) -> BaseState:
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
        dropped=dict(sorted(book.dropped.items())),
        failed=dict(sorted(book.failed.items())),
        lengths=dict(sorted(book.lengths.items())),
        dropped_lengths=dict(sorted(book.dropped_lengths.items())),
        spanning_trained=book.spanning_trained,
        most_versions=book.most_versions,
        quarantined=dict(sorted(book.quarantined.items())),
        engines={k: v.last_lease_id for k, v in sorted(book.engines.items()) if v.last_lease_id},
        batches={b: [g.group_id for g in groups] for b, groups in sorted(book.batches.items())},
        groups=[_dump_group(g, columns) for _, g in sorted(book.groups.items())],
    )


def _dump_group(group: Group, columns: Columns) -> GroupState:
    prompt = columns.prompts[group.group_id]
    return GroupState(
        group_id=group.group_id,
        prompt_id=group.prompt_id,
        position=group.position,
        batch_id=group.batch_id,
        tokens=prompt.tokens.tobytes(),
        payload=prompt.payload,
        rollouts=[_dump_rollout(r, columns.answers[r.rollout_id]) for r in group.rollouts.values()],
    )


def _dump_rollout(rollout: Rollout, pieces: list[Piece]) -> RolloutState:
    return RolloutState(
        rollout_id=rollout.rollout_id,
        state=int(rollout.state),
        lease_id=rollout.lease_id,
        scored_lease_id=rollout.scored_lease_id,
        engine_id=rollout.engine_id,
        spans=list(rollout.spans),
        attempts=rollout.attempts,
        completed_version=rollout.completed_version,
        finish_reason=rollout.finish_reason,
        reward=rollout.reward,
        pieces=[(p.block.generation, p.tokens_at, p.logprobs_at, p.length, p.version) for p in pieces],
    )


def load(state: BaseState, settings: LedgerSettings, blocks: Blocks, now: float) -> tuple[Book, Columns]:
    book, columns = Book(settings), Columns(blocks)
    book.version, book.serving, book.frontier = state.version, state.serving, state.frontier
    book.next_group, book.next_rollout, book.next_lease, book.next_batch = state.next_ids
    book.admitted, book.trained = state.admitted, state.trained
    book.dropped, book.failed = Counter(state.dropped), Counter(state.failed)
    book.lengths, book.dropped_lengths = Counter(state.lengths), Counter(state.dropped_lengths)
    book.spanning_trained, book.most_versions = state.spanning_trained, state.most_versions
    book.quarantined = dict(state.quarantined)
    book.engines = {k: EngineRecord(now, last) for k, last in state.engines.items()}
    files: dict[int, Block] = {}
    for group in state.groups:
        _load_group(group, book, columns, files, now)
    book.batches = {b: [book.groups[g] for g in ids] for b, ids in state.batches.items()}
    return book, columns


def _load_group(state: GroupState, book: Book, columns: Columns, files: dict[int, Block], now: float) -> None:
    group = Group(state.group_id, state.prompt_id, state.position, batch_id=state.batch_id)
    tokens = np.frombuffer(state.tokens, np.int32)
    columns.put_prompt(
        group.group_id,
        Prompt(state.prompt_id, tokens, state.payload, state.position),
        (r.rollout_id for r in state.rollouts),
    )
    for r in state.rollouts:
        rollout = group.rollouts[r.rollout_id] = _load_rollout(r, group, now)
        for generation, tokens_at, logprobs_at, count, version in r.pieces:
            block = files.setdefault(generation, columns.blocks.on_disk(generation, 0, 0))
            columns.blocks.grow(block, 8 * count)
            columns.append(r.rollout_id, Piece(block, tokens_at, logprobs_at, count, version))
        book.rollouts[r.rollout_id] = rollout
        book.by_state[rollout.state] += 1
    book.groups[group.group_id] = group
    _order(group, book)


def _load_rollout(state: RolloutState, group: Group, now: float) -> Rollout:
    return Rollout(
        rollout_id=state.rollout_id,
        group=group,
        state=State(state.state),
        lease_id=state.lease_id,
        scored_lease_id=state.scored_lease_id,
        engine_id=state.engine_id,
        touched=now,
        length=sum(count for _, count in state.spans),
        spans=list(state.spans),
        attempts=state.attempts,
        completed_version=state.completed_version,
        finish_reason=state.finish_reason,
        reward=state.reward,
    )


def _order(group: Group, book: Book) -> None:
    """The group's and its rollouts' places in the book's orders."""
    book.find_age(group)
    group.scored = sum(r.state in (State.SCORED, State.BATCHED) for r in group.rollouts.values())
    for rollout in group.rollouts.values():
        if rollout.state is State.QUEUED:
            book.enqueue(rollout)
        if rollout.lease_id:
            deadline = rollout.touched + book.settings.lease_timeout_s
            heapq.heappush(book.expiry, (deadline, rollout.rollout_id, rollout.lease_id))
    if not group.batch_id and group.scored == book.settings.rollouts_per_prompt:
        assert group.oldest_version is not None
        heapq.heappush(book.ready, (group.oldest_version, group.group_id))


def write(path: Path, data: bytes) -> None:
    """All of `data` under `path`, or nothing of it, also where the power fails."""
    aside = path.with_name(path.name + ".new")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
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
