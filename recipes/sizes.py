"""The sizes that follow from a recipe, each with its arithmetic: printed before a launch, never set. Pure."""

from __future__ import annotations

import msgspec

from asyncrl.recipes.recipe import Recipe

_TOKEN_BYTES = 8
"""In the buffer: the token and its logprob."""
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Size(msgspec.Struct, frozen=True):
    name: str
    value: str
    formula: str


def wire_dtype(recipe: Recipe) -> str:
    """What weights travel as: the engines' type, or float32 where pools differ."""
    dtypes = {pool.dtype for pool in recipe.pools}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def wire_bytes(recipe: Recipe, parameters: int) -> int:
    """Bytes of one version on its way."""
    return parameters * _DTYPE_BYTES[wire_dtype(recipe)]


def derived_sizes(recipe: Recipe, parameters: int | None) -> list[Size]:
    """`parameters` of the model, None where it is not there yet."""
    prompts, learner, bound = recipe.prompts, recipe.learner, recipe.staleness.max_staleness_versions
    b, n, group = prompts.prompts_per_step, prompts.rollouts_per_prompt, recipe.rollouts_per_group
    longest, spare = recipe.sampling.max_new_tokens, group - n
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
            + (f"({n} rollouts_per_prompt + {spare} spare)" if spare else f"{n} rollouts_per_prompt"),
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
    if parameters is not None:
        sizes += _model_sizes(recipe, parameters)
    return sizes


def _model_sizes(recipe: Recipe, parameters: int) -> list[Size]:
    ranks, sent = recipe.learner.ranks, wire_bytes(recipe, parameters)
    buckets = -(-sent // recipe.weight_sync.bucket_bytes)
    return [
        Size("parameters", f"{parameters:,}", recipe.model.path),
        Size(
            "learner state per rank",
            amount(16 * parameters // ranks),
            f"(4 master + 4 gradient + 8 AdamW) bytes x parameters / {ranks} ranks",
        ),
        Size("bytes per version", amount(sent), f"parameters x {wire_dtype(recipe)}"),
        Size(
            "buckets per version, about",
            f"{buckets:,}",
            f"{amount(sent)} / {amount(recipe.weight_sync.bucket_bytes)}",
        ),
        Size("shared memory for weights", amount(2 * sent), "2 slots x bytes per version"),
    ]


def amount(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError
