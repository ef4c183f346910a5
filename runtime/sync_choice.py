"""How a run's versions reach its engines, where the recipe leaves that open: by the machines and GPUs that there are when it starts.

Called by `placement`, before any engine is started. Engines that come later are on one of these machines; on which, is not known
then. So the decision takes each machine that has room for one: where any is another than the learner's, and everything computes on
GPUs of its own, versions are broadcast; where all share the one GPU that there is, they stay in its memory. In every other case each
engine pulls them in its own way. `publishing` asks what a broadcast goes over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from asyncrl.generators.config import PoolConfig
from asyncrl.recipes import Recipe
from asyncrl.weight_sync.topology import Place, is_collective

Way = Literal["collective", "device", "host"]
"""Broadcast; pulled out of a GPU's memory; pulled out of the host's memory, which an engine elsewhere does over TCP."""


def is_over_nccl(recipe: Recipe) -> bool:
    """Whether each rank of a broadcast has a GPU to itself, without which NCCL makes no group; else it goes over gloo."""
    engines_alone = all(_is_on_gpus(pool) and pool.gpu_share == 1 for pool in recipe.pools)
    return recipe.learner.device == "cuda" and recipe.learner.gpu_share == 1 and engines_alone


def _is_on_gpus(pool: PoolConfig) -> bool:
    return pool.engine == "vllm" and pool.device == "cuda"


def way_of(recipe: Recipe, learner_hosts: Sequence[str], gpus: Mapping[str, float]) -> Way:
    """`learner_hosts`: of the ranks that send, rank 0 first. `gpus`: machine -> how many it has, of those that have any."""
    sync = recipe.weight_sync
    on_gpus = recipe.learner.device == "cuda" and all(_is_on_gpus(pool) for pool in recipe.pools)
    over_nccl = is_over_nccl(recipe)
    if sync.transport == "ipc" or (
        sync.transport == "auto"
        and on_gpus
        and len(learner_hosts) == 1
        and dict(gpus) == {learner_hosts[0]: 1}
    ):
        return "device"

    def place(index: int, host: str) -> Place:
        return Place(host=host, gpus=(f"{host}/{index}",) if over_nccl else ())

    senders = [place(index, host) for index, host in enumerate(learner_hosts)]
    # A whole GPU of an engine is none of the learner's: Ray gives each to one of them.
    engines = [place(len(senders) + index, host) for index, host in enumerate(gpus)]
    together = is_collective(sync.transport, senders, engines, max_lag_versions=sync.max_lag_versions)
    return "collective" if together else "host"
