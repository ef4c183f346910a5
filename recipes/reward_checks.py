"""Whether the reward terms of a recipe are there: functions that load, folders that are reward models, room for them.

No torch here: of a model its JSON and the headers of its weights are read. Called by `preflight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from asyncrl.generators.config import RewardsConfig, RewardTerm
from asyncrl.generators.functions import FunctionError
from asyncrl.generators.reward_pool import check_functions
from asyncrl.recipes.model_folder import ModelFolderError, inspect_model, inspect_reward_model
from asyncrl.recipes.recipe import Problem, Recipe
from asyncrl.recipes.sizes import DTYPE_BYTES


def reward_problems(recipe: Recipe, notes: list[str]) -> Iterator[Problem]:
    """Functions are loaded as the run will load them: by a worker process, whose end is not ours."""
    for i, term in enumerate(recipe.rewards.terms):
        if term.model:
            yield from _model_problems(f"rewards.terms[{i}]", term, recipe, notes)
            continue
        try:
            check_functions(RewardsConfig(terms=[term]))
        except FunctionError as error:
            yield Problem(f"rewards.terms[{i}].function", repr(term.function), str(error))


def _model_problems(path: str, term: RewardTerm, recipe: Recipe, notes: list[str]) -> Iterator[Problem]:
    try:
        model = inspect_reward_model(Path(term.model), chat_template=term.served.chat_template)
    except ModelFolderError as error:
        yield Problem(f"{path}.model", repr(term.model), str(error))
        return
    limit, longest = model.max_position_embeddings, recipe.model.max_context_tokens
    if limit is not None and limit < longest:
        notes.append(
            f"{path}.model was made for {limit} tokens, and model.max_context_tokens is {longest}: answers that are too long for "
            "it fail"
        )


def reward_model_bytes(recipe: Recipe) -> int:
    """Weights of all reward models on CPUs: each engine has its own copy."""
    engines = sum(pool.engines_to_begin for pool in recipe.pools)
    return engines * sum(_bytes_of(term) for term in recipe.rewards.terms if term.model)


def _bytes_of(term: RewardTerm) -> int:
    if term.served.device != "cpu":
        return 0
    try:
        return DTYPE_BYTES[term.served.dtype] * inspect_model(Path(term.model)).parameters
    except ModelFolderError:
        return 0  # told of by `reward_problems`
