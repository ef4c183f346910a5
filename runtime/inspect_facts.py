"""What `asyncrl inspect` tells of a run, as facts: from the tables of the log to frozen structs. Pure but for `Decoder`.

The views draw these structs and `--json` writes them, so both say the same. Called by `inspect`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from asyncrl.buffer.reading import RolloutLog, rollouts_table
from asyncrl.buffer.schema import ENVIRONMENT, State
from asyncrl.runtime.inspect_text import Decoder

MOST_STRETCHES = 12
"""Rows of the table of versions; of a longer run each stands for several versions."""


class NotInLog(ValueError):
    """The log has no such rollout or group."""


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """Neighbouring tokens of one version, or of the environment (its version is -1)."""

    origin: Literal["model", "environment"]
    version: int
    start: int
    tokens: int
    logprob_mean: float


class RolloutFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout. None: not known yet, or no longer in the log."""

    rollout_id: int
    group_id: int
    prompt_id: str | None
    state: str
    greedy: bool | None
    """It is the baseline of its group: sampled greedily, and not trained."""
    reward: float | None
    cost: float | None
    finish_reason: str | None
    reason: str | None
    attempts: int
    engines: list[str]
    batch_id: int | None
    step: int | None
    tokens_count: int | None
    environment_tokens: int | None
    spans: list[Span] | None
    prompt: str | None
    answer: str | None


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One change of a rollout's state."""

    unix_s: float
    state: str
    version: int
    lease_id: int
    attempts: int
    batch_id: int
    engine_id: str
    reason: str
    reward: float
    cost: float


class LifeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout from its admission to its end."""

    rollout: RolloutFacts
    changes: list[Change]
    pieces: list[str] | None
    """The text of each span; None without a tokenizer."""
    payload: str | None
    prompt_tokens: list[int] | None
    tokens: list[int] | None
    versions: list[int] | None
    logprobs: list[float] | None


class GroupFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The rollouts of one prompt."""

    group_id: int
    prompt_id: str | None
    prompt: str | None
    payload: str | None
    reward_mean: float | None
    reward_std: float | None
    rollouts: list[RolloutFacts]


class Stretch(msgspec.Struct, frozen=True, kw_only=True):
    """Scored rollouts whose last sampled token is of one of these versions."""

    first_version: int
    last_version: int
    rollouts: int
    reward_mean: float
    tokens_mean: float


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of finished answers."""

    mean: float
    median: float
    p95: float
    longest: int


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """The run as far as its log goes."""

    run: str
    version: int
    """-1 before the first."""
    rollouts: int
    groups: int
    shards: int
    states: dict[str, int]
    dropped: dict[str, int]
    failed: dict[str, int]
    finished: dict[str, int]
    """finish_reason -> answers"""
    lengths: Lengths | None
    by_version: list[Stretch]
    newest: list[RolloutFacts]


def overview(run: str, log: RolloutLog, decoder: Decoder, newest: int) -> Overview:
    table = rollouts_table(log, values=False)
    state = table["state"]
    states = _counts(state)
    return Overview(
        run=run,
        version=pc.max(log.states["version"]).as_py(),
        rollouts=table.num_rows,
        groups=pc.count_distinct(table["group_id"]).as_py(),
        shards=pc.count_distinct(log.states["shard"]).as_py(),
        states={s.name: states[s.name] for s in State if s.name in states},
        dropped=_counts(table["reason"].filter(pc.equal(state, State.DROPPED.name))),
        failed=_counts(table["reason"].filter(pc.equal(state, State.FAILED.name))),
        finished=_counts(table["finish_reason"].filter(pc.not_equal(table["finish_reason"], ""))),
        lengths=_lengths(table),
        by_version=_by_version(table),
        newest=rollouts(log, _newest(table, newest), decoder)[::-1],
    )


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each value comes, the most frequent first."""
    found = {pair["values"]: pair["counts"] for pair in pc.value_counts(column.drop_null()).to_pylist()}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _lengths(table: pa.Table) -> Lengths | None:
    finished = pc.and_(pc.not_equal(table["finish_reason"], ""), pc.is_valid(table["tokens_count"]))
    counts = table["tokens_count"].filter(finished).to_numpy()
    if not len(counts):
        return None
    median, p95 = np.percentile(counts, (50, 95))
    return Lengths(mean=float(counts.mean()), median=float(median), p95=float(p95), longest=int(counts.max()))


def _by_version(table: pa.Table) -> list[Stretch]:
    sampled = pc.invert(pc.fill_null(table["greedy"], False))
    wanted = pc.and_(pc.is_valid(table["reward"]), pc.is_valid(table["last_version"]))
    scored = table.filter(pc.and_(wanted, sampled))
    version, reward, tokens = (scored[name].to_numpy() for name in ("last_version", "reward", "tokens_count"))
    if not len(version):
        return []
    first, last = int(version.min()), int(version.max())
    width = -(-(last - first + 1) // MOST_STRETCHES)
    place = (version - first) // width
    counts, rewards, lengths = (np.bincount(place, weights) for weights in (None, reward, tokens))
    return [
        Stretch(
            first_version=first + int(i) * width,
            last_version=min(last, first + (int(i) + 1) * width - 1),
            rollouts=int(counts[i]),
            reward_mean=float(rewards[i] / counts[i]),
            tokens_mean=float(lengths[i] / counts[i]),
        )
        for i in np.flatnonzero(counts)
    ]


def _newest(table: pa.Table, count: int) -> list[int]:
    """The highest ids among the scored rollouts, else among those with tokens, else of all."""
    for wanted in (pc.is_valid(table["reward"]), pc.greater(pc.fill_null(table["tokens_count"], 0), 0)):
        ids: list[int] = table["rollout_id"].filter(wanted).to_pylist()
        if ids:
            return ids[-count:]
    return list(table["rollout_id"].to_pylist()[-count:])


def rollouts(log: RolloutLog, rollout_ids: Sequence[int], decoder: Decoder) -> list[RolloutFacts]:
    """Of these ids, ascending; ids that the log does not have are left out."""
    return [_rollout(row, decoder) for row in rollouts_table(log, rollout_ids).to_pylist()]


def _rollout(row: dict[str, Any], decoder: Decoder) -> RolloutFacts:
    taken = {name: row[name] for name in RolloutFacts.__struct_fields__ if name in row}
    return RolloutFacts(
        **taken,
        spans=None if row["tokens"] is None else spans(row["versions"], row["logprobs"]),
        prompt=decoder.prompt(row["prompt_tokens"]),
        answer=decoder.answer(row["tokens"]),
    )


def spans(versions: Sequence[int], logprobs: Sequence[float]) -> list[Span]:
    """Where the version or the origin changes, a new span begins."""
    if not versions:
        return []
    version = np.asarray(versions)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(version)) + 1))
    counts = np.diff(starts, append=len(version))
    means = np.add.reduceat(np.asarray(logprobs, np.float64), starts) / counts
    return [
        Span(
            origin="environment" if version[start] == ENVIRONMENT else "model",
            version=int(version[start]),
            start=int(start),
            tokens=int(count),
            logprob_mean=float(mean),
        )
        for start, count, mean in zip(starts, counts, means, strict=True)
    ]


def life(log: RolloutLog, rollout_id: int, decoder: Decoder) -> LifeFacts:
    """Raises `NotInLog`."""
    found = rollouts_table(log, [rollout_id]).to_pylist()
    if not found:
        raise NotInLog(f"no rollout {rollout_id}; {_range(log.states['rollout_id'], 'rollout')}")
    row = found[0]
    facts = _rollout(row, decoder)
    changes = log.states.filter(pc.equal(log.states["rollout_id"], rollout_id))
    ends = [span.start + span.tokens for span in facts.spans or []]
    return LifeFacts(
        rollout=facts,
        changes=[Change(**c) for c in changes.select(Change.__struct_fields__).to_pylist()],
        pieces=decoder.pieces(row["tokens"], ends) if ends else None,
        **{name: row[name] for name in ("payload", "prompt_tokens", "tokens", "versions", "logprobs")},
    )


def group(log: RolloutLog, group_id: int, decoder: Decoder) -> GroupFacts:
    """Raises `NotInLog`."""
    of_group = log.states.filter(pc.equal(log.states["group_id"], group_id))
    members = rollouts(log, pc.unique(of_group["rollout_id"]).to_pylist(), decoder)
    if not members:
        raise NotInLog(f"no group {group_id}; {_range(log.states['group_id'], 'group')}")
    rewards = np.array([r.reward for r in members if r.reward is not None and not r.greedy])
    prompt = log.prompts.filter(pc.equal(log.prompts["group_id"], group_id)).to_pylist()
    return GroupFacts(
        group_id=group_id,
        prompt_id=members[0].prompt_id,
        prompt=members[0].prompt,
        payload=prompt[0]["payload"] if prompt else None,
        reward_mean=float(rewards.mean()) if len(rewards) else None,
        reward_std=float(rewards.std()) if len(rewards) else None,
        rollouts=members,
    )


def _range(ids: pa.ChunkedArray, what: str) -> str:
    """0 is no id: such rows tell of the run."""
    found = pc.min_max(ids.filter(pc.greater(ids, 0))).as_py()
    return f"the log has {what}s {found['min']} to {found['max']}"
