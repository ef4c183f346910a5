"""The tokens of live rollouts, as numpy columns. Knows no states; what may be added or dropped is the ledger's word.

Tokens int32 [n], logprobs float32 [n], versions int32 [n] per rollout, kept as the chunks in which they arrived and
joined when they are read. Called by the buffer service, from one thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from asyncrl.buffer import schema
from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.records import Rollout


@dataclass(slots=True)
class Prompt:
    prompt_id: str
    tokens: np.ndarray  # int32 [prompt]
    payload: str


@dataclass(slots=True)
class Answer:
    tokens: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    versions: list[np.ndarray] = field(default_factory=list)


def list_array(parts: Sequence[np.ndarray], kind: pa.ListType) -> pa.ListArray:
    """One Arrow list per part. The values are copied once, into one array."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int32)
    np.cumsum([len(p) for p in parts], out=offsets[1:])
    flat = np.concatenate(parts) if parts else np.empty(0)
    values = pa.array(flat, type=kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)


def slices(column: pa.ListArray | pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of an Arrow column as numpy views. Boolean lists are copied (Arrow keeps them as bits)."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in itertools.pairwise(offsets)]


def _join(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


class Columns:
    """Prompts by group, answers by rollout."""

    def __init__(self) -> None:
        self._prompts: dict[int, Prompt] = {}
        self._answers: dict[int, Answer] = {}

    def put_prompt(self, group_id: int, prompt: Prompt, rollout_ids: Iterable[int]) -> None:
        self._prompts[group_id] = prompt
        for rollout_id in rollout_ids:
            self._answers[rollout_id] = Answer()

    def append(self, rollout_id: int, version: int, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        answer = self._answers[rollout_id]
        answer.tokens.append(tokens)
        answer.logprobs.append(logprobs)
        answer.versions.append(np.full(len(tokens), version, dtype=np.int32))

    def restart(self, rollout_id: int) -> None:
        """Forgets the answer: the attempt failed."""
        self._answers[rollout_id] = Answer()

    def drop(self, rollout_ids: Iterable[int], live_groups: Iterable[int]) -> None:
        """Frees closed rollouts, and the prompts of groups that are no longer live."""
        closed = list(rollout_ids)
        for rollout_id in closed:
            del self._answers[rollout_id]
        if closed:
            for group_id in self._prompts.keys() - set(live_groups):
                del self._prompts[group_id]

    def leases(self, rollouts: Sequence[Rollout]) -> pa.RecordBatch:
        """`schema.LEASES` rows."""
        prompts = [self._prompts[r.group_id] for r in rollouts]
        prefixes = [_join(self._answers[r.rollout_id].tokens, np.int32) for r in rollouts]
        return pa.record_batch(
            [
                pa.array([r.rollout_id for r in rollouts], pa.int64()),
                pa.array([r.lease_id for r in rollouts], pa.int64()),
                pa.array([r.group_id for r in rollouts], pa.int64()),
                list_array([p.tokens for p in prompts], schema.TOKENS),
                list_array(prefixes, schema.TOKENS),
                pa.array([r.finish_reason for r in rollouts], pa.string()),
                pa.array([p.payload for p in prompts], pa.string()),
            ],
            schema=schema.LEASES,
        )

    def batch(
        self, rollout_ids: Sequence[int], ledger: Ledger, oldest_trainable_version: int
    ) -> pa.RecordBatch:
        """`schema.BATCH` rows; tokens of older versions than `oldest_trainable_version` are not trainable."""
        rollouts = [ledger.rollouts[r] for r in rollout_ids]
        answers = [self._answers[r] for r in rollout_ids]
        versions = [_join(a.versions, np.int32) for a in answers]
        return pa.record_batch(
            [
                pa.array(rollout_ids, pa.int64()),
                pa.array([r.group_id for r in rollouts], pa.int64()),
                list_array([self._prompts[r.group_id].tokens for r in rollouts], schema.TOKENS),
                list_array([_join(a.tokens, np.int32) for a in answers], schema.TOKENS),
                list_array([_join(a.logprobs, np.float32) for a in answers], schema.LOGPROBS),
                list_array(versions, schema.TOKENS),
                list_array([v >= oldest_trainable_version for v in versions], schema.FLAGS),
                pa.array([r.reward for r in rollouts], pa.float32()),
                pa.array([r.finish_reason for r in rollouts], pa.string()),
            ],
            schema=schema.BATCH,
        )
