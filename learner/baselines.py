"""Greedy answers: taken out of a batch before it is trained, and what they earned, for the others of their group (ReMax).

Called by `training`, on every rank with the same table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from asyncrl.learner.batch import Batch, read_table


@dataclass(frozen=True, slots=True)
class Baselines:
    """[rows] of the batch that is trained: of the greedy answer to each rollout's prompt. NaN, and 0 tokens, without one."""

    reward: np.ndarray
    """float64"""
    cost: np.ndarray
    """float64"""
    tokens: np.ndarray
    """int64: its length."""


def read_baselines(table: pa.Table, *, needed: bool) -> tuple[Batch, Baselines]:
    """The rollouts to be trained, and their baselines.

    Raises ValueError as `read_table` does, and if there are only greedy rollouts, two of a group, or, where they are `needed`,
    none of a group.
    """
    every = read_table(table)
    if needed:
        _check_all_there(every)
    greedy = np.flatnonzero(every.greedy)
    if not len(greedy):
        nothing = np.full(every.rows, np.nan)
        return every, Baselines(nothing, nothing.copy(), np.zeros(every.rows, dtype=np.int64))
    rest = np.flatnonzero(~every.greedy)
    if not len(rest):
        raise ValueError(
            f"learner batch has {every.rows} greedy rollouts and none to train; a group is handed over whole or not at all"
        )
    of_group = np.full(int(every.group.max()) + 1, -1)
    of_group[every.group[greedy]] = greedy
    if np.count_nonzero(of_group >= 0) < len(greedy):
        raise ValueError(
            f"learner batch has {len(greedy)} greedy rollouts in {(of_group >= 0).sum()} groups; one each"
        )
    return read_table(table.take(rest)), _of_rows(every, of_group[every.group[rest]])


def _of_rows(every: Batch, place: np.ndarray) -> Baselines:
    """Args: place [rows]: of each row's greedy rollout, -1 without one."""
    there = place >= 0
    return Baselines(
        reward=np.where(there, every.reward[place].astype(np.float64), np.nan),
        cost=np.where(there, every.cost[place].astype(np.float64), np.nan),
        tokens=np.where(there, every.sequences.answer_lengths[place], 0),
    )


def _check_all_there(every: Batch) -> None:
    without = np.setdiff1d(every.group, every.group[every.greedy])
    if len(without):
        rollout = every.rollout_id[every.group == without[0]][0]
        raise ValueError(
            f"{len(without)} groups of the learner's batch have no greedy rollout, the first is that of rollout {rollout}: the "
            "objective's baseline is what that earned, and the buffer hands it over with its group"
        )
