"""The tokens of live rollouts, by rollout: what was asked, and the pieces of the answer. Knows no states; what may be added or
dropped is the ledger's word, where the bytes lie is `token_files`'.

Tokens int32 [n], logprobs float32 [n], versions int32 [n] per rollout. Called by `shard` and `recovery`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from asyncrl.buffer.arrow_message import offsets_of
from asyncrl.buffer.token_files import Piece, TokenFiles


@dataclass(slots=True, frozen=True)
class Prompt:
    """What engines get of it. Its id and position are its group's."""

    tokens: np.ndarray  # int32 [prompt]
    payload: str


def list_array(parts: Sequence[np.ndarray], kind: pa.ListType) -> pa.ListArray:
    """One Arrow list per part. The values are copied once, into one array."""
    flat = np.concatenate(parts) if parts else np.empty(0)
    return flat_lists(offsets_of([len(p) for p in parts]), flat, kind)


def flat_lists(offsets: np.ndarray, flat: np.ndarray, kind: pa.ListType) -> pa.ListArray:
    """Arrow lists over values that lie one behind the other. Numbers are not copied."""
    values = pa.array(flat, type=kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)


def slices(column: pa.ListArray | pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of an Arrow column as numpy views. Boolean lists are copied (Arrow keeps them as bits)."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in itertools.pairwise(offsets)]


class Columns:
    """Prompts by group, answers by rollout."""

    def __init__(self, files: TokenFiles) -> None:
        self.files = files
        self.prompts: dict[int, Prompt] = {}
        self.answers: dict[int, list[Piece]] = {}

    def put_prompt(self, group_id: int, prompt: Prompt, rollout_ids: Iterable[int]) -> None:
        self.prompts[group_id] = prompt
        for rollout_id in rollout_ids:
            self.answers[rollout_id] = []

    def append(self, rollout_id: int, piece: Piece) -> None:
        self.answers[rollout_id].append(piece)
        self.files.hold(piece)

    def restart(self, rollout_id: int) -> None:
        """Forgets the answer: the attempt failed."""
        for piece in self.answers[rollout_id]:
            self.files.release(piece)
        self.answers[rollout_id] = []

    def drop(self, rollout_ids: Iterable[int], group_ids: Iterable[int]) -> None:
        """Frees closed rollouts and groups."""
        release = self.files.release
        for rollout_id in rollout_ids:
            for piece in self.answers.pop(rollout_id):
                release(piece)
        for group_id in group_ids:
            del self.prompts[group_id]

    def tokens(self, rollout_id: int) -> bytes:
        """The answer so far, as int32."""
        return b"".join(self.files.tokens(p).tobytes() for p in self.answers[rollout_id])
