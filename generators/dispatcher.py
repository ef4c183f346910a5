"""Keeps one engine busy: leases rollouts, gives each a slot, and hands them back when it has too many.

Invariants:
- Every lease ends in exactly one of the ways that `rollout_life` names.
- At most `concurrency` rollouts are generated at once, whatever it was changed to meanwhile; a rollout that waits for its
  score (or for its environment) holds no slot, and at most `_BESIDE_PER_SLOT` x concurrency do before leasing pauses.
- One lease request is under way at a time. It may wait at the buffer while the concurrency changes: what it brings over the
  present limit is released at once.
- A buffer that is started again is waited for by its client, which sends again what was not acknowledged: every call here
  is one that may be repeated, so nothing is lost or doubled. Longer than that, and the buffer's error ends the run.
- When the engine dies, this process lives: what every stream has is flushed and released before the error is raised.
Runs in the engine's process, on one event loop; started by `runtime.engine_part`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from asyncrl.buffer import BufferClient
from asyncrl.buffer.wire import Leased
from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.engine import Engine, EngineDead
from asyncrl.generators.outbox import Outbox
from asyncrl.generators.rollout_life import Kit, RolloutLife, Scorer, TurnTaker
from asyncrl.generators.slots import Slots

logger = logging.getLogger(__name__)

_LEASE_WAIT_S = 3.0
_HEARTBEAT_S = 10.0
_BESIDE_PER_SLOT = 8


class Dispatcher:
    """`run` works until `stop` or a fault; `set_concurrency` may be called at any time."""

    def __init__(
        self,
        *,
        engine: Engine,
        engine_id: str,
        buffer: BufferClient,
        scorer: Scorer,
        sampling: SamplingConfig,
        concurrency: int,
        stop_token_ids: tuple[int, ...],
        decode: Callable[[list[int]], str],
        turns: TurnTaker | None = None,
        seed: int | None = None,
    ) -> None:
        """`turns`: the environment; None where a rollout has one turn. `seed`: of a run that is to be made again bit for bit."""
        self._engine = engine
        self._engine_id = engine_id
        self._buffer = buffer
        self._outbox = Outbox(buffer, engine_id)
        self._kit = Kit(
            engine=engine,
            buffer=buffer,
            outbox=self._outbox,
            scorer=scorer,
            turns=turns,
            seats=self,
            sampling=sampling,
            seed=seed,
            stop_token_ids=stop_token_ids,
            decode=decode,
        )
        self._slots = Slots(concurrency)
        self._lives: dict[str, RolloutLife] = {}
        self._room = asyncio.Event()
        self._stopping = False
        self._dead: EngineDead | None = None

    @property
    def concurrency(self) -> int:
        """The limit that was set last."""
        return self._slots.limit

    @property
    def slots_used(self) -> int:
        return self._slots.used

    async def run(self) -> None:
        """Ends after `stop`, when every lease has ended. Raises `EngineDead`, once all that there was is handed back, or
        the first other fault in a group (BufferUnreachable)."""
        async with asyncio.TaskGroup() as tasks:
            outbox = tasks.create_task(self._outbox.run(), name="outbox")
            heartbeat = tasks.create_task(self._heartbeats(), name="heartbeat")
            async with asyncio.TaskGroup() as rollouts:
                await self._lease_all(rollouts)
            outbox.cancel()
            heartbeat.cancel()
        if self._dead is not None:
            raise self._dead

    async def stop(self) -> None:
        """Hands everything back: partial rollouts return to the queue with their prefix."""
        self._stopping = True
        self._room.set()
        await self._recall(self._slots.known)

    async def set_concurrency(self, limit: int) -> None:
        """From now on at most `limit` slots. Fewer than are used: the newest rollouts go back with all their tokens, and
        this returns when they have. 0 pauses: nothing is held or leased but what waits for its score, and heartbeats go on.

        Waits for the flush and the release of what goes back, which the buffer's answers (its client's deadlines) end.
        """
        surplus = self._slots.resize(limit)
        leaving = [self._lives[key].left for key in surplus]
        self._slots_changed()
        await self._recall(surplus)
        if leaving:
            await asyncio.wait(leaving)

    # ---- leasing -----------------------------------------------------------------------------------------------

    def _free(self) -> int:
        if len(self._lives) - self._slots.used >= _BESIDE_PER_SLOT * self._slots.limit:
            return 0
        return self._slots.free

    async def _lease_all(self, rollouts: asyncio.TaskGroup) -> None:
        """Waits for a free slot (a rollout of ours ends, or the limit rises), then for the buffer to have work; ends on
        `stop` or with the engine's death, after the last answer of the buffer."""
        while not self._stopping:
            free = self._free()
            if free <= 0:
                self._room.clear()
                await self._room.wait()
                continue
            room = self._engine.stats().kv_free_tokens
            leases = await self._buffer.lease(self._engine_id, free, _LEASE_WAIT_S, kv_free_tokens=room)
            # The limit may have fallen meanwhile.
            fitting = 0 if self._stopping else self._slots.free
            for lease in leases[:fitting]:
                self._begin(lease, rollouts)
            if over := leases[fitting:]:
                await self._buffer.release([(lease.rollout_id, lease.lease_id) for lease in over])

    def _begin(self, lease: Leased, rollouts: asyncio.TaskGroup) -> None:
        life = RolloutLife(lease, self._kit)
        self._lives[life.key] = life
        self._slots.take(life.key)
        rollouts.create_task(self._carry_out(life), name=f"rollout-{lease.rollout_id}")

    async def _carry_out(self, life: RolloutLife) -> None:
        answer = None
        try:
            answer = await life.answer()
        except EngineDead as error:
            await self._die(error)
        finally:
            self._slots.end(life.key)
            life.left.set_result(None)
            self._slots_changed()
        try:
            if answer is not None:
                await life.score(answer)
        finally:
            del self._lives[life.key]
            self._room.set()

    def step_out(self, key: str) -> None:
        """See `Seats`."""
        self._slots.step_out(key)
        self._slots_changed()

    def line_up(self, key: str) -> None:
        """See `Seats`."""
        self._slots.line_up(key)
        self._slots_changed()

    def _slots_changed(self) -> None:
        for key in self._slots.admit():
            self._lives[key].grant()
        self._room.set()

    # ---- giving back -------------------------------------------------------------------------------------------

    async def _recall(self, keys: Iterable[str]) -> None:
        recalled = [key for key in keys if key in self._lives]
        for key in recalled:
            self._lives[key].recall()
        await self._engine.abort(recalled)

    async def _die(self, error: EngineDead) -> None:
        """The engine's other streams hear of it by themselves; what holds no slot is recalled."""
        if self._dead is None:
            logger.error("engine %s died; its rollouts are handed back: %s", self._engine_id, error)
            self._dead = error
            await self.stop()

    async def _heartbeats(self) -> None:
        """Tells the buffer that the engine lives, so that slow prefills keep their leases; ends when cancelled."""
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            await self._buffer.heartbeat(self._engine_id)
