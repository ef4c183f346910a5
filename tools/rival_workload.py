"""What every rival of the buffer moves: drawn rollouts, what they add up to, and the figures of a run that moved all of them.

Called by `buffer_rivals` and by what it is made of.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec
import numpy as np

PRODUCERS: Final = 2
POOL: Final = 1024
"""Distinct rollouts of one producer, taken in turn: 8 MiB, more than the caches of its own that a core has."""
MEAN_TOKENS, SIGMA, SHORTEST, LONGEST = 1024, 0.8, 16, 8192


class RivalError(RuntimeError):
    """A rival lost rollouts, changed them, stood still or died."""


@dataclass(frozen=True)
class Workload:
    rollouts: int = 8192
    push: int = 8
    """Rollouts that a producer sends at once."""
    batch: int = 256
    """Rollouts that the consumer reads at once."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.push, self.batch) < 1 or self.rollouts < PRODUCERS:
            raise ValueError(f"workload: expected push, batch >= 1 and rollouts >= {PRODUCERS}, got {self}")

    @property
    def slots(self) -> int:
        """Pushes of one producer that may be under way."""
        return max(2, 4 * self.batch // (PRODUCERS * self.push))


class Rollout(NamedTuple):
    ids: np.ndarray  # int32 [tokens]
    logprobs: np.ndarray  # float32 [tokens]
    version: int


class Push(NamedTuple):
    """The columns of some rollouts, one after the other."""

    ids: np.ndarray  # int32 [tokens of all]
    logprobs: np.ndarray  # float32 [tokens of all]
    lengths: np.ndarray  # int32 [rollouts]
    versions: np.ndarray  # int32 [rollouts]


class Sums(msgspec.Struct, frozen=True):
    rollouts: int = 0
    tokens: int = 0
    ids: int = 0
    logprobs: float = 0.0
    versions: int = 0
    """Of all tokens."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(*map(operator.add, msgspec.structs.astuple(self), msgspec.structs.astuple(other)))

    @property
    def megabytes(self) -> float:
        """Id and logprob of every token, version of every rollout."""
        return (8 * self.tokens + 4 * self.rollouts) / 1e6


def make_rollouts(workload: Workload, producer: int, producers: int = PRODUCERS) -> list[list[Rollout]]:
    """All that one producer sends, push by push: its distinct rollouts, again and again until its share is full."""
    rng = np.random.default_rng([workload.seed, producer, producers])
    share = workload.rollouts // producers + (producer < workload.rollouts % producers)
    drawn = rng.lognormal(np.log(MEAN_TOKENS), SIGMA, min(POOL, share)).clip(SHORTEST, LONGEST)
    pool = [
        Rollout(
            ids=rng.integers(0, 150_000, length, dtype=np.int32),
            logprobs=rng.integers(-(2**14), 1, length).astype(np.float32) / np.float32(1024),
            version=int(rng.integers(0, 32)),
        )
        for length in np.rint(drawn * (MEAN_TOKENS / drawn.mean())).astype(int)
    ]
    sent = [pool[index % len(pool)] for index in range(share)]
    return [sent[start : start + workload.push] for start in range(0, share, workload.push)]


def pack(rollouts: Sequence[Rollout]) -> Push:
    """One copy of every token."""
    return Push(
        np.concatenate([rollout.ids for rollout in rollouts]),
        np.concatenate([rollout.logprobs for rollout in rollouts]),
        np.array([len(rollout.ids) for rollout in rollouts], np.int32),
        np.array([rollout.version for rollout in rollouts], np.int32),
    )


def touch(push: Push) -> Sums:
    return Sums(
        rollouts=len(push.lengths),
        tokens=len(push.ids),
        ids=int(push.ids.sum(dtype=np.int64)),
        logprobs=float(push.logprobs.sum(dtype=np.float64)),
        versions=int(np.dot(push.lengths.astype(np.int64), push.versions)),
    )


def expected_sums(workload: Workload, producers: int = PRODUCERS) -> Sums:
    """What the producers' rollouts add up to, whoever moves them."""
    sent = (push for producer in range(producers) for push in make_rollouts(workload, producer, producers))
    return functools.reduce(operator.add, (touch(pack(push)) for push in sent), Sums())


@dataclass(frozen=True)
class Figures:
    rival: str
    push: int
    seconds: float
    rollouts_per_s: float
    mb_per_s: float
    cpu_s: float
    """Of all processes, servers included, while the clock ran."""
    cpu_s_by_role: dict[str, float]
    mb_per_cpu_s: float
    sums: Sums


def make_figures(
    name: str, workload: Workload, seconds: float, cpu_s: dict[str, float], sums: Sums
) -> Figures:
    """Raises `RivalError` unless every rollout arrived once and whole."""
    if sums != (sent := expected_sums(workload)):
        raise RivalError(f"{name}, pushes of {workload.push}: expected the sums sent, {sent}, got {sums}")
    return Figures(
        rival=name,
        push=workload.push,
        seconds=seconds,
        rollouts_per_s=sums.rollouts / seconds,
        mb_per_s=sums.megabytes / seconds,
        cpu_s=sum(cpu_s.values()),
        cpu_s_by_role=cpu_s,
        mb_per_cpu_s=sums.megabytes / sum(cpu_s.values()),
        sums=sums,
    )
