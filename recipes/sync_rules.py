"""What `[weight_sync]` must be with the rest of a recipe, and what follows where it says nothing. Pure.

Called by `recipe` when a recipe is loaded, and by the parts that need the lag.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncrl.recipes.recipe import Recipe

Broken = tuple[str, str, str]
"""Key path, what was found, the way out."""


def lag_of(recipe: Recipe) -> int:
    """Versions that an engine may be behind while the learner goes on.

    Where nothing is said and the bound is 1 or 0, none: a token that is one version old when it is sampled would be past the bound
    as soon as the next version is there.
    """
    if recipe.weight_sync.max_lag_versions is not None:
        return recipe.weight_sync.max_lag_versions
    together = recipe.weight_sync.transport == "collective" or recipe.run.deterministic
    return 1 if recipe.staleness.max_staleness_versions > 1 and not together else 0


def broken_sync_rules(recipe: Recipe) -> Iterator[Broken]:
    """Each rule of weight sync that the recipe breaks."""
    yield from _lag(recipe)
    yield from _senders(recipe)
    yield from _devices(recipe)
    yield from _float8(recipe)


def _lag(recipe: Recipe) -> Iterator[Broken]:
    path, lag = "weight_sync.max_lag_versions", lag_of(recipe)
    bound = recipe.staleness.max_staleness_versions
    if lag > bound:
        yield (
            path,
            str(lag),
            f"must be at most staleness.max_staleness_versions = {bound}: what an engine that far behind samples is past the "
            "bound when it comes",
        )
    if lag and recipe.weight_sync.transport == "collective":
        yield path, str(lag), "must be 0, or left out: a collective gives a version to all engines at once"
    if lag and recipe.run.deterministic:
        yield (
            path,
            str(lag),
            "must be 0, or left out, with run.deterministic: when an engine takes a version is chance",
        )


def _senders(recipe: Recipe) -> Iterator[Broken]:
    sync, lora = recipe.weight_sync, recipe.learner.lora
    if sync.senders == "one":
        return
    path, found = "weight_sync.senders", '"all"'
    if lora is not None and lora.sync == "merged":
        yield (
            path,
            found,
            'must be "one" with adapters that are merged: merged weights are not rows that a rank holds',
        )
    if sync.wire_dtype == "float8":
        yield path, found, 'must be "one" with float8: a block of 128 x 128 may lie on two ranks'
    if sync.transport == "ipc":
        yield path, found, 'must be "one" with ipc: engines read the memory of one GPU'


def _devices(recipe: Recipe) -> Iterator[Broken]:
    sync = recipe.weight_sync
    if sync.transport == "ipc" and recipe.learner.gpu_share == 1:
        yield (
            "learner.gpu_share",
            "1",
            'must be below 1 with weight_sync.transport = "ipc": engines are on that GPU, too',
        )
    if sync.transport == "ipc" and recipe.learner.device != "cuda":
        yield "weight_sync.transport", '"ipc"', 'needs learner.device = "cuda": it shares the memory of a GPU'
    for i, pool in enumerate(recipe.pools):
        if pool.gpu_share < 1 and pool.tensor_parallel > 1:
            yield f"pools[{i}].gpu_share", f"{pool.gpu_share:g}", "must be 1 with tensor_parallel above 1"
        if sync.transport == "ipc" and pool.gpu_share == 1:
            yield (
                f"pools[{i}].gpu_share",
                "1",
                'must be below 1 with weight_sync.transport = "ipc": the learner is on that GPU, too',
            )
        if sync.transport == "ipc" and (pool.device != "cuda" or pool.engine != "vllm"):
            yield "weight_sync.transport", '"ipc"', f"needs vLLM engines on CUDA, pools[{i}] is not"


def _float8(recipe: Recipe) -> Iterator[Broken]:
    if recipe.weight_sync.wire_dtype != "float8":
        return
    path, found = "weight_sync.wire_dtype", '"float8"'
    for i, pool in enumerate(recipe.pools):
        if pool.engine != "vllm" or pool.device != "cuda":
            yield (
                path,
                found,
                f"needs vLLM engines on CUDA of compute capability 7.5 or above, pools[{i}] is not: on a CPU vLLM computes in float8 only "
                "with AMX, which no test has seen",
            )
        elif pool.dtype != "bfloat16":
            yield path, found, f'needs pools[{i}].dtype = "bfloat16": what is not in float8 travels as that'
    if recipe.adapter_rank:
        yield path, found, 'needs whole models: set learner.lora.sync = "merged", or wire_dtype = "auto"'
