"""Rows of prompt and answer tokens, and their way into one forward pass.

Invariant: per-token values are flat over all answer tokens, in row order; a token's place there is its identity.
Nothing here loops over tokens in Python. Called by `batch` and `sft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from asyncrl.learner.attention import Packing


@dataclass(frozen=True, slots=True)
class Rows:
    """Ragged prompts and answers as flat arrays."""

    prompt_starts: np.ndarray
    """[rows + 1]: row r's prompt is prompts[prompt_starts[r] : prompt_starts[r + 1]]."""
    prompts: np.ndarray
    """[prompt tokens] int32"""
    answer_starts: np.ndarray
    """[rows + 1]"""
    answers: np.ndarray
    """[tokens] int32"""

    @property
    def answer_lengths(self) -> np.ndarray:
        return np.diff(self.answer_starts)

    @property
    def lengths(self) -> np.ndarray:
        """[rows]: prompt and answer tokens."""
        return np.diff(self.prompt_starts) + np.diff(self.answer_starts)

    def row_of_token(self) -> np.ndarray:
        """[tokens]: the row each answer token belongs to."""
        return np.repeat(np.arange(len(self.answer_starts) - 1), self.answer_lengths)

    def tokens_of(self, rows: np.ndarray) -> np.ndarray:
        """Places of the answer tokens of `rows`, in order."""
        return np.flatnonzero(np.isin(self.row_of_token(), rows))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass over rollouts in one row. An empty one (no tokens) still runs: other ranks wait in its collectives."""

    input_ids: torch.Tensor
    """[1, positions] int64: rollout after rollout, each without its last token, which predicts nothing."""
    position_ids: torch.Tensor
    """[1, positions] int64: from 0 in each rollout."""
    packing: Packing
    """Where each rollout ends."""
    predictors: torch.Tensor
    """[tokens] int64: the position whose output predicts the token."""
    targets: torch.Tensor
    """[tokens] int64"""
    place: torch.Tensor
    """[tokens] int64: where the token is among all answer tokens."""
    padding: int
    """Positions that are computed for nothing."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`."""
        names = ("input_ids", "position_ids", "packing", "predictors", "targets", "place")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def rows_of(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Rows:
    """Rows of (prompt tokens, answer tokens)."""
    prompt_lengths = [len(prompt) for prompt, _ in pairs]
    answer_lengths = [len(answer) for _, answer in pairs]
    return Rows(
        prompt_starts=np.cumsum([0, *prompt_lengths]),
        prompts=np.concatenate([np.asarray(prompt, dtype=np.int32) for prompt, _ in pairs]),
        answer_starts=np.cumsum([0, *answer_lengths]),
        answers=np.concatenate([np.asarray(answer, dtype=np.int32) for _, answer in pairs]),
    )


def assemble(rows: Rows, chosen: np.ndarray) -> MicroBatch:
    """The forward pass over the rows `chosen`, one after the other."""
    if not len(chosen):
        return _nothing()
    prompt = np.diff(rows.prompt_starts)[chosen]
    answer = rows.answer_lengths[chosen]
    place = _ranges(rows.answer_starts[chosen], answer)
    targets = rows.answers[place].astype(np.int64)
    ends = np.cumsum(prompt + answer)
    starts = ends - prompt - answer
    whole = np.empty(int(ends[-1]), dtype=np.int64)
    whole[_ranges(starts, prompt)] = rows.prompts[_ranges(rows.prompt_starts[chosen], prompt)]
    whole[_ranges(starts + prompt, answer)] = targets
    # Without its last token each rollout is one shorter, and a token is predicted from the position before it. One of a
    # single token keeps it, since a rollout of no positions is none to attention.
    lengths = np.maximum(prompt + answer - 1, 1)
    first = np.cumsum(lengths) - lengths
    return MicroBatch(
        input_ids=torch.from_numpy(whole[_ranges(starts, lengths)])[None],
        position_ids=torch.from_numpy(_ranges(np.zeros_like(lengths), lengths))[None],
        packing=Packing.of(tuple(lengths.tolist())),
        predictors=torch.from_numpy(_ranges(first + prompt - 1, answer)),
        targets=torch.from_numpy(targets),
        place=torch.from_numpy(place),
        padding=0,
    )


def _nothing() -> MicroBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    one = torch.zeros((1, 1), dtype=torch.int64)
    return MicroBatch(one, one, Packing.of((1,)), nothing, nothing, nothing, padding=1)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The ranges [start, start + length), one after the other: [sum of lengths] int64."""
    ends = np.cumsum(lengths)
    offset: np.ndarray = np.repeat(starts - (ends - lengths), lengths)
    offset += np.arange(len(offset))
    return offset
