"""Rows of prompt and answer tokens, and their way into one forward pass.

Invariant: per-token values are flat over all answer tokens, in row order; a token's place there is its identity.
Nothing here loops over tokens in Python. Called by `batch` and `sft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


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
    """One forward pass. An empty one (no tokens) still runs: other ranks wait in its collectives."""

    input_ids: torch.Tensor
    """[rows, longest - 1] int64: without each row's last token, which predicts nothing."""
    predictors: torch.Tensor
    """[tokens] int64: place in the flattened input_ids whose output predicts the token."""
    targets: torch.Tensor
    """[tokens] int64"""
    place: torch.Tensor
    """[tokens] int64: where the token is among all answer tokens."""
    padding: int
    """Padded positions among rows x longest."""


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
    """The forward pass over the rows `chosen`, padded on the right to the longest of them."""
    if not len(chosen):
        nothing = torch.zeros(0, dtype=torch.int64)
        return MicroBatch(torch.zeros((1, 1), dtype=torch.int64), nothing, nothing, nothing, 0)
    prompt = np.diff(rows.prompt_starts)[chosen]
    answer = rows.answer_lengths[chosen]
    longest = int((prompt + answer).max())
    grid = np.zeros((len(chosen), longest), dtype=np.int64)
    flat = grid.reshape(-1)
    row_start = np.arange(len(chosen)) * longest
    flat[_ranges(row_start, prompt)] = rows.prompts[_ranges(rows.prompt_starts[chosen], prompt)]
    place = _ranges(rows.answer_starts[chosen], answer)
    targets = rows.answers[place].astype(np.int64)
    flat[_ranges(row_start + prompt, answer)] = targets
    # Without the last column each row is one shorter, and a token is predicted from the position before it.
    width = max(longest - 1, 1)
    predictors = _ranges(np.arange(len(chosen)) * width + prompt - 1, answer)
    return MicroBatch(
        input_ids=torch.from_numpy(np.ascontiguousarray(grid[:, :width])),
        predictors=torch.from_numpy(predictors),
        targets=torch.from_numpy(targets),
        place=torch.from_numpy(place),
        padding=int(grid.size - (prompt + answer).sum()),
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The ranges [start, start + length), one after the other: [sum of lengths] int64."""
    ends = np.cumsum(lengths)
    offset: np.ndarray = np.repeat(starts - (ends - lengths), lengths)
    offset += np.arange(len(offset))
    return offset
