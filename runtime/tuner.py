"""`concurrency = "auto"`: once a second shows each engine's controller how the run stands, and carries out what it decides.

The decisions are `generators.concurrency`'s; every change is logged with its reason, and the pool shows the last one.
A paused run, a drained pool and an engine that is not up are left alone. Called by the supervisor, on its event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from asyncrl.generators.concurrency import Controller, Facts
from asyncrl.runtime import facts
from asyncrl.runtime.bottleneck import wait_shares
from asyncrl.runtime.engine_keeper import EngineKeeper
from asyncrl.runtime.fleet import Fleet, Pool
from asyncrl.runtime.observer import Observer

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_SETTLE_S = 20.0
_SETTLE_STEPS = 3
"""The learner waits once in each of its steps: a few of them show how much."""


class Tuner:
    """`run` until cancelled."""

    def __init__(self, fleet: Fleet, observer: Observer) -> None:
        self._fleet, self._observer = fleet, observer
        self._controllers: dict[str, Controller] = {}
        """By the id of an engine's life: another life is another engine."""
        self._preemptions: dict[str, int] = {}
        self._before: facts.Snapshot | None = None
        self._stale = 0

    async def run(self) -> None:
        """Waits for the next snapshot, which the supervisor takes every second. Ends when cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            now = self._observer.last
            if now is None or now is self._before:
                continue
            if self._before is not None and not self._fleet.paused:
                self._look(self._before, now)
                await self._fleet.apply_slots()
            self._before, self._stale = now, self._observer.stale_rollouts

    def _look(self, before: facts.Snapshot, now: facts.Snapshot) -> None:
        shares = wait_shares(before, now)
        lives = {keeper.engine_id for keeper in self._fleet.keepers()}
        for life in [life for life in self._controllers if life not in lives]:
            del self._controllers[life]
            self._preemptions.pop(life, None)
        for pool in self._fleet.pools.values():
            if pool.concurrency == "auto" and not pool.drained:
                for keeper in pool.keepers.values():
                    if keeper.last is not None and keeper.actor is not None:
                        self._decide(pool, keeper, keeper.last, now, shares)

    def _decide(
        self,
        pool: Pool,
        keeper: EngineKeeper,
        engine: facts.EngineFacts,
        now: facts.Snapshot,
        shares: Mapping[str, float],
    ) -> None:
        life = keeper.engine_id
        controller = self._controllers.get(life)
        if controller is None:
            settle_s = max(_SETTLE_S, _SETTLE_STEPS * self._observer.step_s)
            controller = self._controllers[life] = Controller(pool.config.max_concurrency, settle_s)
        preempted, self._preemptions[life] = self._preemptions.get(life, 0), engine.preemptions
        decision = controller.decide(
            Facts(
                now=now.seconds,
                limit=keeper.limit,
                slots_used=engine.slots_used,
                kv_used_fraction=engine.kv_used_fraction,
                preemptions=max(0, engine.preemptions - preempted),
                waiting=engine.waiting,
                tokens_per_s=engine.tokens_per_s,
                learner_waiting=shares.get(facts.LEARNER_WAITS, 0.0),
                # Engines find nothing, and the bound is why: only then is there more room than may be used.
                staleness_waiting=min(
                    shares.get(facts.ENGINES_WAIT, 0.0), shares.get(facts.PROMPTS_WAIT, 0.0)
                ),
                queued=now.buffer.queued,
                stale=self._observer.stale_rollouts - self._stale,
            )
        )
        if decision.limit != keeper.limit:
            pool.tuned = f"{keeper.name}: {decision.reason}"
            logger.info("concurrency %s", pool.tuned)
            self._observer.note(f"concurrency of {pool.tuned}")
            keeper.limit = pool.limit = decision.limit
