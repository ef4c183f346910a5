"""kill -9 of an engine's whole process, dispatcher included, in full flight and again and again: each rollout goes on elsewhere,
having lost at most `flush_tokens` tokens, and ends as if nothing had been.

The process counts each token, in a file that outlives it, at the moment at which its engine samples it.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
import sys
from pathlib import Path

import msgspec
import numpy as np

from asyncrl.buffer import BufferClient
from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.fake_speech import Lengths, Speech
from tests.buffers import admit, buffer_service
from tests.dispatching import STOP, dispatcher, fake, read, until

FLUSH = 16
PROMPTS = 24
STEP_S = 0.005
SLOTS = 1024
"""Of the counting file: one for each rollout id."""

SCRIPT = """
import asyncio, mmap, struct, sys
import msgspec
from asyncrl.buffer import BufferAddress, BufferClient
from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.fake_batch import Stream
from asyncrl.generators.fake_speech import Lengths
from tests.dispatching import dispatcher, fake

address = msgspec.json.decode(sys.stdin.readline(), type=BufferAddress)
with open(sys.argv[1], "r+b") as file:
    counted = mmap.mmap(file.fileno(), 0)
add = Stream.add

def counting(self, *token):
    add(self, *token)
    rollout_id = int(self.request_id.split(".")[0])
    struct.pack_into("<q", counted, 8 * rollout_id, len(self.request.tokens) - 3 + self.request.max_new_tokens - self.left)

async def main():
    Stream.add = counting
    engine = await fake(step_s=float(sys.argv[4]), lengths=Lengths(median_tokens=300, sigma=0.4))
    async with BufferClient(address) as buffer:
        sampling = SamplingConfig(max_new_tokens=400, flush_tokens=int(sys.argv[3]))
        await dispatcher(engine, buffer, sampling=sampling, concurrency=64, engine_id=sys.argv[2]).run()

asyncio.run(main())
"""


def counts(file: mmap.mmap) -> list[int]:
    return list(struct.unpack(f"<{SLOTS}q", file[:]))


async def killed(address: object, path: Path, engine_id: str, after_tokens: int, file: mmap.mmap) -> None:
    """Lets an engine's process sample about so many tokens more, and kills it."""
    root = Path(__file__).parents[2]
    start = sum(counts(file))
    arguments = [str(path), engine_id, str(FLUSH), str(STEP_S)]
    child = await asyncio.create_subprocess_exec(
        *[sys.executable, "-c", SCRIPT, *arguments],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    child.stdin.write(msgspec.json.encode(address) + b"\n")
    try:

        async def enough() -> bool:
            assert child.returncode is None, "it ended by itself"
            return sum(counts(file)) >= start + after_tokens

        await until(enough, 60.0)
    finally:
        child.kill()
        await child.wait()


def test_a_killed_process_costs_each_rollout_flush_tokens_at_most(tmp_path):
    path = tmp_path / "counts"
    path.write_bytes(bytes(8 * SLOTS))

    async def run(service, client, file):
        await admit(service.address, PROMPTS)
        lost = []
        async with BufferClient(service.address) as buffer:
            for turn, tokens in enumerate((700, 1111, 1900)):
                await killed(service.address, path, f"doomed-{turn}", tokens, file)
                assert await buffer.engine_lost(f"doomed-{turn}", for_good=True) == PROMPTS
                # Whoever leases them next sees what the buffer has.
                for lease in await buffer.lease(f"look-{turn}", PROMPTS, 5.0):
                    kept = len(np.frombuffer(lease.tokens, np.int32))
                    lost.append(counts(file)[lease.rollout_id] - kept)
                    struct.pack_into("<q", file, 8 * lease.rollout_id, kept)
                    await buffer.release([(lease.rollout_id, lease.lease_id)])
            engine = await fake(lengths=Lengths(median_tokens=300, sigma=0.4))
            sampling = SamplingConfig(max_new_tokens=400, flush_tokens=FLUSH)
            d = dispatcher(engine, buffer, sampling=sampling, concurrency=64, engine_id="last")
            running = asyncio.create_task(d.run())
            _, rows = await asyncio.to_thread(read, client)
            await d.stop()
            await running
            await engine.shutdown()
        return lost, rows.to_pylist()

    settings = {"prompts_per_step": PROMPTS, "rollouts_per_prompt": 1, "bound": 0}
    with (
        buffer_service(tmp_path, **settings) as (service, client),
        path.open("r+b") as opened,
        mmap.mmap(opened.fileno(), 0) as file,
    ):
        client.publish(0)
        lost, rows = asyncio.run(run(service, client, file))
    assert len(lost) == 3 * PROMPTS
    assert sum(lost) > 0, "no token was on its way when it was killed: the test shows nothing"
    assert max(lost) <= FLUSH, f"of {FLUSH} tokens at most: {sorted(lost)}"
    for row in rows:
        speech = Speech(0, 50_021, Lengths(median_tokens=300, sigma=0.4), STOP, row["prompt_tokens"])
        assert row["tokens"] == [speech.speak()[0] for _ in row["tokens"]]
        assert row["finish_reason"] == ("length" if len(row["tokens"]) == 400 else "stop")
