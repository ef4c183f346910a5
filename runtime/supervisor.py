"""Runs the parts of one run from start to end, and ends it with the culprit's traceback when one of them dies.

    start engines and learner --> publish version 0 --> engines confirm --> held-out accuracy --> admit prompts
        --> steps: read, train, publish, commit --> hand rollouts back --> held-out accuracy --> end

Every part's long call (`buffer.run`, `engine.receive`, `engine.dispatch`) is watched; the first that ends by itself
ends the run. One event loop, in the launching process. Called by `launch`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

import ray

from asyncrl.buffer import BufferClient
from asyncrl.generators.prompts import Frontier, Prompt
from asyncrl.recipes import Recipe
from asyncrl.runtime import facts
from asyncrl.runtime.feeder import feed
from asyncrl.runtime.learner_part import StepOutcome
from asyncrl.runtime.observer import Observer
from asyncrl.runtime.part_log import tail
from asyncrl.runtime.placement import Placed
from asyncrl.runtime.run_folder import RunFolder

_READ_S = 2.0
_SNAPSHOT_S = 1.0
_CALL_S = 60.0


class PartFailed(RuntimeError):
    """A part of the run broke or died: which, its traceback, the end of its log."""


class Stopped(Exception):
    """Somebody asked the run to end."""


class Supervisor:
    """One run. `run` ends with all steps done, with `Stopped`, or with `PartFailed`."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        parts: Placed,
        observer: Observer,
        frontier: Frontier,
        held_out: list[Prompt],
        stop: asyncio.Event,
    ) -> None:
        self._recipe = recipe
        self._folder = folder
        self._parts = parts
        self._observer = observer
        self._frontier = frontier
        self._held_out = held_out
        self._stop = stop
        self._watched: dict[str, asyncio.Task[Any]] = {}
        self._endpoint = ""

    async def run(self) -> None:
        buffer = self._parts.buffer
        self._endpoint = await self._call(
            "buffer", buffer.endpoint.remote(), self._recipe.learner.start_timeout_s
        )
        self._watch("buffer", buffer.run.remote())
        async with BufferClient(self._endpoint) as client:
            observing = asyncio.create_task(self._observe(client), name="observer")
            self._watched["observer"] = observing
            try:
                await self._guarded(self._start())
                await self._guarded(self._evaluate(0))
                await self._guarded(self._train(client))
                await self._guarded(self._hand_back())
                await self._guarded(self._evaluate(self._recipe.run.steps))
                await self._guarded(self._save())
            finally:
                observing.cancel()
                await asyncio.gather(observing, return_exceptions=True)

    # ---- the phases --------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        """Publish before admit: no prompt comes before every engine has confirmed version 0."""
        learner, engines = self._parts.learners, self._parts.engines
        timeout_s = max(
            [self._recipe.learner.start_timeout_s, *(p.start_timeout_s for p in self._recipe.pools)]
        )
        with self._observer.phase(facts.ENGINE_START):
            starting = [self._call(name, e.start.remote(), timeout_s) for name, e in engines.items()]
            ranks = [self._call(f"learner-{i}", p.start.remote(), timeout_s) for i, p in enumerate(learner)]
            results = await asyncio.gather(*ranks, *starting)
        with self._observer.phase(facts.FIRST_SYNC):
            for name, engine in engines.items():
                self._watch(name, engine.receive.remote(results[0]))
            await self._call(
                "learner-0", learner[0].meet.remote(list(engines), self._endpoint, timeout_s), timeout_s
            )
            await self._on_every_rank("publish", 0)
            await self._call("learner-0", learner[0].admit_prompts.remote(), _CALL_S)

    async def _evaluate(self, step: int) -> None:
        """Held-out accuracy on the present weights, the prompts dealt out over the engines."""
        if not self._held_out:
            return
        engines = list(self._parts.engines.items())
        with self._observer.phase(facts.EVALUATION):
            shares = [self._held_out[i :: len(engines)] for i in range(len(engines))]
            calls = [
                self._call(
                    name, engine.evaluate.remote(share, str(step)), self._recipe.learner.step_timeout_s
                )
                for (name, engine), share in zip(engines, shares, strict=True)
                if share
            ]
            self._observer.evaluated(step, await asyncio.gather(*calls))

    async def _train(self, client: BufferClient) -> None:
        with self._observer.phase(facts.TRAINING):
            for name, engine in self._parts.engines.items():
                self._watch(f"{name} dispatcher", engine.dispatch.remote(self._endpoint))
            feeding = asyncio.create_task(
                feed(client, self._frontier, self._recipe.longest_prompt_tokens), name="feeder"
            )
            self._watched["feeder"] = feeding
            try:
                for step in range(1, self._recipe.run.steps + 1):
                    await self._step(step)
            finally:
                del self._watched["feeder"]
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)

    async def _step(self, step: int) -> None:
        began = time.monotonic()
        self._observer.learner_state = "waiting for rollouts"
        learner = self._parts.learners[0]
        # Waits for the buffer to have a batch, which engines fill; ends with the batch, or when a watched part ends,
        # a stop is asked for, or nothing moves for `run.stall_timeout_s`.
        while not await self._call("learner-0", learner.read.remote(_READ_S), _READ_S + _CALL_S):
            self._observer.check_progress(self._recipe.run.stall_timeout_s)
        waited_s = time.monotonic() - began
        self._observer.learner_state = "training"
        outcome: StepOutcome = await self._on_every_rank("train")
        self._observer.stepped(step, outcome, waited_s)

    async def _hand_back(self) -> None:
        """Engines return what they hold; nothing more is admitted."""
        for name, engine in self._parts.engines.items():
            watched = self._watched.pop(f"{name} dispatcher", None)
            await self._call(name, engine.stop.remote(), _CALL_S)
            if watched is not None:
                async with asyncio.timeout(_CALL_S):
                    await watched

    async def _save(self) -> None:
        await self._on_every_rank("save")

    async def wind_down(self, *, save: bool) -> None:
        """Ends every part in order; the caller sets the deadline."""
        if save:
            await asyncio.gather(*self._remote_on_ranks("save"))
        await asyncio.gather(
            *(e.shutdown.remote() for e in self._parts.engines.values()), return_exceptions=True
        )
        if self._endpoint:
            async with BufferClient(self._endpoint) as client:
                self._observer.buffer_report(await client.status())
                await client.stop()
        await asyncio.gather(*(p.close.remote() for p in self._parts.learners), return_exceptions=True)

    async def stop_dispatchers(self) -> None:
        """For a stop in mid-run: partial rollouts go back to the buffer, and so to its log, with what they have."""
        await asyncio.gather(*(e.stop.remote() for e in self._parts.engines.values()), return_exceptions=True)

    # ---- watching ----------------------------------------------------------------------------------------------

    def _watch(self, part: str, reference: Any) -> None:
        self._watched[part] = asyncio.ensure_future(self._await(part, reference))

    async def _await(self, part: str, reference: Any) -> Any:
        try:
            return await reference
        except ray.exceptions.RayError as error:
            raise PartFailed(self._report(part, error)) from error

    async def _call(self, part: str, reference: Any, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._await(part, reference)
        except TimeoutError:
            log = tail(self._folder.log(part))
            raise PartFailed(
                f"{part} gave no answer within {timeout_s:.0f} s. The end of its log:\n{log}"
            ) from None

    async def _on_every_rank(self, method: str, *arguments: Any) -> Any:
        timeout_s = self._recipe.learner.step_timeout_s
        calls = [
            self._call(f"learner-{i}", reference, timeout_s)
            for i, reference in enumerate(self._remote_on_ranks(method, *arguments))
        ]
        return (await asyncio.gather(*calls))[0]

    def _remote_on_ranks(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(part, method).remote(*arguments) for part in self._parts.learners]

    async def _guarded(self, work: Awaitable[None]) -> None:
        """Awaits `work`; ends it with the error of whatever part ends first, or with `Stopped`."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            # Waits for the phase; unblocked by it, by any watched part that ends, or by a stop.
            while not task.done():
                await asyncio.wait(
                    {task, stopping, *self._watched.values()}, return_when=asyncio.FIRST_COMPLETED
                )
                if self._stop.is_set():
                    raise Stopped
                self._raise_ended(task)
            await task
        finally:
            stopping.cancel()
            task.cancel()
            await asyncio.gather(task, stopping, return_exceptions=True)

    def _raise_ended(self, task: asyncio.Future[None]) -> None:
        for part, watched in list(self._watched.items()):
            if watched.done() and not task.done():
                watched.result()
                raise PartFailed(
                    f"{part} ended by itself before the run was over; see {self._folder.log(part)}"
                )

    def _report(self, part: str, error: ray.exceptions.RayError) -> str:
        """The part's own traceback is within Ray's error text; the log's tail shows what its children said."""
        log = tail(self._folder.log(part.removesuffix(" dispatcher")))
        return f"{part} failed: {error}\n--- the end of its log ({self._folder.logs}) ---\n{log}"

    async def _observe(self, client: BufferClient) -> None:
        """Once a second: the state of every part, to view and metrics. Ends when cancelled."""
        while True:
            await asyncio.sleep(_SNAPSHOT_S)
            engines = await asyncio.gather(*(self._status(n, e) for n, e in self._parts.engines.items()))
            self._observer.snapshot(await client.status(), [e for e in engines if e is not None])

    async def _status(self, name: str, engine: Any) -> facts.EngineFacts | None:
        try:
            async with asyncio.timeout(_SNAPSHOT_S):
                status: facts.EngineFacts = await self._await(name, engine.status.remote())
                return status
        except TimeoutError:
            return None  # its process is still importing, or its event loop is busy
