"""What a run does when it is told to: scale, pause, continue, drain, stop, and what its status is.

Satisfies `control.Commands`, which says what each means. On the supervisor's event loop; called by the control server.
"""

from __future__ import annotations

import asyncio
import time

from asyncrl.runtime.bottleneck import bottleneck
from asyncrl.runtime.control import (
    CommandRefused,
    RunStatus,
    WrongCommand,
    check_scale,
    pools_meant,
)
from asyncrl.runtime.facts import Concurrency, RunState
from asyncrl.runtime.fleet import Fleet
from asyncrl.runtime.supervisor import Supervisor

_STARTING = "the run is starting; ask again when its engines are up (asyncrl status --watch shows it)"


class RunCommands:
    """The commands of one run. `stop` is the run's own signal to end."""

    def __init__(self, supervisor: Supervisor, stop: asyncio.Event) -> None:
        self._supervisor, self._stop = supervisor, stop
        self._observer = supervisor.observer
        self._name = supervisor.watch.folder.path.name
        self._started_at = time.time() - self._observer.seconds

    async def status(self) -> RunStatus:
        now = self._observer.last
        if now is None:
            raise CommandRefused("the run is starting: it has no engines yet; ask again in a few seconds")
        who = bottleneck(self._observer.before, now)
        return RunStatus(name=self._name, started_at=self._started_at, who_waits=who, snapshot=now)

    async def scale(self, pool: str | None, concurrency: Concurrency | None, engines: int | None) -> str:
        self._check_exact("scale")
        fleet = self._fleet()
        names = check_scale(list(fleet.pools), pool, concurrency, engines)
        if concurrency is not None:
            _check_slots(fleet, names, concurrency)  # before anything is changed
        said = []
        if engines is not None:
            said.append(self._scale_engines(fleet, names[0], engines))
        if concurrency is not None:
            await fleet.set_concurrency(names, concurrency)
            slots = "as many slots as serve (auto)" if concurrency == "auto" else f"{concurrency} slots"
            said.append(f"{', '.join(names)}: {slots} in each engine")
        text = "; ".join(said)
        self._observer.note(text)
        self._supervisor.look.set()
        return text

    def _scale_engines(self, fleet: Fleet, name: str, engines: int) -> str:
        others = sum(pool.wanted for other, pool in fleet.pools.items() if other != name)
        if engines + others < 1:
            raise CommandRefused(f"no engine would be left: leave one in {name}, or use pause")
        before = fleet.pools[name].wanted
        change = fleet.set_engines(name, engines)
        moves = [
            f"{'adding' if indices is change.add else 'removing'} {', '.join(f'{name}-{i}' for i in indices)}"
            for indices in change
            if indices
        ]
        return f"{name}: {before} -> {engines} engines" + (f" ({', '.join(moves)})" if moves else "")

    async def pause(self) -> str:
        self._check_exact("pause")
        await self._fleet().set_paused(True)
        return self._now("paused", "paused: the engines hand their rollouts back and hold still")

    async def go_on(self) -> str:
        fleet = self._fleet()
        await fleet.go_on()
        self._supervisor.draining = False
        self._supervisor.feed()
        return self._now("running", "the run goes on")

    async def drain(self, pool: str | None) -> str:
        fleet = self._fleet()
        if pool is not None:
            self._check_exact("drain --pool")
            (name,) = pools_meant(list(fleet.pools), pool)
            await fleet.drain(name)
            text = f"pool {name} hands its rollouts back and takes nothing more"
            self._observer.note(text)
            self._supervisor.look.set()
            return text
        self._supervisor.draining = True
        await self._supervisor.stop_feeding()
        await fleet.set_paused(False)  # what is under way is to be finished
        return self._now(
            "draining", "draining: no new prompts; what is under way is trained, then the run ends"
        )

    async def stop(self) -> str:
        self._stop.set()
        return self._now("stopping", "the run is ending")

    def _check_exact(self, command: str) -> None:
        if self._supervisor.recipe.run.deterministic:
            raise CommandRefused(
                f"{command} is not for a run with run.deterministic: a rollout that is cut and goes on, or shares its engine, has "
                "other last bits; `drain`, `stop` and `continue` are"
            )

    def _fleet(self) -> Fleet:
        fleet = self._supervisor.fleet
        if fleet is None or not fleet.begun:
            raise CommandRefused(_STARTING)
        return fleet

    def _now(self, state: RunState, text: str) -> str:
        self._observer.state = state
        self._observer.note(text)
        self._supervisor.look.set()
        return text


def _check_slots(fleet: Fleet, names: list[str], concurrency: Concurrency) -> None:
    for name in names:
        most = fleet.pools[name].config.max_concurrency
        if concurrency != "auto" and not 1 <= concurrency <= most:
            raise WrongCommand(
                f"--concurrency {concurrency}: expected 1 to {most} slots in each engine of pool {name}, which is built for "
                f"max_concurrency = {most} (pause holds a run still)"
            )
