"""`asyncrl rft`: rejection-sampling fine-tuning. Hooked in by `cli`.

Exit codes: 0 done; 1 failed; 2 something wrong with what was written; 130 stopped (another call goes on).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from asyncrl.recipes import Recipe
    from asyncrl.runtime.rft import RFTSummary

_WRONG = 2
Checked = Callable[[argparse.Namespace, Console], "Recipe | None"]


def rft(chosen: argparse.Namespace, checked: Checked) -> int:
    """`checked` reads the recipe and says what is wrong with it."""
    from asyncrl.runtime.guard import guard, guarded_run

    run_id = guarded_run()
    if run_id is None:
        return guard(["rft", str(chosen.recipe), *(part for o in chosen.overrides for part in ("--set", o))])
    console = Console()
    recipe = checked(chosen, console)
    if recipe is None:
        return _WRONG
    if recipe.rft is None:
        return _say(f"{chosen.recipe} has no [rft]: add one with out", _WRONG)
    from asyncrl.buffer.reading import LogError
    from asyncrl.runtime.launch import make_model
    from asyncrl.runtime.rft import RFTError, run_rft
    from asyncrl.runtime.run_folder import RunIsUp
    from asyncrl.runtime.watch import PartFailed

    try:
        make_model(recipe, Path(chosen.recipe), chosen.overrides, console)
        summary = run_rft(recipe, recipe.rft, run_id, console)
    except (RFTError, RunIsUp, PartFailed, LogError) as error:
        return _say(str(error), 1)
    except KeyboardInterrupt:
        return 130
    console.print(_table(summary))
    console.print(f"wrote {summary.out}", highlight=False, soft_wrap=True)
    return 0


def _table(summary: RFTSummary) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("round", "held out before", "mean reward", "answers", "kept", "prompts kept", "steps"):
        table.add_column(name, justify="right")
    for number, done in enumerate(summary.rounds, 1):
        cells = (f"{done.reward_mean:.3f}", f"{done.samples:,}", f"{done.kept:,}")
        prompts = f"{done.prompts_kept:,} of {done.prompts:,}"
        table.add_row(str(number), _share(done.accuracy), *cells, prompts, f"{done.steps:,}")
    table.add_row("result", _share(summary.accuracy), *[""] * 5, style="bold")
    return table


def _share(accuracy: float | None) -> str:
    return "not measured" if accuracy is None else f"{accuracy:.3f}"


def _say(text: str, code: int) -> int:
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)
    return code
