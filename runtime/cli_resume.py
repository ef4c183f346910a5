"""`asyncrl resume RUN`, and `asyncrl launch RECIPE --resume`. Hooked in by `cli`.

Exit codes: 0 done, also where there was nothing left to do; 1 failed, or the run is up; 2 what was written is wrong; 130 stopped.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from asyncrl.recipes import Recipe
    from asyncrl.runtime.run_folder import RunFolder

_WRONG = 2
_PATIENCE_S = 30.0
"""For the parts of a run that was killed with its guard: Ray's own processes end them after a while."""


def add_resume(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("resume", help="go on with a run from its last checkpoint")
    command.description = (
        "Goes on with a run that was stopped, killed or that failed, in its own folder: from its last whole checkpoint, with the "
        "recipe as it was run. With a higher run.steps also with one that is finished."
    )
    command.add_argument("name", metavar="RUN", help="a run's folder, or its name under runs/")
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one setting, such as run.steps=200 or learner.ranks=2; may be repeated",
    )
    command.set_defaults(run=_resume)


def _resume(chosen: argparse.Namespace) -> int:
    from asyncrl.runtime.find_run import NoSuchRun, find_run
    from asyncrl.runtime.guard import guard, guarded_run
    from asyncrl.runtime.run_folder import RunFolder

    run_id = guarded_run()
    if run_id is None:
        return guard(["resume", chosen.name, *(part for o in chosen.overrides for part in ("--set", o))])
    try:
        folder = RunFolder(find_run(chosen.name).path.resolve())
    except NoSuchRun as error:
        return _say(str(error), _WRONG)

    def recipe() -> Recipe:
        from asyncrl.runtime.cli import find_beside
        from asyncrl.runtime.resume import go_where_it_was_launched, recipe_as_run

        find_beside(go_where_it_was_launched(folder))
        return recipe_as_run(folder, chosen.overrides)

    return go_on_with(folder, run_id, recipe)


def go_on_with(folder: RunFolder, run_id: str, make_recipe: Callable[[], Recipe]) -> int:
    """From its last checkpoint, with the recipe that `make_recipe` finds once nobody else runs in the folder."""
    from asyncrl.recipes import RecipeError
    from asyncrl.recipes.preflight import preflight
    from asyncrl.runtime.resume import NothingToResume, checkpoint_of
    from asyncrl.runtime.run_folder import RunIsUp, held

    try:
        with held(folder, run_id, _PATIENCE_S):
            recipe = make_recipe()
            found = preflight(recipe)
            if found.problems:
                raise RecipeError(str(folder.recipe), found.problems)
            checkpoint = checkpoint_of(folder, recipe)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run has its own handler, as in `launch`
            from asyncrl.runtime.launch import go_on

            return go_on(recipe, folder, run_id, checkpoint, Console())
    except RunIsUp as error:
        return _say(
            f"{error}; `asyncrl status {folder.path}` shows it, `asyncrl stop {folder.path}` ends it", 1
        )
    except NothingToResume as error:
        return _say(str(error), error.exit_code)
    except RecipeError as error:
        return _say(str(error), _WRONG)


def launched_before(recipe: Recipe, recipe_path: Path, run_id: str) -> int | None:
    """For `launch --resume`: the exit code of the newest run of that name, gone on with; None where there is none to go on with."""
    from asyncrl.runtime.resume import may_go_on, newest_run

    folder = newest_run(recipe)
    if folder is None:
        return None
    return go_on_with(folder, run_id, lambda: may_go_on(folder.read_recipe(), recipe, str(recipe_path)))


def _say(text: str, code: int) -> int:
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)
    return code
