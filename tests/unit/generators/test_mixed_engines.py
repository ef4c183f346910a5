"""Engines of mixed size at one buffer: work goes where it is done, and long partial rollouts where there is room for them."""

import asyncio
from collections import Counter

import pyarrow.compute as pc
import pytest

from asyncrl.buffer import BufferClient
from asyncrl.buffer.reading import read_log
from asyncrl.generators import dispatcher as dispatching
from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.fake_speech import Lengths
from tests.buffers import admit, buffer_service
from tests.dispatching import dispatcher, fake, until

LONG = Lengths(median_tokens=90)
SAMPLING = SamplingConfig(max_new_tokens=100, flush_tokens=4)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(dispatching, "_LEASE_WAIT_S", 0.3)


def leases_in_order(folder):
    """(rollout, engine) of every lease."""
    log = read_log(folder / "rollouts")
    leased = log.states.filter(pc.equal(log.states["state"], "LEASED"))
    return list(zip(leased["rollout_id"].to_pylist(), leased["engine_id"].to_pylist(), strict=True))


async def until_states(client, **wanted):
    """So many rollouts are in these states."""

    async def reached():
        states = (await client.status()).states
        return all(states[name] >= count for name, count in wanted.items())

    await until(reached, 60)


@pytest.mark.alone
def test_a_faster_engine_takes_more(tmp_path):
    async def run(service):
        await admit(service.address, 12)
        fast, slow = await fake(step_s=0.002), await fake(step_s=0.02)
        async with BufferClient(service.address) as buffer, asyncio.TaskGroup() as group:
            both = [
                dispatcher(fast, buffer, engine_id="fast", concurrency=4),
                dispatcher(slow, buffer, engine_id="slow", concurrency=4),
            ]
            for one in both:
                group.create_task(one.run())
            await until_states(buffer, scored=72)
            for one in both:
                await one.stop()
        await fast.shutdown()
        await slow.shutdown()

    with buffer_service(tmp_path, prompts_per_step=12, rollouts_per_prompt=6) as (service, client):
        client.publish(0)
        asyncio.run(run(service))
    taken = Counter(engine for _, engine in leases_in_order(tmp_path))
    assert taken["fast"] + taken["slow"] >= 72
    assert taken["fast"] > 2.5 * taken["slow"] > 0


def test_long_partial_rollouts_go_to_the_engine_with_room(tmp_path):
    """Both engines have free slots and ask; only one has room in its KV cache for what was sampled so far."""

    async def run(service):
        async with BufferClient(service.address) as buffer, asyncio.TaskGroup() as group:
            small = await fake(step_s=0.05, kv_capacity_tokens=40, lengths=LONG)
            busy = dispatcher(small, buffer, engine_id="small", concurrency=2, sampling=SAMPLING)
            await admit(service.address, 1)
            group.create_task(busy.run())
            await until_states(buffer, leased=2)
            maker = await fake(step_s=0.002, lengths=LONG)
            first = dispatcher(maker, buffer, engine_id="maker", sampling=SAMPLING)
            making = group.create_task(first.run())
            await admit(service.address, 1)
            await until_states(buffer, leased=4)
            await until(lambda: asyncio.sleep(0, maker.stats().generated_tokens >= 2 * 60), 20)
            await first.stop()
            await making
            large = await fake(step_s=0.002, lengths=LONG)
            roomy = dispatcher(large, buffer, engine_id="large", sampling=SAMPLING)
            await busy.set_concurrency(4)
            group.create_task(roomy.run())
            await until_states(buffer, scored=2)
            for one in (busy, roomy):
                await one.stop()
        for engine in (small, maker, large):
            await engine.shutdown()

    with buffer_service(tmp_path) as (service, client):
        client.publish(0)
        asyncio.run(run(service))
    given = leases_in_order(tmp_path)
    partial = {rollout_id for rollout_id, engine in given if engine == "maker"}
    assert len(partial) == 2
    assert {e for r, e in given if r in partial and e != "maker"} == {"large"}
