"""The sizes that follow from a recipe, each with its arithmetic: printed before a launch, never set. Pure."""

from __future__ import annotations

import msgspec

from asyncrl.recipes.plan_lora import Weights, held_state, sent_parameters
from asyncrl.recipes.recipe import Recipe
from asyncrl.weight_sync.float8 import BLOCK, SCALE_DTYPE

_TOKEN_BYTES = 8
"""In the buffer: the token and its logprob."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Size(msgspec.Struct, frozen=True):
    name: str
    value: str
    formula: str


def wire_dtype(recipe: Recipe) -> str:
    """What weights travel as: `weight_sync.wire_dtype`, or by itself the engines' type, and float32 where pools differ."""
    if recipe.weight_sync.wire_dtype != "auto":
        return recipe.weight_sync.wire_dtype
    dtypes = {pool.dtype for pool in recipe.pools}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def wire_bytes(recipe: Recipe, model: Weights) -> int:
    """Bytes of one version on its way. Raises UnknownTarget."""
    sent, dtype = sent_parameters(model, recipe.learner.lora), wire_dtype(recipe)
    if dtype != "float8":
        return sent * DTYPE_BYTES[dtype]
    linear = sum(layer.parameters for layer in model.linears.values())
    scales = -(-linear // BLOCK**2) * DTYPE_BYTES[SCALE_DTYPE]
    return linear + scales + (sent - linear) * DTYPE_BYTES["bfloat16"]


def derived_sizes(recipe: Recipe, model: Weights | None) -> list[Size]:
    """`model`: None where it is not there yet. Raises UnknownTarget."""
    prompts, learner, bound = recipe.prompts, recipe.learner, recipe.staleness.max_staleness_versions
    b, n, group = prompts.prompts_per_step, prompts.rollouts_per_prompt, recipe.rollouts_per_group
    longest, baseline = recipe.sampling.max_new_tokens, recipe.greedy_baseline
    spare = group - n - baseline
    further = (f" + {spare} spare" if spare else "") + (" + 1 greedy" if baseline else "")
    under_way = recipe.held_groups_limit * group
    sizes = [
        Size("rollouts per step", f"{b * n:,}", f"{b} prompts_per_step x {n} rollouts_per_prompt"),
        Size("prompts in the whole run", f"{b * recipe.run.steps:,}", f"{b} x {recipe.run.steps} steps"),
        Size(
            "prompts under way, at most",
            f"{recipe.held_groups_limit:,}",
            f"({bound} max_staleness_versions + 1) x {b} prompts_per_step",
        ),
        Size(
            "rollouts under way, at most",
            f"{under_way:,}",
            f"{recipe.held_groups_limit} prompts x "
            + (f"({n} rollouts_per_prompt{further})" if further else f"{n} rollouts_per_prompt"),
        ),
        Size(
            "answers under way, at most",
            amount(_TOKEN_BYTES * under_way * longest),
            f"{under_way:,} rollouts x {longest} max_new_tokens x {_TOKEN_BYTES} bytes; at "
            f"{amount(recipe.buffer.memory_bytes)} (buffer.memory_bytes) leases go out for the next batch alone",
        ),
        Size(
            "slots",
            f"{recipe.slots:,}",
            " + ".join(f"{p.engines} x {p.first_concurrency} ({p.name})" for p in recipe.pools),
        ),
        Size(
            "answer tokens per step, at most",
            f"{b * n * longest:,}",
            f"{b * n} rollouts x {longest} max_new_tokens",
        ),
        Size(
            "optimizer steps",
            f"{recipe.run.steps * learner.minibatches_per_step:,}",
            f"{recipe.run.steps} steps x {learner.minibatches_per_step} minibatches_per_step",
        ),
    ]
    if model is not None:
        sizes += _model_sizes(recipe, model)
    return sizes


def _model_sizes(recipe: Recipe, model: Weights) -> list[Size]:
    ranks, sent, lora = recipe.learner.ranks, wire_bytes(recipe, model), recipe.learner.lora
    held = held_state(model, lora)
    what = "adapter" if recipe.adapter_rank else "parameters"
    buckets = -(-sent // recipe.weight_sync.bucket_bytes)
    return [
        Size("parameters", f"{model.parameters:,}", recipe.model.path),
        Size("learner state per rank", amount(held.total_bytes / ranks), f"({held.formula}) / {ranks} ranks"),
        Size("bytes per version", amount(sent), f"{what} x {wire_dtype(recipe)}"),
        Size(
            "buckets per version, about",
            f"{buckets:,}",
            f"{amount(sent)} / {amount(recipe.weight_sync.bucket_bytes)}",
        ),
        Size(
            "shared memory for weights",
            amount(recipe.version_slots * sent),
            f"{recipe.version_slots} versions x bytes per version",
        ),
        Size(
            "versions that engines may be behind",
            str(recipe.max_lag_versions),
            "the learner goes on meanwhile" if recipe.max_lag_versions else "the learner waits for all",
        ),
    ]


def amount(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError
