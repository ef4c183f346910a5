"""Runs the parts of one run from start to end, and ends it with the culprit's traceback when it cannot go on.

    start buffer, engines and learner --> publish version 0 --> engines take and confirm it --> held-out accuracy
        --> admit prompts --> steps: read, train, publish, commit --> hand rollouts back --> held-out accuracy --> end

The learner's calls and the buffer's keepers are watched; what ends by itself ends the run. A buffer process that dies is
started again (`buffer_watch`), engines come and go (`fleet`), and commands change the run meanwhile (`commands`). One event
loop, in the launching process. Called by `launch`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import msgspec

from asyncrl.buffer import BufferAddress, BufferClient
from asyncrl.buffer.keys import ClientKeys
from asyncrl.generators.prompts import Frontier, Prompt
from asyncrl.recipes import Recipe
from asyncrl.runtime import facts
from asyncrl.runtime.buffer_watch import ShardKeeper
from asyncrl.runtime.feeder import feed
from asyncrl.runtime.fleet import Fleet
from asyncrl.runtime.held_out import evaluate
from asyncrl.runtime.learner_part import StepOutcome
from asyncrl.runtime.machines import watch_machines
from asyncrl.runtime.observer import Observer
from asyncrl.runtime.tuner import Tuner
from asyncrl.runtime.watch import Watch

_READ_S = 2.0
_SNAPSHOT_S = 1.0
_CALL_S = 60.0
_CLOSE_S = 5.0


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What is there for the whole run, as Ray's handles (which have no public type), and what opens the buffer's sockets."""

    buffers: list[Any]
    """One of each shard."""
    learners: list[Any]
    """One of each rank."""
    keys: ClientKeys


class Supervisor:
    """One run. `run` ends with all steps done or the run drained, with `Stopped`, or with `PartFailed`."""

    def __init__(
        self,
        recipe: Recipe,
        run_id: str,
        parts: Parts,
        observer: Observer,
        watch: Watch,
        frontier: Frontier,
        held_out: list[Prompt],
    ) -> None:
        self.recipe, self.observer, self.watch = recipe, observer, watch
        self.fleet: Fleet | None = None
        """From when the buffer is up."""
        self.draining = False
        """Nothing more is admitted; the run ends when what is under way is trained."""
        self.look = asyncio.Event()
        """Somebody wants to see the run as it is now."""
        self._run_id, self._keys = run_id, parts.keys
        self._buffers, self._learners = parts.buffers, parts.learners
        self._frontier, self._held_out = frontier, held_out
        self._open = contextlib.AsyncExitStack()
        self._client: BufferClient | None = None
        self._feeding: asyncio.Task[None] | None = None
        self._training = False

    async def run(self) -> None:
        guarded = self.watch.guarded
        address = await self._start_buffer()
        client = self._client = await self._open.enter_async_context(BufferClient(address))
        folder, note = str(self.watch.folder.path), self.observer.note
        fleet = self.fleet = Fleet(self.recipe, folder, self._run_id, self.watch, client, address, note)
        self.watch.add("fleet", fleet.keep())
        self.watch.add("machines", watch_machines(note))
        observing = self.watch.add("observer", self._observe(client, fleet))
        try:
            await guarded(self._start(address, fleet))
            await guarded(self._evaluate(0))
            await guarded(self._train(client, fleet))
            await guarded(fleet.hand_back())
            await guarded(self._evaluate(self.observer.steps_done))
            await guarded(self._save())
        finally:
            observing.cancel()
            await asyncio.gather(observing, return_exceptions=True)

    async def close(self) -> None:
        """After everything else, also where the run failed: the keepers of engines talk to the buffer to their end."""
        if self.fleet is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self.fleet.shutdown()
        await self._open.aclose()

    # ---- the phases --------------------------------------------------------------------------------------------

    async def _start_buffer(self) -> BufferAddress:
        """Every shard listens and is kept running from here on."""
        timeout_s = self.recipe.learner.start_timeout_s
        starting = [
            self.watch.call(f"buffer-{i}", s.start.remote(), timeout_s) for i, s in enumerate(self._buffers)
        ]
        endpoints = tuple(await asyncio.gather(*starting))
        address = BufferAddress(endpoints=endpoints, keys=self._keys)
        for i, shard in enumerate(self._buffers):
            keeper = ShardKeeper(i, shard, address, self.watch, self.observer)
            self.watch.add(f"buffer-{i}", keeper.keep())
        return address

    async def _start(self, address: BufferAddress, fleet: Fleet) -> None:
        """Version 0 is published as soon as the learner can; engines take it when they are up, and then the run begins."""
        learner = self.recipe.learner
        with self.observer.phase(facts.ENGINE_START):
            fleet.start()
            ranks = [
                self.watch.call(f"learner-{i}", part.start.remote(), learner.start_timeout_s)
                for i, part in enumerate(self._learners)
            ]
            endpoint = (await asyncio.gather(*ranks))[0]
            first = self._learners[0]
            await self.watch.call("learner-0", first.meet.remote(address), _CALL_S)
            await self._on_every_rank("publish", 0)
            fleet.endpoint.set_result(endpoint)
        with self.observer.phase(facts.FIRST_SYNC):
            await fleet.begin()
            await self.watch.call("learner-0", first.admit_prompts.remote(), _CALL_S)

    async def _evaluate(self, step: int) -> None:
        """Held-out accuracy on the present weights."""
        if self._held_out and self.fleet is not None:
            with self.observer.phase(facts.EVALUATION):
                timeout_s = self.recipe.learner.step_timeout_s
                self.observer.evaluated(
                    step, await evaluate(self.fleet, self._held_out, str(step), timeout_s)
                )

    async def _train(self, client: BufferClient, fleet: Fleet) -> None:
        with self.observer.phase(facts.TRAINING):
            fleet.dispatching.set()
            self._training = True
            self.observer.state = "running"
            self.feed()
            tuning = self.watch.add("tuner", Tuner(fleet, self.observer).run())
            try:
                for step in range(1, self.recipe.run.steps + 1):
                    if not await self._step(step, client, fleet):
                        break
            finally:
                self._training = False
                await self.stop_feeding()
                self.watch.remove("tuner")
                tuning.cancel()
                await asyncio.gather(tuning, return_exceptions=True)

    async def _step(self, step: int, client: BufferClient, fleet: Fleet) -> bool:
        """False where the run is drained and no batch can come any more."""
        began = time.monotonic()
        self.observer.learner_state = "waiting for rollouts"
        learner = self._learners[0]
        stall_s = self.recipe.run.stall_timeout_s
        # Waits for the buffer to have a batch, which engines fill; ends with the batch, or when a watched part ends,
        # a stop is asked for, or nothing moves for so long. One read may take as long as that: it waits for a buffer
        # that is started again, and for room on a full disk.
        while True:
            drained = self.draining and await self._is_drained(
                client
            )  # before the read, which takes what there is
            if await self.watch.call("learner-0", learner.read.remote(_READ_S), stall_s + _CALL_S):
                break
            if drained:
                return False
            self.observer.check_progress(stall_s)
        waited_s = time.monotonic() - began
        self.observer.learner_state = "training"
        outcome: StepOutcome = await self._on_every_rank("train")
        self.observer.stepped(step, outcome, waited_s)
        for report in (outcome.sync, *outcome.welcomes):
            fleet.condemn(report.out_of_service)
        return True

    async def _is_drained(self, client: BufferClient) -> bool:
        states = (await client.status()).states
        return self._feeding is None and not any(states[s] for s in ("queued", "leased", "complete"))

    def feed(self) -> None:
        """Prompts are admitted from here on."""
        if self._feeding is None and self._training and self.fleet is not None:
            longest = self.recipe.longest_prompt_tokens
            self._feeding = self.watch.add("feeder", feed(self.fleet.buffer, self._frontier, longest))

    async def stop_feeding(self) -> None:
        """No prompt is admitted from here on."""
        self.watch.remove("feeder")
        feeding, self._feeding = self._feeding, None
        if feeding is not None:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    async def _save(self) -> None:
        await self._on_every_rank("save")

    async def wind_down(self, *, save: bool) -> None:
        """Ends every part in order; the caller sets the deadline."""
        if save:
            await asyncio.gather(*self._remote_on_ranks("save"))
        if self.fleet is not None:
            await self.fleet.shutdown()
        if self._client is not None:
            self.observer.buffer_report(await self._client.status())
            await self._client.stop()
        await asyncio.gather(*(p.close.remote() for p in self._learners), return_exceptions=True)

    async def stop_dispatchers(self) -> None:
        """For a stop in mid-run: partial rollouts go back to the buffer, and so to its log, with what they have."""
        if self.fleet is not None:
            await self.fleet.hand_back()

    async def _on_every_rank(self, method: str, *arguments: Any) -> Any:
        timeout_s = self.recipe.learner.step_timeout_s
        calls = [
            self.watch.call(f"learner-{i}", reference, timeout_s)
            for i, reference in enumerate(self._remote_on_ranks(method, *arguments))
        ]
        return (await asyncio.gather(*calls))[0]

    def _remote_on_ranks(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(part, method).remote(*arguments) for part in self._learners]

    async def _observe(self, client: BufferClient, fleet: Fleet) -> None:
        """Once a second, and after each command: the state of every part, to view and metrics. Ends when cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SNAPSHOT_S):
                    await self.look.wait()
            self.look.clear()
            engines, pools = await fleet.facts()
            self.observer.snapshot(await client.status(), engines, pools)
