"""`asyncrl`: the command line. Exit codes: 0 done, 1 failed, 2 something wrong with what was written, 130 stopped.

What a command needs is imported when it runs, so that `--help` and `check` answer at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from asyncrl.runtime.cli_control import add_control
from asyncrl.runtime.cli_export import add_export
from asyncrl.runtime.cli_plan import add_plan
from asyncrl.runtime.cli_resume import add_resume, launched_before

if TYPE_CHECKING:
    from asyncrl.recipes import Recipe

_WRONG = 2


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    run: int = chosen.run(chosen)
    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncrl", description="Asynchronous reinforcement learning of language models."
    )
    parser.add_argument("--version", action="version", version=f"asyncrl {metadata.version('asyncrl')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("launch", _launch, "check a recipe and run it to its end"),
        ("check", _check, "check a recipe and this machine, print the sizes that follow; starts nothing"),
        ("sft", _sft, "make the recipe's model.path by supervised fine-tuning, as [sft] says"),
        ("rft", _rft, "sample with the recipe's model, keep what scores and imitate it, as [rft] says"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "recipe", type=_recipe_path, help="a .toml file, or the name of a shipped recipe"
        )
        command.add_argument(
            "--set",
            dest="overrides",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override one setting, such as run.steps=10 or pools.0.concurrency=8; may be repeated",
        )
        command.set_defaults(run=run)
        if name == "launch":
            command.add_argument(
                "--resume",
                action="store_true",
                help="go on with the newest run of that name from its last checkpoint; a new run where there is none",
            )
    add_resume(commands)
    report = commands.add_parser("report", help="draw report.png of a run folder and print its summary")
    report.add_argument("folder", type=Path, help="such as runs/quickstart")
    report.set_defaults(run=_report)
    _add_inspect(commands.add_parser("inspect", help="show a run's rollouts, also while it goes on"))
    add_control(commands)
    add_export(commands)
    add_plan(commands)
    return parser


def _add_inspect(command: argparse.ArgumentParser) -> None:
    command.description = "Without an option: what became of the rollouts, and the newest of them."
    command.add_argument("name", metavar="RUN", help="a run's folder, or its name under runs/")
    what = command.add_mutually_exclusive_group()
    what.add_argument(
        "--sql", metavar="QUERY", help="DuckDB over the tables rollouts, states, segments and prompts"
    )
    what.add_argument("--rollout", type=int, metavar="ID", help="one rollout's life, its tokens by version")
    what.add_argument("--group", type=int, metavar="ID", help="the rollouts of one prompt")
    command.add_argument("--limit", type=_positive, metavar="N", help="rows or rollouts to show at most")
    command.add_argument(
        "--json", action="store_true", dest="as_json", help="one JSON object; of a query one for each row"
    )
    command.set_defaults(run=_inspect)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {number}")
    return number


def _recipe_path(text: str) -> Path:
    """`quickstart` is the recipe of that name that came with the package, unless there is such a file here."""
    path, shipped = Path(text), Path(__file__).resolve().parents[1] / "recipes" / f"{text}.toml"
    return shipped if not path.exists() and shipped.is_file() else path


def _launch(chosen: argparse.Namespace) -> int:
    from asyncrl.runtime.guard import guard, guarded_run

    run_id = guarded_run()
    if run_id is None:
        resume = ["--resume"] if chosen.resume else []
        overrides = [part for o in chosen.overrides for part in ("--set", o)]
        return guard(["launch", str(chosen.recipe), *resume, *overrides])
    console = Console()
    recipe = _checked(chosen, console)
    if recipe is None:
        return _WRONG
    before = launched_before(recipe, chosen.recipe, run_id) if chosen.resume else None
    if before is not None:
        return before
    # Until the run has its own handler nothing is up that could need an orderly end, and a KeyboardInterrupt in the
    # middle of an import can be swallowed there.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from asyncrl.runtime.launch import launch
    from asyncrl.runtime.watch import PartFailed

    try:
        return launch(recipe, run_id, chosen.recipe, chosen.overrides, console)
    except PartFailed as error:
        return _say(str(error), 1)


def _check(chosen: argparse.Namespace) -> int:
    return _WRONG if _checked(chosen, Console()) is None else 0


def _checked(chosen: argparse.Namespace, console: Console) -> Recipe | None:
    """The recipe, with its sizes printed; None after printing every problem."""
    from asyncrl.recipes import RecipeError, load_recipe
    from asyncrl.recipes.preflight import preflight
    from asyncrl.recipes.sizes import derived_sizes

    find_beside(chosen.recipe)
    try:
        recipe = load_recipe(chosen.recipe, chosen.overrides)
        found = preflight(recipe)
        if found.problems:
            raise RecipeError(str(chosen.recipe), found.problems)
    except RecipeError as error:
        _say(str(error), _WRONG)
        return None
    table = Table(
        title=f"{chosen.recipe}: what follows from it", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("size")
    table.add_column("", justify="right", style="bold")
    table.add_column("from", style="dim")
    for size in derived_sizes(recipe, found.model):
        table.add_row(size.name, size.value, size.formula)
    console.print(table)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    return recipe


def find_beside(recipe: Path) -> None:
    """Modules beside the recipe can be named as reward functions, here and in every process that this one starts."""
    folder = str(recipe.resolve().parent)
    sys.path.append(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH", ""), folder) if p)


def _sft(chosen: argparse.Namespace) -> int:
    from asyncrl.recipes import RecipeError, load_recipe

    try:
        recipe = load_recipe(chosen.recipe, chosen.overrides)
    except RecipeError as error:
        return _say(str(error), _WRONG)
    if recipe.sft is None:
        return _say(f"{chosen.recipe} has no [sft]: add one with source and steps", _WRONG)
    if Path(recipe.model.path).exists():
        return _say(f"model.path = {recipe.model.path} is there already: remove it to make it anew", _WRONG)
    from asyncrl.runtime.warm_start import make

    try:
        make(recipe, recipe.sft, Console())
    except KeyboardInterrupt:
        return 130
    return 0


def _rft(chosen: argparse.Namespace) -> int:
    from asyncrl.runtime.cli_rft import rft

    return rft(chosen, _checked)


def _report(chosen: argparse.Namespace) -> int:
    from asyncrl.runtime.report import write_report
    from asyncrl.runtime.run_folder import RunFolder
    from asyncrl.runtime.summary import read_summary
    from asyncrl.runtime.summary_table import show_summary

    folder = RunFolder(chosen.folder)
    if not folder.metrics.is_file():
        return _say(f"{folder.path} is no run folder: {folder.metrics.name} is not in it", _WRONG)
    summary = read_summary(folder.summary) if folder.summary.is_file() else None
    write_report(folder.metrics, summary, folder.report)
    console = Console()
    if summary is not None:
        show_summary(summary, console)
    console.print(f"wrote {folder.report}", highlight=False)
    return 0


def _inspect(chosen: argparse.Namespace) -> int:
    from asyncrl.runtime.inspect import Request, inspect_run

    asked = {name: getattr(chosen, name) for name in ("sql", "rollout", "group", "limit", "as_json")}
    # A pipe has no width of its own, and tables cut to 80 columns say little.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    try:
        return inspect_run(Request(run=chosen.name, **asked), Console(width=width), Console(stderr=True))
    except KeyboardInterrupt:
        return 130


def _say(text: str, code: int) -> int:
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
