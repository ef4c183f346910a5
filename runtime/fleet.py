"""Every engine of a run, in its pools: begins with them, adds, removes and restarts them, sets their slots.

- A pool's engines are wanted, not owned: `scale` changes how many, each has a keeper (`engine_keeper`) that lives up to it.
- An engine that dies too often is given up; a pool whose engines are all given up has failed, and the run goes on with the
  others. Without any pool left, where an engine cannot even start before the run has begun, or meets a mistake of the
  recipe, the run ends with the cause.
- What is decided is in `fleet_rules`; here it is carried out. One event loop. Called by the supervisor and the tuner.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

from asyncrl.buffer import BufferAddress, BufferClient
from asyncrl.recipes import Recipe
from asyncrl.runtime import fleet_rules
from asyncrl.runtime.deaths import ends_the_run
from asyncrl.runtime.engine_keeper import EngineKeeper
from asyncrl.runtime.facts import Concurrency, EngineFacts, EngineState, PoolFacts
from asyncrl.runtime.placement import RESERVE_S, no_room
from asyncrl.runtime.watch import PartFailed, Watch

_LOOK_S = 1.0


class Pool:
    """One pool's engines and what they were asked to be."""

    def __init__(self, recipe: Recipe, index: int) -> None:
        self.config = recipe.pools[index]
        self.index = index
        self.wanted = self.config.engines
        self.concurrency: Concurrency = self.config.concurrency
        self.limit = self.config.first_concurrency
        """Slots that a new engine begins with."""
        self.drained = False
        self.keepers: dict[int, EngineKeeper] = {}
        self.leaving: list[EngineKeeper] = []
        self.tuned = ""
        """With `auto`: the controller's last change."""

    @property
    def states(self) -> list[EngineState]:
        return [keeper.state for keeper in self.keepers.values()]


class Fleet:
    """`begin`, then `dispatching` set and cleared by the supervisor, `shutdown` at the end. `keep` is to be watched."""

    def __init__(
        self,
        recipe: Recipe,
        folder: str,
        run_id: str,
        watch: Watch,
        buffer: BufferClient,
        address: BufferAddress,
        note: Callable[[str], None],
    ) -> None:
        self.recipe, self.folder, self.run_id = recipe, folder, run_id
        self.watch, self.buffer, self.address = watch, buffer, address
        self.endpoint: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.dispatching = asyncio.Event()
        self.pools = {pool.name: Pool(recipe, i) for i, pool in enumerate(recipe.pools)}
        self.paused = False
        self.begun = False
        self._note = note
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()
        self._lives: Counter[str] = Counter()
        self._tasks: dict[asyncio.Task[None], EngineKeeper] = {}

    # ---- the run's phases ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Asks for room for every engine that is wanted."""
        for pool in self.pools.values():
            self._fit(pool)

    async def begin(self) -> None:
        """Waits until every pool has as many engines up as the run begins with; unblocked by their keepers.

        Raises PlacementError where there is no room for them; a failure before that comes by `keep`.
        """
        deadline = time.monotonic() + RESERVE_S
        while not fleet_rules.has_begun([(p.config, p.states) for p in self.pools.values()]):
            if time.monotonic() > deadline:
                self._check_room()
            await self._change(_LOOK_S)
        self.begun = True

    async def keep(self) -> None:
        """Waits for a failure that ends the run; the keepers bring it about."""
        await self._failure

    async def hand_back(self) -> None:
        """Every engine returns what it holds, and takes nothing more until `dispatching` is set again."""
        self.dispatching.clear()
        await asyncio.gather(*(keeper.hand_back() for keeper in self.keepers()))

    async def shutdown(self) -> None:
        """Ends every engine; the caller sets the deadline."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- commands ------------------------------------------------------------------------------------------------

    def set_engines(self, name: str, wanted: int) -> fleet_rules.Resize:
        """Adds or removes engines of a pool from now on; those that were given up are tried again."""
        pool = self.pools[name]
        pool.wanted = wanted
        for index in [i for i, k in pool.keepers.items() if k.state == "dead"]:
            del pool.keepers[index]
        return self._fit(pool)

    async def set_concurrency(self, names: Iterable[str], concurrency: Concurrency) -> None:
        for pool in [self.pools[name] for name in names]:
            pool.concurrency, pool.tuned, pool.drained = concurrency, "", False
            if concurrency != "auto":
                pool.limit = concurrency
                for keeper in pool.keepers.values():
                    keeper.limit = concurrency
        await self.apply_slots()

    async def set_paused(self, paused: bool) -> None:
        """Drained pools stay so."""
        self.paused = paused
        await self.apply_slots()

    async def go_on(self) -> None:
        """No pause and no drained pool any more."""
        for pool in self.pools.values():
            pool.drained = False
        await self.set_paused(False)

    async def drain(self, name: str) -> None:
        self.pools[name].drained = True
        await self.apply_slots()

    def condemn(self, out_of_service: Mapping[str, str]) -> None:
        """Engine ids that a version was settled without, and why. One that hangs does not hear of it: its life ends here."""
        for keeper in self.keepers():
            if keeper.engine_id in out_of_service:
                keeper.condemn(out_of_service[keeper.engine_id])

    async def apply_slots(self) -> None:
        """Tells each engine its slots where they are others than it has."""
        changes: list[Awaitable[None]] = []
        for pool in self.pools.values():
            for keeper in pool.keepers.values():
                slots = fleet_rules.slots(keeper.limit, paused=self.paused, drained=pool.drained)
                if slots != keeper.slots:
                    changes.append(keeper.set_slots(slots))
        await asyncio.gather(*changes)

    # ---- what it looks like --------------------------------------------------------------------------------------

    def keepers(self) -> Iterator[EngineKeeper]:
        """All that are not gone, those on their way out included."""
        for pool in self.pools.values():
            yield from [*pool.keepers.values(), *pool.leaving]

    async def facts(self) -> tuple[list[EngineFacts], list[PoolFacts]]:
        engines = list(await asyncio.gather(*(keeper.facts() for keeper in self.keepers())))
        return engines, [self._pool_facts(pool) for pool in self.pools.values()]

    def _pool_facts(self, pool: Pool) -> PoolFacts:
        down = [k for k in pool.keepers.values() if k.state not in fleet_rules.UP]
        reasons = [f"{k.name}: {k.reason}" for k in down if k.reason]
        return fleet_rules.pool_facts(
            pool.config,
            pool.states,
            wanted=pool.wanted,
            concurrency=pool.concurrency,
            begun=self.begun,
            reasons=[*reasons, pool.tuned],
        )

    # ---- what the keepers tell -----------------------------------------------------------------------------------

    def next_life(self, name: str) -> int:
        self._lives[name] += 1
        return self._lives[name]

    def moved(self) -> None:
        self._changed.set()

    def died(self, keeper: EngineKeeper, error: PartFailed, again_s: float | None) -> None:
        pool = self.pools[keeper.pool.name]
        what = f"starting it again in {again_s:.0f} s" if again_s is not None else "given up"
        self._note(f"engine {keeper.name} died ({keeper.reason}); {what}")
        if ends_the_run(error.raised) or not (self.begun or error.process_died):
            self._fail(error)  # another one would not serve, or start, either
        if (
            again_s is None
            and fleet_rules.pool_state(pool.states, wanted=pool.wanted, begun=True) == "failed"
        ):
            self._note(f"pool {pool.config.name} failed: all its engines are given up")
            alive = [p for p in self.pools.values() if any(state != "dead" for state in p.states)]
            if not alive or not self.begun:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    # ---- keepers -------------------------------------------------------------------------------------------------

    def _fit(self, pool: Pool) -> fleet_rules.Resize:
        change = fleet_rules.resize({i: k.state for i, k in pool.keepers.items()}, pool.wanted)
        for index in change.remove:
            keeper = pool.keepers.pop(index)
            pool.leaving.append(keeper)
            keeper.retire()
        for index in change.add:
            self._add(pool, index)
        return change

    def _add(self, pool: Pool, index: int) -> None:
        slots = fleet_rules.slots(pool.limit, paused=self.paused, drained=pool.drained)
        keeper = pool.keepers[index] = EngineKeeper(self, pool.index, index, pool.limit, slots)
        task = asyncio.create_task(keeper.keep(), name=f"keeper of {keeper.name}")
        self._tasks[task] = keeper
        task.add_done_callback(self._kept)

    def _kept(self, task: asyncio.Task[None]) -> None:
        keeper = self._tasks.pop(task)
        pool = self.pools[keeper.pool.name]
        if keeper in pool.leaving:
            pool.leaving.remove(keeper)
            self._note(f"engine {keeper.name} is removed")
        if not task.cancelled() and (error := task.exception()):
            self._fail(error)
        self.moved()

    def _check_room(self) -> None:
        for pool in self.pools.values():
            waiting = [k for k in pool.keepers.values() if k.state == "waiting for room"]
            missing = pool.config.engines_to_begin - (len(pool.keepers) - len(waiting))
            if missing > 0:
                each = waiting[0].reason
                wanted = f"{missing} more engines of pool {pool.config.name}, each of which {each}"
                raise no_room(wanted, "Lower engines, ranks or cores, or set min_engines to begin with fewer")

    async def _change(self, timeout_s: float) -> None:
        """Returns at a keeper's next change of state, or after `timeout_s`."""
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return
