"""The dispatcher between the fake engine and a real buffer: nothing is lost, whatever ends when."""

import asyncio
import contextlib

import pytest

from asyncrl.buffer import BufferClient
from asyncrl.buffer.columns import slices
from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.dispatcher import Dispatcher
from asyncrl.generators.engine import EngineDead
from asyncrl.generators.fake_engine import FakeEngine, Fault
from asyncrl.generators.reward_pool import RewardFailed, Score
from asyncrl.runtime.engine_part import first_fault
from tests.buffers import buffer_service
from tests.unit.buffer.test_service import admit

SAMPLING = SamplingConfig(max_new_tokens=40, temperature=1.0, flush_tokens=4)
STOP = (0,)


class Scorer:
    """Real scores of a simple rule; fails where it is told to."""

    def __init__(self, fails=()):
        self.fails = set(fails)
        self.asked = 0

    async def score(self, answer_text, payload):
        self.asked += 1
        if self.asked in self.fails:
            raise RewardFailed("scripted")
        return Score(float(len(answer_text)), {})


def dispatcher(engine, buffer, scorer=None, concurrency=4, engine_id="e"):
    return Dispatcher(
        engine=engine,
        engine_id=engine_id,
        buffer=buffer,
        scorer=scorer or Scorer(),
        sampling=SAMPLING,
        concurrency=concurrency,
        stop_token_ids=STOP,
        decode=lambda tokens: " ".join(map(str, tokens)),
    )


async def fake(**settings):
    engine = FakeEngine(vocab_size=32, version=0, **settings)
    await engine.start()
    return engine


async def uninterrupted(prompt):
    """What the fake engine says to a prompt when nobody disturbs it."""
    from asyncrl.generators.engine import GenerationRequest

    engine, tokens = await fake(), []
    request = GenerationRequest(
        request_id="x",
        tokens=prompt,
        max_new_tokens=SAMPLING.max_new_tokens,
        temperature=1.0,
        stop_token_ids=STOP,
    )
    async for chunk in engine.generate(request):
        tokens += chunk.tokens
    await engine.shutdown()
    return tokens


def read(client):
    got = client.read_batch(20.0)
    assert got is not None
    return got


async def until_batch(service, client, dispatchers):
    """Runs dispatchers until the buffer has a batch."""
    async with asyncio.TaskGroup() as group:
        for d in dispatchers:
            group.create_task(d.run())
        batch = await asyncio.to_thread(read, client)
        for d in dispatchers:
            await d.stop()
    return batch


def test_rollouts_are_generated_scored_and_equal_the_engine_s_own(tmp_path):
    async def run(service, client):
        await admit(service.endpoint, 2)
        engine = await fake()
        async with BufferClient(service.endpoint) as buffer:
            _, rows = await until_batch(service, client, [dispatcher(engine, buffer)])
        for prompt, tokens in zip(slices(rows["prompt_tokens"]), slices(rows["tokens"]), strict=True):
            assert tokens.tolist() == await uninterrupted(prompt.tolist())
        assert set(rows["finish_reason"].to_pylist()) <= {"stop", "length"}
        await engine.shutdown()

    with buffer_service(tmp_path / "log") as (service, client):
        client.publish(0)
        asyncio.run(run(service, client))


def test_a_stop_hands_everything_back_and_another_engine_goes_on_to_the_same_answer(tmp_path):
    async def run(service, client):
        await admit(service.endpoint, 2)
        slow, fast = await fake(step_s=0.02), await fake()
        async with BufferClient(service.endpoint) as buffer:
            first = dispatcher(slow, buffer, engine_id="slow")
            running = asyncio.create_task(first.run())
            await asyncio.sleep(0.15)
            await first.stop()
            await asyncio.wait_for(running, 10)
            status = await buffer.status()
            assert status.states["leased"] == 0 and status.counts.live == 4
            _, rows = await until_batch(service, client, [dispatcher(fast, buffer, engine_id="fast")])
        for prompt, tokens in zip(slices(rows["prompt_tokens"]), slices(rows["tokens"]), strict=True):
            assert tokens.tolist() == await uninterrupted(prompt.tolist())
        await slow.shutdown()
        await fast.shutdown()

    with buffer_service(tmp_path / "log") as (service, client):
        client.publish(0)
        asyncio.run(run(service, client))


def test_a_failed_score_is_tried_again_and_then_gives_the_group_up(tmp_path):
    async def run(service, client):
        await admit(service.endpoint, 4)
        engine = await fake()
        async with BufferClient(service.endpoint) as buffer:
            # The first answer fails twice in a row only if nothing else is scored between: one slot.
            d = dispatcher(engine, buffer, Scorer(fails={1, 2}), concurrency=1)
            await until_batch(service, client, [d])
            counts = (await buffer.status()).counts
        assert counts.holds
        assert counts.failed == {"reward: scripted": 1}
        assert counts.dropped == {"a rollout of its group failed": 1}
        await engine.shutdown()

    with buffer_service(tmp_path / "log", max_attempts=2) as (service, client):
        client.publish(0)
        asyncio.run(run(service, client))


def test_a_dead_engine_ends_the_dispatcher_with_its_error(tmp_path):
    async def run(service):
        await admit(service.endpoint, 2)
        engine = await fake(faults=[Fault(kind="die", where="token", at=20)])
        async with BufferClient(service.endpoint) as buffer:
            with pytest.raises(ExceptionGroup) as caught:
                await asyncio.wait_for(dispatcher(engine, buffer).run(), 20)
        assert isinstance(first_fault(caught.value), EngineDead)
        with contextlib.suppress(EngineDead):
            await engine.shutdown()

    with buffer_service(tmp_path / "log") as (service, client):
        client.publish(0)
        asyncio.run(run(service))
        counts = client.status().counts
        assert counts.holds and counts.live == 4


def test_concurrency_is_the_bound_on_slots(tmp_path):
    async def run(service, client):
        await admit(service.endpoint, 4)
        engine = await fake(step_s=0.001)
        most = 0
        async with BufferClient(service.endpoint) as buffer:
            d = dispatcher(engine, buffer, concurrency=3)

            async def watch():
                nonlocal most
                while True:
                    most = max(most, engine.stats().running)
                    await asyncio.sleep(0.001)

            watching = asyncio.create_task(watch())
            await until_batch(service, client, [d])
            watching.cancel()
        assert most == 3
        await engine.shutdown()

    with buffer_service(tmp_path / "log") as (service, client):
        client.publish(0)
        asyncio.run(run(service, client))
