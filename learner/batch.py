"""From the buffer's Arrow table to flat columns, minibatches of whole groups, and each rank's micro-batches.

Invariants:
- Per-token columns are flat over all answer tokens of the table, in table order: [tokens]. A token's place in them is its
  identity on every rank, so that figures of all ranks add up by place.
- Every rank derives the same division from the same table, without talking; each answer token is in one micro-batch of
  one rank, and every rank has the same number of micro-batches (the collectives of a forward pass must match).
- Nothing here loops over tokens in Python.
Called by `step`, on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from asyncrl.buffer.schema import BATCH, ENVIRONMENT
from asyncrl.learner.division import LINEAR, divide
from asyncrl.learner.rows import MicroBatch, Rows, assemble

_ANSWER_LISTS = ("logprobs", "versions", "trainable")


@dataclass(frozen=True, slots=True)
class Batch:
    """A table as flat arrays. Arrays of numbers share memory with the table."""

    rollout_id: np.ndarray
    """[rows] int64"""
    group: np.ndarray
    """[rows] int64: 0, 1, ... in order of first appearance."""
    reward: np.ndarray
    """[rows] float32"""
    cost: np.ndarray
    """[rows] float32: what Safe RLHF holds below its limit; 0 where no reward term gives one."""
    greedy: np.ndarray
    """[rows] bool: the baseline of its group, sampled greedily; none of its tokens is trainable."""
    sequences: Rows
    behaviour: np.ndarray
    """[tokens] float32: logprobs under the policy that sampled."""
    versions: np.ndarray
    """[tokens] int32; `schema.ENVIRONMENT` where the environment gave the token."""
    trainable: np.ndarray
    """[tokens] bool; never where the environment gave the token."""

    @property
    def rows(self) -> int:
        return len(self.rollout_id)

    @property
    def tokens(self) -> int:
        """Answer tokens, those of the environment included."""
        return len(self.behaviour)

    @property
    def sampled(self) -> np.ndarray:
        """[tokens] bool: where a policy sampled the token. Only there `behaviour` is a logprob."""
        sampled: np.ndarray = self.versions != ENVIRONMENT
        return sampled


def read_table(table: pa.Table) -> Batch:
    """Raises ValueError if the table is not of `asyncrl.buffer.schema.BATCH` or its lists do not match."""
    if table.schema.names != BATCH.names or table.schema.types != BATCH.types:
        raise ValueError(f"learner batch must have the schema\n{BATCH}\ngot\n{table.schema}")
    if not table.num_rows:
        raise ValueError("learner batch has no rows; the buffer hands over whole groups or waits")
    rollout_id = _numbers(table, "rollout_id")
    prompt_starts, prompts = _lists(table, "prompt_tokens")
    answer_starts, answers = _lists(table, "tokens")
    columns = {}
    for name in _ANSWER_LISTS:
        starts, columns[name] = _lists(table, name)
        _check_lists(name, starts, answer_starts, rollout_id)
    if not (np.diff(prompt_starts) > 0).all():
        row = int(np.flatnonzero(np.diff(prompt_starts) == 0)[0])
        raise ValueError(
            f"rollout {rollout_id[row]} has no prompt tokens; nothing predicts its first answer token"
        )
    _check_origin(columns["versions"], columns["trainable"], answer_starts, rollout_id)
    greedy = _flags(table, "greedy")
    _check_greedy(greedy, columns["trainable"], answer_starts, rollout_id)
    return Batch(
        rollout_id=rollout_id,
        group=_dense(_numbers(table, "group_id")),
        reward=_numbers(table, "reward"),
        cost=_numbers(table, "cost"),
        greedy=greedy,
        sequences=Rows(
            prompt_starts=prompt_starts, prompts=prompts, answer_starts=answer_starts, answers=answers
        ),
        behaviour=columns["logprobs"],
        versions=columns["versions"],
        trainable=columns["trainable"],
    )


def split_groups(group: np.ndarray, minibatches: int) -> list[np.ndarray]:
    """Row indices of each minibatch: whole groups, in table order, equally many groups up to one.

    With fewer groups than `minibatches` there is one minibatch per group.
    """
    count = int(group.max()) + 1
    bounds = np.linspace(0, count, min(minibatches, count) + 1).round().astype(np.int64)
    part = np.searchsorted(bounds[1:], group, side="right")
    return [np.flatnonzero(part == index) for index in range(len(bounds) - 1)]


def make_microbatches(
    batch: Batch,
    rows: np.ndarray,
    tokens_per_microbatch: int,
    rank: int,
    ranks: int,
    even_length: float = LINEAR,
) -> list[MicroBatch]:
    """This rank's forward passes over `rows`; as many on every rank. `even_length` is the model's, see `division`."""
    parts = divide(batch.sequences.lengths[rows], tokens_per_microbatch, ranks, even_length)[rank]
    return [assemble(batch.sequences, rows[part]) for part in parts]


def _dense(ids: np.ndarray) -> np.ndarray:
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    dense: np.ndarray = order[inverse.reshape(-1)]
    return dense


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    values: np.ndarray = _whole(table, name).to_numpy(zero_copy_only=True)
    return values


def _flags(table: pa.Table, name: str) -> np.ndarray:
    values: np.ndarray = _whole(table, name).to_numpy(zero_copy_only=False)
    return values


def _lists(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Starts [rows + 1] from 0, and the values of all lists; zero-copy but for flags, which Arrow keeps as bits."""
    column = _whole(table, name)
    starts = column.offsets.to_numpy(zero_copy_only=True).astype(np.int64)
    values = column.values.slice(int(starts[0]), int(starts[-1] - starts[0]))
    flags = pa.types.is_boolean(values.type)
    return starts - starts[0], values.to_numpy(zero_copy_only=not flags)


def _whole(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if column.null_count:
        raise ValueError(
            f"learner batch: column {name} has {column.null_count} nulls, its schema allows none"
        )
    return column


def _check_lists(name: str, starts: np.ndarray, answer_starts: np.ndarray, rollout_id: np.ndarray) -> None:
    wrong = np.flatnonzero(np.diff(starts) != np.diff(answer_starts))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"rollout {rollout_id[row]}: {name} has {np.diff(starts)[row]} entries for {np.diff(answer_starts)[row]} tokens"
        )


def _check_origin(
    versions: np.ndarray, trainable: np.ndarray, answer_starts: np.ndarray, rollout_id: np.ndarray
) -> None:
    wrong = np.flatnonzero(trainable & (versions == ENVIRONMENT))
    if len(wrong):
        row = int(np.searchsorted(answer_starts, wrong[0], side="right")) - 1
        raise ValueError(
            f"rollout {rollout_id[row]}: token {wrong[0] - answer_starts[row]} is the environment's and marked trainable; "
            "no policy sampled it"
        )


def _check_greedy(
    greedy: np.ndarray, trainable: np.ndarray, answer_starts: np.ndarray, rollout_id: np.ndarray
) -> None:
    wrong = np.flatnonzero(trainable & np.repeat(greedy, np.diff(answer_starts)))
    if len(wrong):
        row = int(np.searchsorted(answer_starts, wrong[0], side="right")) - 1
        raise ValueError(
            f"rollout {rollout_id[row]}: it is its group's greedy baseline and has trainable tokens; what was not sampled from "
            "the policy's distribution cannot be trained"
        )
