"""The dispatcher between the fake engine and a real buffer: nothing is lost, whatever ends when."""

import asyncio

import pytest

from asyncrl.buffer import BufferClient
from asyncrl.buffer.columns import slices
from asyncrl.generators import dispatcher as dispatching
from asyncrl.generators.engine import GenerationRequest
from asyncrl.generators.score import RewardFailed
from tests.buffers import admit, buffer_service
from tests.dispatching import SAMPLING, STOP, Scorer, dispatcher, fake, read


class Poisoned(Scorer):
    """Cannot score the first answer that it saw, however often it comes."""

    bad = None

    async def score(self, answer_text, payload):
        self.bad = self.bad or answer_text
        if answer_text == self.bad:
            raise RewardFailed("scripted")
        return await super().score(answer_text, payload)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """A stop comes after the last wait for work."""
    monkeypatch.setattr(dispatching, "_LEASE_WAIT_S", 0.3)


async def uninterrupted(prompt):
    """What the fake engine says to a prompt when nobody disturbs it."""
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


async def until_batch(client, dispatchers):
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
        await admit(service.address, 2)
        engine = await fake()
        async with BufferClient(service.address) as buffer:
            _, rows = await until_batch(client, [dispatcher(engine, buffer)])
        for prompt, tokens in zip(slices(rows["prompt_tokens"]), slices(rows["tokens"]), strict=True):
            assert tokens.tolist() == await uninterrupted(prompt.tolist())
        assert set(rows["finish_reason"].to_pylist()) <= {"stop", "length"}
        await engine.shutdown()

    with buffer_service(tmp_path) as (service, client):
        client.publish(0)
        asyncio.run(run(service, client))


def test_a_stop_hands_everything_back_and_another_engine_goes_on_to_the_same_answer(tmp_path):
    async def run(service, client):
        await admit(service.address, 2)
        slow, fast = await fake(step_s=0.02), await fake()
        async with BufferClient(service.address) as buffer:
            first = dispatcher(slow, buffer, engine_id="slow")
            running = asyncio.create_task(first.run())
            await asyncio.sleep(0.15)
            await first.stop()
            async with asyncio.timeout(10):
                await running
            status = await buffer.status()
            assert status.states["leased"] == 0 and status.counts.live == 4
            _, rows = await until_batch(client, [dispatcher(fast, buffer, engine_id="fast")])
        for prompt, tokens in zip(slices(rows["prompt_tokens"]), slices(rows["tokens"]), strict=True):
            assert tokens.tolist() == await uninterrupted(prompt.tolist())
        await slow.shutdown()
        await fast.shutdown()

    with buffer_service(tmp_path) as (service, client):
        client.publish(0)
        asyncio.run(run(service, client))


def test_a_failed_score_is_tried_again_and_then_gives_the_group_up(tmp_path):
    async def run(service, client):
        await admit(service.address, 4)
        engine = await fake()
        async with BufferClient(service.address) as buffer:
            await until_batch(client, [dispatcher(engine, buffer, Poisoned(), concurrency=1)])
            report = await buffer.status()
            counts = report.counts
        assert counts.holds and report.quarantined == 1
        assert counts.failed == {"reward: scripted": 1}
        assert counts.dropped == {"a rollout of its group failed": 1}
        await engine.shutdown()

    with buffer_service(tmp_path, max_attempts=2) as (service, client):
        client.publish(0)
        asyncio.run(run(service, client))


def test_concurrency_is_the_bound_on_slots(tmp_path):
    async def run(service, client):
        await admit(service.address, 4)
        engine = await fake(step_s=0.001)
        most = 0
        async with BufferClient(service.address) as buffer:
            d = dispatcher(engine, buffer, concurrency=3)

            async def watch():
                nonlocal most
                while True:
                    most = max(most, engine.stats().running)
                    await asyncio.sleep(0.001)

            watching = asyncio.create_task(watch())
            await until_batch(client, [d])
            watching.cancel()
        assert most == 3
        await engine.shutdown()

    with buffer_service(tmp_path) as (service, client):
        client.publish(0)
        asyncio.run(run(service, client))


class Counted:
    """An engine that remembers what it was asked to generate."""

    def __init__(self, engine):
        self._engine = engine
        self.requests = []

    def generate(self, request):
        self.requests.append(request.request_id)
        return self._engine.generate(request)

    def __getattr__(self, name):
        return getattr(self._engine, name)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_buffer_that_starts_again_costs_no_token_and_no_lease(tmp_path, monkeypatch, shards):
    monkeypatch.setattr(dispatching, "_HEARTBEAT_S", 0.02)

    async def run(service, client):
        await admit(service.address, 4)
        engine = Counted(await fake(step_s=0.02))
        async with BufferClient(service.address) as buffer:
            d = dispatcher(engine, buffer, concurrency=8)
            running = asyncio.create_task(d.run())
            # Long before the first answer is whole: leases are out, segments and heartbeats under way.
            for _ in range(3):
                await asyncio.sleep(0.15)
                before = await buffer.status()
                assert before.states["leased"] > 0 and before.counts.live == 8
                await asyncio.to_thread(service.again)
                after = await buffer.status()
                assert after.recovery is not None and after.recovery.live_rollouts == 8
            batches = [await asyncio.to_thread(read, client)]
            assert client.commit(batches[0][0].batch_ids, 1).holds
            batches.append(await asyncio.to_thread(read, client))
            await d.stop()
            async with asyncio.timeout(10):
                await running
        rows = [row for _, batch in batches for row in batch.to_pylist()]
        assert len({row["rollout_id"] for row in rows}) == len(engine.requests) == 8
        for row in rows:
            assert row["tokens"] == await uninterrupted(row["prompt_tokens"])
        await engine.shutdown()

    with buffer_service(tmp_path, shards=shards) as (service, client):
        client.publish(0)
        asyncio.run(run(service, client))


def test_an_idle_dispatcher_finds_work_after_the_buffer_started_again(tmp_path):
    async def run(service, client):
        engine = await fake()
        async with BufferClient(service.address) as buffer:
            running = asyncio.create_task((d := dispatcher(engine, buffer)).run())
            await asyncio.sleep(0.1)
            await asyncio.to_thread(service.again)
            await admit(service.address, 2)
            await asyncio.to_thread(read, client)
            await d.stop()
            async with asyncio.timeout(10):
                await running
        await engine.shutdown()

    with buffer_service(tmp_path) as (service, client):
        client.publish(0)
        asyncio.run(run(service, client))
