"""`asyncrl plan RECIPE`: which GPUs train and which generate, in which shapes, and how long a step would take.

Starts nothing and reads no weights. Exit codes: 0 planned, 2 nothing fits or something wrong with what was written.
Hooked into `cli`, which parses; what the command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from asyncrl.recipes.gpus import ClusterEntry
    from asyncrl.recipes.plan import Plan
    from asyncrl.recipes.plan_facts import Efficiency

_WRONG = 2


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "find engine shapes, learner split, concurrency and staleness for the GPUs there are; starts nothing"
    )
    command = commands.add_parser("plan", help=text, description=text)
    command.add_argument("recipe", help="a .toml file, or the name of a shipped recipe")
    command.add_argument(
        "--gpus",
        metavar="TYPE:NxM,...",
        help="instead of [[cluster]]: H100:8x2,L40S:4 is 8 H100 a node on 2 nodes, and 4 L40S",
    )
    command.add_argument(
        "--model-config", type=Path, metavar="FILE", help="a config.json, instead of model.path"
    )
    command.add_argument(
        "--mean-tokens",
        type=float,
        metavar="N",
        help="of an answer; default: a third of max_new_tokens, a guess",
    )
    command.add_argument(
        "--prompt-tokens", type=float, metavar="N", help="of a prompt, on average; default: 256"
    )
    command.add_argument(
        "--max-staleness",
        type=_whole,
        metavar="N",
        help="the most that may be planned; default: staleness.max_staleness_versions",
    )
    command.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another constant of the estimates, such as train_compute=0.5; docs/plan.md lists them; may be repeated",
    )
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting; may be repeated",
    )
    command.add_argument(
        "--write", type=Path, metavar="FILE", help="write the plan as a recipe; FILE must not be there yet"
    )
    command.add_argument("--json", action="store_true", dest="as_json", help="one JSON object")
    command.set_defaults(run=run_plan)


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 on, got {number}")
    return number


def run_plan(chosen: argparse.Namespace) -> int:
    from asyncrl.recipes import RecipeError
    from asyncrl.recipes.model_sizes import ModelConfigError
    from asyncrl.recipes.plan_facts import PlanError

    try:
        plan, cluster, raw = _plan(chosen)
        if chosen.write:
            _write(chosen, plan, cluster, raw)
    except (RecipeError, ModelConfigError, PlanError) as error:
        Console(stderr=True).print(str(error), highlight=False, markup=False, soft_wrap=True)
        return _WRONG
    if chosen.as_json:
        import msgspec

        sys.stdout.write(msgspec.json.encode(plan).decode() + "\n")
        return 0
    from asyncrl.runtime.plan_table import show_plan

    # A pipe has no width of its own, and tables cut to 80 columns say little.
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
    show_plan(plan, console)
    if chosen.write:
        console.print(f"\nwrote {chosen.write}", highlight=False)
    return 0


def _plan(chosen: argparse.Namespace) -> tuple[Plan, list[ClusterEntry], dict[str, Any]]:
    from asyncrl.recipes import load_recipe
    from asyncrl.recipes.gpus import parse_fleet
    from asyncrl.recipes.load import apply_override
    from asyncrl.recipes.model_sizes import read_shape
    from asyncrl.recipes.plan import make_plan, question_for
    from asyncrl.recipes.plan_facts import PlanError

    path = _recipe_path(chosen.recipe)
    recipe = load_recipe(path, chosen.overrides)
    raw = tomllib.loads(path.read_text())
    for override in chosen.overrides:
        apply_override(raw, override)
    try:
        cluster = parse_fleet(chosen.gpus) if chosen.gpus else recipe.cluster
    except ValueError as error:
        raise PlanError(f"--gpus {error}") from error
    model = read_shape(chosen.model_config or Path(recipe.model.path))
    question = question_for(
        recipe,
        model,
        cluster,
        _efficiency(chosen.assume),
        mean_tokens=chosen.mean_tokens,
        prompt_tokens=chosen.prompt_tokens,
        most_staleness=chosen.max_staleness,
    )
    return make_plan(question), list(cluster), raw


def _recipe_path(text: str) -> Path:
    """`gsm8k` is the recipe of that name that came with the package, unless there is such a file here."""
    path, shipped = Path(text), Path(__file__).resolve().parents[1] / "recipes" / f"{text}.toml"
    return shipped if not path.exists() and shipped.is_file() else path


def _efficiency(assumed: list[str]) -> Efficiency:
    """Raises PlanError."""
    import msgspec

    from asyncrl.recipes.plan_facts import Efficiency, PlanError

    values = dict(text.partition("=")[::2] for text in assumed)
    try:
        return msgspec.convert(values, Efficiency, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(field.name for field in msgspec.structs.fields(Efficiency))
        raise PlanError(f"--assume: {error}; known: {known}") from error


def _write(chosen: argparse.Namespace, plan: Plan, cluster: list[ClusterEntry], raw: dict[str, Any]) -> None:
    """Only what loads as a recipe is written, and no file is overwritten. Raises PlanError, RecipeError."""
    from asyncrl.recipes import recipe_from
    from asyncrl.recipes.plan_facts import PlanError
    from asyncrl.recipes.plan_recipe import planned_toml

    words = ["asyncrl plan", shlex.quote(chosen.recipe)]
    for option in ("gpus", "model_config", "mean_tokens", "prompt_tokens", "max_staleness"):
        value = getattr(chosen, option)
        if value is not None:
            words += [
                f"--{option.replace('_', '-')}",
                f"{value:g}" if isinstance(value, float) else str(value),
            ]
    words += [f"--assume {shlex.quote(text)}" for text in chosen.assume]
    words += [f"--set {shlex.quote(text)}" for text in chosen.overrides]
    text = planned_toml(raw, plan, cluster, " ".join(words))
    recipe_from(tomllib.loads(text), str(chosen.write))
    try:
        with chosen.write.open("x") as file:
            file.write(text)
    except FileExistsError as error:
        raise PlanError(f"--write {chosen.write}: is there already; name another file") from error
    except OSError as error:
        raise PlanError(f"--write {chosen.write}: cannot be written ({error.strerror})") from error
