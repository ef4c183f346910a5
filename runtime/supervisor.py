"""Runs the parts of one run from start to end, and ends it with the culprit's traceback when it cannot go on.

    start buffer, engines and learner --> publish version 0 --> engines take and confirm it --> held-out accuracy
        --> admit prompts --> steps: read, train, publish, commit [, checkpoint] --> hand rollouts back --> held-out accuracy
        --> end

A run that goes on from a checkpoint puts learner and buffer back to it first, and publishes the version that they had then.
The learner's calls and the buffer's keepers are watched; what ends by itself ends the run. A buffer process that dies is
started again (`buffer_watch`), engines come and go (`fleet`), and commands change the run meanwhile (`commands`). One event
loop, in the launching process. Called by `launch`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, ClassVar

import msgspec

from asyncrl.buffer import BufferAddress, BufferClient
from asyncrl.buffer.keys import ClientKeys
from asyncrl.generators.prompts import Frontier
from asyncrl.recipes import Recipe
from asyncrl.runtime import facts
from asyncrl.runtime.buffer_watch import ShardKeeper
from asyncrl.runtime.checkpointing import Checkpointing
from asyncrl.runtime.checkpoints import Manifest
from asyncrl.runtime.feeder import feed
from asyncrl.runtime.fleet import Fleet
from asyncrl.runtime.held_out import Evaluations
from asyncrl.runtime.learner_faults import named
from asyncrl.runtime.learner_part import StepOutcome
from asyncrl.runtime.learner_ranks import LearnerRanks
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

    WORK: ClassVar[str] = facts.TRAINING
    """The phase in which engines have rollouts."""

    def __init__(
        self,
        recipe: Recipe,
        run_id: str,
        parts: Parts,
        observer: Observer,
        watch: Watch,
        frontier: Frontier,
        evaluations: Evaluations,
        goes_on_from: Manifest | None = None,
    ) -> None:
        self.recipe, self.observer, self.watch = recipe, observer, watch
        self.fleet: Fleet | None = None
        """From when the buffer is up."""
        self.draining = False
        """Nothing more is admitted; the run ends when what is under way is trained."""
        self.look = asyncio.Event()
        """Somebody wants to see the run as it is now."""
        self.in_training = ""
        """The batch that is being trained on, for whoever tells of a fault."""
        self._run_id, self._keys = run_id, parts.keys
        self._buffers = parts.buffers
        self._ranks = LearnerRanks(parts.learners, watch, recipe.learner.step_timeout_s)
        self._from = goes_on_from
        self._checkpointing = Checkpointing(recipe, watch.folder, self._ranks, observer.note)
        self._frontier, self._evaluations = frontier, evaluations
        self._open = contextlib.AsyncExitStack()
        self._client: BufferClient | None = None
        self._feeding: asyncio.Task[None] | None = None
        self._training = False
        self._waited_s = 0.0
        """For the batch that was trained last."""

    async def run(self) -> None:
        guarded = self.watch.guarded
        address = await self._start_buffer()
        client = self._client = await self._open.enter_async_context(BufferClient(address))
        folder, note = str(self.watch.folder.path), self.observer.note
        fleet = self.fleet = Fleet(self.recipe, folder, self._run_id, self.watch, client, address, note)
        self.watch.add("fleet", fleet.keep())
        self.watch.add("machines", watch_machines(note))
        self.watch.add("checkpoints", self._checkpointing.keep())
        observing = self.watch.add("observer", self._observe(client, fleet))
        try:
            await guarded(self._start(address, fleet))
            await guarded(self._evaluate_before(fleet))
            await guarded(self._train(client, fleet))
            await guarded(fleet.hand_back())
            await guarded(self._checkpoint_at_end())
            await guarded(self._evaluate_after(fleet))
            await guarded(self._save())
        finally:
            observing.cancel()
            await asyncio.gather(observing, return_exceptions=True)

    async def close(self) -> None:
        """After everything else, also where the run failed: the keepers of engines talk to the buffer to their end."""
        await self._evaluations.close()
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
        """The first version is published as soon as the learner can; engines take it when they are up, and then the run begins."""
        ranks, timeout_s = self._ranks, self.recipe.learner.start_timeout_s
        with self.observer.phase(facts.ENGINE_START):
            fleet.start()
            endpoint = await ranks.everyone("start", timeout_s=timeout_s)
            await ranks.first("meet", address, timeout_s=_CALL_S)
            self.observer.published(await ranks.everyone("publish", await self._restored()))
            fleet.endpoint.set_result(endpoint)
        with self.observer.phase(facts.FIRST_SYNC):
            await self._begun(fleet)
            await ranks.first("admit_prompts", timeout_s=_CALL_S)
            await self._checkpointing.begin()

    async def _begun(self, fleet: Fleet) -> None:
        """Waits for the engines that the run begins with, which have the version then; where it was broadcast before they came, they
        get it now. Ends when they have it, with what keeps them from it, or when the fleet's own deadline is over."""
        beginning = asyncio.create_task(fleet.begin())
        try:
            while not beginning.done():
                await asyncio.wait({beginning}, timeout=_READ_S)
                if not beginning.done():
                    await self._bring_joiners(fleet)
            await beginning
        finally:
            beginning.cancel()
            await asyncio.gather(beginning, return_exceptions=True)

    async def _bring_joiners(self, fleet: Fleet) -> None:
        """To the present version, while the learner waits and its weights are that version's."""
        if await self._ranks.first("behind"):
            await self._ranks.everyone("publish_again")
        fleet.condemn(await self._ranks.first("out_of_service", timeout_s=_CALL_S))

    async def _restored(self) -> int:
        """The version to begin with, which learner and buffer have then."""
        found = self._from
        if found is None:
            return 0
        await self._ranks.everyone("restore", found.step, found.version, found.learner)
        return found.version

    async def _evaluate_before(self, fleet: Fleet) -> None:
        if self._evaluations.wanted and not self.observer.steps_done:
            with self.observer.phase(facts.EVALUATION):
                await self._evaluations.before(fleet, 0)

    async def _evaluate_after(self, fleet: Fleet) -> None:
        if self._evaluations.wanted:
            with self.observer.phase(facts.EVALUATION):
                await self._evaluations.settle()
                await self._evaluations.after(fleet, self.observer.steps_done)

    async def _train(self, client: BufferClient, fleet: Fleet) -> None:
        with self.observer.phase(self.WORK):
            fleet.dispatching.set()
            self._training = True
            self.observer.state = "running"
            self.feed()
            tuning = self.watch.add("tuner", Tuner(fleet, self.observer).run())
            try:
                for step in range(self.observer.steps_done + 1, self.recipe.run.steps + 1):
                    if not await self._step(step, client, fleet):
                        break
                    await self._evaluations.after_step(fleet, step)
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
        stall_s = self.recipe.run.stall_timeout_s
        # Waits for the buffer to have a batch, which engines fill; ends with the batch, or when a watched part ends,
        # a stop is asked for, or nothing moves for so long. One read may take as long as that: it waits for a buffer
        # that is started again, and for room on a full disk.
        while True:
            drained = self.draining and await self._is_drained(
                client
            )  # before the read, which takes what there is
            batch = await self._ranks.first("read", _READ_S, timeout_s=stall_s + _CALL_S)
            if batch is not None:
                break
            if drained:
                return False
            await self._bring_joiners(fleet)
            self.observer.check_progress(stall_s)
        self._waited_s = time.monotonic() - began
        self.observer.learner_state, self.in_training = "training", named(batch)
        due = self._checkpointing.due(step)
        if due and self.recipe.run.deterministic:
            await self.stop_feeding()  # nothing is under way at the checkpoint
        outcome: StepOutcome = await self._ranks.everyone("train")
        self.in_training = ""
        checkpoint_stall_s = await self._checkpointing.take() if due else 0.0
        if not self.draining:
            self.feed()
        self.observer.stepped(step, outcome, self._waited_s, checkpoint_stall_s)
        for report in outcome.reports:
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

    async def _checkpoint_at_end(self) -> None:
        """Where the run was drained there is none of the last step yet."""
        await self._checkpointing.take()

    async def _save(self) -> None:
        """The model, and the last checkpoint as far as it is not written yet."""
        await self._ranks.everyone("save")
        await self._checkpointing.finish(self.recipe.learner.step_timeout_s)

    async def wind_down(self, *, save: bool) -> None:
        """Ends every part in order; the caller sets the deadline."""
        if save:
            await self._save_in_mid_run()
        if self.fleet is not None:
            await self.fleet.shutdown()
        if self._client is not None:
            self.observer.buffer_report(await self._client.status())
            await self._client.stop()
        await self._ranks.close()

    async def _save_in_mid_run(self) -> None:
        """What was learned, and a checkpoint with what the engines handed back. With `deterministic` the last one stays the one to
        go on from: a rollout that goes on from its middle has other last bits."""
        await self._hear_of_last_step()
        await self._save()
        if self.fleet is not None and self.fleet.begun and not self.recipe.run.deterministic:
            await self._checkpointing.take()
            await self._checkpointing.finish(self.recipe.learner.step_timeout_s)

    async def _hear_of_last_step(self) -> None:
        """A stop ends the wait for a step, and not the step: it is trained and committed all the same."""
        step = await self._ranks.first("steps_done")
        if step > self.observer.steps_done:
            self.observer.stepped(step, await self._ranks.first("last_outcome"), self._waited_s)

    async def stop_dispatchers(self) -> None:
        """For a stop in mid-run: partial rollouts go back to the buffer, and so to its log, with what they have."""
        if self.fleet is not None:
            await self.fleet.hand_back()

    async def _observe(self, client: BufferClient, fleet: Fleet) -> None:
        """Once a second, and after each command: the state of every part, to view and metrics. Ends when cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SNAPSHOT_S):
                    await self.look.wait()
            self.look.clear()
            engines, pools = await fleet.facts()
            self.observer.snapshot(await client.status(), engines, pools)
