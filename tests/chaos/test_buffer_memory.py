"""Producers ten times as fast as the reader, and a budget of 16 MiB for tokens that wait: past it leases are withheld, so that
no more is held than the budget and what was leased by then; the process, which keeps no token, hardly grows; no append waits
or is refused, the reader never starves, and what it reads is right."""

import asyncio
import threading
import time

import psutil
import pytest

from asyncrl.buffer import BlockingBufferClient, BufferClient, wire
from tests.buffer_world import check_rows, part, process_buffer, reward_of, until
from tests.buffers import admit_all

MEMORY_BYTES = 16 * 2**20
ALLOWANCE_BYTES = 12 * 2**20
"""What the process may grow by, whatever is held; twice what was measured (5.7 MiB). It is made of: the requests of one round
that are not written yet (four engines with one append of 64 KB each); pages of the engines' arenas, which are the clients'
memory and count in the shard's RSS too; 3,200 rollouts' records and queue entries (3 MiB); what the allocators keep."""
STEADY_BYTES = 4 * 2**20
"""How much more the second half of the soak may need than the first: nothing grows with time."""
PROMPTS_PER_STEP, ROLLOUTS_PER_PROMPT, BOUND = 4, 4, 200
TOKENS, PIECE = 4000, 1000
"""Of an answer (32 KB), and of one append's piece of it."""
ENGINES, SLOTS = 4, 256
PIECES_AT_ONCE = 8
LEASED_BYTES = 8 * TOKENS * (ENGINES * SLOTS + PROMPTS_PER_STEP * ROLLOUTS_PER_PROMPT)
"""Of answers that may be under way when the budget is reached, and of the batch that is needed next."""
READ_EVERY_S = 0.25
SOAK_S = 22.0


class Producers:
    """Engines in one thread that take all leases they get, and finish them as fast as they can."""

    def __init__(self, address):
        self.address = address
        self.ending = threading.Event()
        self.failure = None
        self.finished = 0
        self.refused = self.withheld = 0
        self.longest_append_s = 0.0
        self.busy_s = 0.0
        """In which at least one engine had something to do; what was finished in it gives the producers' own pace."""
        self._busy = 0
        self._busy_since = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self):
        self.ending.set()
        self._thread.join(30)
        assert not self._thread.is_alive() and self.failure is None, self.failure

    def _run(self):
        try:
            asyncio.run(self._all())
        except BaseException as problem:
            self.failure = problem
            raise

    async def _all(self):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._feed())
            for index in range(ENGINES):
                tasks.create_task(self._engine(f"e{index}"))

    async def _feed(self):
        async with BufferClient(self.address) as client:
            while not self.ending.is_set():
                await client.capacity(0.2)
                await admit_all(client, 1000)

    async def _engine(self, name):
        async with BufferClient(self.address) as client:
            while not self.ending.is_set():
                leases = await client.lease(name, SLOTS, 0.1)
                if not leases:
                    self.withheld += 1
                    continue
                self._begin()
                for start in range(0, len(leases), PIECES_AT_ONCE):
                    await self._finish(client, name, leases[start : start + PIECES_AT_ONCE])
                self._end()
                await client.heartbeat(name)

    def _begin(self):
        if not self._busy:
            self._busy_since = time.monotonic()
        self._busy += 1

    def _end(self):
        self._busy -= 1
        if not self._busy:
            self.busy_s += time.monotonic() - self._busy_since

    async def _finish(self, client, name, leases):
        """All of a lease's tokens, piece by piece in turn with those of others."""
        for at in range(0, TOKENS, PIECE):
            reason = "stop" if at + PIECE >= TOKENS else ""
            pieces = [part(x.rollout_id, x.lease_id, at, PIECE, 0, reason) for x in leases]
            begun = time.monotonic()
            self.refused += len(await client.append(name, pieces))
            self.longest_append_s = max(self.longest_append_s, time.monotonic() - begun)
        scored = [wire.Scored(x.rollout_id, x.lease_id, reward_of(x.rollout_id)) for x in leases]
        self.refused += len(await client.score(scored))
        self.finished += len(leases)


class Watch:
    """Looks at the shard's figures and its process' memory all the time."""

    def __init__(self, buffer):
        self._client = BlockingBufferClient(buffer.address)
        self._process = psutil.Process(buffer.processes[0].pid)
        self.start_rss = self.rss()
        self.most_held = self.most_rss = self.most_queued = self.looks = 0
        self.rss_by_time = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def rss(self):
        return self._process.memory_info().rss

    def _run(self):
        while not self._ending.wait(0.03):
            status = self._client.status()
            self.looks += 1
            self.most_held = max(self.most_held, status.held_bytes)
            self.most_queued = max(self.most_queued, status.states["queued"])
            self.rss_by_time.append(self.rss())
            self.most_rss = max(self.most_rss, self.rss_by_time[-1])

    def end(self):
        self._ending.set()
        self._thread.join(10)
        self._client.close()


def warm_up(buffer):
    """One batch of one token each: code, sockets, keys and files are there. Returns the version after it."""

    async def fill():
        async with BufferClient(buffer.address) as client:
            await client.capacity(1.0)
            await admit_all(client, PROMPTS_PER_STEP)
            for lease in await client.lease("warm", 100, 2.0):
                await client.append("warm", [part(lease.rollout_id, lease.lease_id, 0, 1, 0, "stop")])
                scored = wire.Scored(lease.rollout_id, lease.lease_id, reward_of(lease.rollout_id))
                await client.score([scored])

    asyncio.run(fill())
    selection, rows = buffer.client.read_batch(5.0)
    check_rows(rows, 1)
    buffer.client.commit(selection.batch_ids, 1)


def read_slowly(buffer, watch, producers):
    """A batch every so often. Returns how many, and the longest time that one was waited for."""
    version, batches, longest_s = 1, 0, 0.0
    until(lambda: watch.most_held > MEMORY_BYTES or producers.failure, 20, "more than the budget")
    end = time.monotonic() + SOAK_S
    while (begun := time.monotonic()) < end:
        found = buffer.client.read_batch(10.0)
        assert found is not None, f"no progress: {buffer.client.status()}"
        longest_s = max(longest_s, time.monotonic() - begun)
        selection, rows = found
        check_rows(rows, TOKENS)
        version += 1
        assert buffer.client.commit(selection.batch_ids, version).holds
        batches += 1
        time.sleep(max(0.0, begun + READ_EVERY_S - time.monotonic()))
    return batches, longest_s


@pytest.mark.timeout(120)
def test_ten_times_too_much_stays_within_the_memory_and_is_trained_right(tmp_path):
    sizes = {"prompts_per_step": PROMPTS_PER_STEP, "rollouts_per_prompt": ROLLOUTS_PER_PROMPT}
    with process_buffer(tmp_path, bound=BOUND, memory_bytes=MEMORY_BYTES, **sizes) as buffer:
        buffer.client.publish(0)
        warm_up(buffer)
        watch = Watch(buffer)
        producers = Producers(buffer.address)
        try:
            batches, longest_s = read_slowly(buffer, watch, producers)
        finally:
            producers.end()
            watch.end()
        read_rate = PROMPTS_PER_STEP * ROLLOUTS_PER_PROMPT * batches / SOAK_S
        own_rate = producers.finished / producers.busy_s
        mib = 2.0**20
        print(
            f"{batches} batches ({read_rate:.0f} rollouts/s) against {own_rate:.0f}/s of the producers; held "
            f"{watch.most_held / mib:.1f} MiB, RSS {watch.start_rss / mib:.1f} "
            f"-> {watch.most_rss / mib:.1f} (half way {max(watch.rss_by_time[: watch.looks // 2]) / mib:.1f}); longest append "
            f"{producers.longest_append_s:.2f} s, read {longest_s:.2f} s, withheld {producers.withheld}, queued {watch.most_queued}"
        )
        assert watch.looks > 100
        assert own_rate > 10 * read_rate
        assert MEMORY_BYTES < watch.most_held <= MEMORY_BYTES + LEASED_BYTES
        assert watch.most_rss - watch.start_rss < ALLOWANCE_BYTES
        first_half = watch.rss_by_time[: watch.looks // 2]
        assert watch.most_rss - max(first_half) < STEADY_BYTES
        assert producers.refused == 0 and producers.longest_append_s < 2.0
        assert producers.withheld > 20 and watch.most_queued > 1000
        assert longest_s < 3.0 and batches > 0.5 * SOAK_S / READ_EVERY_S
        counts = buffer.stop()
        assert counts.holds and counts.trained == (batches + 1) * PROMPTS_PER_STEP * ROLLOUTS_PER_PROMPT
