"""Concurrency that changes while the dispatcher runs, between the fake engine and a real buffer: at once, and without a token
lost or sampled twice."""

import asyncio
import contextlib
import logging

import pytest

from asyncrl.buffer import BufferClient
from asyncrl.buffer.wire import Leased
from asyncrl.generators import dispatcher as dispatching
from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.engine import EngineDead
from asyncrl.generators.fake_engine import Fault
from asyncrl.generators.fake_speech import Lengths
from tests.buffers import admit, buffer_service
from tests.dispatching import Scorer, dispatcher, fake, read, until

AT_ONCE_S = 1.5
LONG = SamplingConfig(max_new_tokens=400, flush_tokens=8)
SIZES = {"prompts_per_step": 4, "rollouts_per_prompt": 2, "bound": 0}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """A stop comes after the last wait for work."""
    monkeypatch.setattr(dispatching, "_LEASE_WAIT_S", 1.0)


class Heard(BufferClient):
    """A client that remembers what it leased, released and how often it said that the engine lives."""

    def __init__(self, address):
        super().__init__(address)
        self.leased: list[Leased] = []
        self.released: list[tuple[int, int]] = []
        self.heartbeats = 0

    async def lease(self, *args, **kwargs):
        found = await super().lease(*args, **kwargs)
        self.leased += found
        return found

    async def release(self, leases):
        self.released += leases
        await super().release(leases)

    async def heartbeat(self, engine_id):
        self.heartbeats += 1
        await super().heartbeat(engine_id)


@contextlib.asynccontextmanager
async def running(address, engine, **settings):
    """(dispatcher, client) at work; stopped at the end."""
    async with Heard(address) as buffer:
        d = dispatcher(engine, buffer, sampling=LONG, **settings)
        task = asyncio.create_task(d.run())
        try:
            yield d, buffer
            await d.stop()
            async with asyncio.timeout(20):
                await task
        finally:
            task.cancel()
            await asyncio.wait({task})
        await engine.shutdown()


def on_buffer(tmp_path, scenario, **settings):
    with buffer_service(tmp_path, **(SIZES | settings)) as (service, client):
        client.publish(0)
        asyncio.run(scenario(service, client))


def test_up_at_once_though_a_lease_request_is_parked(tmp_path):
    async def scenario(service, client):
        engine = await fake(step_s=0.005, lengths=Lengths(median_tokens=10_000))
        async with running(service.address, engine, concurrency=1) as (d, _):
            await asyncio.sleep(0.2)  # it has asked for one, and waits
            await d.set_concurrency(8)
            assert d.concurrency == 8
            await admit(service.address, 4)

            async def all_run():
                return engine.stats().running == 8

            await until(all_run, AT_ONCE_S)

    on_buffer(tmp_path, scenario)


def test_down_hands_the_newest_back_and_nothing_is_lost_or_sampled_twice(tmp_path):
    async def scenario(service, client):
        engine = await fake(step_s=0.004, lengths=Lengths(median_tokens=120))
        async with running(service.address, engine, concurrency=3) as (d, buffer):
            await admit(service.address, 4)

            async def some_work():
                return engine.stats().generated_tokens > 30

            await until(some_work)
            await d.set_concurrency(8)
            before = engine.stats().generated_tokens

            async def all_work():
                return d.slots_used == 8 and engine.stats().generated_tokens > before + 100

            await until(all_work)
            async with asyncio.timeout(AT_ONCE_S):
                await d.set_concurrency(3)
            assert d.slots_used == 3 and engine.stats().running <= 3
            oldest = {(lease.rollout_id, lease.lease_id) for lease in buffer.leased[:3]}
            assert len(buffer.released) == 5 and not oldest & set(buffer.released)
            await d.set_concurrency(8)
            _, rows = await asyncio.to_thread(read, client)
            tokens = sum(len(row) for row in rows["tokens"].to_pylist())
            assert engine.stats().generated_tokens == tokens == 8 * 120

    on_buffer(tmp_path, scenario)


def test_zero_is_a_pause(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatching, "_HEARTBEAT_S", 0.02)

    async def scenario(service, client):
        engine = await fake(step_s=0.004, lengths=Lengths(median_tokens=50))
        async with running(service.address, engine, concurrency=4) as (d, buffer):
            await admit(service.address, 4)

            async def work():
                return engine.stats().generated_tokens > 40

            await until(work)
            async with asyncio.timeout(AT_ONCE_S):
                await d.set_concurrency(0)
            held, spoke = len(buffer.leased), buffer.heartbeats
            status = await buffer.status()
            assert d.slots_used == engine.stats().running == status.states["leased"] == 0
            sampled = engine.stats().generated_tokens
            await asyncio.sleep(0.3)
            assert len(buffer.leased) == held and engine.stats().generated_tokens == sampled
            assert buffer.heartbeats > spoke + 3
            await d.set_concurrency(4)
            _, rows = await asyncio.to_thread(read, client)
            assert engine.stats().generated_tokens == sum(len(row) for row in rows["tokens"].to_pylist())

    on_buffer(tmp_path, scenario)


@pytest.mark.parametrize("limit", [0, 1])
def test_what_a_parked_request_brings_over_the_lowered_limit_is_released_at_once(tmp_path, limit):
    async def scenario(service, client):
        engine = await fake(step_s=0.005, lengths=Lengths(median_tokens=10_000))
        async with running(service.address, engine, concurrency=8) as (d, buffer):
            await asyncio.sleep(0.2)  # it has asked for eight, and waits
            async with asyncio.timeout(AT_ONCE_S):
                await d.set_concurrency(limit)
            await admit(service.address, 4)

            async def given_back():
                return len(buffer.leased) == 8 and (await buffer.status()).states["leased"] == limit

            await until(given_back, AT_ONCE_S)
            assert len(buffer.released) == 8 - limit
            assert d.slots_used == limit

    on_buffer(tmp_path, scenario)


class Held(Scorer):
    """Scores nothing until it is let go."""

    def __init__(self):
        self.let_go = asyncio.Event()
        self.waiting = 0

    async def score(self, answer_text, payload):
        self.waiting += 1
        await self.let_go.wait()
        return await super().score(answer_text, payload)


def test_scores_that_wait_neither_hold_a_slot_nor_a_change_up(tmp_path):
    async def scenario(service, client):
        scorer = Held()
        engine = await fake(step_s=0.001, lengths=Lengths(median_tokens=8))
        async with running(service.address, engine, concurrency=1, scorer=scorer) as (d, buffer):
            await admit(service.address, 8)

            async def full():
                return scorer.waiting == 8

            await until(full)
            await asyncio.sleep(0.1)
            assert len(buffer.leased) == 8, "leasing pauses at eight answers for each slot"
            async with asyncio.timeout(AT_ONCE_S):
                await d.set_concurrency(0)
                await d.set_concurrency(2)

            async def more():
                return scorer.waiting == 16

            await until(more)
            scorer.let_go.set()
            await asyncio.to_thread(read, client)

    on_buffer(tmp_path, scenario, prompts_per_step=8)


def test_down_at_once_while_weights_are_applied(tmp_path):
    async def scenario(service, client):
        engine = await fake(step_s=0.002, lengths=Lengths(median_tokens=10_000))
        async with running(service.address, engine, concurrency=8) as (d, buffer):
            await admit(service.address, 4)

            async def work():
                return engine.stats().generated_tokens > 100

            await until(work)
            async with engine._boundary:  # what `apply` holds: no step is made
                async with asyncio.timeout(AT_ONCE_S):
                    await d.set_concurrency(2)
                assert d.slots_used == 2
                async with asyncio.timeout(AT_ONCE_S):
                    await d.set_concurrency(0)
                assert (await buffer.status()).states["leased"] == 0

    on_buffer(tmp_path, scenario)


def test_a_dead_engine_s_tokens_are_all_in_the_buffer_and_its_rollouts_elsewhere(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)

    async def scenario(service, client):
        lengths = Lengths(median_tokens=60)
        first = await fake(step_s=0.001, lengths=lengths, faults=[Fault(kind="die", where="token", at=150)])
        async with Heard(service.address) as buffer:
            await admit(service.address, 4)
            with pytest.raises(EngineDead, match="die at token 150"):
                async with asyncio.timeout(20):
                    await dispatcher(first, buffer, sampling=LONG, concurrency=8).run()
            status = await buffer.status()
            assert status.states["leased"] == 0 and status.counts.live == 8
            assert first.stats().generated_tokens == 149
        second = await fake(lengths=lengths)
        async with running(service.address, second, concurrency=8, engine_id="second") as (_, buffer):
            _, rows = await asyncio.to_thread(read, client)
            prefixes = sum(len(lease.tokens) // 4 for lease in buffer.leased)
            assert prefixes == 149, "every token that the dead engine sampled"
        assert sum(len(row) for row in rows["tokens"].to_pylist()) == 149 + second.stats().generated_tokens

    on_buffer(tmp_path, scenario)


def test_changes_at_random_keep_every_rollout_whole(tmp_path):
    limits = [8, 1, 5, 0, 2, 8, 0, 0, 3, 7, 1, 8]

    async def scenario(service, client):
        engine = await fake(step_s=0.001, lengths=Lengths(median_tokens=100, sigma=0.5))
        async with running(service.address, engine, concurrency=4) as (d, buffer):
            await admit(service.address, 8)

            async def work():
                return engine.stats().running

            await until(work)
            for turn in range(3):
                for limit in limits:
                    changes = [asyncio.create_task(d.set_concurrency(n)) for n in (limit, 8 - limit, limit)]
                    await asyncio.sleep(0.005 * (turn + 1))
                    await asyncio.gather(*changes)
                    assert d.slots_used <= d.concurrency == limit
            await d.set_concurrency(8)
            _, rows = await asyncio.to_thread(read, client)
            assert len(buffer.released) > 20
            assert engine.stats().generated_tokens == sum(len(row) for row in rows["tokens"].to_pylist())
            assert (await buffer.status()).counts.holds

    on_buffer(tmp_path, scenario, prompts_per_step=8)
