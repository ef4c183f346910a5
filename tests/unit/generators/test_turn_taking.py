"""Rollouts of several turns: the environment speaks between them, holds no slot, and may be asked again by any engine."""

import asyncio
import contextlib

import numpy as np
import pytest

from asyncrl.buffer import BufferClient
from asyncrl.buffer.schema import ENVIRONMENT
from asyncrl.generators import dispatcher as dispatching
from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.engine import EngineDead, GenerationRequest
from asyncrl.generators.fake_speech import Lengths
from asyncrl.generators.turns import EnvironmentFailed
from tests.buffers import admit, buffer_service
from tests.dispatching import STOP, dispatcher, fake, read, until
from tests.interrupting import Interrupting

LONG = SamplingConfig(max_new_tokens=200, flush_tokens=4)
LENGTHS = Lengths(median_tokens=9, sigma=0.3)
PROMPT = 3


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(dispatching, "_LEASE_WAIT_S", 0.3)


class Echo:
    """Answers the first turns with a few tokens that depend on all so far, and ends the rollout after `turns`."""

    def __init__(self, turns=3):
        self.turns = turns
        self.asked = []
        self.open = asyncio.Event()
        self.open.set()

    async def next_turn(self, prompt_tokens, answer_tokens, versions, payload):
        assert len(answer_tokens) == len(versions) and answer_tokens[-1] in STOP and versions[-1] >= 0
        self.asked.append((tuple(prompt_tokens), len(answer_tokens)))
        await self.open.wait()
        if answer_tokens.count(STOP[0]) >= self.turns:
            return None
        return [7000 + sum(answer_tokens) % 1000, 7, 8]


async def uninterrupted(prompt, env, limit=200):
    """(tokens, logprobs, whether each was sampled, finish reason)"""
    engine, tokens, logprobs, sampled, finish = await fake(lengths=LENGTHS), [], [], [], ""
    while not finish:
        request = GenerationRequest(
            request_id="x",
            tokens=prompt + tokens,
            max_new_tokens=limit - len(tokens),
            temperature=1.0,
            stop_token_ids=STOP,
        )
        async for chunk in engine.generate(request):
            tokens += chunk.tokens
            logprobs += chunk.logprobs
            sampled += [True] * len(chunk.tokens)
        if chunk.finish_reason == "length":
            finish = "length"
            break
        reply = await env.next_turn(prompt, tokens, [0] * len(tokens), "")
        if reply is None:
            finish = "stop"
        elif len(reply) >= limit - len(tokens):
            finish = "length"
        else:
            tokens += reply
            logprobs += [0.0] * len(reply)
            sampled += [False] * len(reply)
    await engine.shutdown()
    return tokens, logprobs, sampled, finish


def check(rows, env, limit=200):
    for row in rows:
        tokens, logprobs, sampled, finish = asyncio.run(uninterrupted(row["prompt_tokens"], env, limit))
        assert row["tokens"] == tokens and row["finish_reason"] == finish
        assert np.array_equal(np.float32(row["logprobs"]), np.float32(logprobs))
        assert [version != ENVIRONMENT for version in row["versions"]] == sampled
        assert not any(t for t, s in zip(row["trainable"], sampled, strict=True) if not s)


@contextlib.asynccontextmanager
async def running(address, engine, env, **settings):
    async with BufferClient(address) as buffer:
        d = dispatcher(engine, buffer, turns=env, **({"sampling": LONG} | settings))
        task = asyncio.create_task(d.run())
        try:
            yield d, buffer
            await d.stop()
            async with asyncio.timeout(20):
                await task
        finally:
            task.cancel()
            await asyncio.wait({task})


def on_buffer(tmp_path, scenario, **settings):
    with buffer_service(tmp_path, **({"bound": 0} | settings)) as (service, client):
        client.publish(0)
        return asyncio.run(scenario(service, client))


@pytest.mark.parametrize("limit", [200, 31, 24])
def test_turns_follow_one_another_until_the_environment_ends_it(tmp_path, limit):
    async def scenario(service, client):
        engine = await fake(lengths=LENGTHS)
        await admit(service.address, 2)
        sampling = SamplingConfig(max_new_tokens=limit, flush_tokens=4)
        async with running(service.address, engine, Echo(), sampling=sampling):
            _, rows = await asyncio.to_thread(read, client)
        await engine.shutdown()
        return rows.to_pylist()

    rows = on_buffer(tmp_path, scenario)
    check(rows, Echo(), limit)
    assert any(ENVIRONMENT in row["versions"] for row in rows)


def test_while_the_environment_works_another_rollout_has_the_slot(tmp_path):
    async def scenario(service, client):
        engine, env = await fake(lengths=LENGTHS), Echo(turns=2)
        env.open.clear()
        await admit(service.address, 2)
        async with running(service.address, engine, env, concurrency=1) as (d, _):

            async def all_asked():
                return len(env.asked) == 4 and d.slots_used == 0

            await until(all_asked)
            env.open.set()
            _, rows = await asyncio.to_thread(read, client)
        await engine.shutdown()
        return rows.to_pylist()

    check(on_buffer(tmp_path, scenario), Echo(turns=2))


def test_who_comes_back_from_the_environment_is_served_before_new_leases(tmp_path):
    async def scenario(service, client):
        engine, env = await fake(lengths=Lengths(median_tokens=60), step_s=0.002), Echo(turns=2)
        await admit(service.address, 4)
        async with running(service.address, engine, env, concurrency=1):
            await asyncio.to_thread(read, client)
        await engine.shutdown()
        # Two rollouts at most are under way: one at the environment, and the one that took its slot meanwhile.
        begun, done = [], 0
        for prompt_and_length in env.asked:
            begun.append(prompt_and_length)
            done += prompt_and_length[1] > 100
            assert len(begun) - 2 * done <= 3

    on_buffer(tmp_path, scenario, prompts_per_step=4)


def test_a_reason_of_the_environment_s_failure_ends_the_rollout_with_it(tmp_path):
    class Broken(Echo):
        async def next_turn(self, prompt_tokens, answer_tokens, versions, payload):
            if prompt_tokens[-1] == 3:
                raise EnvironmentFailed("'broken' on prompt 'p0': scripted")
            return await super().next_turn(prompt_tokens, answer_tokens, versions, payload)

    async def scenario(service, client):
        engine = await fake(lengths=LENGTHS)
        await admit(service.address, 4)
        async with running(service.address, engine, Broken()) as (_, buffer):
            await asyncio.to_thread(read, client)
            counts = (await buffer.status()).counts
        await engine.shutdown()
        assert counts.holds and counts.failed == {"environment: 'broken' on prompt 'p0': scripted": 1}

    on_buffer(tmp_path, scenario, max_attempts=1, rollouts_per_prompt=1, bound=1)


@pytest.mark.parametrize("limit", [0, 1])
def test_a_rollout_at_the_environment_goes_back_on_a_pause_and_stays_on_a_lower_limit(tmp_path, limit):
    async def scenario(service, client):
        engine, env = await fake(lengths=LENGTHS), Echo()
        env.open.clear()
        await admit(service.address, 2)
        async with running(service.address, engine, env, concurrency=4) as (d, buffer):

            async def all_asked():
                return len(env.asked) == 4

            async def held_as_allowed():
                return (await buffer.status()).states["leased"] == (4 if limit else 0)

            await until(all_asked)
            async with asyncio.timeout(1.5):
                await d.set_concurrency(limit)
            # A lease that was asked for before the pause may be answered with what just went back: it is released again.
            await until(held_as_allowed)
            env.open.set()
            await d.set_concurrency(4)
            _, rows = await asyncio.to_thread(read, client)
        await engine.shutdown()
        # Those that went back were asked about a second time, with the same tokens.
        assert len(env.asked) == 4 * 3 + (0 if limit else 4)
        return rows.to_pylist()

    check(on_buffer(tmp_path, scenario), Echo())


@pytest.mark.parametrize("kind", ["pause", "drain", "death"])
def test_interrupted_at_any_token_of_any_turn_it_is_the_same_rollout(tmp_path, kind):
    prompts = [(1, 2, 3 + i) for i in range(12)]
    whole = [asyncio.run(uninterrupted(list(prompt), Echo())) for prompt in prompts]
    positions = {}
    for index, (prompt, (tokens, _, sampled, _)) in enumerate(zip(prompts, whole, strict=True)):
        # Before and after stop tokens and replies, and in the middle of turns; a reply is never half there.
        places = [at for at in range(1, len(tokens)) if sampled[at]]
        positions[prompt] = places[index % 3 :: 3]

    async def scenario(service, client):
        await admit(service.address, len(prompts))
        current = {}

        async def interrupt():
            if kind == "pause":
                await current["d"].set_concurrency(0)
                await current["d"].set_concurrency(2)
            elif kind == "drain":
                await current["d"].stop()
            else:
                return EngineDead("scripted")

        async def engines(buffer):
            # Ends when it is cancelled: the batch is there.
            for turn in range(10_000):
                engine = await fake(lengths=LENGTHS)
                wrapped = Interrupting(engine, PROMPT, positions, interrupt)
                current["d"] = dispatcher(
                    wrapped, buffer, turns=Echo(), sampling=LONG, engine_id=f"e{turn}", concurrency=2
                )
                with contextlib.suppress(EngineDead):
                    await current["d"].run()
                await engine.shutdown()

        async with BufferClient(service.address) as buffer, asyncio.timeout(100):
            task = asyncio.create_task(engines(buffer))
            reading = asyncio.ensure_future(asyncio.to_thread(client.read_batch, 90.0))
            await asyncio.wait({task, reading}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            _, rows = await reading
            task.cancel()
            await asyncio.wait({task})
            return rows.to_pylist()

    rows = on_buffer(tmp_path, scenario, prompts_per_step=len(prompts), rollouts_per_prompt=1)
    check(rows, Echo())
    assert not any(positions.values())
