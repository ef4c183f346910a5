"""Greedy baselines between the dispatcher, the fake engine and a real buffer; costs on their way there."""

import asyncio

import pytest

from asyncrl.buffer import BufferClient
from asyncrl.buffer.columns import slices
from asyncrl.buffer.reading import read_log, rollouts_table
from asyncrl.generators import dispatcher as dispatching
from asyncrl.generators.engine import GenerationRequest
from asyncrl.generators.score import CostMissing, Score
from tests.buffers import admit, buffer_service
from tests.dispatching import SAMPLING, STOP, Scorer, dispatcher, fake, read, until

SEEDS = (5, 6)


class Costly(Scorer):
    """A cost of each answer beside its score."""

    async def score(self, answer_text, payload):
        words = len(answer_text.split())
        return Score(float(words), words / 4, {})


class Free(Scorer):
    async def score(self, answer_text, payload):
        raise CostMissing("scripted")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(dispatching, "_LEASE_WAIT_S", 0.3)


async def spoken(prompt, temperature, seed=0):
    """What the fake engine says to a prompt when nobody disturbs it."""
    engine, tokens = await fake(seed=seed), []
    request = GenerationRequest(
        request_id="x",
        tokens=prompt,
        max_new_tokens=SAMPLING.max_new_tokens,
        temperature=temperature,
        stop_token_ids=STOP,
    )
    async for chunk in engine.generate(request):
        tokens += chunk.tokens
    await engine.shutdown()
    return tokens


def answers(rows):
    """(prompt, greedy, answer) of each row."""
    columns = (slices(rows["prompt_tokens"]), rows["greedy"].to_pylist(), slices(rows["tokens"]))
    return [(p.tolist(), g, t.tolist()) for p, g, t in zip(*columns, strict=True)]


def test_each_group_has_its_baseline_and_costs_travel_with_the_scores(tmp_path):
    async def run(service, client):
        await admit(service.address, 2)
        engine = await fake()
        async with BufferClient(service.address) as buffer, asyncio.TaskGroup() as group:
            one = dispatcher(engine, buffer, Costly())
            group.create_task(one.run())
            _, rows = await asyncio.to_thread(read, client)
            await one.stop()
        assert rows["greedy"].to_pylist() == [True, False, False] * 2
        for prompt, greedy, answer in answers(rows):
            assert answer == await spoken(prompt, 0.0 if greedy else 1.0)
            assert (await spoken(prompt, 0.0)) != (await spoken(prompt, 1.0))
        assert rows["cost"].to_pylist() == [reward / 4 for reward in rows["reward"].to_pylist()]
        assert min(rows["cost"].to_pylist()) > 0
        for greedy, trainable in zip(rows["greedy"].to_pylist(), slices(rows["trainable"]), strict=True):
            assert all(trainable) != greedy and any(trainable) != greedy
        await engine.shutdown()

    with buffer_service(tmp_path, greedy_baseline=True) as (service, client):
        client.publish(0)
        asyncio.run(run(service, client))


def test_a_partial_baseline_goes_on_greedily_on_another_engine(tmp_path):
    """The engines' seeds differ, so that only what is greedy comes out as if nobody had interrupted it."""

    async def run(service, client):
        await admit(service.address, 2)
        slow, fast = await fake(step_s=0.02, seed=SEEDS[0]), await fake(seed=SEEDS[1])
        async with BufferClient(service.address) as buffer:
            first = dispatcher(slow, buffer, engine_id="slow")
            running = asyncio.create_task(first.run())

            async def has_begun():
                return slow.stats().generated_tokens >= 12

            await until(has_begun)
            await first.stop()
            async with asyncio.timeout(10):
                await running
            async with asyncio.TaskGroup() as group:
                second = dispatcher(fast, buffer, engine_id="fast")
                group.create_task(second.run())
                _, rows = await asyncio.to_thread(read, client)
                await second.stop()
        found = answers(rows)
        for prompt, greedy, answer in found:
            if greedy:
                assert answer == await spoken(prompt, 0.0)
        table = rollouts_table(read_log(service.log().parent)).to_pylist()
        assert [row["engines"] for row in table if row["greedy"]] == [["slow", "fast"]] * 2
        for engine in (slow, fast):
            await engine.shutdown()

    with buffer_service(tmp_path, greedy_baseline=True) as (service, client):
        client.publish(0)
        asyncio.run(run(service, client))


def test_an_objective_that_limits_costs_ends_where_nobody_gives_any(tmp_path):
    async def run(service):
        await admit(service.address, 1)
        engine = await fake()
        async with BufferClient(service.address) as buffer:
            with pytest.raises(BaseExceptionGroup) as caught:
                async with asyncio.timeout(10):
                    await dispatcher(engine, buffer, Free()).run()
            assert caught.group_contains(CostMissing, match="scripted")
        await engine.shutdown()

    with buffer_service(tmp_path) as (service, client):
        client.publish(0)
        asyncio.run(run(service))
