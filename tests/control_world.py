"""A run that obeys commands and does nothing else, behind a real control socket: in a thread, or as a process of its own.

As a process: `python -m tests.control_world FOLDER [SECONDS]` serves until it is killed, gets SIGTERM, or the time is up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import threading
import time
from pathlib import Path

from asyncrl.buffer.keys import make_keys
from asyncrl.runtime.control import CommandRefused, RunStatus, check_scale, pools_meant
from asyncrl.runtime.control_server import ControlServer
from asyncrl.runtime.facts import BufferFacts, EngineFacts, HeldOut, PoolFacts, Snapshot
from asyncrl.runtime.run_folder import RunFolder
from asyncrl.runtime.summary import RunIdentity, summarise, write_summary

STARTED = 1_760_000_000.0


class ObedientRun:
    """`Commands` over a few numbers. `delays_s` and `raises` are by command."""

    def __init__(self, name="sums", pools=("big", "small")):
        self.name = name
        self.slots = dict.fromkeys(pools, 8)
        self.engines = dict.fromkeys(pools, 1)
        self.drained = set()
        self.state = "running"
        self.step = 3
        self.done = []
        """Commands in the order in which they were carried out."""
        self.began = []
        self.delays_s = {}
        self.raises = {}
        self.stopped = asyncio.Event()

    async def _does(self, command, *arguments):
        self.began.append((command, *arguments))
        await asyncio.sleep(self.delays_s.get(command, 0.0))
        if command in self.raises:
            raise self.raises[command]
        if command != "status":
            self.done.append((command, *arguments))

    async def status(self):
        await self._does("status")
        return RunStatus(
            name=self.name,
            started_at=STARTED,
            who_waits="learner waits for rollouts 41 %: generation is the bottleneck",
            snapshot=Snapshot(
                held_out=HeldOut(wanted=True, step=0, accuracy=0.5, standard_error=0.1),
                seconds=148.0,
                phase="training",
                step=self.step,
                steps=60,
                version=3,
                engines=[self._engine(pool, i) for pool, n in self.engines.items() for i in range(n)],
                buffer=BufferFacts(queued=5, leased=7, memory_bytes=2**30),
                state=self.state,
                pools=[
                    PoolFacts(
                        name=pool,
                        state="serving",
                        engines_wanted=count,
                        engines_serving=count,
                        concurrency=self.slots[pool],
                    )
                    for pool, count in self.engines.items()
                ],
                learner_state="training",
                learner_tokens_per_s=4200.0,
                engine_tokens_per_s=2300.0,
            ),
        )

    def _engine(self, pool, index):
        return EngineFacts(
            engine_id=f"{pool}-{index}",
            pool=pool,
            state="serving",
            version=3,
            slots_used=4,
            slots=8,
            tokens_per_s=1150.0,
            kv_used_fraction=0.5,
        )

    async def scale(self, pool, concurrency, engines):
        meant = check_scale(list(self.slots), pool, concurrency, engines)
        await self._does("scale", pool, concurrency, engines)
        for name in meant:
            self.slots[name] = self.slots[name] if concurrency is None else concurrency
            self.engines[name] = self.engines[name] if engines is None else engines
        return f"{', '.join(meant)}: {concurrency} slots per engine, {engines} engines"

    async def pause(self):
        await self._does("pause")
        self.state = "paused"
        return "engines hand back what they have and hold still"

    async def go_on(self):
        await self._does("continue")
        if self.state == "running":
            raise CommandRefused("the run is not paused and no pool is drained")
        self.state = "running"
        return "engines take rollouts again"

    async def drain(self, pool):
        pools_meant(list(self.slots), pool)
        await self._does("drain", pool)
        self.drained.add(pool)
        return f"{pool or 'the run'} finishes what it has"

    async def stop(self):
        await self._does("stop")
        self.state = "stopping"
        self.stopped.set()
        return "the run ends in order"


def run_folder(path, *, summary=""):
    """A folder that `find_run` takes for a run's, with keys; with `summary` one that has ended so."""
    folder = RunFolder(Path(path))
    folder.path.mkdir(parents=True)
    folder.recipe.write_text(json.dumps({"run": {"name": folder.path.name}}))
    make_keys(folder.keys)
    if summary:
        end(folder, summary)
    return folder


def end(folder, outcome):
    """Writes the summary of a run that came to `outcome`."""
    identity = RunIdentity(
        name=folder.path.name, model="m", folder=str(folder.path), steps=60, max_staleness_versions=1
    )
    summary = summarise(identity, [], outcome=outcome, phase_seconds={}, packages={})
    write_summary(summary, folder.summary)


class Serving:
    """A control server on an event loop in a thread of its own."""

    def __init__(self, folder, run, **options):
        self.folder, self.run = folder, run
        self.gap_s = 0.0
        """The longest time for which the loop had no turn."""
        self.error = None
        self._options = options
        self._bound = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="control")

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        server_keys, self.keys = make_keys(self.folder.keys)
        server = ControlServer(self.run, server_keys, self.folder.control, **self._options)
        self.endpoint = server.endpoint
        self._task = asyncio.create_task(server.run())
        ticking = asyncio.create_task(self._tick())
        await asyncio.sleep(0)
        self._bound.set()
        try:
            await self._task
        except asyncio.CancelledError:
            pass
        except (RuntimeError, TimeoutError) as error:
            self.error = error
        ticking.cancel()

    async def _tick(self):
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            self.gap_s = max(self.gap_s, time.monotonic() - before)

    def end(self):
        """As the supervisor does; returns when the server has ended."""
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def __enter__(self):
        self._thread.start()
        assert self._bound.wait(10)
        return self

    def __exit__(self, *_):
        self.end()


async def _process(folder, seconds):
    run = ObedientRun(folder.path.name)
    server_keys, _ = make_keys(folder.keys)
    server = asyncio.create_task(ControlServer(run, server_keys, folder.control).run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, run.stopped.set)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await run.stopped.wait()
    run.state = "stopping"
    await asyncio.sleep(0.5)
    server.cancel()
    await asyncio.gather(server, return_exceptions=True)
    end(folder, "stopped")


if __name__ == "__main__":
    asyncio.run(_process(RunFolder(Path(sys.argv[1])), float((*sys.argv, "60")[2])))
