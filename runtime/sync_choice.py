"""Whether a run's versions are broadcast to all engines at once or pulled by each, where the recipe leaves it open. Called by
`placement`, which knows the machines, before any engine is started.

Engines that come later are on one of the machines of a cluster; which, is not known then. So the decision takes each machine that
has room for one: where any is another than the learner's, and everything computes on GPUs, versions are broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence

from asyncrl.recipes import Recipe
from asyncrl.weight_sync.topology import Place, is_collective


def broadcasts(recipe: Recipe, learner_hosts: Sequence[str], gpu_hosts: Sequence[str]) -> bool:
    """`learner_hosts`: of the ranks that send, rank 0 first. `gpu_hosts`: the machines with GPUs."""
    on_gpus = recipe.learner.device == "cuda" and all(pool.device == "cuda" for pool in recipe.pools)

    def place(index: int, host: str) -> Place:
        return Place(host=host, gpus=(f"{host}/{index}",) if on_gpus else ())

    senders = [place(index, host) for index, host in enumerate(learner_hosts)]
    # A GPU of an engine is none of the learner's: Ray gives each to one of them.
    engines = [place(len(senders) + index, host) for index, host in enumerate(gpu_hosts)]
    sync = recipe.weight_sync
    return is_collective(sync.transport, senders, engines, max_lag_versions=sync.max_lag_versions)
