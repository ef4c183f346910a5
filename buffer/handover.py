"""A batch on its way from a shard to the learner.

What can be said per piece or per group is said once, in the header (`Layout`); `schema.BATCH` is made on arrival. The tokens and
logprobs themselves the reader takes from the log's files, where both are on one host (`Places`): the shard does not touch them.
Else they are the body: all tokens (int32), then all logprobs (float32). Called by `shard` (out) and `reader` (in).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import pyarrow as pa

from asyncrl.buffer.arena import boot_id
from asyncrl.buffer.arrow_message import offsets_of
from asyncrl.buffer.columns import Columns, flat_lists, list_array
from asyncrl.buffer.errors import BadRequest, BufferFault
from asyncrl.buffer.records import Rollout
from asyncrl.buffer.schema import BATCH, FLAGS, LOGPROBS, TOKENS
from asyncrl.buffer.token_files import TOKEN_BYTES, Piece, TokenFiles


class FilesUnreadable(BufferFault):
    """The log's files are not to be read from here: another host, or another view of the disks."""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What a batch holds. Rollouts stand in the order of the selection."""

    group_ids: list[int]
    group_sizes: list[int]
    """Rollouts of each group, which stand together."""
    prompts: list[bytes]
    """int32, of each group."""
    lengths: list[int]
    """Answer tokens of each rollout."""
    piece_versions: list[int]
    piece_lengths: list[int]
    """Runs of tokens of one version, over all rollouts."""
    rewards: list[float]
    costs: list[float]
    greedy: list[bool]
    """Of each rollout: it is its group's baseline."""
    finish_reasons: list[str]
    oldest_trainable_version: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """Where the pieces of a layout lie: bytes from the start of the segments file of a generation."""

    boot_id: str
    files: dict[int, tuple[str, int, int]]
    """generation -> (path, device, inode)"""
    generations: list[int]
    tokens_at: list[int]
    logprobs_at: list[int]


def lay_out(
    rollouts: Sequence[Rollout], pieces: Sequence[Piece], columns: Columns, oldest_trainable_version: int
) -> Layout:
    """`pieces`: of all rollouts, in order."""
    groups = [(group, len(list(members))) for group, members in itertools.groupby(r.group for r in rollouts)]
    return Layout(
        group_ids=[group.group_id for group, _ in groups],
        group_sizes=[size for _, size in groups],
        prompts=[columns.prompts[group.group_id].tokens.tobytes() for group, _ in groups],
        lengths=[r.length for r in rollouts],
        piece_versions=[piece.version for piece in pieces],
        piece_lengths=[piece.length for piece in pieces],
        rewards=[r.reward for r in rollouts],
        costs=[r.cost for r in rollouts],
        greedy=[r.greedy for r in rollouts],
        finish_reasons=[r.finish_reason for r in rollouts],
        oldest_trainable_version=oldest_trainable_version,
    )


def places(pieces: Sequence[Piece], files: TokenFiles, host: str) -> Places:
    """`host` is this host's `boot_id`."""
    generations = [piece.generation for piece in pieces]
    where = {}
    for generation in set(generations):
        path = files.path_of(generation).resolve()
        status = path.stat()
        where[generation] = (str(path), status.st_dev, status.st_ino)
    return Places(
        boot_id=host,
        files=where,
        generations=generations,
        tokens_at=[piece.tokens_at for piece in pieces],
        logprobs_at=[piece.logprobs_at for piece in pieces],
    )


def joined(pieces: Sequence[Piece], files: TokenFiles) -> memoryview:
    """The body: all tokens, then all logprobs."""
    total = sum(piece.length for piece in pieces)
    body = memoryview(bytearray(TOKEN_BYTES * total))
    tokens, logprobs, at = (
        np.frombuffer(body, np.int32, total),
        np.frombuffer(body, np.float32, total, 4 * total),
        0,
    )
    for piece in pieces:
        end = at + piece.length
        tokens[at:end] = files.tokens(piece)
        logprobs[at:end] = files.logprobs(piece)
        at = end
    return body


def split(body: memoryview, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Copies of tokens and logprobs. Raises BadRequest where the body is not what the header says."""
    if len(body) != 8 * total:
        raise BadRequest(f"batch: a body of {len(body)} bytes, expected {8 * total} for {total} tokens")
    tokens = np.frombuffer(body, np.int32, total).copy()
    return tokens, np.frombuffer(body, np.float32, total, 4 * total).copy()


class LogFiles:
    """The reader's side of `Places`. No file stays open: one that the shard deletes would keep its room on the disk."""

    def __init__(self) -> None:
        self._boot_id = boot_id()

    def read(self, where: Places, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and logprobs of all pieces. Raises FilesUnreadable."""
        if where.boot_id != self._boot_id:
            raise FilesUnreadable("the buffer is on another host")
        total = layout.tokens
        tokens, logprobs = np.empty(total, np.int32), np.empty(total, np.float32)
        token_bytes, logprob_bytes = tokens.data.cast("B"), logprobs.data.cast("B")
        at = 0
        with contextlib.ExitStack() as opened:
            descriptors = {g: _open(*file, opened) for g, file in where.files.items()}
            for generation, tokens_at, logprobs_at, length in _runs(where, layout.piece_lengths):
                end, file = at + 4 * length, descriptors[generation]
                done = os.preadv(file, [token_bytes[at:end]], tokens_at)
                done += os.preadv(file, [logprob_bytes[at:end]], logprobs_at)
                if done != 8 * length:
                    raise FilesUnreadable(
                        f"{where.files[generation][0]} ends within {length} tokens at byte {tokens_at}"
                    )
                at = end
        return tokens, logprobs


def _open(path: str, device: int, inode: int, opened: contextlib.ExitStack) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise FilesUnreadable(f"{path}: {error.strerror}") from error
    opened.callback(os.close, descriptor)
    status = os.fstat(descriptor)
    if (status.st_dev, status.st_ino) != (device, inode):
        raise FilesUnreadable(f"{path} is another file here than it is to the buffer")
    return descriptor


def _runs(where: Places, lengths: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """(generation, tokens_at, logprobs_at, length) of pieces that lie one behind the other, taken together."""
    if not lengths:
        return
    generations, starts = np.array(where.generations), np.array(where.tokens_at, np.int64)
    ends = starts + 4 * np.array(lengths, np.int64)
    breaks = np.flatnonzero((starts[1:] != ends[:-1]) | (generations[1:] != generations[:-1])) + 1
    firsts, lasts = [0, *breaks.tolist()], [*(breaks - 1).tolist(), len(lengths) - 1]
    for first, last in zip(firsts, lasts, strict=True):
        length = int(ends[last] - starts[first]) // 4
        yield where.generations[first], where.tokens_at[first], where.logprobs_at[first], length


def arrive(
    layout: Layout, rollout_ids: Sequence[int], tokens: np.ndarray, logprobs: np.ndarray
) -> pa.RecordBatch:
    """`schema.BATCH` rows over tokens int32 and logprobs float32 of all rollouts, one behind the other."""
    versions = np.repeat(np.array(layout.piece_versions, np.int32), layout.piece_lengths)
    trainable = versions >= layout.oldest_trainable_version
    if any(layout.greedy):
        trainable &= ~np.repeat(np.array(layout.greedy, bool), layout.lengths)
    offsets = offsets_of(layout.lengths)
    by_group = [np.frombuffer(prompt, np.int32) for prompt in layout.prompts]
    prompts = [p for p, size in zip(by_group, layout.group_sizes, strict=True) for _ in range(size)]
    return pa.record_batch(
        [
            pa.array(rollout_ids, pa.int64()),
            pa.array(np.repeat(np.array(layout.group_ids, np.int64), layout.group_sizes)),
            list_array(prompts, TOKENS),
            flat_lists(offsets, tokens, TOKENS),
            flat_lists(offsets, logprobs, LOGPROBS),
            flat_lists(offsets, versions, TOKENS),
            flat_lists(offsets, trainable, FLAGS),
            pa.array(layout.rewards, pa.float32()),
            pa.array(layout.costs, pa.float32()),
            pa.array(layout.greedy, pa.bool_()),
            pa.array(layout.finish_reasons, pa.string()),
        ],
        schema=BATCH,
    )
