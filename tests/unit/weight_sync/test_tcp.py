"""The `tcp` transport over real sockets: chunk server and puller, whole versions and deltas."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from asyncrl.weight_sync import chunks
from asyncrl.weight_sync.pulling import Puller
from asyncrl.weight_sync.serving import ChunkServer
from asyncrl.weight_sync.shm import map_version
from tests.chunk_worlds import Bytes, fetched, small_plan


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4096)


@pytest.fixture
def server():
    with ChunkServer("127.0.0.1") as made:
        yield made


@pytest.fixture
def puller():
    made = Puller("e0")
    yield made
    made.close()


@pytest.mark.parametrize("senders", (1, 3))
def test_a_version_comes_whole_and_verified_into_memory_that_others_can_map(server, puller, senders):
    version = Bytes(small_plan(senders=senders))
    version.open_at(server, 0)
    offer = fetched(puller, version.offer(0, server.endpoint))
    assert version.is_in(offer)
    map_version(offer).close()  # as an engine stages it
    assert offer.source.path.startswith(f"/proc/{os.getpid()}/fd/")
    assert puller.bytes_pulled == sum(bucket.size for bucket in version.plan.buckets)
    assert server.close_version(0, timeout_s=5)
    assert server.bytes_sent[0] == puller.bytes_pulled


@pytest.mark.parametrize("senders", (1, 3))
def test_the_next_version_comes_as_a_delta(server, puller, senders):
    before = Bytes(small_plan(senders=senders))
    after = Bytes(before.plan, seed=1, base=before)
    before.open_at(server, 0)
    fetched(puller, before.offer(0, server.endpoint))
    after.open_at(server, 1)
    assert server.base_of(1) == 0
    assert after.is_in(fetched(puller, after.offer(1, server.endpoint)))
    assert 0 < puller.bytes_pulled < before.plan.total_bytes / 10


def test_who_has_another_version_gets_all_of_it(server, puller):
    versions = [Bytes(small_plan())]
    for number in range(3):
        versions.append(Bytes(versions[0].plan, seed=number + 1, base=versions[-1]))
    versions[0].open_at(server, 0)
    fetched(puller, versions[0].offer(0, server.endpoint))
    for number in (1, 2):
        versions[number].open_at(server, number)
    assert versions[2].is_in(fetched(puller, versions[2].offer(2, server.endpoint)))
    assert puller.bytes_pulled >= 60_000
    # Its base is closed before it asks: what was not compared by then is not compared any more.
    versions[3].open_at(server, 3)
    assert server.close_version(2, timeout_s=5)
    assert versions[3].is_in(fetched(puller, versions[3].offer(3, server.endpoint)))
    assert puller.bytes_pulled >= 60_000


def test_another_version_of_the_same_number_is_no_base(server, puller):
    """Version 1 is fetched, aborted, and comes again with other bytes."""
    before = Bytes(small_plan())
    aborted, again = (Bytes(before.plan, seed=seed, base=before) for seed in (1, 2))
    after = Bytes(before.plan, seed=3, base=again)
    before.open_at(server, 0)
    fetched(puller, before.offer(0, server.endpoint))
    aborted.open_at(server, 1)
    fetched(puller, aborted.offer(1, server.endpoint))
    assert server.close_version(1, timeout_s=5)
    again.open_at(server, 1)
    after.open_at(server, 2)
    assert after.is_in(fetched(puller, after.offer(2, server.endpoint)))
    assert puller.bytes_pulled >= 60_000


def test_the_same_bytes_proposed_again_are_not_pulled_again(server, puller):
    version = Bytes(small_plan())
    version.open_at(server, 0)
    fetched(puller, version.offer(0, server.endpoint))
    assert version.is_in(fetched(puller, version.offer(0, server.endpoint)))
    assert puller.bytes_pulled == 0


def test_without_deltas_every_version_comes_whole(puller):
    before = Bytes(small_plan())
    after = Bytes(before.plan, seed=1, base=before)
    with ChunkServer("127.0.0.1", deltas=False) as server:
        for number, version in enumerate((before, after)):
            version.open_at(server, number)
            assert version.is_in(fetched(puller, version.offer(number, server.endpoint)))
            assert puller.bytes_pulled >= 60_000
        assert server.base_of(1) == -1


def test_two_hundred_updates_leave_identical_bytes_and_a_late_joiner_gets_them_whole(server, puller):
    rng = np.random.default_rng(0)
    version = Bytes(small_plan(tensors=3))
    version.open_at(server, 0)
    full = part = 0
    for number in range(1, 201):
        fetched(puller, version.offer(number - 1, server.endpoint))
        share = float(rng.choice([0.0, 0.001, 0.05, 0.5]))
        after = (
            Bytes(version.plan, seed=number, base=version, share=share)
            if rng.random() < 0.9
            else Bytes(version.plan, number)
        )
        after.open_at(server, number)
        offer = fetched(puller, after.offer(number, server.endpoint))
        assert after.is_in(offer)
        full, part = full + (puller.bytes_pulled >= 30_000), part + (puller.bytes_pulled < 15_000)
        assert server.close_version(number - 1, timeout_s=5)
        version = after
    assert full > 5 and part > 100
    late = Puller("late")
    try:
        assert version.is_in(fetched(late, version.offer(200, server.endpoint)))
        assert late.bytes_pulled >= 30_000
    finally:
        late.close()


def test_several_engines_at_once_share_the_deltas(server):
    import asyncio

    before = Bytes(small_plan())
    after = Bytes(before.plan, seed=1, base=before)
    pullers = [Puller(f"e{i}") for i in range(4)]

    async def all_of(version, number):
        return await asyncio.gather(
            *(each.fetch(version.offer(number, server.endpoint), 20) for each in pullers)
        )

    try:
        before.open_at(server, 0)
        assert all(before.is_in(offer) for offer in asyncio.run(all_of(before, 0)))
        after.open_at(server, 1)
        assert all(after.is_in(offer) for offer in asyncio.run(all_of(after, 1)))
        assert {each.bytes_pulled for each in pullers} == {pullers[0].bytes_pulled}
        assert pullers[0].bytes_pulled < 10_000
    finally:
        for each in pullers:
            each.close()


def test_what_pulls_loads_no_torch():
    code = "import sys; import asyncrl.weight_sync.pulling; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment, cwd=root)
