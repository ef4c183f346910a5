"""From the rows of the log to one row per rollout: the joins behind `reading.rollouts_table`. Pure, in numpy.

A rollout's tokens are what its segments leave standing: each segment replaces everything from its `start` on, and a
failed attempt that is tried again takes all of them with it. What the log no longer holds whole is null. Tokens of the
environment are part of the answer, but no version is its first or last by them. There is no loop over rows or tokens: one
stable sort by rollout, then operations on whole columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from asyncrl.buffer.arrow_message import offsets_of
from asyncrl.buffer.schema import ENVIRONMENT, LOGPROBS, TOKENS, State

Ints = np.ndarray  # int64 unless said otherwise
Flags = np.ndarray  # bool

_ALL_TOKENS = [s.name for s in (State.COMPLETE, State.SCORED, State.BATCHED, State.TRAINED)]
_ENDS = [s.name for s in (State.TRAINED, State.DROPPED, State.FAILED)]
_IN_BATCH = [s.name for s in (State.BATCHED, State.TRAINED)]
_BELOW = np.int64(2**32)
"""Above every `start`, so that the rows of one rollout can be told from those of the next in one running minimum."""


def rollout_columns(
    prompts: pa.Table, segments: pa.Table, states: pa.Table, *, values: bool
) -> dict[str, pa.Array]:
    """The columns of `reading.rollouts_table`. Rollouts are those that `states` knows."""
    lives = Lives(states)
    answers = _answers(segments, lives)
    prompt = _rows_of_groups(prompts, lives.last("group_id"))
    counts = pa.array(answers.counts, pa.int32(), mask=answers.missing)
    columns = {
        "rollout_id": pa.array(lives.ids),
        "group_id": lives.last("group_id"),
        "prompt_id": prompt["prompt_id"],
        "greedy": pc.equal(prompt["greedy_id"], pa.array(lives.ids)),
        "state": lives.last("state"),
        "reward": lives.score("reward"),
        "cost": lives.score("cost"),
        "finish_reason": answers.finish_reason,
        "attempts": lives.last("attempts"),
        "engines": lives.engines(),
        "tokens_count": counts,
        "environment_tokens": pa.array(answers.environment_counts, pa.int32(), mask=answers.missing),
        "first_version": answers.first_version,
        "last_version": answers.last_version,
        "batch_id": lives.where_last("batch_id", _IN_BATCH),
        "step": lives.where_last("version", [State.TRAINED.name]),
        "reason": lives.where_last("reason", _ENDS),
        "admitted_unix_s": prompt["unix_s"],
        "ended_unix_s": lives.where_last("unix_s", _ENDS),
    }
    if values:
        columns |= {
            "tokens": answers.lists(_kept_values(segments["tokens"], answers), TOKENS),
            "logprobs": answers.lists(_kept_values(segments["logprobs"], answers), LOGPROBS),
            "versions": answers.lists(np.repeat(answers.row_versions, answers.row_counts), TOKENS),
            "prompt_tokens": prompt["tokens"],
            "payload": prompt["payload"],
        }
    return columns


class Lives:
    """The changes of state, sorted by rollout and within one by time. One entry per rollout in `ids`, ascending."""

    def __init__(self, states: pa.Table) -> None:
        # A row of rollout 0 tells of the run.
        states = states.filter(pc.not_equal(states["rollout_id"], 0))
        states = states.take(pa.array(np.argsort(states["rollout_id"].to_numpy(), kind="stable")))
        self.states: pa.Table = states.combine_chunks()
        self.ids, self._first = np.unique(self.states["rollout_id"].to_numpy(), return_index=True)
        self._last = np.append(self._first[1:], len(self.states))[: len(self.ids)] - 1

    def last(self, column: str) -> pa.Array:
        """Its value in each rollout's last row."""
        return _take(self.states[column], self._last)

    def where_last(self, column: str, names: list[str]) -> pa.Array:
        """Its value in each rollout's last row where that has one of these states, else null."""
        return _take(self.states[column], np.where(self._are(names)[self._last], self._last, -1))

    def score(self, column: str) -> pa.Array:
        """Reward or cost of the last score, null where there is none or the rollout went back to the queue after it."""
        scored = self._latest(self._are([State.SCORED.name]))
        queued = self._latest(self._are([State.QUEUED.name]))
        return _take(self.states[column], np.where(scored > queued, scored, -1))

    def engines(self) -> pa.Array:
        """The engine of each lease, in order."""
        leased = self._are([State.LEASED.name])
        return _list_array(
            _sums(leased.astype(np.int64), self._first), self.states["engine_id"].filter(pa.array(leased))
        )

    def attempt(self) -> Attempt:
        rollout, attempts = self.states["rollout_id"].to_numpy(), self.states["attempts"].to_numpy()
        again = self._are([State.QUEUED.name]).copy()
        again[:1] = False
        again[1:] &= (rollout[1:] == rollout[:-1]) & (attempts[1:] > attempts[:-1])
        row = self._latest(again)
        return Attempt(
            from_seq=np.where(row >= 0, self.states["seq"].to_numpy()[row], -1),
            finished=self._latest(self._are(_ALL_TOKENS)) > row,
            untraced=attempts[self._last] != np.where(row >= 0, attempts[row], 0),
        )

    def _are(self, names: list[str]) -> Flags:
        return np.asarray(pc.is_in(self.states["state"], pa.array(names)).to_numpy())

    def _latest(self, rows: Flags) -> Ints:
        """Index of each rollout's last row that is set, else -1."""
        if not len(self.ids):
            return np.empty(0, np.int64)
        return np.asarray(np.maximum.reduceat(np.where(rows, np.arange(len(rows)), -1), self._first))


class Attempt(NamedTuple):
    """What the states say of each rollout's present attempt. Tokens of earlier ones are no part of its answer."""

    from_seq: Ints
    """`seq` of the row with which the attempt before it was given up; -1 for a first attempt."""
    finished: Flags
    """All its tokens were there once."""
    untraced: Flags
    """The row with which it began is no longer in the log: its tokens cannot be told from those before it."""


class Answers(NamedTuple):
    """What the segments leave of each rollout's answer."""

    rows: Ints
    """The segment rows that count, sorted by rollout."""
    row_counts: Ints
    """How many of its first tokens each of them keeps."""
    row_versions: np.ndarray
    """int32"""
    counts: Ints
    """Tokens of each rollout; 0 where they are missing."""
    environment_counts: Ints
    """Those of them that are the environment's."""
    missing: Flags
    """Rollouts of whose answer the log lost a part."""
    finish_reason: pa.Array
    first_version: pa.Array
    """Of the sampled tokens, as is `last_version`."""
    last_version: pa.Array

    def lists(self, flat: np.ndarray, kind: pa.ListType) -> pa.ListArray:
        return _list_array(self.counts, pa.array(flat, kind.value_type), kind, self.missing)


def _answers(segments: pa.Table, lives: Lives) -> Answers:
    rollout, seq = segments["rollout_id"].to_numpy(), segments["seq"].to_numpy()
    attempt, place = lives.attempt(), _places(lives.ids, rollout)
    counting = np.flatnonzero(place >= 0)
    counting = counting[seq[counting] > attempt.from_seq[place[counting]]]
    rows = counting[np.argsort(place[counting], kind="stable")]
    place = place[rows]
    start = segments["start"].to_numpy()[rows].astype(np.int64)
    length = pc.list_value_length(segments["tokens"]).to_numpy()[rows].astype(np.int64)
    kept, whole = _left_standing(place, start, length, len(lives.ids))
    finish = pc.fill_null(_take(segments["finish_reason"], _pick(rows, _last_of(place, len(lives.ids)))), "")
    unfinished = pc.equal(finish, "").to_numpy(zero_copy_only=False)
    missing = ~whole | attempt.untraced | (attempt.finished & unfinished)
    kept[missing[place]] = 0
    filled = kept > 0
    rows, place, kept = rows[filled], place[filled], kept[filled]
    versions = segments["version"].to_numpy()[rows]
    sampled = versions != ENVIRONMENT
    known, known_place = pa.array(versions[sampled]), place[sampled]
    return Answers(
        rows=rows,
        row_counts=kept,
        row_versions=versions,
        counts=np.bincount(place, kept, len(lives.ids)).astype(np.int64),
        environment_counts=np.bincount(place[~sampled], kept[~sampled], len(lives.ids)).astype(np.int64),
        missing=missing,
        finish_reason=pc.if_else(pa.array(missing), pa.scalar(None, pa.string()), finish),
        first_version=_take(known, _first_of(known_place, len(lives.ids))),
        last_version=_take(known, _last_of(known_place, len(lives.ids))),
    )


def _left_standing(place: Ints, start: Ints, length: Ints, rollouts: int) -> tuple[Ints, Flags]:
    """How many of its first tokens each row keeps, and of each rollout, whether what is kept leaves no gap.

    A row ends where the earliest of the later rows of its rollout starts.
    """
    key = place * _BELOW + start
    earliest = np.minimum.accumulate(key[::-1])[::-1]  # over this row and all after it
    later = np.append(earliest[1:], np.iinfo(np.int64).max)[: len(key)]
    end = np.minimum(start + length, later - place * _BELOW)
    kept = np.maximum(end - start, 0)
    # Tokens of the same rollout before this row: what a row that stands must start at.
    before = np.cumsum(kept) - kept
    before -= before[_first_of(place, rollouts)[place]] if len(place) else 0
    stands = (kept > 0) | ((length == 0) & (later >= key))
    torn = place[stands & (start != before)]
    whole = np.ones(rollouts, bool)
    whole[torn] = False
    return kept, whole


def _kept_values(column: pa.ChunkedArray, answers: Answers) -> np.ndarray:
    """The values of the rows that count, cut to what they keep, in one array."""
    lists = column.take(pa.array(answers.rows)).combine_chunks()
    lengths = pc.list_value_length(lists).to_numpy().astype(np.int64)
    flat: np.ndarray = lists.flatten().to_numpy()
    if np.array_equal(lengths, answers.row_counts):
        return flat
    within = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    kept: np.ndarray = flat[within < np.repeat(answers.row_counts, lengths)]
    return kept


def _rows_of_groups(prompts: pa.Table, group_ids: pa.Array) -> dict[str, pa.Array]:
    """The prompt row of each rollout's group; nulls where the log no longer has it."""
    known = prompts["group_id"].to_numpy()
    order = np.argsort(known, kind="stable")
    row = _pick(order, _places(known[order], group_ids.to_numpy()))
    names = ("prompt_id", "greedy_id", "unix_s", "tokens", "payload")
    return {name: _take(prompts[name], row) for name in names}


# ---- small tools -----------------------------------------------------------------------------------------------------


def _take(column: pa.Array | pa.ChunkedArray, rows: Ints) -> pa.Array:
    """The values at `rows`; null for -1."""
    taken = column.take(pa.array(rows, pa.int64(), mask=rows < 0))
    return taken.combine_chunks() if isinstance(taken, pa.ChunkedArray) else taken


def _places(ids: Ints, wanted: Ints) -> Ints:
    """Where each of `wanted` stands in the sorted `ids`, -1 for nowhere."""
    found = np.searchsorted(ids, wanted)
    inside = found < len(ids)
    inside[inside] = ids[found[inside]] == wanted[inside]
    return np.where(inside, found, -1)


def _pick(rows: Ints, at: Ints) -> Ints:
    """`rows[at]`; -1 stays -1."""
    picked = np.full(len(at), -1)
    picked[at >= 0] = rows[at[at >= 0]]
    return picked


def _first_of(place: Ints, rollouts: int) -> Ints:
    """Index of the first entry of each rollout in the sorted `place`, -1 for none."""
    found = np.searchsorted(place, np.arange(rollouts), "left")
    return np.where(np.bincount(place, minlength=rollouts) > 0, found, -1)


def _last_of(place: Ints, rollouts: int) -> Ints:
    found = np.searchsorted(place, np.arange(rollouts), "right") - 1
    return np.where(np.bincount(place, minlength=rollouts) > 0, found, -1)


def _sums(values: Ints, first: Ints) -> Ints:
    return np.add.reduceat(values, first) if len(first) else np.empty(0, np.int64)


def _list_array(
    counts: Ints,
    flat: pa.Array | pa.ChunkedArray,
    kind: pa.ListType | None = None,
    missing: Flags | None = None,
) -> pa.ListArray:
    values = flat.combine_chunks() if isinstance(flat, pa.ChunkedArray) else flat
    mask = None if missing is None or not missing.any() else pa.array(missing)
    return pa.ListArray.from_arrays(pa.array(offsets_of(counts)), values, type=kind, mask=mask)
