"""Prompts on their way into a real buffer: in their order, each once, also when the feeder or the buffer starts anew."""

import asyncio

import pytest

from asyncrl.buffer import BufferClient
from asyncrl.buffer.reading import read_log
from asyncrl.buffer.wire import Admitted, Scored
from asyncrl.generators.prompts import Frontier, Prompt
from asyncrl.runtime import feeder
from asyncrl.runtime.feeder import NoPromptFits, feed, take_fitting
from tests.buffers import buffer_service, segment


class Endless:
    """Prompts of `lengths[i]` tokens in turn; of no end."""

    name, size = "endless", None

    def __init__(self, *lengths):
        self.lengths = lengths

    def __getitem__(self, index):
        return Prompt(f"p{index}", [1] * self.lengths[index % len(self.lengths)], "{}")


def walk(*lengths, cursor=0):
    return Frontier(Endless(*lengths), seed=0, cursor=cursor)


def test_prompts_that_leave_no_room_for_an_answer_are_passed_over_and_keep_their_positions():
    frontier = walk(1, 2, 9)
    rows = take_fitting(frontier, 4, 2)
    assert [(row.prompt_id, row.position) for row in rows] == [("p0", 0), ("p1", 1), ("p3", 3), ("p4", 4)]
    assert frontier.cursor == 5  # and no prompt beyond those was drawn
    with pytest.raises(NoPromptFits, match="have more than 2 tokens"):
        take_fitting(walk(9), 1, 2)


async def fed(address, frontier, held, longest_tokens=8):
    """Feeds until the buffer holds so many groups."""
    async with BufferClient(address) as client:
        feeding = asyncio.create_task(feed(client, frontier, longest_tokens))
        async with asyncio.timeout(20):
            while (await client.status()).held_groups < held:
                assert not feeding.done(), feeding.exception()
                await asyncio.sleep(0.01)
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)


def admitted(folder):
    """(prompt_id, position) by shard, in the order in which the log has them."""
    prompts = read_log(folder / "rollouts").prompts.to_pylist()
    found = {}
    for row in prompts:
        found.setdefault(row["shard"], []).append((row["prompt_id"], row["position"]))
    return found


@pytest.mark.parametrize("shards", [1, 2])
def test_the_order_of_the_prompts_is_kept_across_restarts_of_feeder_and_buffer(tmp_path, shards):
    with buffer_service(tmp_path, shards=shards, prompts_per_step=4, bound=1) as (service, client):
        client.publish(0)
        asyncio.run(fed(service.address, walk(1, 9, 2), held=8))
        service.again()
        # A feeder of a new launch knows nothing of the first one's walk.
        for version in (1, 2):
            asyncio.run(finish_all(service.address, version - 1))
            batch = client.read_batch(10.0)
            assert batch is not None
            client.commit(batch[0].batch_ids, version)
            asyncio.run(fed(service.address, walk(1, 9, 2), held=8))
    by_shard = admitted(tmp_path)
    positions = sorted(position for rows in by_shard.values() for _, position in rows)
    fitting = [i for i in range(100) if i % 3 != 1]
    assert positions == fitting[:16]  # every prompt that fits, each once, none left out
    assert all(prompt_id == f"p{position}" for rows in by_shard.values() for prompt_id, position in rows)
    for rows in by_shard.values():
        assert [position for _, position in rows] == sorted(position for _, position in rows)


async def finish_all(address, version):
    """Answers and scores whatever can be leased."""
    async with BufferClient(address) as buffer:
        while leases := await buffer.lease("e", 64, 0.2):
            done = [segment(x.rollout_id, x.lease_id, 0, [5], version, "stop") for x in leases]
            assert await buffer.append("e", done) == []
            assert await buffer.score([Scored(x.rollout_id, x.lease_id, 1.0) for x in leases]) == []


class Scripted:
    """A buffer of two shards that notes what it is asked."""

    def __init__(self, rooms, frontier=0, quarantined=()):
        self.rooms, self.frontier, self.quarantined = list(rooms), frontier, quarantined
        self.walk, self.asked = None, []

    async def status(self):
        return self

    async def capacity(self, timeout_s):
        if not self.rooms:
            await asyncio.sleep(60)
        return self.rooms.pop(0)

    async def admit(self, shard, prompts):
        self.asked.append((shard, [p.position for p in prompts], self.walk.cursor))
        await asyncio.sleep(0.01)
        bad = sum(p.prompt_id in self.quarantined for p in prompts)
        return Admitted(admitted=len(prompts) - bad, passed_over=bad)


async def feed_for_a_while(buffer, frontier):
    buffer.walk = frontier
    async with asyncio.timeout(0.2):
        await feed(buffer, frontier, 8)


def test_nothing_is_drawn_for_a_shard_before_the_one_before_has_acknowledged():
    buffer = Scripted([[3, 2], [0, 1], [2, 0]], frontier=10)
    with pytest.raises(TimeoutError):
        asyncio.run(feed_for_a_while(buffer, walk(1)))
    # While a shard admits, the walk stands where that shard's prompts end.
    assert buffer.asked == [(0, [10, 11, 12], 13), (1, [13, 14], 15), (1, [15], 16), (0, [16, 17], 18)]


def test_quarantined_prompts_are_replaced_and_a_source_of_nothing_else_ends_the_run(monkeypatch):
    buffer = Scripted([[2, 0], [1, 0]], quarantined={"p1"})
    with pytest.raises(TimeoutError):
        asyncio.run(feed_for_a_while(buffer, walk(1)))
    assert [positions for _, positions, _ in buffer.asked] == [[0, 1], [2]]
    monkeypatch.setattr(feeder, "_MOST_PASSED_OVER", 3)
    with pytest.raises(NoPromptFits, match="4 prompts in a row, the last p3, are quarantined"):
        asyncio.run(
            feed_for_a_while(Scripted([[2, 0]] * 9, quarantined={f"p{i}" for i in range(20)}), walk(1))
        )
