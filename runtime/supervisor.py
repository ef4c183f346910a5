"""Runs the parts of one run from start to end, and ends it with the culprit's traceback when one of them dies.

    start buffer, engines and learner --> publish version 0 --> engines confirm --> held-out accuracy --> admit prompts
        --> steps: read, train, publish, commit --> hand rollouts back --> held-out accuracy --> end

Every part's long call (`engine.receive`, `engine.dispatch`, the keeping of each buffer shard) is watched; the first that
ends by itself ends the run. A buffer process that dies is started again meanwhile (`buffer_watch`). One event loop, in the
launching process. Called by `launch`.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from asyncrl.buffer import BufferAddress, BufferClient
from asyncrl.buffer.keys import ClientKeys
from asyncrl.generators.prompts import Frontier, Prompt
from asyncrl.recipes import Recipe
from asyncrl.runtime import facts
from asyncrl.runtime.buffer_watch import ShardKeeper
from asyncrl.runtime.feeder import feed
from asyncrl.runtime.learner_part import StepOutcome
from asyncrl.runtime.observer import Observer
from asyncrl.runtime.placement import Placed
from asyncrl.runtime.watch import Watch

_READ_S = 2.0
_SNAPSHOT_S = 1.0
_CALL_S = 60.0


class Supervisor:
    """One run. `run` ends with all steps done, with `Stopped`, or with `PartFailed`."""

    def __init__(
        self,
        recipe: Recipe,
        parts: Placed,
        keys: ClientKeys,
        observer: Observer,
        watch: Watch,
        frontier: Frontier,
        held_out: list[Prompt],
    ) -> None:
        self._recipe = recipe
        self._parts = parts
        self._keys = keys
        self._observer = observer
        self._watch = watch
        self._frontier = frontier
        self._held_out = held_out
        self._address: BufferAddress | None = None

    async def run(self) -> None:
        guarded = self._watch.guarded
        address = await self._start_buffer()
        async with BufferClient(address) as client:
            observing = self._watch.add("observer", self._observe(client))
            try:
                await guarded(self._start(address))
                await guarded(self._evaluate(0))
                await guarded(self._train(client, address))
                await guarded(self._hand_back())
                await guarded(self._evaluate(self._recipe.run.steps))
                await guarded(self._save())
            finally:
                observing.cancel()
                await asyncio.gather(observing, return_exceptions=True)

    # ---- the phases --------------------------------------------------------------------------------------------

    async def _start_buffer(self) -> BufferAddress:
        """Every shard listens and is kept running from here on."""
        timeout_s = self._recipe.learner.start_timeout_s
        shards = self._parts.buffers
        starting = [
            self._watch.call(f"buffer-{i}", s.start.remote(), timeout_s) for i, s in enumerate(shards)
        ]
        endpoints = tuple(await asyncio.gather(*starting))
        address = self._address = BufferAddress(endpoints=endpoints, keys=self._keys)
        for i, shard in enumerate(shards):
            keeper = ShardKeeper(i, shard, address, self._watch, self._observer)
            self._watch.add(f"buffer-{i}", keeper.keep())
        return address

    async def _start(self, address: BufferAddress) -> None:
        """Publish before admit: no prompt comes before every engine has confirmed version 0."""
        learner, engines = self._parts.learners, self._parts.engines
        timeout_s = max(
            [self._recipe.learner.start_timeout_s, *(p.start_timeout_s for p in self._recipe.pools)]
        )
        with self._observer.phase(facts.ENGINE_START):
            starting = [self._watch.call(name, e.start.remote(), timeout_s) for name, e in engines.items()]
            ranks = [
                self._watch.call(f"learner-{i}", p.start.remote(), timeout_s) for i, p in enumerate(learner)
            ]
            results = await asyncio.gather(*ranks, *starting)
        with self._observer.phase(facts.FIRST_SYNC):
            for name, engine in engines.items():
                self._watch.part(name, engine.receive.remote(results[0]))
            meeting = learner[0].meet.remote(list(engines), address, timeout_s)
            await self._watch.call("learner-0", meeting, timeout_s)
            await self._on_every_rank("publish", 0)
            await self._watch.call("learner-0", learner[0].admit_prompts.remote(), _CALL_S)

    async def _evaluate(self, step: int) -> None:
        """Held-out accuracy on the present weights, the prompts dealt out over the engines."""
        if not self._held_out:
            return
        engines = list(self._parts.engines.items())
        with self._observer.phase(facts.EVALUATION):
            shares = [self._held_out[i :: len(engines)] for i in range(len(engines))]
            calls = [
                self._watch.call(
                    name, engine.evaluate.remote(share, str(step)), self._recipe.learner.step_timeout_s
                )
                for (name, engine), share in zip(engines, shares, strict=True)
                if share
            ]
            self._observer.evaluated(step, await asyncio.gather(*calls))

    async def _train(self, client: BufferClient, address: BufferAddress) -> None:
        with self._observer.phase(facts.TRAINING):
            for name, engine in self._parts.engines.items():
                self._watch.part(f"{name} dispatcher", engine.dispatch.remote(address))
            feeding = self._watch.add(
                "feeder", feed(client, self._frontier, self._recipe.longest_prompt_tokens)
            )
            try:
                for step in range(1, self._recipe.run.steps + 1):
                    await self._step(step)
            finally:
                self._watch.remove("feeder")
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)

    async def _step(self, step: int) -> None:
        began = time.monotonic()
        self._observer.learner_state = "waiting for rollouts"
        learner = self._parts.learners[0]
        stall_s = self._recipe.run.stall_timeout_s
        # Waits for the buffer to have a batch, which engines fill; ends with the batch, or when a watched part ends,
        # a stop is asked for, or nothing moves for so long. One read may take as long as that: it waits for a buffer
        # that is started again, and for room on a full disk.
        while not await self._watch.call("learner-0", learner.read.remote(_READ_S), stall_s + _CALL_S):
            self._observer.check_progress(stall_s)
        waited_s = time.monotonic() - began
        self._observer.learner_state = "training"
        outcome: StepOutcome = await self._on_every_rank("train")
        self._observer.stepped(step, outcome, waited_s)

    async def _hand_back(self) -> None:
        """Engines return what they hold; nothing more is admitted."""
        for name, engine in self._parts.engines.items():
            watched = self._watch.remove(f"{name} dispatcher")
            await self._watch.call(name, engine.stop.remote(), _CALL_S)
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
        if self._address is not None:
            async with BufferClient(self._address) as client:
                self._observer.buffer_report(await client.status())
                await client.stop()
        await asyncio.gather(*(p.close.remote() for p in self._parts.learners), return_exceptions=True)

    async def stop_dispatchers(self) -> None:
        """For a stop in mid-run: partial rollouts go back to the buffer, and so to its log, with what they have."""
        await asyncio.gather(*(e.stop.remote() for e in self._parts.engines.values()), return_exceptions=True)

    async def _on_every_rank(self, method: str, *arguments: Any) -> Any:
        timeout_s = self._recipe.learner.step_timeout_s
        calls = [
            self._watch.call(f"learner-{i}", reference, timeout_s)
            for i, reference in enumerate(self._remote_on_ranks(method, *arguments))
        ]
        return (await asyncio.gather(*calls))[0]

    def _remote_on_ranks(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(part, method).remote(*arguments) for part in self._parts.learners]

    async def _observe(self, client: BufferClient) -> None:
        """Once a second: the state of every part, to view and metrics. Ends when cancelled."""
        while True:
            await asyncio.sleep(_SNAPSHOT_S)
            engines = await asyncio.gather(*(self._status(n, e) for n, e in self._parts.engines.items()))
            self._observer.snapshot(await client.status(), [e for e in engines if e is not None])

    async def _status(self, name: str, engine: Any) -> facts.EngineFacts | None:
        try:
            async with asyncio.timeout(_SNAPSHOT_S):
                status: facts.EngineFacts = await self._watch.outcome(name, engine.status.remote())
                return status
        except TimeoutError:
            return None  # its process is still importing, or its event loop is busy
