"""Snapshots of several shards show one frontier, whatever becomes of their freezes in between."""

import asyncio
import threading
import time

import pytest

from asyncrl.buffer import BlockingBufferClient, BufferClient, BufferService, reader, wire
from asyncrl.buffer.errors import SnapshotUneven
from tests.buffers import buffer_service, prompts

GROUP = 2


class MeddledReader(BlockingBufferClient):
    """Calls `meddle` between the first shard's snapshot and the second's, the first `times`."""

    def __init__(self, address, meddle, times=1):
        super().__init__(address)
        self._meddle, self.left = meddle, times

    def ask(self, shard, request, timeout_s=0.0):
        reply = super().ask(shard, request, timeout_s)
        if shard == 0 and isinstance(request, wire.Snapshot) and self.left:
            self.left -= 1
            self._meddle()
        return reply


@pytest.fixture
def buffer(tmp_path):
    """Three shards with two groups each, and room for more."""
    with buffer_service(tmp_path, prompts_per_step=60, rollouts_per_prompt=GROUP, shards=3) as (
        buffer,
        client,
    ):
        client.publish(0)
        for _ in range(2):
            admit_everywhere(buffer)
        yield buffer


def admit_everywhere(buffer):
    """As the feeder does: one prompt to one shard after the other, each after the one before was acknowledged."""

    async def run():
        async with BufferClient(buffer.address) as client:
            for shard in range(client.shards):
                first = (await client.status()).frontier
                await client.admit(shard, prompts(1, first), timeout_s=10.0)

    asyncio.run(run())


def restart(buffer, shard):
    buffer.client.ask(shard, wire.Stop())
    buffer.threads[shard].join(10)
    service = BufferService(
        settings=buffer.settings(shard),
        config=buffer.config,
        folder=buffer.log(shard),
        keys=buffer.server_keys,
        port=buffer.ports[shard],
    )
    buffer.services[shard] = service
    buffer.threads[shard] = threading.Thread(target=service.run, name=f"buffer-{shard}")
    buffer.threads[shard].start()


def snapshot(buffer, meddle, times=1, step=1):
    client = MeddledReader(buffer.address, meddle, times)
    try:
        return client.snapshot(step), client
    finally:
        client.close()


def check_whole(buffer, taken):
    """Whatever lies before the frontier of the snapshot is in it."""
    assert buffer.client.restore(taken.step).frontier == taken.frontier
    assert buffer.client.status().counts.admitted == GROUP * taken.frontier


def test_undisturbed_one_try_is_enough(buffer):
    taken, _ = snapshot(buffer, lambda: None)
    assert taken.frontier == 6
    check_whole(buffer, taken)


def test_a_freeze_that_its_shard_lost_by_a_restart(buffer, caplog):
    """The other shards went on from their snapshots, and the one that had started anew had prompts behind theirs in its own."""

    def meddle():
        for shard in (1, 2):
            restart(buffer, shard)
        admit_everywhere(buffer)

    taken, client = snapshot(buffer, meddle)
    assert not client.left and "frontiers [4, 5, 6] have become [4, 8, 9]" in caplog.text
    assert taken.frontier == 9
    check_whole(buffer, taken)


def test_a_restart_without_an_admission_is_no_matter(buffer, caplog):
    taken, client = snapshot(buffer, lambda: restart(buffer, 1))
    assert not client.left and taken.frontier == 6 and "have become" not in caplog.text
    check_whole(buffer, taken)


def test_a_freeze_that_is_over_before_the_last_snapshot(buffer, monkeypatch, caplog):
    monkeypatch.setattr(reader, "_FREEZES_S", (0.2, 30.0))

    def meddle():
        time.sleep(0.3)
        admit_everywhere(buffer)

    taken, client = snapshot(buffer, meddle)
    assert not client.left and taken.frontier == 9 and "have become [4, 8, 9]" in caplog.text
    check_whole(buffer, taken)


def test_frontiers_that_never_stay_end_by_name_and_the_next_snapshot_is_whole(buffer, monkeypatch):
    monkeypatch.setattr(reader, "_FREEZES_S", (0.05, 0.1, 0.2))

    def meddle():
        time.sleep(0.3)
        admit_everywhere(buffer)

    with pytest.raises(
        SnapshotUneven, match=r"step 1: expected .* at \[10, 11, 12\] for 0.2 s, they came to \[10, 14, 15\]"
    ):
        snapshot(buffer, meddle, times=9)
    taken, _ = snapshot(buffer, lambda: None, step=2)
    assert taken.frontier == 15
    check_whole(buffer, taken)
