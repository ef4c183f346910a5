"""What a run that is to go on goes on from: its folder, its recipe as it was run with what may be changed, its checkpoint.

Called by the CLI, which holds the run's folder meanwhile.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from asyncrl.recipes import Recipe, RecipeError, dump_recipe, recipe_from
from asyncrl.recipes.load import apply_override
from asyncrl.recipes.resume_rules import changes_refused, fixed_digest
from asyncrl.runtime.checkpoints import Checkpoints, Manifest
from asyncrl.runtime.run_folder import Origin, RunFolder


class NothingToResume(RuntimeError):
    """The run cannot go on; `exit_code` is 0 where it need not: it is finished."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def go_where_it_was_launched(folder: RunFolder) -> Path:
    """This process works from the folder that the run was launched in, as its recipe's paths may be relative. Returns the
    recipe's file, beside which its reward functions are found. Raises NothingToResume."""
    try:
        origin = msgspec.json.decode(folder.origin.read_bytes(), type=Origin)
        os.chdir(origin.cwd)
    except (OSError, msgspec.DecodeError) as error:
        raise NothingToResume(
            f"run {folder.path.name} cannot go on from where it was launched ({folder.origin} says where): {error}"
        ) from error
    return Path(origin.recipe)


def recipe_as_run(folder: RunFolder, overrides: Sequence[str]) -> Recipe:
    """With `a.b=value` of this start. Raises RecipeError, also for what may not be changed."""
    before = folder.read_recipe()
    tables = dump_recipe(before)
    for override in overrides:
        apply_override(tables, override)
    return may_go_on(before, recipe_from(tables, str(folder.recipe)), "--set")


def may_go_on(before: Recipe, after: Recipe, file: str) -> Recipe:
    """`after`. Raises RecipeError where it changes what stays."""
    refused = changes_refused(before, after)
    if refused:
        raise RecipeError(file, refused)
    return after


def checkpoint_of(folder: RunFolder, recipe: Recipe) -> Manifest:
    """Raises NothingToResume, also for a run that is finished."""
    name, checkpoints = folder.path.name, Checkpoints(folder)
    if recipe.sft is not None and not Path(recipe.model.path).exists():
        raise NothingToResume(
            f"model.path = {recipe.model.path}, which run {name} began with, is gone: put it back"
        )
    try:
        found = checkpoints.newest()
    except ValueError as error:
        raise NothingToResume(str(error)) from error
    if found is None:
        raise NothingToResume(
            f"run {name} has no checkpoint to go on from in {folder.checkpoints}: launch it anew"
        )
    if found.recipe_digest != fixed_digest(recipe):
        raise NothingToResume(
            f"the checkpoint of step {found.step} belongs to another recipe than {folder.recipe}: was that file changed? Put it "
            "back as it was, and change settings with --set"
        )
    if found.step >= recipe.run.steps:
        raise NothingToResume(
            f"run {name} is finished: {found.step} of {recipe.run.steps} steps are done. To go on: asyncrl resume {folder.path} "
            f"--set run.steps={2 * recipe.run.steps}",
            exit_code=0,
        )
    return found


def newest_run(recipe: Recipe) -> RunFolder | None:
    """The newest run of the recipe's name in its folder that has a checkpoint."""
    name, parent = recipe.run.name, Path(recipe.run.folder).resolve()
    numbered = re.compile(rf"{re.escape(name)}(?:-(\d+))?")
    found = [
        (int(match[1] or 1), path)
        for path in parent.glob(f"{name}*")
        if (match := numbered.fullmatch(path.name))
    ]
    for _, path in sorted(found, reverse=True):
        folder = RunFolder(path)
        if folder.recipe.is_file() and folder.read_recipe().run.name == name and Checkpoints(folder).steps():
            return folder
    return None
