"""Ray: starting or joining it, and making the parts of a run as actors where there is room for them.

The learner's ranks are placed together; each engine has a room of its own, so that engines come and go one by one, and one
that found no room gets it when a machine joins. Ray places, starts and watches processes; rollouts and weights do not travel
through it. Called by `launch` and by the keepers of engines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from asyncrl.generators.config import PoolConfig
from asyncrl.recipes import Recipe
from asyncrl.recipes.preflight import usable_cores
from asyncrl.runtime.buffer_part import BufferPart
from asyncrl.runtime.engine_part import EnginePart
from asyncrl.runtime.learner_part import LearnerPart
from asyncrl.runtime.sync_choice import way_of

_OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's smallest: nothing of size travels through it."""
RESERVE_S = 60.0
"""What a run needs to begin must have room within that time."""
_GPU_TYPE_SHARE = 0.001
"""What Ray's own users take of `accelerator_type:X`, so that any number fits on a machine that has it."""


class PlacementError(RuntimeError):
    """The machines that Ray knows have no room for the run."""


def start_ray(recipe: Recipe) -> None:
    """Starts Ray here, or joins the cluster at `run.ray_address`."""
    variables = {
        "PYTHONSAFEPATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if recipe.run.ray_address:
        ray.init(
            address=recipe.run.ray_address,
            log_to_driver=False,
            runtime_env={"env_vars": variables},
            logging_level=logging.ERROR,
        )
        return
    os.environ.update(variables, RAY_USAGE_STATS_ENABLED="0", RAY_DISABLE_MEMORY_MONITOR="1")
    ray.init(
        address="local",
        num_cpus=usable_cores(),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def own_host(recipe: Recipe) -> str:
    """Where the parts of this machine listen for the others."""
    return "127.0.0.1" if not recipe.run.ray_address else str(ray.util.get_node_ip_address())


def place_buffers(recipe: Recipe, folder: str, run_id: str) -> list[Any]:
    """Beside the launcher, where the log is: Ray starts them again there when they die, and repeats no call of its own."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    part, host = ray.remote(BufferPart), own_host(recipe)
    options = {"num_cpus": 0, "max_concurrency": 4, "max_restarts": -1, "max_task_retries": 0}
    return [
        part.options(**options, scheduling_strategy=here, name=f"{run_id}-buffer-{shard}").remote(
            recipe, folder, host, shard
        )
        for shard in range(recipe.buffer.shards)
    ]


def place_learners(recipe: Recipe, folder: str, run_id: str) -> list[Any]:
    """All ranks at once, or none. Raises PlacementError."""
    learner = recipe.learner
    rank = (
        {"CPU": float(learner.cores)} if learner.device == "cpu" else {"CPU": 1.0, "GPU": learner.gpu_share}
    )
    room = placement_group([rank] * learner.ranks, strategy="PACK")
    if not room.wait(RESERVE_S):
        raise no_room(f"{learner.ranks} learner ranks with {rank} each", "Lower learner.ranks or cores")
    places = [_options(rank, room, index) for index in range(learner.ranks)]
    hosts = [_host_of(recipe, room, index) for index in range(learner.ranks)]
    if hosts[0] == own_host(recipe):
        port = free_port(hosts[0])
    else:  # only that machine knows
        port = ray.get(ray.remote(free_port).options(**places[0]).remote(hosts[0]), timeout=RESERVE_S)
    sending = hosts if recipe.weight_sync.senders == "all" else hosts[:1]
    way = way_of(recipe, sending, _gpus())
    part = ray.remote(LearnerPart)
    return [
        part.options(**places[index], name=f"{run_id}-learner-{index}").remote(
            recipe, folder, index, f"{hosts[0]}:{port}", run_id, hosts[index], way
        )
        for index in range(learner.ranks)
    ]


def _gpus() -> dict[str, float]:
    """Machine -> GPUs, of those that have any."""
    machines = {
        str(each["NodeManagerAddress"]): each["Resources"].get("GPU", 0.0)
        for each in ray.nodes()
        if each["Alive"]
    }
    return {host: count for host, count in machines.items() if count}


def _host_of(recipe: Recipe, room: PlacementGroup, index: int) -> str:
    """Where a part in this place listens for the others."""
    if not recipe.run.ray_address:
        return own_host(recipe)
    node = placement_group_table(room)["bundles_to_node_id"][index]
    return next(str(each["NodeManagerAddress"]) for each in ray.nodes() if each["NodeID"] == node)


def demand(pool: PoolConfig) -> dict[str, float]:
    """What one engine of `pool` takes of Ray's resources; a fake engine only what the recipe names."""
    taken = dict(pool.resources)
    if pool.gpu_type:
        taken[f"accelerator_type:{pool.gpu_type}"] = _GPU_TYPE_SHARE
    if pool.engine == "fake":
        return taken
    if pool.device == "cpu":
        return {"CPU": float(pool.cores), **taken}
    return {"CPU": 1.0, "GPU": pool.tensor_parallel * pool.gpu_share, **taken}


class EngineRoom:
    """A place for one engine: asked for when made, had when `is_ready`, given back by `release`."""

    def __init__(self, pool: PoolConfig) -> None:
        self._demand = demand(pool)
        self._group: PlacementGroup | None = None
        if self._demand:
            self._group = placement_group([self._demand], strategy="STRICT_PACK")

    def is_ready(self) -> bool:
        """Asks Ray's head, which takes a few milliseconds."""
        return self._group is None or placement_group_table(self._group)["state"] == "CREATED"

    def wants(self) -> str:
        return ", ".join(f"{name} {amount:g}" for name, amount in self._demand.items()) or "nothing"

    def make_engine(self, recipe: Recipe, folder: str, run_id: str, pool_index: int, engine_id: str) -> Any:
        """Ray starts its process at once."""
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        if self._group is not None:
            options = _options(self._demand, self._group, 0)
        part = ray.remote(EnginePart).options(**options, max_concurrency=16, name=f"{run_id}-{engine_id}")
        return part.remote(recipe, folder, pool_index, engine_id, None)

    def release(self) -> None:
        """Whatever still runs there is ended by Ray. May be called twice."""
        group, self._group = self._group, None
        if group is not None:
            remove_placement_group(group)


def end_actor(actor: Any) -> None:
    """Kills its process, if there is one."""
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        ray.kill(actor, no_restart=True)


def no_room(wanted: str, advice: str) -> PlacementError:
    """With what the cluster has and what of it is free."""
    named = ("CPU", "GPU")
    have = {k: v for k, v in ray.cluster_resources().items() if k in named or not _is_of_ray(k)}
    free = {k: v for k, v in ray.available_resources().items() if k in have}
    return PlacementError(
        f"Ray found no room within {RESERVE_S:.0f} s: wanted {wanted}, the cluster has {have}, free are {free}. "
        f"{advice}, or add machines."
    )


def _is_of_ray(resource: str) -> bool:
    """Whether Ray made it up itself: memory, one entry for each machine and each placement group."""
    return (
        resource in ("memory", "object_store_memory") or resource.startswith("node:") or "_group_" in resource
    )


def _options(taken: dict[str, float], room: PlacementGroup, index: int) -> dict[str, Any]:
    strategy = PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=index)
    return {
        "scheduling_strategy": strategy,
        "num_cpus": taken.get("CPU", 0.0),
        "num_gpus": taken.get("GPU", 0.0),
        "resources": {k: v for k, v in taken.items() if k not in ("CPU", "GPU")},
    }


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
