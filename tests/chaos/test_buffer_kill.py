"""kill -9 under load, again and again: engines, a scorer, a feeder and a reader go on by themselves, what was acknowledged is
there, no rollout is lost or trained twice, and the equation holds.

The shards are processes; the clients live in the test's process and know nothing of the kills. Every client keeps a record
of what was acknowledged to it, which is compared at the end with the batches that were read and with the log.
"""

import asyncio
import random
import threading
import time
from collections import Counter

import numpy as np
import pytest

from asyncrl.buffer import BlockingBufferClient, BufferClient, connection, wire
from asyncrl.buffer.columns import slices
from tests.buffer_world import (
    check_order,
    goes_round,
    logged_rollouts,
    logprobs_of,
    part,
    process_buffer,
    reward_of,
    tokens_of,
    until,
)
from tests.buffers import admit_all

SEED = 9
ENGINES = 3
IN_FLIGHT = 6
"""Rollouts that one engine works on."""
PER_STEP = (4, 4)
"""Groups of a batch, rollouts of a group."""


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """Clients ask again soon, so that the load is back before the next kill."""
    monkeypatch.setattr(connection, "_ASK_AGAIN_S", 0.25)
    monkeypatch.setattr(connection, "_ASK_WAITING_S", 0.2)


class World:
    """What the clients were told, by the clients' own books."""

    def __init__(self, buffer, seed):
        self.buffer, self.random = buffer, random.Random(seed)
        self.answers = 0
        """Acknowledged so far, by all clients: while it grows the shards serve."""
        self.acknowledged = {}
        """rollout_id -> tokens of it that were acknowledged."""
        self.finished = set()
        self.scored = set()
        self.refused = 0
        self.trained = Counter()
        self.batches = []
        self.version = 0
        self.ending = threading.Event()
        self.failures = []

    def length_of(self, rollout_id):
        """Some rollouts are one segment, some many; one in eight has segments that go through the arena."""
        return 5000 if rollout_id % 8 == 3 else 1 + rollout_id * 37 % 60

    def note(self, segments):
        self.answers += 1
        for segment in segments:
            end = segment.start + len(segment.tokens)
            known = self.acknowledged.get(segment.rollout_id, 0)
            assert segment.start <= known
            self.acknowledged[segment.rollout_id] = max(known, end)
            if segment.finish_reason:
                self.finished.add(segment.rollout_id)

    # ---- clients -------------------------------------------------------------------------------------------------

    async def feed(self, client):
        while not self.ending.is_set():
            await client.capacity(1.0)
            await admit_all(client, 64)
            self.answers += 1

    async def engine(self, client, name):
        """Holds some rollouts, appends a piece of one or of several at a time, scores what is whole."""
        held = {}
        while not self.ending.is_set():
            if len(held) < IN_FLIGHT:
                wait_s = 0.0 if held else 0.5
                for lease in await client.lease(name, IN_FLIGHT - len(held), wait_s):
                    held[lease.rollout_id] = [lease.lease_id, self._prefix(lease)]
                self.answers += 1
            if not held:
                continue
            chosen = self.random.sample(sorted(held), self.random.randint(1, len(held)))
            segments = [self._next(r, *held[r]) for r in chosen]
            lost = await client.append(name, segments)
            self.refused += len(lost)
            self.note([s for s in segments if s.rollout_id not in lost])
            for segment in segments:
                held[segment.rollout_id][1] += len(segment.tokens)
            done = [s.rollout_id for s in segments if s.finish_reason and s.rollout_id not in lost]
            await self._score(client, {r: held[r][0] for r in done})
            for rollout_id in (*done, *lost):
                del held[rollout_id]
            if held and self.random.random() < 0.05:
                gone = self.random.choice(sorted(held))
                await client.release([(gone, held.pop(gone)[0])])
            await client.heartbeat(name)
        await client.release([(r, lease_id) for r, (lease_id, _) in held.items()])

    def _prefix(self, lease):
        """The tokens that a lease brings are those that were acknowledged, and perhaps some more."""
        have = np.frombuffer(lease.tokens, np.int32)
        assert np.array_equal(have, tokens_of(lease.rollout_id, len(have)))
        assert len(have) >= self.acknowledged.get(lease.rollout_id, 0), lease.rollout_id
        return len(have)

    def _next(self, rollout_id, lease_id, at):
        left = self.length_of(rollout_id) - at
        count = left if self.random.random() < 0.3 else min(left, self.random.choice([1, 7, 2500]))
        reason = "stop" if count == left else ""
        return part(rollout_id, lease_id, at, count, self.version, reason)

    async def _score(self, client, done):
        if done:
            scored = [wire.Scored(r, lease_id, reward_of(r)) for r, lease_id in done.items()]
            lost = await client.score(scored)
            self.refused += len(lost)
            self.scored |= set(done) - set(lost)
            self.answers += 1

    def read(self):
        """The learner: reads, checks, commits."""
        reader = BlockingBufferClient(self.buffer.address)
        try:
            while not self.ending.is_set():
                found = reader.read_batch(1.0)
                if found is None:
                    continue
                self.answers += 1
                selection, rows = found
                self._keep(rows)
                counts = reader.commit(selection.batch_ids, self.version + 1)
                assert counts.holds
                self.version += 1
                self.answers += 1
        except BaseException as problem:
            self.failures.append(problem)
            raise
        finally:
            reader.close()

    def _keep(self, rows):
        for rollout_id, tokens, logprobs in zip(
            rows["rollout_id"].to_pylist(), slices(rows["tokens"]), slices(rows["logprobs"]), strict=True
        ):
            assert len(tokens) == self.length_of(rollout_id)
            assert np.array_equal(tokens, tokens_of(rollout_id, len(tokens)))
            assert np.array_equal(logprobs, logprobs_of(rollout_id, len(tokens)))
            self.trained[rollout_id] += 1
        self.batches.append(rows.num_rows)

    async def clients(self):
        async with BufferClient(self.buffer.address) as feeder:
            engines = [BufferClient(self.buffer.address) for _ in range(ENGINES)]
            for client in engines:
                await client.__aenter__()
            tasks = [self.feed(feeder)]
            tasks += [self.engine(client, f"engine-{i}") for i, client in enumerate(engines)]
            await asyncio.gather(*tasks)
            for client in engines:
                await client.__aexit__()

    def run_clients(self):
        try:
            asyncio.run(self.clients())
        except BaseException as problem:
            self.failures.append(problem)
            raise


def kill_under_load(world, kills, seed):
    """SIGKILL some milliseconds after the shard answers again, and a new start on the same port and folder."""
    rng, buffer = random.Random(seed), world.buffer
    for _ in range(kills):
        before = world.answers
        until(
            lambda before=before: world.failures or world.answers >= before + 2, 30, "answers after a start"
        )
        assert not world.failures, world.failures
        time.sleep(rng.uniform(0.02, 0.15))
        shard = rng.randrange(buffer.config.shards)
        buffer.kill(shard)
        buffer.start(shard)


def survive(folder, kills, *, seed=SEED, **config):
    with process_buffer(
        folder, prompts_per_step=PER_STEP[0], rollouts_per_prompt=PER_STEP[1], lease_timeout_s=60.0, **config
    ) as buffer:
        buffer.client.publish(0)
        world = World(buffer, seed)
        threads = [threading.Thread(target=world.run_clients), threading.Thread(target=world.read)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            kill_under_load(world, kills, seed)
            progress = len(world.batches)
            until(lambda: world.failures or len(world.batches) > progress, 30, "batches after the last kill")
        finally:
            world.ending.set()
            for thread in threads:
                thread.join(30)
        assert not world.failures, world.failures
        assert not any(thread.is_alive() for thread in threads)
        status = buffer.client.status()
        counts = buffer.stop()
        print(
            f"{kills} kills in {time.monotonic() - begun:.1f} s: {world.answers} answers, "
            f"{sum(world.acknowledged.values())} tokens acknowledged, {len(world.batches)} batches, "
            f"{world.refused} leases lost, recovery {status.recovery}"
        )
        check(world, status, counts)


def check(world, status, counts):
    assert counts.holds and counts.trained == sum(world.trained.values()) == sum(world.batches)
    assert set(world.trained.values()) <= {1}
    assert status.version == world.version == len(world.batches)
    assert sum(world.acknowledged.values()) > 1000 and len(world.batches) >= 2
    if world.buffer.config.keep_log == "all":
        check_log(world, counts)


def check_log(world, counts):
    logged = logged_rollouts(world.buffer.log_folder)
    check_order(world.buffer.log_folder)
    for rollout_id, count in world.acknowledged.items():
        row = logged[rollout_id]
        assert row["tokens_count"] >= count
        assert row["tokens"] == tokens_of(rollout_id, row["tokens_count"]).tolist()
        assert row["logprobs"] == logprobs_of(rollout_id, row["tokens_count"]).tolist()
    # While the answer to a commit is lost the engines go on at the version before it: one that ends a whole group then may
    # miss the bound by one, and only such groups are dropped.
    gone = {r for r, row in logged.items() if row["state"] == "DROPPED"}
    assert counts.dropped == ({"over_stale": len(gone)} if gone else {}) and len(gone) < len(logged) / 10
    # What was finished is whole: trained, or still there with all of its tokens.
    for rollout_id in world.finished | world.scored:
        row = logged[rollout_id]
        assert row["tokens_count"] == world.length_of(rollout_id)
        kept = ("COMPLETE", "SCORED", "BATCHED", "QUEUED")
        assert rollout_id in gone or rollout_id in world.trained or row["state"] in kept, row
    for rollout_id in world.scored - set(world.trained) - gone:
        assert logged[rollout_id]["state"] in ("SCORED", "BATCHED")
    assert {r for r, row in logged.items() if row["state"] == "TRAINED"} == set(world.trained)
    assert counts.admitted == len(logged) and not counts.failed
    assert counts.live == len(logged) - len(world.trained) - len(gone)


@pytest.mark.timeout(240)
def test_fifty_kills_under_load_lose_nothing(tmp_path):
    survive(tmp_path, 50)


@pytest.mark.timeout(120)
def test_kills_lose_nothing_where_every_commit_is_on_the_disk(tmp_path):
    survive(tmp_path, 5, seed=SEED + 1, durability="fsync")


@pytest.mark.timeout(240)
def test_kills_of_one_of_two_shards_lose_nothing(tmp_path):
    survive(tmp_path, 10, seed=SEED + 2, shards=2)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("keep_log", ["all", "needed"])
def test_kills_at_rotations_lose_nothing(tmp_path, keep_log):
    """Files of 64 KiB: a generation begins every few appends."""
    survive(tmp_path, 8, seed=SEED + 3, rotate_bytes=2**16, keep_log=keep_log, memory_bytes=2**20)
    if keep_log == "needed":
        assert len(list((tmp_path / "rollouts" / "0").glob("segments-*"))) < 20


@pytest.mark.timeout(120)
@pytest.mark.parametrize("keep_log", ["all", "needed"])
def test_kills_in_the_midst_of_snapshots_and_restores(tmp_path, keep_log):
    """The call comes back by itself; a snapshot is there as a whole, and a restore finds what was there at its time."""
    rng, steps = random.Random(SEED), 6
    with process_buffer(tmp_path, prompts_per_step=2, keep_log=keep_log) as buffer:
        buffer.client.publish(0)
        taken = {}
        for step in range(1, steps + 1):
            goes_round(buffer)
            before = _figures(buffer)
            done = _kill_during(buffer, lambda step=step: buffer.client.snapshot(step, tuple(taken)), rng)
            assert (done.step, done.version, done.frontier) == (step, before["version"], before["frontier"])
            assert _figures(buffer) == before
            taken[step] = before
        for step in (steps, 2, 4):
            if step not in taken:
                continue
            done = _kill_during(buffer, lambda step=step: buffer.client.restore(step), rng)
            assert (done.step, done.version) == (step, taken[step]["version"])
            assert {**_figures(buffer), "serving": True} == taken[step]
            buffer.client.publish(done.version)
            assert _figures(buffer) == taken[step]
            taken = {kept: figures for kept, figures in taken.items() if kept <= step}
            goes_round(buffer)
        assert buffer.stop().holds


def _figures(buffer):
    status = buffer.client.status()
    kept = ("version", "serving", "states", "counts", "frontier", "held_groups", "lengths")
    return {name: getattr(status, name) for name in kept}


def _kill_during(buffer, call, rng):
    """Makes the call in a thread, kills the shard some milliseconds later; returns the call's own answer."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    time.sleep(rng.uniform(0.0, 0.012))
    buffer.kill()
    buffer.start()
    thread.join(30)
    assert answers, "the call did not come back"
    return answers[0]
