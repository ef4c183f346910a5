"""Fake engines with their receivers, in an event loop of a thread of their own. Used by the tests of weight sync."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from asyncrl.generators.fake_engine import FakeEngine, Fault
from asyncrl.weight_sync.receiver import Receiver
from asyncrl.weight_sync.sockets import Secure

CALL_S = 30.0


class Engines:
    """One publisher's engines, by name. A second engine of a name stands beside the first until that is ended."""

    def __init__(self, endpoint: str, secure: Secure | None = None, **faults: list[Fault]) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.engines: dict[str, FakeEngine] = {}
        self.receivers: dict[str, Receiver] = {}
        self.receiving: dict[str, asyncio.Task[None]] = {}
        self.make: Callable[..., FakeEngine] = FakeEngine
        """Of the engines that are started from now on."""
        self._endpoint = endpoint
        self._secure = secure
        self._all: list[tuple[FakeEngine, asyncio.Task[None]]] = []
        for name, script in faults.items():
            self.start(name, script)

    def do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=CALL_S)

    def start(self, name: str, faults: Sequence[Fault] = ()) -> asyncio.Task[None]:
        """Returns the task of its receiver."""
        return self.do(self._start(name, faults))

    async def _start(self, name: str, faults: Sequence[Fault]) -> asyncio.Task[None]:
        engine = self.engines[name] = self.make(faults=faults)
        await engine.start()
        receiver = self.receivers[name] = Receiver(engine, self._endpoint, name, secure=self._secure)
        self.receiving[name] = asyncio.create_task(receiver.run())
        self._all.append((engine, self.receiving[name]))
        return self.receiving[name]

    async def end(self, receiving: asyncio.Task[None]) -> None:
        receiving.cancel()
        await asyncio.wait({receiving}, timeout=10)

    async def leave(self, name: str) -> None:
        await self.end(self.receiving[name])

    def ended(self, name: str) -> BaseException | None:
        """What its receiver ended with by itself."""

        async def wait() -> BaseException | None:
            await asyncio.wait({self.receiving[name]}, timeout=10)
            return self.receiving[name].exception()

        return self.do(wait())

    async def wait_for(self, version: int, timeout_s: float) -> None:
        """All of them run `version` or a later one."""
        await asyncio.gather(*(r.wait_for_version(version, timeout_s) for r in self.receivers.values()))

    def wait_for_fault(self, name: str) -> None:
        """Waits for its script's faults to have happened, which its publisher brings about."""
        deadline = time.monotonic() + CALL_S
        while self.engines[name]._faults and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not self.engines[name]._faults

    def close(self) -> None:
        for engine, receiving in self._all:
            self.do(self.end(receiving))
            self.do(engine.shutdown())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(timeout=10)
        self.loop.close()
