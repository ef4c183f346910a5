"""How many rollouts may be under way, how they are shared out among pools, and what a split then comes to. Pure.

How many may be under way follows from the pacing in `asyncrl.buffer.staleness`: with B prompts a step and bound K at most
(K + 1) B prompts are held. A prompt's group is held until its longest rollout ends, then until its batch is complete (half a
batch on average), then while that is trained. With C rollouts in slots, R a step, s = mean of the longest in a group / mean
length and u = train time / step time, by Little's law
    C s / R + 1/2 + u <= K + 1
tests/unit/recipes/test_plan_pacing.py plays the pacing out and holds this to a tenth.
Asynchronous step = max(generate, train); synchronous step = generate with its tail + train. K = 0 is synchronous.
Called by `plan_search`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from asyncrl.recipes.gpus import ClusterEntry, GPUSpec
from asyncrl.recipes.plan_facts import Efficiency, Workload
from asyncrl.recipes.plan_memory import LearnerFit
from asyncrl.recipes.plan_model import Amount, ModelShape
from asyncrl.recipes.plan_speed import EngineSpeed, LearnerTime

CHUNKS = 128
"""Parts into which the rollouts under way are cut to share them out."""
WAITING = 0.5
"""Of a batch: complete groups that wait for the rest of it. None where all answers are equally long, which is rare."""
WORTH = 0.02
"""The smallest staleness is taken whose step is within this share of the shortest."""
SAME = 1 + 1e-9


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """Engines of one shape on one kind of node."""

    entry: int
    speed: EngineSpeed
    engines: int

    @property
    def gpus(self) -> int:
        return self.engines * self.speed.tensor_parallel

    @property
    def slots(self) -> int:
        return self.speed.fit.most_slots * self.engines

    def rollouts_per_s(self, under_way: Amount) -> Amount:
        each: Amount = np.minimum(under_way / self.engines, self.speed.fit.most_slots)
        return self.speed.rollouts_per_s(each) * self.engines


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """A learner and the pools beside it, before rollouts are shared out."""

    entry: int
    ranks: int
    fit: LearnerFit
    time: LearnerTime
    pools: tuple[Pool, ...]

    @property
    def gpus(self) -> int:
        return self.ranks + sum(pool.gpus for pool in self.pools)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a split comes to."""

    split: Split
    staleness: int
    """max_staleness_versions; 0: learner and engines take turns."""
    under_way: tuple[float, ...]
    """Rollouts in slots, per pool of the split."""
    generate_s: float
    synchronous_s: float
    step_s: float

    @property
    def rank(self) -> tuple[float, int, int]:
        return self.step_s, self.split.gpus, self.staleness


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a plan depends on."""

    model: ModelShape
    entries: tuple[ClusterEntry, ...]
    gpus: tuple[GPUSpec, ...]
    """One for each entry."""
    work: Workload
    eff: Efficiency
    most_staleness: int


def straggling(work: Workload) -> float:
    """How much longer than a rollout its group is held: the longest of the group over the mean."""
    return work.lengths.mean_of_longest(work.rollouts_per_prompt) / work.lengths.mean


def chunk(q: Question) -> float:
    """Rollouts in one part: 1 / CHUNKS of the most that the bound can ever allow. The same for every split."""
    return (q.most_staleness + 1) * q.work.rollouts / straggling(q.work) / CHUNKS


def curve_of(q: Question, pool: Pool) -> np.ndarray:
    """[CHUNKS + 1] rollouts finished per second, with so many parts under way in the pool."""
    return pool.rollouts_per_s(np.arange(CHUNKS + 1) * chunk(q))


def share_out(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The most rollouts per second of all pools together for every number of parts, and each pool's parts then.

    Exact, by one max-plus convolution a pool. Returns [CHUNKS + 1] and, per pool, [CHUNKS + 1].
    """
    total, given = curves[0], [np.arange(CHUNKS + 1)]
    for curve in curves[1:]:
        best, own = np.empty(CHUNKS + 1), np.empty(CHUNKS + 1, dtype=np.int64)
        for j in range(CHUNKS + 1):
            sums = total[j::-1] + curve[: j + 1]
            own[j] = int(np.argmax(sums))
            best[j] = sums[own[j]]
        rest = np.arange(CHUNKS + 1) - own
        given = [parts[rest] for parts in given] + [own]
        total = best
    return total, given


def solve(q: Question, split: Split) -> Outcome:
    """The smallest staleness that is worth it, and the fewest rollouts under way that reach its step time."""
    total, given = share_out([curve_of(q, pool) for pool in split.pools])
    with np.errstate(divide="ignore"):
        generate = np.where(total > 0, q.work.rollouts / total, np.inf)
    synchronous = synchronous_s(q, split)
    choices = [(synchronous, -1), *_by_staleness(q, split.time.total_s, generate)]
    best = min(step for step, _ in choices)
    staleness = next(k for k, (step, _) in enumerate(choices) if step <= best * (1 + WORTH))
    step, parts = choices[staleness]
    each = [float(own[parts]) * chunk(q) for own in given]
    return Outcome(
        split=split,
        staleness=staleness,
        under_way=tuple(min(n, pool.slots) for n, pool in zip(each, split.pools, strict=True))
        if staleness
        else _whole_batch(q, split),
        generate_s=float(generate[parts]) if staleness else synchronous - split.time.total_s,
        synchronous_s=synchronous,
        step_s=step,
    )


def _by_staleness(q: Question, train_s: float, generate: np.ndarray) -> list[tuple[float, int]]:
    """For each bound from 1 on: the shortest step, and the fewest parts under way that reach it; inf if none may be.

    `generate`: [CHUNKS + 1] seconds, by parts under way.
    """
    steps = np.maximum(generate, train_s)
    held = np.arange(CHUNKS + 1) * chunk(q) * straggling(q.work) / q.work.rollouts + WAITING + train_s / steps
    choices = []
    for bound in range(1, q.most_staleness + 1):
        allowed = held <= bound + 1 + 1e-9
        shortest = float(steps[allowed].min()) if allowed.any() else math.inf
        choices.append((shortest, int(np.argmax(allowed & (steps <= shortest * SAME)))))
    return choices


def _shares(split: Split) -> list[float]:
    speeds = [float(pool.rollouts_per_s(float(pool.slots))) for pool in split.pools]
    return [speed / sum(speeds) for speed in speeds]


def _whole_batch(q: Question, split: Split) -> tuple[float, ...]:
    """A whole batch at once, by the pools' speeds."""
    return tuple(
        float(min(q.work.rollouts * share, pool.slots))
        for share, pool in zip(_shares(split), split.pools, strict=True)
    )


def synchronous_s(q: Question, split: Split) -> float:
    """Generate a whole batch, wait for its last rollout, then train."""
    generate = max(
        pool.speed.batch_s(q.work.rollouts * share / pool.engines, pool.speed.fit.most_slots)
        for share, pool in zip(_shares(split), split.pools, strict=True)
    )
    return generate + split.time.total_s
