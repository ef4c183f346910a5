"""Keeps one engine of a pool running, from the search for room to its end, and starts it again when it dies.

    waiting for room -> starting -> joining -> idle/serving --retire--> draining -> gone
         ^                 |           |            |
         +---- restarting (wait) <-----+--- death --+---- too many deaths --> dead

- Every life has an id of its own (`small-0`, then `small-0.2`): what the buffer, the publisher or a log knows of one life can
  never be taken for another's, and a life that Ray gave up too early has leases that are void.
- Start, restart and joining late are one path: load, take the present weights, confirm them, serve.
- A life ends with its actor killed, its room given back, and the buffer told that its leases are free.
Made by `fleet`, on the supervisor's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any, Protocol

import msgspec

from asyncrl.buffer import BufferAddress, BufferClient
from asyncrl.generators.config import PoolConfig
from asyncrl.recipes import Recipe
from asyncrl.runtime.deaths import Deaths, ends_the_run
from asyncrl.runtime.facts import EngineFacts, EngineState
from asyncrl.runtime.placement import EngineRoom, end_actor
from asyncrl.runtime.watch import PartFailed, Watch

logger = logging.getLogger(__name__)

_CALL_S = 60.0
_LOOK_S = 0.25
_STATUS_S = 1.0
_SHUTDOWN_S = 15.0
_STOP_AGAIN_S = 0.5
_TAILS_S = 5.0
"""For a dispatcher whose engine died to hand in what it has."""


class Run(Protocol):
    """What a keeper needs of the run: `Fleet` has it."""

    recipe: Recipe
    folder: str
    run_id: str
    watch: Watch
    buffer: BufferClient
    address: BufferAddress
    endpoint: asyncio.Future[str]
    """Of the learner's publisher."""
    dispatching: asyncio.Event
    """Set while engines are to work on rollouts."""

    def next_life(self, name: str) -> int:
        """1 for the first engine of this name, and one more for each that follows, whoever keeps it."""

    def died(self, keeper: EngineKeeper, error: PartFailed, again_s: float | None) -> None:
        """Told of every death; `again_s` None: it is not started again."""

    def moved(self) -> None:
        """Told of every change of state."""


class EngineKeeper:
    """One engine. `keep` ends when it was retired, or with its last death."""

    def __init__(self, run: Run, pool_index: int, index: int, limit: int, slots: int) -> None:
        self._run = run
        self.pool: PoolConfig = run.recipe.pools[pool_index]
        self.pool_index = pool_index
        self.name = f"{self.pool.name}-{index}"
        self.deaths = Deaths(self.pool.max_deaths, self.pool.deaths_within_s)
        self.state: EngineState = "waiting for room"
        self.reason = ""
        self.limit = limit
        """Slots that were asked for it; `slots` is less while it is paused or drained."""
        self.slots = slots
        self.actor: Any = None
        """While it is up."""
        self.last: EngineFacts | None = None
        """What its process said last, of this life."""
        self._life = 0
        self._node = ""
        self._dispatch: asyncio.Task[None] | None = None
        self._retired = asyncio.Event()
        self._condemned: asyncio.Future[str] | None = None

    @property
    def engine_id(self) -> str:
        """Of its present life."""
        return self.name if self._life <= 1 else f"{self.name}.{self._life}"

    @property
    def retired(self) -> bool:
        return self._retired.is_set()

    def condemn(self, reason: str) -> None:
        """Its present life is to end: it does not serve as it should, and may not know."""
        if self._condemned is not None and not self._condemned.done():
            self._condemned.set_result(reason)

    def retire(self) -> None:
        """It hands its rollouts back and ends."""
        self._retired.set()

    async def keep(self) -> None:
        """Waits for the end of each life, and starts the next; ends retired, or dead."""
        while not self.retired:
            self._life = self._run.next_life(self.name)
            error = await self._live()
            if error is None:
                return
            now = time.monotonic()
            hopeless = self.deaths.one_too_many(now) or ends_the_run(error.raised)
            again_s = None if hopeless else self.deaths.wait_s(now)
            if again_s is None:
                self._be("dead", error.cause)
            self._run.died(self, error, again_s)
            if again_s is None:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(again_s):
                    await self._retired.wait()

    # ---- one life ----------------------------------------------------------------------------------------------

    async def _live(self) -> PartFailed | None:
        """None when it was retired, else what it died of."""
        self._node, self.last = "", None
        room = EngineRoom(self.pool)
        actor, error = None, None
        try:
            if not await self._has_room(room):
                return None
            run = self._run
            actor = room.make_engine(run.recipe, run.folder, run.run_id, self.pool_index, self.engine_id)
            error = await self._lead(actor)
            return error
        finally:
            self.actor = None
            await asyncio.shield(self._bury(actor, room, error))

    async def _has_room(self, room: EngineRoom) -> bool:
        """Waits for machines to have it: another part ends, a machine joins. False when retired meanwhile."""
        self._be("waiting for room", f"wants {room.wants()}")
        while not self.retired:
            if await asyncio.to_thread(room.is_ready):
                return True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._retired.wait()
        return False

    async def _lead(self, actor: Any) -> PartFailed | None:
        """Ends with the life, or when it was retired and has handed everything back."""
        living = asyncio.create_task(self._serve(actor), name=f"life of {self.engine_id}")
        retired = asyncio.create_task(self._retired.wait())
        condemned = self._condemned = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait({living, retired, condemned}, return_when=asyncio.FIRST_COMPLETED)
            if not living.done() and condemned.done():
                return self._run.watch.failed(self.engine_id, condemned.result())
            if not living.done():
                self._be("draining", "")
                await self.hand_back()
                return None
            living.result()
            return None  # it had just finished its work when it was retired
        except PartFailed as error:
            return error
        finally:
            for task in (living, retired):
                task.cancel()
            await asyncio.gather(living, retired, return_exceptions=True)

    async def _serve(self, actor: Any) -> None:
        """Ends when it is retired, or raises PartFailed with what ended it."""
        run, engine_id = self._run, self.engine_id
        self._be("starting", "")
        self._node = await run.watch.call(
            engine_id, actor.start.remote(), self.pool.start_timeout_s + _CALL_S
        )
        self._be("joining", "waits for the learner's weights")
        learner = run.recipe.learner
        wait_s = learner.start_timeout_s + learner.step_timeout_s + run.recipe.weight_sync.timeout_s
        joining = actor.join.remote(await asyncio.shield(run.endpoint), run.address.keys, wait_s)
        await run.watch.call(engine_id, joining, wait_s + _CALL_S)
        self.actor = actor
        self._be("idle", "")
        receiving = asyncio.create_task(self._receive(actor))
        working = asyncio.create_task(self._work(actor))
        try:
            await asyncio.wait({receiving, working}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done() and self._dispatch is not None:
                # The same death, met by a weight update first: the dispatcher is handing in what it has.
                await asyncio.wait({working}, timeout=_TAILS_S)
            for task in (working, receiving):
                if task.done():
                    task.result()
        finally:
            for task in (receiving, working):
                task.cancel()
            await asyncio.gather(receiving, working, return_exceptions=True)

    async def _receive(self, actor: Any) -> None:
        watch = self._run.watch
        await watch.outcome(self.engine_id, actor.receive.remote())
        raise watch.failed(self.engine_id, "it stopped taking weights by itself")

    async def _work(self, actor: Any) -> None:
        """Waits until engines are to work, dispatches until told to stop, and again. Ends retired, or with its error."""
        while not self.retired:
            await self._run.dispatching.wait()
            call = actor.dispatch.remote(self._run.address, self.slots)
            self._dispatch = asyncio.create_task(self._run.watch.outcome(self.engine_id, call))
            self._dispatch.add_done_callback(_seen)
            try:
                # Not ended by the end of this task: whoever hands back waits for it still.
                await asyncio.shield(self._dispatch)
            finally:
                self._dispatch = None

    async def _bury(self, actor: Any, room: EngineRoom, error: PartFailed | None) -> None:
        """`error`: what it died of. Its leases are free before anything else, for others to go on with."""
        if actor is not None:
            if error is not None:
                self._be("restarting", error.cause)
                await self._run.buffer.engine_lost(self.engine_id, for_good=True)
            if error is None or not error.process_died:
                with contextlib.suppress(PartFailed):
                    await self._run.watch.call(self.engine_id, actor.shutdown.remote(), _SHUTDOWN_S)
            end_actor(actor)
            if error is None:
                await self._run.buffer.engine_lost(self.engine_id, for_good=True)
        room.release()
        self._run.moved()

    # ---- what the fleet asks -------------------------------------------------------------------------------------

    async def set_slots(self, slots: int) -> None:
        """At once where it serves; else from when it does. An engine that does not answer is about to be found dead."""
        self.slots = slots
        if self.actor is not None and self._dispatch is not None:
            with contextlib.suppress(PartFailed):
                await self._run.watch.call(self.engine_id, self.actor.set_concurrency.remote(slots), _CALL_S)

    async def hand_back(self) -> None:
        """Its rollouts return to the buffer with what they have; returns when they have, or when it is too late for that.

        Waits for the dispatch to end. It is told more than once: it may have been about to begin.
        """
        actor, dispatch, deadline = self.actor, self._dispatch, time.monotonic() + _CALL_S
        while dispatch is not None and not dispatch.done() and time.monotonic() < deadline:
            with contextlib.suppress(PartFailed):
                await self._run.watch.call(self.engine_id, actor.stop.remote(), _CALL_S)
            await asyncio.wait({dispatch}, timeout=_STOP_AGAIN_S)

    async def facts(self) -> EngineFacts:
        """Its process' own, or the last of them where it is busy; without one, what is known here."""
        actor = self.actor
        if actor is not None:
            try:
                async with asyncio.timeout(_STATUS_S):
                    self.last = await self._run.watch.outcome(self.engine_id, actor.status.remote())
            except (TimeoutError, PartFailed):
                pass  # its event loop is busy; or it is dead, which `keep` finds by itself
        return self._told(deaths=self.deaths.total, reason=self.reason, node=self._node, engine_id=self.name)

    def _told(self, **known: Any) -> EngineFacts:
        if self.last is None or self.actor is None:
            return EngineFacts(
                pool=self.pool.name,
                state=self.state,
                version=-1,
                slots_used=0,
                slots=0,
                tokens_per_s=0.0,
                **known,
            )
        state = self.last.state if self.state == "idle" else self.state
        if state == "idle" and not self.slots:
            state = "paused"
        return msgspec.structs.replace(self.last, state=state, **known)

    def _be(self, state: EngineState, reason: str) -> None:
        logger.info("engine=%s state=%s reason=%s", self.engine_id, state, reason)
        self.state, self.reason = state, reason
        self._run.moved()


def _seen(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # where nobody waits for it any more it is not logged as forgotten
