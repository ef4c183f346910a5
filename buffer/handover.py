"""A batch on its way from a shard to the learner: raw columns in the body, the rest in the header, `schema.BATCH` on arrival.

Body: the answers' tokens (int32), their logprobs (float32), then each group's prompt (int32), each one behind the other. What can
be said per piece or per group is said once: versions, prompts, and which tokens are trainable are spread out by the reader.
Called by `shard` (out) and `reader` (in).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import numpy as np
import pyarrow as pa

from asyncrl.buffer.columns import Columns, flat_lists, list_array
from asyncrl.buffer.errors import BadRequest
from asyncrl.buffer.records import Rollout
from asyncrl.buffer.schema import BATCH, FLAGS, LOGPROBS, TOKENS


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What the body holds. Rollouts stand in the order of the selection."""

    group_ids: list[int]
    group_sizes: list[int]
    """Rollouts of each group, which stand together."""
    prompt_lengths: list[int]
    """Of each group."""
    lengths: list[int]
    """Answer tokens of each rollout."""
    piece_versions: list[int]
    piece_lengths: list[int]
    """Runs of tokens of one version, over all rollouts."""
    rewards: list[float]
    finish_reasons: list[str]
    oldest_trainable_version: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def nbytes(self) -> int:
        return 8 * self.tokens + 4 * sum(self.prompt_lengths)


def lay_out(rollouts: Sequence[Rollout], columns: Columns, oldest_trainable_version: int) -> Layout:
    groups = [(group, len(list(members))) for group, members in itertools.groupby(r.group for r in rollouts)]
    spans = [span for r in rollouts for span in r.spans]
    return Layout(
        group_ids=[group.group_id for group, _ in groups],
        group_sizes=[size for _, size in groups],
        prompt_lengths=[len(columns.prompts[group.group_id].tokens) for group, _ in groups],
        lengths=[r.length for r in rollouts],
        piece_versions=[version for version, _ in spans],
        piece_lengths=[length for _, length in spans],
        rewards=[r.reward for r in rollouts],
        finish_reasons=[r.finish_reason for r in rollouts],
        oldest_trainable_version=oldest_trainable_version,
    )


def fill(body: memoryview, layout: Layout, rollouts: Sequence[Rollout], columns: Columns) -> None:
    """Puts the columns into `body`: the one copy that the shard makes of them."""
    total = layout.tokens
    tokens = np.frombuffer(body, np.int32, total)
    logprobs = np.frombuffer(body, np.float32, total, 4 * total)
    columns.copy((r.rollout_id for r in rollouts), tokens, logprobs)
    prompts = np.frombuffer(body, np.int32, sum(layout.prompt_lengths), 8 * total)
    if layout.group_ids:
        np.concatenate([columns.prompts[g].tokens for g in layout.group_ids], out=prompts)


def arrive(layout: Layout, rollout_ids: Sequence[int], body: memoryview) -> pa.RecordBatch:
    """`schema.BATCH` rows over a copy of `body`. Raises BadRequest where the body is not what the header says."""
    if len(body) != layout.nbytes:
        raise BadRequest(f"batch: a body of {len(body)} bytes, the header says {layout.nbytes}")
    total = layout.tokens
    tokens = np.frombuffer(body, np.int32, total).copy()
    logprobs = np.frombuffer(body, np.float32, total, 4 * total).copy()
    versions = np.repeat(np.array(layout.piece_versions, np.int32), layout.piece_lengths)
    offsets = np.zeros(len(rollout_ids) + 1, np.int32)
    np.cumsum(layout.lengths, out=offsets[1:])
    flat_prompts = np.frombuffer(body, np.int32, sum(layout.prompt_lengths), 8 * total)
    ends = list(itertools.accumulate(layout.prompt_lengths))
    prompts = [
        flat_prompts[end - length : end]
        for end, length, size in zip(ends, layout.prompt_lengths, layout.group_sizes, strict=True)
        for _ in range(size)
    ]
    return pa.record_batch(
        [
            pa.array(rollout_ids, pa.int64()),
            pa.array(np.repeat(np.array(layout.group_ids, np.int64), layout.group_sizes)),
            list_array(prompts, TOKENS),
            flat_lists(offsets, tokens, TOKENS),
            flat_lists(offsets, logprobs, LOGPROBS),
            flat_lists(offsets, versions, TOKENS),
            flat_lists(offsets, versions >= layout.oldest_trainable_version, FLAGS),
            pa.array(layout.rewards, pa.float32()),
            pa.array(layout.finish_reasons, pa.string()),
        ],
        schema=BATCH,
    )
