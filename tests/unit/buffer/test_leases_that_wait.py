"""Leases by room in the KV cache, through a real service: who waits, who is answered, and when."""

import asyncio
import time

import pytest

from asyncrl.buffer import BufferClient
from asyncrl.buffer.leasing import LONGEST_PASSED_S
from tests.buffer_world import part
from tests.buffers import admit_all, buffer_service

LONG = 400
"""Tokens of a partial rollout; prompts have 3."""


@pytest.fixture(params=[1, 3], ids=["1-shard", "3-shards"])
def buffer(tmp_path, request):
    """Groups of one, version 0 published."""
    sizes = dict(prompts_per_step=12, rollouts_per_prompt=1)
    with buffer_service(tmp_path, shards=request.param, **sizes) as (buffer, reader):
        reader.publish(0)
        yield buffer


def talk(buffer, scenario):
    async def run():
        async with asyncio.timeout(30), BufferClient(buffer.address) as client:
            await scenario(client)

    asyncio.run(run())


async def lease_all(client, engine, count):
    leases = []
    while len(leases) < count:
        found = await client.lease(engine, count - len(leases), 2.0)
        assert found
        leases += found
    return leases


async def make_busy(client, *engines):
    """Each generates a rollout of every shard, so that none may take just anything."""
    for engine in engines:
        await admit_all(client, client.shards)
        await lease_all(client, engine, client.shards)


async def make_long_ones(client):
    """One of each shard, held by an engine; `client.release` hands them back."""
    await admit_all(client, client.shards)
    leases = await lease_all(client, "maker", client.shards)
    await client.append("maker", [part(lease.rollout_id, lease.lease_id, 0, LONG) for lease in leases])
    return [(lease.rollout_id, lease.lease_id) for lease in leases]


def lengths(leases):
    return [len(lease.tokens) // 4 for lease in leases]


def test_one_that_waits_without_room_does_not_hold_up_another_that_has_it(buffer):
    async def scenario(client):
        await make_busy(client, "small", "large")
        held = await make_long_ones(client)
        small = asyncio.create_task(client.lease("small", 9, 20.0, 10))
        await asyncio.sleep(0.1)
        large = asyncio.create_task(client.lease("large", 9, 20.0, 100_000))
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        await client.release(held)
        assert set(lengths(await large)) == {LONG}
        assert time.monotonic() - begun < LONGEST_PASSED_S and not small.done()
        small.cancel()

    talk(buffer, scenario)


@pytest.mark.alone
def test_one_that_waits_gets_what_fits_as_soon_as_it_comes(buffer):
    async def scenario(client):
        await make_busy(client, "small")
        await client.release(await make_long_ones(client))
        small = asyncio.create_task(client.lease("small", 9, 20.0, LONG))
        await asyncio.sleep(0.3)
        assert not small.done()
        begun = time.monotonic()
        await admit_all(client, client.shards)
        assert set(lengths(await small)) == {0}
        assert time.monotonic() - begun < 1.0

    talk(buffer, scenario)


def test_one_that_waits_alone_gets_what_does_not_fit_after_a_while(buffer):
    async def scenario(client):
        await make_busy(client, "small")
        await client.release(await make_long_ones(client))
        begun = time.monotonic()
        assert LONG in lengths(await client.lease("small", 9, 20.0, 0))
        # The loop looks every second; with several shards the client asks each in turn, for a quarter of one.
        assert LONGEST_PASSED_S - 0.1 < time.monotonic() - begun < LONGEST_PASSED_S + 3.0

    talk(buffer, scenario)


@pytest.mark.alone
def test_an_engine_that_holds_nothing_gets_what_does_not_fit_at_once(buffer):
    async def scenario(client):
        await client.release(await make_long_ones(client))
        begun = time.monotonic()
        assert LONG in lengths(await client.lease("empty", 9, 20.0, 0))
        assert time.monotonic() - begun < 1.0

    talk(buffer, scenario)


def test_requests_without_room_pass_it_on_by_their_number(buffer):
    async def scenario(client):
        await make_busy(client, "small")
        await client.release(await make_long_ones(client))
        begun, asked, found = time.monotonic(), 0, []
        while not found:
            found, asked = await client.lease("small", 1, 0.0, 0), asked + 1
        assert lengths(found) == [LONG] and time.monotonic() - begun < LONGEST_PASSED_S
        # Each call asks every shard once, and with several one of them once more.
        assert asked == 9 if client.shards == 1 else asked <= 9

    talk(buffer, scenario)
