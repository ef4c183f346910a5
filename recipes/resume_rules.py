"""What of a recipe a run that goes on may change, and what not, and why. Pure. Called by whoever resumes a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from asyncrl.recipes.recipe import Problem, Recipe

_WALK: Final = "the prompts are walked on from a position, and another walk has other prompts there"
_SAMPLED: Final = (
    "rollouts that are under way were sampled with it, and their logprobs are of that distribution"
)
_HELD: Final = "the groups that the buffer holds were made with it"
_STATE: Final = "the checkpoint's weights and optimizer states are of that shape"

FIXED: Final[Mapping[str, str]] = {
    "run.name": "the run's folder has that name",
    "run.folder": "the run goes on in the folder where it is",
    "run.deterministic": "what came before was not made that way, or would not be gone on with that way",
    "model": _STATE,
    "prompts.source": _WALK,
    "prompts.seed": _WALK,
    "prompts.prompt_field": _WALK,
    "prompts.answer_field": _WALK,
    "prompts.chat_template": _WALK,
    "prompts.system": _WALK,
    "prompts.task": _WALK,
    "prompts.prompts_per_step": _HELD,
    "prompts.rollouts_per_prompt": _HELD,
    "buffer.group_policy": _HELD,
    "buffer.shards": "a rollout's id says which shard it is in",
    "staleness": "the prompts that are under way were admitted under that bound",
    "sampling.temperature": _SAMPLED,
    "sampling.max_new_tokens": "it decides which prompts are passed over for their length, and so their order",
    "environment": "rollouts that are under way had their turns with it",
    "learner.objective.type": "another one needs other parts, and the checkpoint has those of this one",
    "learner.critic.path": _STATE,
    "learner.lora": _STATE,
}
"""Settings, or whole tables of them, that stay as they were. Everything else may be changed from one start to the next."""


def changes_refused(before: Recipe, after: Recipe) -> list[Problem]:
    """What a resume may not change, in the order of the recipe."""
    return [
        Problem(
            path,
            _shown(new),
            f"was {_shown(old)} when the run began, and stays so: {reason}; begin a new run for that",
        )
        for path, reason, old, new in _compared(before, after)
        if old != new
    ]


def fixed_digest(recipe: Recipe) -> str:
    """Of the settings that stay: a checkpoint belongs to a recipe with the same ones."""
    tables = msgspec.to_builtins(recipe)
    fixed = {path: _at(tables, path) for path in FIXED if path not in ("run.folder", "run.name")}
    return hashlib.sha256(msgspec.json.encode(fixed, order="sorted")).hexdigest()[:16]


def _compared(before: Recipe, after: Recipe) -> Iterator[tuple[str, str, Any, Any]]:
    old, new = msgspec.to_builtins(before), msgspec.to_builtins(after)
    for path, reason in FIXED.items():
        yield from _leaves(path, reason, _at(old, path), _at(new, path))


def _leaves(path: str, reason: str, old: Any, new: Any) -> Iterator[tuple[str, str, Any, Any]]:
    """The settings of a table one by one, so that what is told is what was changed."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _leaves(f"{path}.{key}", reason, old.get(key), new.get(key))
    else:
        yield path, reason, old, new


def _at(tables: Any, path: str) -> Any:
    """None where the recipe has no such table, and where what it has is empty, which is the same."""
    for key in path.split("."):
        if not isinstance(tables, dict):
            return None
        tables = tables.get(key)
    return None if tables in ("", {}, []) else tables


def _shown(value: Any) -> str:
    return "not set" if value is None else msgspec.json.encode(value).decode()
