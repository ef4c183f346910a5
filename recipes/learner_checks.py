"""What the learner has beside the policy, as far as a recipe shows it: are the models there, and what do they take. No torch.

Called by `preflight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from asyncrl.learner.config import base_is_reference
from asyncrl.learner.objective_needs import needs_of
from asyncrl.recipes.model_folder import ModelFacts, ModelFolderError, inspect_model
from asyncrl.recipes.plan_lora import TRAINED_BYTES
from asyncrl.recipes.recipe import Problem, Recipe
from asyncrl.recipes.sizes import DTYPE_BYTES


def learner_model_problems(recipe: Recipe) -> Iterator[Problem]:
    """Of the critic's and the reference's own folders."""
    for key, path in _paths(recipe).items():
        try:
            model = inspect_model(Path(path))
        except ModelFolderError as error:
            yield Problem(key, repr(path), str(error))
            continue
        limit, longest = model.max_position_embeddings, recipe.model.max_context_tokens
        if limit is not None and longest > limit:
            yield Problem(
                key, repr(path), f"was made for {limit} tokens at most, model.max_context_tokens is {longest}"
            )


def part_bytes(recipe: Recipe, policy: ModelFacts) -> float:
    """Over all ranks: a critic with its optimizer, and a reference that is not the base of adapters, in its compute type."""
    learner, parts = recipe.learner, needs_of(recipe.learner.objective).parts
    sizes = {key: _parameters(path) for key, path in _paths(recipe).items()}
    total = 0.0
    if "critic" in parts:
        total += TRAINED_BYTES * (sizes.get("learner.critic.path") or policy.parameters)
    if "reference model" in parts and not base_is_reference(learner):
        total += DTYPE_BYTES[learner.dtype] * (sizes.get("learner.reference.path") or policy.parameters)
    return total


def _paths(recipe: Recipe) -> dict[str, str]:
    """By key path, where the recipe names one."""
    learner = recipe.learner
    named = {
        "learner.critic.path": learner.critic.path if learner.critic else "",
        "learner.reference.path": learner.reference.path if learner.reference else "",
    }
    return {key: path for key, path in named.items() if path}


def _parameters(path: str) -> int:
    try:
        return inspect_model(Path(path)).parameters
    except ModelFolderError:
        return 0  # told of by `learner_model_problems`
