"""`asyncrl export`: a run's checkpoint as a Hugging Face folder. Hooked in by `cli`.

Exit codes: 0 done; 2 what was asked for is not there, or its place is taken; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console

if TYPE_CHECKING:
    from asyncrl.runtime.run_folder import RunFolder

_WRONG = 2


class NothingToExport(ValueError):
    """No checkpoint, or not the one that was asked for."""


def add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "write a run's model as a Hugging Face folder, from a checkpoint"
    command = commands.add_parser(
        "export",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. Also while the run goes on; starts nothing, needs no GPU.",
    )
    command.add_argument("name", metavar="RUN", help="a run's folder, or its name under runs/")
    command.add_argument("--step", type=int, metavar="N", help="of this step; without it of the newest")
    command.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to; without it RUN/model-step-N. Never overwritten"
    )
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights"
    )
    command.set_defaults(run=_export)


def _export(chosen: argparse.Namespace) -> int:
    from asyncrl.runtime.find_run import find_run

    console = Console()
    try:
        folder = find_run(chosen.name)
        checkpoint, step = choose(folder, chosen.step)
        out = chosen.out or folder.path / f"model-step-{step}"
        _write(folder, checkpoint, out, chosen.dtype)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(str(error), highlight=False, markup=False, soft_wrap=True)
        return _WRONG
    except KeyboardInterrupt:
        return 130
    console.print(
        f"wrote {out}: the model after step {step}, in {chosen.dtype}", highlight=False, soft_wrap=True
    )
    return 0


def choose(folder: RunFolder, step: int | None) -> tuple[Path, int]:
    """The checkpoint of `step`, or the newest that is whole, and its step. Raises `NothingToExport`."""
    from asyncrl.learner.checkpoint_folder import checkpoints, newest, step_of, whole

    there = {
        number: path for path in checkpoints(folder.checkpoints) if (number := step_of(path)) is not None
    }
    steps = sorted(number for number, path in there.items() if whole(path))
    if step is not None and step in steps:
        return there[step], step
    if step is not None:
        raise NothingToExport(
            f"run {folder.path.name} has no checkpoint of step {step} with weights; it has those of steps "
            f"{', '.join(map(str, steps)) or '(none)'}"
        )
    path = newest(folder.checkpoints)
    if path is None:
        raise NothingToExport(
            f"run {folder.path.name} has no whole checkpoint in {folder.checkpoints} yet: they come every "
            "checkpoints.every_steps steps and at its end"
        )
    return path, int(step_of(path) or 0)


def _write(folder: RunFolder, checkpoint: Path, out: Path, dtype: str) -> None:
    recipe = folder.read_recipe()
    from transformers.utils import logging

    from asyncrl.learner.export import export_model

    logging.disable_progress_bar()
    export_model(recipe.learner, model_path_of(folder, recipe.model.path), checkpoint, out, dtype)  # type: ignore[arg-type]


def model_path_of(folder: RunFolder, path: str) -> str:
    """A relative path in a recipe is from where the run was launched. A name of a hub stays one."""
    from asyncrl.runtime.run_folder import Origin

    if Path(path).exists() or not folder.origin.is_file():
        return path
    launched = Path(msgspec.json.decode(folder.origin.read_bytes(), type=Origin).cwd) / path
    return str(launched) if launched.is_dir() else path
