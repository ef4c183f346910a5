"""A fake engine with its receiver as a process of its own: `python engine_process.py ENDPOINT ENGINE_ID [FAULTS]`.

Prints one line for each version it runs, `WHERE ERROR` when the receiver ends with an error; ends by signal.
`FAULTS` is JSON: a list of `Fault`. Started by the tests of weight sync.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

import msgspec

from asyncrl.generators.fake_engine import FakeEngine, Fault
from asyncrl.weight_sync.receiver import Receiver


async def main(endpoint: str, engine_id: str, faults: str = "[]") -> None:
    engine = FakeEngine(faults=msgspec.json.decode(faults, type=list[Fault]))
    await engine.start()
    receiver = Receiver(engine, endpoint, engine_id)
    receiving = asyncio.create_task(receiver.run())
    print("up", flush=True)
    version = 0
    # Waits for: versions. Ends: with the receiver, or after a minute without one (the test is gone).
    while not receiving.done():
        waiting = asyncio.create_task(receiver.wait_for_version(version, timeout_s=60))
        await asyncio.wait({waiting, receiving}, return_when=asyncio.FIRST_COMPLETED)
        if receiving.done():
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, RuntimeError):
                await waiting
            break
        await waiting
        print(f"version {receiver.version} probe {await engine.probe([1, 2, 3])}", flush=True)
        version = receiver.version + 1
    print(f"ended {receiving.exception()!r}", flush=True)
    await engine.shutdown()


if __name__ == "__main__":
    assert "torch" not in sys.modules, "an engine that only receives must not load torch"
    asyncio.run(main(*sys.argv[1:]))
