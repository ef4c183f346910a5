"""The search: every split of the GPUs between learner and engines that fits, the best first. Pure.

Variables: the learner's GPU type and ranks (within a node its divisors, else whole nodes), tensor parallelism of the
engines on each kind of node, and whether engines stay on the learner's node (versions then travel by the node's own link)
or use all that is left. For each, `plan_pacing` shares out the rollouts. A larger set of GPUs has every split that a smaller
one has, or a better one, so its best is never worse. Called by `plan`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec

from asyncrl.recipes.gpus import ClusterEntry
from asyncrl.recipes.plan_facts import Misfit
from asyncrl.recipes.plan_memory import EngineFit, LearnerFit, fit_engine, fit_learner
from asyncrl.recipes.plan_pacing import SAME, Outcome, Pool, Question, Split, curve_of, solve
from asyncrl.recipes.plan_speed import EngineSpeed, learner_time


class Found(msgspec.Struct, frozen=True, kw_only=True):
    outcomes: list[Outcome]
    """The best of each learner's shape, best first; empty where nothing fits."""
    misfits: list[Misfit]
    roles_that_fit: frozenset[str]
    """`engine` and `learner`, where some shape of it fits by itself."""


def search(question: Question) -> Found:
    engines, learners = engine_fits(question), learner_fits(question)
    misfits = [fit for fit in [*engines.values(), *learners.values()] if isinstance(fit, Misfit)]
    shapes = {key: fit for key, fit in engines.items() if isinstance(fit, EngineFit)}
    outcomes = []
    for (entry, ranks), fit in learners.items():
        if isinstance(fit, Misfit):
            continue
        found = [solve(question, split) for split in _splits(question, shapes, entry, ranks, fit)]
        if found:
            outcomes.append(min(found, key=lambda outcome: outcome.rank))
    outcomes = [fewest_engines(question, outcome) for outcome in outcomes]
    roles = {"engine": bool(shapes), "learner": any(isinstance(fit, LearnerFit) for fit in learners.values())}
    return Found(
        outcomes=sorted(outcomes, key=lambda outcome: outcome.rank),
        misfits=misfits,
        roles_that_fit=frozenset(role for role, fits in roles.items() if fits),
    )


# ---- what fits ---------------------------------------------------------------------------------------------------------


def engine_fits(q: Question) -> dict[tuple[int, int], EngineFit | Misfit]:
    """By entry and tensor parallelism."""
    return {
        (i, tp): fit_engine(q.model, entry.gpu_type, gpu, tp, q.work, q.eff)
        for i, (entry, gpu) in enumerate(zip(q.entries, q.gpus, strict=True))
        for tp in divisors(entry.gpus_per_node)
    }


def learner_fits(q: Question) -> dict[tuple[int, int], LearnerFit | Misfit]:
    """By entry and ranks."""
    return {
        (i, ranks): fit_learner(q.model, entry.gpu_type, gpu, ranks, q.work, q.eff)
        for i, (entry, gpu) in enumerate(zip(q.entries, q.gpus, strict=True))
        for ranks in _ranks(entry)
    }


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _ranks(entry: ClusterEntry) -> list[int]:
    whole = [entry.gpus_per_node * nodes for nodes in range(2, entry.nodes + 1)]
    return divisors(entry.gpus_per_node) + whole


# ---- splits ------------------------------------------------------------------------------------------------------------


def _splits(
    q: Question, shapes: dict[tuple[int, int], EngineFit], entry: int, ranks: int, fit: LearnerFit
) -> Iterator[Split]:
    for at_home in (True, False):
        each = (_pools(q, shapes, i, entry, ranks, at_home=at_home) for i in range(len(q.entries)))
        # An entry may be left out: another dtype would make versions travel as float32.
        choices = [[*_undominated(q, pools), None] for pools in each if pools]
        for chosen in itertools.product(*choices):
            pools = tuple(pool for pool in chosen if pool is not None)
            if not pools:
                continue
            dtypes = {pool.speed.fit.dtype for pool in pools}
            time = learner_time(
                q.model,
                q.entries[entry],
                q.gpus[entry],
                ranks,
                fit,
                q.work,
                q.eff,
                wire_dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
                across_nodes=not at_home,
            )
            yield Split(entry=entry, ranks=ranks, fit=fit, time=time, pools=pools)


def _pools(
    q: Question, shapes: dict[tuple[int, int], EngineFit], i: int, learner: int, ranks: int, *, at_home: bool
) -> list[Pool]:
    """The pools that entry `i` could make of what the learner leaves: one for each tensor parallelism that fits."""
    entry, pools = q.entries[i], []
    for (at, tp), fit in shapes.items():
        if at != i:
            continue
        per_node = entry.gpus_per_node // tp
        engines = 0 if at_home else per_node * entry.nodes
        if i == learner:
            whole, part = divmod(ranks, entry.gpus_per_node)
            left = (entry.gpus_per_node - part) // tp if part else 0
            engines = left if at_home else left + per_node * (entry.nodes - whole - bool(part))
        if engines:
            speed = EngineSpeed(
                model=q.model, gpu=q.gpus[i], tensor_parallel=tp, fit=fit, work=q.work, eff=q.eff
            )
            pools.append(Pool(entry=i, speed=speed, engines=engines))
    return pools


def _undominated(q: Question, pools: list[Pool]) -> list[Pool]:
    """Without those that another one of the same entry equals or beats whatever it is given."""
    curves = [curve_of(q, pool) for pool in pools]
    kept: list[int] = []
    for i, curve in enumerate(curves):
        beaten = any((curves[k] >= curve).all() for k in kept)
        if not beaten:
            kept = [k for k in kept if not (curve >= curves[k]).all()] + [i]
    return [pools[k] for k in kept]


def fewest_engines(q: Question, outcome: Outcome) -> Outcome:
    """The same step time at the same staleness with as few GPUs as it takes: engines that a slow learner leaves idle go."""
    for k in range(len(outcome.split.pools) - 1, -1, -1):
        low, high, best = 0, outcome.split.pools[k].engines, outcome
        while low < high:
            middle = (low + high) // 2
            smaller = _with_engines(q, outcome, k, middle)
            if smaller and smaller.step_s <= outcome.step_s * SAME and smaller.staleness <= outcome.staleness:
                high, best = middle, smaller
            else:
                low = middle + 1
        if len(best.split.pools) < len(outcome.split.pools):
            return fewest_engines(q, best)
        outcome = best
    return outcome


def _with_engines(q: Question, outcome: Outcome, k: int, engines: int) -> Outcome | None:
    pools = list(outcome.split.pools)
    if engines:
        pools[k] = msgspec.structs.replace(pools[k], engines=engines)
    else:
        del pools[k]
    if not pools:
        return None
    return solve(q, msgspec.structs.replace(outcome.split, pools=tuple(pools)))
