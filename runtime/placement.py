"""Ray: starting or joining it, reserving room for the whole run at once, and making the parts as actors.

Ray places, starts and watches processes; rollouts and weights do not travel through it. Called by `launch`.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import msgspec
import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from asyncrl.recipes import Recipe
from asyncrl.recipes.preflight import usable_cores
from asyncrl.runtime.buffer_part import BufferPart
from asyncrl.runtime.engine_part import EnginePart
from asyncrl.runtime.learner_part import LearnerPart

_OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's smallest: nothing of size travels through it."""
_RESERVE_S = 60.0


class PlacementError(RuntimeError):
    """The machines that Ray knows have no room for the run."""


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a run, as Ray's handles. (Handles have no public type.)"""

    buffers: list[Any]
    """One of each shard."""
    engines: dict[str, Any]
    learners: list[Any]


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


def place(recipe: Recipe, folder: str, run_id: str) -> Placed:
    """Makes every part; Ray starts their processes at once. Raises PlacementError."""
    host = "127.0.0.1" if not recipe.run.ray_address else ray.util.get_node_ip_address()
    shares = iter(_reserve(_demands(recipe)))
    buffers = _buffers(recipe, folder, run_id, host)
    engines, learners = {}, []
    address = f"{host}:{free_port(host)}"
    for rank in range(recipe.learner.ranks):
        learner = ray.remote(LearnerPart).options(**next(shares), name=f"{run_id}-learner-{rank}")
        learners.append(learner.remote(recipe, folder, rank, address, run_id, host))
    for pool_index, pool in enumerate(recipe.pools):
        for index in range(pool.engines):
            engine_id = f"{pool.name}-{index}"
            engine = ray.remote(EnginePart).options(
                **next(shares), max_concurrency=16, name=f"{run_id}-{engine_id}"
            )
            engines[engine_id] = engine.remote(recipe, folder, pool_index, engine_id, None)
    return Placed(buffers=buffers, engines=engines, learners=learners)


def _buffers(recipe: Recipe, folder: str, run_id: str, host: str) -> list[Any]:
    """Beside the launcher, where the log is: Ray starts them again there when they die, and repeats no call of its own."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    part = ray.remote(BufferPart)
    options = {"num_cpus": 0, "max_concurrency": 4, "max_restarts": -1, "max_task_retries": 0}
    return [
        part.options(**options, scheduling_strategy=here, name=f"{run_id}-buffer-{shard}").remote(
            recipe, folder, host, shard
        )
        for shard in range(recipe.buffer.shards)
    ]


def _demands(recipe: Recipe) -> list[dict[str, float]]:
    """What each rank and each engine needs of Ray's resources, in the order of placing; a fake engine nothing."""
    learner = recipe.learner
    rank = {"CPU": float(learner.cores)} if learner.device == "cpu" else {"CPU": 1.0, "GPU": 1.0}
    demands = [rank] * learner.ranks
    for pool in recipe.pools:
        if pool.engine == "fake":
            engine = {}
        elif pool.device == "cpu":
            engine = {"CPU": float(pool.cores)}
        else:
            engine = {"CPU": 1.0, "GPU": float(pool.tensor_parallel)}
        demands += [engine] * pool.engines
    return demands


def _reserve(demands: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Reserves all at once, or nothing; returns each part's options for Ray."""
    bundles = [demand for demand in demands if demand]
    room: PlacementGroup = placement_group(bundles, strategy="PACK")
    if not room.wait(_RESERVE_S):
        have = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        want = {k: sum(d.get(k, 0.0) for d in demands) for k in ("CPU", "GPU")}
        raise PlacementError(
            f"Ray found no room within {_RESERVE_S:.0f} s: the run wants {want}, the cluster has {have}, free are {free}. "
            "Lower engines, ranks or cores, or add machines."
        )
    index = iter(range(len(bundles)))
    return [_options(demand, room, next(index)) if demand else {"num_cpus": 0} for demand in demands]


def _options(demand: dict[str, float], room: PlacementGroup, index: int) -> dict[str, Any]:
    strategy = PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=index)
    return {"scheduling_strategy": strategy, "num_cpus": demand["CPU"], "num_gpus": demand.get("GPU", 0.0)}


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
