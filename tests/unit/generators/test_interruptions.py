"""A rollout may be interrupted at any token, by anything, any number of times: joined, it is what it would have been."""

import asyncio

import numpy as np
import pytest

from asyncrl.buffer import BufferClient
from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.engine import EngineDead, GenerationRequest
from asyncrl.generators.fake_speech import Lengths
from tests.buffers import admit, buffer_service
from tests.dispatching import STOP, dispatcher, fake, until
from tests.interrupting import Interrupting

ANSWER = 24
PROMPT = 3
ANCHOR = (1, 2, 3)
"""The prompt that comes first: its rollout waits, as the oldest, until all others are through."""


async def uninterrupted(prompt, limit, tokens=ANSWER):
    engine, got = await fake(lengths=Lengths(median_tokens=tokens)), ([], [])
    request = GenerationRequest(
        request_id="x", tokens=prompt, max_new_tokens=limit, temperature=1.0, stop_token_ids=STOP
    )
    async for chunk in engine.generate(request):
        got[0].extend(chunk.tokens)
        got[1].extend(chunk.logprobs)
    await engine.shutdown()
    return got


class Scene:
    """One engine after the other works on the same buffer, until there is a batch."""

    def __init__(self, buffer, kind, positions, limit):
        self.buffer, self.kind, self.positions = buffer, kind, positions
        self.sampling = SamplingConfig(max_new_tokens=limit, flush_tokens=4)
        self.engines = []
        self.released = asyncio.Event()
        self._turn = 0

    async def interrupt(self):
        d, kind = self.dispatcher, self.kind
        if kind == "pause":
            await d.set_concurrency(0)
            assert d.slots_used == 0
            await d.set_concurrency(1)
        elif kind == "scale-down":
            await d.set_concurrency(1)
            assert d.slots_used == 1
            await d.set_concurrency(2)
        elif kind == "drain":
            await d.stop()
        else:
            return EngineDead("scripted")
        return None

    async def run_engine(self, tokens):
        engine = await fake(version=self._turn % 2, lengths=Lengths(median_tokens=tokens))
        self._turn += 1
        wrapped = Interrupting(engine, PROMPT, self.positions, self.interrupt)
        self.engines.append(wrapped)
        self.dispatcher = dispatcher(
            Anchored(wrapped, self.released) if self.kind == "scale-down" else wrapped,
            self.buffer,
            engine_id=f"e{self._turn}",
            sampling=self.sampling,
            concurrency=2 if self.kind == "scale-down" else 1,
        )
        try:
            await self.dispatcher.run()
        except EngineDead as error:
            assert self.kind == "death" and str(error) == "scripted"
        await engine.shutdown()

    @property
    def interrupted(self):
        return [hit for engine in self.engines for hit in engine.interrupted]


class Anchored:
    """Holds the rollout of `ANCHOR` back, so that every other one is the newest."""

    def __init__(self, engine, released):
        self._engine, self._released = engine, released

    async def generate(self, request):
        if tuple(request.tokens[:PROMPT]) == ANCHOR:
            await self._released.wait()
        async for chunk in self._engine.generate(request):
            yield chunk

    def __getattr__(self, name):
        return getattr(self._engine, name)


def play(tmp_path, kind, positions, limit, tokens=ANSWER):
    """Runs the rollouts of `positions`, interrupted there; returns the rows and the scene."""
    prompts = len(positions)
    hits = sum(map(len, positions.values()))

    async def run(service, client):
        await admit(service.address, prompts)
        async with BufferClient(service.address) as buffer:
            scene = Scene(buffer, kind, positions, limit)

            async def engines():
                while True:
                    await scene.run_engine(tokens)

            running = asyncio.create_task(engines())

            async def only_anchor():
                states = (await buffer.status()).states
                return states["queued"] == 0 and states["leased"] <= 1

            async def release():
                await until(only_anchor, 60.0)
                scene.released.set()

            releasing = asyncio.create_task(release())
            async with asyncio.timeout(60):
                reading = asyncio.ensure_future(asyncio.to_thread(client.read_batch, 30.0))
                await asyncio.wait({reading, running}, return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    running.result()
                _, rows = await reading
                await releasing
            report = await buffer.status()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert report.counts.holds and not report.counts.failed
            assert len(scene.interrupted) == hits
            return rows.to_pylist(), scene

    settings = {"prompts_per_step": prompts, "rollouts_per_prompt": 1, "bound": 0}
    with buffer_service(tmp_path, **settings) as (service, client):
        client.publish(0)
        return asyncio.run(run(service, client))


def prompts_of(count):
    return [(1, 2, 3 + i) for i in range(count)]


def check(rows, limit, tokens=ANSWER):
    for row in rows:
        expected, logprobs = asyncio.run(uninterrupted(row["prompt_tokens"], limit, tokens))
        assert row["tokens"] == expected
        assert np.array_equal(np.float32(row["logprobs"]), np.float32(logprobs))
        assert row["finish_reason"] == ("length" if limit < tokens else "stop")


@pytest.mark.parametrize("limit", [ANSWER, ANSWER - 1])
@pytest.mark.parametrize("kind", ["pause", "scale-down", "drain", "death"])
def test_interrupted_at_every_position_it_is_the_uninterrupted_rollout(tmp_path, kind, limit):
    prompts = prompts_of(limit + 1)
    positions = {prompt: [place] for place, prompt in enumerate(prompts[1:])}
    rows, scene = play(tmp_path, kind, {ANCHOR: []} | positions, limit)
    assert {place for _, place in scene.interrupted} == set(range(limit))
    check(rows, limit)


@pytest.mark.parametrize("kind", ["pause", "drain", "death"])
def test_versions_are_those_of_the_engines_that_sampled(tmp_path, kind):
    positions = {prompt: [5 + i, 11 + i] for i, prompt in enumerate(prompts_of(3))}
    rows, scene = play(tmp_path, kind, positions, ANSWER)
    seen = set()
    for row in rows:
        cuts = [place for prompt, place in scene.interrupted if list(prompt) == row["prompt_tokens"]]
        runs = [set(part.tolist()) for part in np.split(np.array(row["versions"]), cuts)]
        assert all(len(run) == 1 for run in runs)  # each run is of one engine, and so of one version
        seen |= set.union(*runs)
    assert seen == ({0} if kind == "pause" else {0, 1})
    check(rows, ANSWER)


@pytest.mark.parametrize("kind", ["pause", "scale-down", "drain", "death"])
def test_nothing_is_truncated_because_it_was_interrupted_often(tmp_path, kind):
    often = list(range(2, 152, 3))
    assert len(often) == 50
    prompts = prompts_of(4)
    positions = {prompts[0]: [], prompts[1]: often, prompts[2]: [7, 90], prompts[3]: [1, 1, 1]}
    rows, _ = play(tmp_path, kind, positions, limit=400, tokens=160)
    check(rows, 400, 160)
