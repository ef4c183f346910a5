"""What a run needs so that its weights can be made again bit for bit, also over a resume. Pure. Called by `recipe`.

An answer is then a function of (prompts.seed, rollout, weights): it is sampled alone in its engine, as the last bits of a row
depend on what it shares a batch with; from its first token to its last, as a prefix that is computed at once has other last
bits than one that grew token by token; and before the next version, so that no version starts while it is under way.
Checkpoints are taken while nothing is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncrl.recipes.recipe import Recipe

Broken = tuple[str, str, str]
"""Key path, what was found, advice."""

_KEY = "with run.deterministic"


def broken_deterministic_rules(recipe: Recipe) -> Iterator[Broken]:
    if not recipe.run.deterministic:
        return
    yield from _one_of_each(recipe)
    yield from _in_step(recipe)
    yield from _on_cpu("learner.device", recipe.learner.device)
    if any(pool.engine == "vllm" for pool in recipe.pools):
        yield from _alone(recipe)


def _alone(recipe: Recipe) -> Iterator[Broken]:
    """Of real engines: a rollout is by itself in its engine. What a fake one says follows from its prompt alone."""
    for i, pool in enumerate(recipe.pools):
        if pool.engine == "vllm":
            for key in ("concurrency", "max_concurrency"):
                value = getattr(pool, key)
                if value != 1:
                    yield (
                        f"pools[{i}].{key}",
                        str(value),
                        f"must be 1 {_KEY}: what shares a batch with a rollout changes the last bits of its logprobs",
                    )
            yield from _on_cpu(f"pools[{i}].device", pool.device)
    if recipe.weight_sync.prefix_cache:
        yield (
            "weight_sync.prefix_cache",
            "true",
            f"must be false {_KEY}: what is found in a cache was computed in other pieces than what is not",
        )
    if recipe.evaluation.every_steps:
        yield (
            "evaluation.every_steps",
            str(recipe.evaluation.every_steps),
            f"must be 0 {_KEY}: held-out answers would share batches with rollouts",
        )


def _one_of_each(recipe: Recipe) -> Iterator[Broken]:
    engines = recipe.engines
    if engines != 1:
        yield (
            "pools",
            f"{engines} engines",
            f"must be one pool of one engine {_KEY}: which of two gets a rollout is chance",
        )
    if recipe.learner.ranks != 1:
        yield (
            "learner.ranks",
            str(recipe.learner.ranks),
            f"must be 1 {_KEY}: gradients that are added up over ranks have other last bits",
        )
    if recipe.buffer.shards != 1:
        yield (
            "buffer.shards",
            str(recipe.buffer.shards),
            f"must be 1 {_KEY}: which shard a prompt goes to is chance",
        )


def _in_step(recipe: Recipe) -> Iterator[Broken]:
    bound = recipe.staleness.max_staleness_versions
    if bound:
        yield (
            "staleness.max_staleness_versions",
            str(bound),
            f"must be 0 {_KEY}: with more, it is chance at which token of a rollout the next version comes",
        )
    if recipe.buffer.group_policy.spare_rollouts_per_prompt:
        yield (
            "buffer.group_policy",
            "first_k",
            f'must be {{ type = "full" }} {_KEY}: which rollouts of a group are the first is chance',
        )


def _on_cpu(path: str, device: str) -> Iterator[Broken]:
    if device != "cpu":
        yield path, f'"{device}"', f'must be "cpu" {_KEY}: elsewhere nobody has shown that it holds'
