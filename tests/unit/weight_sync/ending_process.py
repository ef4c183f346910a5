"""One side of the `collective` transport as a process of its own, which does what it reads line by line from stdin, answers each
with a line, and ends in order, at once, at the end of that.

    python ending_process.py learner                    `send V`, `half V`, `rest`: prints its endpoint first
    python ending_process.py engine ENDPOINT ENGINE_ID  prints `version V` for each that it runs
    python ending_process.py meeting                    a group that one member never comes to

Started by `test_process_ends.py`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable

import torch
from senders import tensors_of

from asyncrl.generators.fake_engine import FakeEngine
from asyncrl.weight_sync.collective_publisher import CollectivePublisher
from asyncrl.weight_sync.collective_sender import CollectiveSender
from asyncrl.weight_sync.collective_words import Stream
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import SyncAborted
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import Bucket, make_plan
from asyncrl.weight_sync.process_group import connect_store
from asyncrl.weight_sync.receiver import Receiver

PLAN = make_plan([(f"layer.{i}", "bfloat16", (512, 4096)) for i in range(12)], 2**22)
TIMEOUT_S = 30.0
"""Of what the group itself waits for."""
DEADLINE_S = 3.0
"""Of a version."""


def say(line: str) -> None:
    print(line, flush=True)


def learner() -> None:
    with CollectivePublisher(WeightSyncConfig(timeout_s=TIMEOUT_S), PLAN) as publisher:
        say(publisher.endpoint)
        names = set(sys.stdin.readline().split())
        publisher.wait_for_engines(names, 60)
        publisher._drafts.timeout_s = DEADLINE_S
        version, half = -1, len(PLAN.buckets) // 2
        for line in sys.stdin:
            what, _, number = line.strip().partition(" ")
            if what != "rest":
                version = int(number)
                publisher.begin(version)
            if what != "rest":
                _write(publisher, version, PLAN.buckets[:half])
            if what != "half":
                _write(publisher, version, PLAN.buckets[half:])
                try:
                    say(f"committed {len(publisher.commit().engines)}")
                except SyncAborted:
                    say("aborted")
            else:
                say("half")


def _write(publisher: CollectivePublisher, version: int, buckets: Iterable[Bucket]) -> None:
    tensors = tensors_of(PLAN, version)
    for bucket in buckets:
        publisher.write(bucket, cut(PLAN, bucket, tensors))


async def engine(endpoint: str, engine_id: str) -> None:
    fake = FakeEngine()
    await fake.start()
    receiver = Receiver(fake, endpoint, engine_id)
    receiving = asyncio.create_task(receiver.run())
    reading = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    version = 0
    # Waits for: versions. Unblocked by: the learner. Ends: with stdin.
    while not reading.done():
        waiting = asyncio.create_task(receiver.wait_for_version(version, timeout_s=60))
        await asyncio.wait({waiting, reading}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            say(f"version {receiver.version}")
            version = receiver.version + 1
        waiting.cancel()
    receiving.cancel()
    await asyncio.wait({receiving}, timeout=10)
    await fake.shutdown()


def meeting() -> None:
    """Says how long the sender took to give up a group that is not made, and ends with its thread in torch's code."""
    sender = CollectiveSender(PLAN, 0, "127.0.0.1", torch.device("cpu"), DEADLINE_S)
    sender.begin(Stream(name="group", version=0, size=2, made=False, timeout_s=DEADLINE_S))
    connect_store(sender.address).set("group/here/1", "1")
    started = time.monotonic()

    def look() -> None:
        sender.called_off()
        if time.monotonic() > started + 0.5:
            raise TimeoutError

    try:
        sender.drain(look)
    except TimeoutError:
        say(f"{time.monotonic() - started:.2f}")
    sender.close()


if __name__ == "__main__":
    if sys.argv[1] == "engine":
        asyncio.run(engine(*sys.argv[2:]))
    else:
        {"learner": learner, "meeting": meeting}[sys.argv[1]]()
