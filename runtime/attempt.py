"""One start of a run's parts, from Ray to the end of every process below this one. Called by `launch`.

    SIGINT or SIGTERM once: stop, hand rollouts back, write the summary, within `STOP_S`.   Twice: kill everything at once.
    SIGHUP (the terminal or the process that holds the run is gone), however often: stop.

A run has one, or several where it goes back to a checkpoint after a fault of its learner.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import ray

from asyncrl.buffer.errors import BufferFault
from asyncrl.buffer.keys import ServerKeys, make_keys
from asyncrl.generators.prompts import Frontier, Prompt, held_out, open_source
from asyncrl.generators.sources import SourceError
from asyncrl.generators.tokens import TokenizerError, load_tokenizer
from asyncrl.recipes import Recipe, dump_recipe
from asyncrl.runtime import facts
from asyncrl.runtime.checkpoints import Manifest
from asyncrl.runtime.commands import RunCommands
from asyncrl.runtime.control_server import CannotListen, ControlServer
from asyncrl.runtime.feeder import NoPromptFits
from asyncrl.runtime.held_out import Evaluations
from asyncrl.runtime.held_out_results import NothingScored
from asyncrl.runtime.learner_faults import is_fault
from asyncrl.runtime.metrics import open_metrics
from asyncrl.runtime.observer import Observer, RunStalled
from asyncrl.runtime.placement import PlacementError, place_buffers, place_learners, start_ray
from asyncrl.runtime.processes import end_processes
from asyncrl.runtime.run_folder import RunFolder
from asyncrl.runtime.supervisor import Parts, Supervisor
from asyncrl.runtime.view import View
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
    NothingScored,
    SourceError,
    TokenizerError,
)
"""What a run can end with: the message says all there is to say."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is the same for every start."""

    recipe: Recipe
    folder: RunFolder
    run_id: str
    view: View
    began: float
    """By the monotonic clock, where the run's seconds are 0."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    supervisor: type[Supervisor] = Supervisor


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a start ended."""

    outcome: str
    """As the summary has it."""
    steps_done: int
    report: str = ""
    """Of what failed: all there is to say."""
    fault: bool = False
    """Of the learner: a checkpoint may be gone on from."""


def attempt(run: Run, goes_on_from: Manifest | None) -> Ended:
    """Blocks until the run has ended, and every process below this one with it."""
    recipe, folder = run.recipe, run.folder
    folder.forget_endpoints()
    metrics = open_metrics(
        folder.metrics, recipe.telemetry, run=folder.path.name, settings=dump_recipe(recipe)
    )
    observer = Observer(recipe, run.view, metrics, run.began)
    observer.phase_seconds.update(run.phase_seconds)
    if goes_on_from is not None:
        observer.goes_on_from(goes_on_from.step, goes_on_from.version)
    try:
        # On this thread, and before the loop: Ray's daemons end with the thread that started them.
        with observer.phase(facts.RAY_START):
            start_ray(recipe)
        return asyncio.run(_supervise(run, observer, goes_on_from))
    finally:
        # The loop and its handlers are gone; from here on a signal means "at once", and the guard clears up.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os._exit(130))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with observer.phase(facts.SHUTDOWN):
            ray.shutdown()
            metrics.close()  # before its mirror's process, which is below this one as well, is ended
            end_processes(1.0)  # Ray's own agents outlast it by seconds; whatever else is left must not
            remove_leftovers(run.run_id)
        run.phase_seconds.update(observer.phase_seconds)


async def _supervise(run: Run, observer: Observer, goes_on_from: Manifest | None) -> Ended:
    recipe, folder, run_id = run.recipe, run.folder, run.run_id
    stop, supervisor = asyncio.Event(), None
    on_signals(stop, observer.note)
    try:
        server_keys, keys = make_keys(folder.keys)
        with observer.phase(facts.RAY_START):
            where = (recipe, str(folder.path), run_id)
            buffers = await asyncio.to_thread(place_buffers, *where)
            learners = await asyncio.to_thread(place_learners, *where)
        frontier, tests = await asyncio.to_thread(_prompts, recipe, observer.note)
        watch = Watch(folder, stop)
        parts = Parts(buffers=buffers, learners=learners, keys=keys)
        evaluations = Evaluations(recipe, tests, observer)
        supervisor = run.supervisor(
            recipe, run_id, parts, observer, watch, frontier, evaluations, goes_on_from
        )
        async with _answering(supervisor, server_keys, stop):
            outcome = await _run(supervisor, observer)
        return Ended(outcome=outcome, steps_done=observer.steps_done)
    except _FAILURES as error:
        observer.note(str(error))
        in_training = supervisor.in_training if supervisor is not None and is_fault(error) else ""
        headline = _headline(error) + (f"; it was training {in_training}" if in_training else "")
        return Ended(
            outcome=f"failed: {headline}",
            steps_done=observer.steps_done,
            report=f"{headline}\n{error}",
            fault=is_fault(error),
        )


def _headline(error: Exception) -> str:
    """One line."""
    if isinstance(error, PartFailed) and error.part:
        return f"{error.part} failed: {error.cause}"
    return next(iter(str(error).splitlines()), type(error).__name__)


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
        except (TimeoutError, PartFailed, ray.exceptions.RayError) as error:
            observer.note(
                f"did not end in order within {STOP_S:.0f} s ({type(error).__name__}); killing what is left"
            )


def _prompts(recipe: Recipe, note: Callable[[str], None]) -> tuple[Frontier, list[Prompt]]:
    """Those to train on, and the held-out ones that leave room for their answer."""
    tokenizer = load_tokenizer(recipe.model.path)
    source = open_source(recipe.prompts, tokenizer)
    found = held_out(recipe.prompts, recipe.evaluation, tokenizer)
    longest = recipe.model.max_context_tokens - recipe.held_out_answer_tokens
    tests = [prompt for prompt in found if len(prompt.tokens) <= longest]
    if len(tests) < len(found):
        note(
            f"{len(found) - len(tests)} of {len(found)} held-out prompts are left out: over {longest} tokens"
        )
    return Frontier(source, recipe.prompts.seed), tests


def on_signals(stop: asyncio.Event, note: Callable[[str], None]) -> None:
    def asked() -> None:
        if stop.is_set():
            os._exit(130)  # the guard ends everything below
        stop.set()
        note(f"stopping within {STOP_S + 5:.0f} s; Ctrl-C again kills at once")

    def hung_up() -> None:
        if not stop.is_set():
            stop.set()
            note(f"stopping within {STOP_S + 5:.0f} s: terminal or parent process is gone")

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)
    loop.add_signal_handler(signal.SIGHUP, hung_up)
