"""The buffer over its real sockets: a batch's way, waiting requests, refusals, repetitions, lost answers, restarts, and
the log that it leaves."""

import asyncio
import math
import threading
import time

import msgspec
import numpy as np
import pyarrow.compute as pc
import pytest

from asyncrl.buffer import (
    BlockingBufferClient,
    BufferAddress,
    BufferClient,
    PromptRow,
    connection,
    waiting,
    wire,
)
from asyncrl.buffer.arena import Arena, Region
from asyncrl.buffer.columns import slices
from asyncrl.buffer.errors import ArenaUnknown, BadRequest, EngineBarred
from asyncrl.buffer.reading import read_log
from asyncrl.buffer.schema import BATCH
from tests.buffer_world import (
    LosingProxy,
    RawClient,
    accounts,
    check_order,
    check_rows,
    generate,
    goes_round,
    logged_rollouts,
    part,
    process_buffer,
    score,
    until,
)
from tests.buffers import admit, admit_all, buffer_service, prompts

TOKENS = 4
LONG = 6000
"""Tokens of an append that goes through the arena."""


@pytest.fixture(params=[1, 3], ids=["1-shard", "3-shards"])
def shards(request):
    return request.param


@pytest.fixture
def world(tmp_path, shards):
    """(buffer, reader) with batches of 3 groups of 2, and version 0 published."""
    with buffer_service(tmp_path, prompts_per_step=3, shards=shards) as (buffer, reader):
        reader.publish(0)
        yield buffer, reader


def talk(buffer, coroutine, *arguments):
    """Runs `coroutine(client, ...)` with a client of its own."""

    async def run():
        async with BufferClient(buffer.address) as client:
            return await coroutine(client, *arguments)

    return asyncio.run(run())


async def _lease_all(client, engine="e"):
    leases = await client.lease(engine, 1000, 2.0)
    while more := await client.lease(engine, 1000, 0.1):
        leases += more
    return leases


async def lease_one(client, engine="e"):
    (lease,) = await client.lease(engine, 1, 2.0)
    return lease


# ---- a batch's way -----------------------------------------------------------------------------------------------------


def test_a_batch_goes_the_whole_way(world):
    buffer, reader = world
    assert asyncio.run(admit(buffer.address, 3)) == 3
    assert len(talk(buffer, generate)) == 6
    selection, rows = reader.read_batch(2.0)
    assert rows.schema == BATCH and rows.num_rows == 6
    assert selection.version == 0 and selection.tokens == selection.trainable_tokens == 24
    assert (selection.staleness_min, selection.staleness_mean, selection.staleness_max) == (0, 0.0, 0)
    assert rows["rollout_id"].to_pylist() == list(selection.rollout_ids)
    groups = rows["group_id"].to_pylist()
    assert groups[0::2] == groups[1::2] == list(selection.group_ids)
    assert sorted(p.tolist() for p in slices(rows["prompt_tokens"])) == [[1, 2, 3 + i // 2] for i in range(6)]
    check_rows(rows, TOKENS)
    assert all(flags.all() for flags in slices(rows["trainable"]))
    assert all((versions == 0).all() for versions in slices(rows["versions"]))
    assert rows["finish_reason"].to_pylist() == ["stop"] * 6
    counts = reader.commit(selection.batch_ids, 1)
    assert counts.holds and counts.trained == 6
    assert reader.status().states == dict.fromkeys(reader.status().states, 0)


def test_a_groups_rollouts_live_in_the_shard_that_their_ids_name(world):
    buffer, reader = world
    asyncio.run(admit(buffer.address, 3))
    talk(buffer, generate)
    _, rows = reader.read_batch(2.0)
    shards = buffer.config.shards
    assert {g % shards for g in rows["group_id"].to_pylist()} == set(range(shards))
    for rollout_id, group_id in zip(
        rows["rollout_id"].to_pylist(), rows["group_id"].to_pylist(), strict=True
    ):
        assert rollout_id % shards == group_id % shards
        segments = read_log(buffer.folder / "rollouts").segments
        mine = segments.filter(pc.field("rollout_id") == rollout_id)
        assert mine["shard"].unique().to_pylist() == [rollout_id % shards]


def test_many_batches_go_round_and_pacing_leaves_room_for_each(world):
    buffer, reader = world
    for step in range(4):
        assert reader.status().version == step
        assert goes_round(buffer).num_rows == 6


def test_tokens_past_the_bound_are_context_only(world):
    """Bound 1: what was sampled at version 0 is masked in the batch that leaves at version 2."""

    async def begin(client):
        await admit_all(client, 6)
        leases = await _lease_all(client, "slow")
        late = sorted({lease.group_id for lease in leases})[3:]
        slow = [lease for lease in leases if lease.group_id in late]
        await client.append("slow", [part(lease.rollout_id, lease.lease_id, 0, 2) for lease in slow])
        await client.engine_lost("slow")
        return {lease.group_id for lease in slow}

    async def fast(client, version, groups):
        """Finishes `groups` alone."""
        for lease in await _lease_all(client, "fast"):
            if lease.group_id in groups:
                have = len(lease.tokens) // 4
                rest = part(lease.rollout_id, lease.lease_id, have, 4 - have, version, "stop")
                await client.append("fast", [rest])
                await score(client, lease)
        await client.engine_lost("fast")

    buffer, reader = world
    late = talk(buffer, begin)
    # Two batches of fresh groups leave before the late ones are finished.
    for version in range(2):
        asyncio.run(admit(buffer.address, 100))
        fresh = talk(buffer, lambda client: _fresh_groups(client, late))
        talk(buffer, fast, version, fresh)
        selection, _ = reader.read_batch(2.0)
        reader.commit(selection.batch_ids, version + 1)
    talk(buffer, fast, 2, late)
    selection, rows = reader.read_batch(2.0)
    assert set(rows["group_id"].to_pylist()) == late
    assert selection.tokens == 4 * rows.num_rows and selection.trainable_tokens == 2 * rows.num_rows
    for versions, trainable in zip(slices(rows["versions"]), slices(rows["trainable"]), strict=True):
        assert versions.tolist() == [0, 0, 2, 2] and trainable.tolist() == [False, False, True, True]
    check_rows(rows, TOKENS)


async def _fresh_groups(client, late):
    found = {lease.group_id for lease in await _lease_all(client, "look")} - late
    await client.engine_lost("look")
    return found


# ---- waiting -------------------------------------------------------------------------------------------------------------


def test_a_read_waits_and_is_answered_as_soon_as_the_batch_is_whole(world):
    buffer, _ = world
    reader, got = BlockingBufferClient(buffer.address), []
    waiting = threading.Thread(target=lambda: got.append((reader.read_batch(20.0), time.monotonic())))
    waiting.start()
    asyncio.run(admit(buffer.address, 3))
    talk(buffer, generate)
    done = time.monotonic()
    waiting.join(10)
    reader.close()
    assert got[0][0] is not None and got[0][1] - done < 2.0


def test_a_lease_and_a_capacity_wait_and_are_answered_by_what_frees_them(world):
    buffer, reader = world
    asyncio.run(admit(buffer.address, 100))
    talk(buffer, generate)
    selection, _ = reader.read_batch(2.0)

    async def wait(client):
        leasing = asyncio.create_task(client.lease("late", 4, 20.0))
        room = asyncio.create_task(client.capacity(20.0))
        await asyncio.sleep(0.3)
        assert not leasing.done() and not room.done()
        begun = time.monotonic()
        await asyncio.to_thread(reader.commit, selection.batch_ids, 1)
        async with asyncio.timeout(10):
            assert any(await room)
            await admit_all(client, 3)
            assert await leasing
        assert time.monotonic() - begun < 5.0

    talk(buffer, wait)


def test_waiting_ends_at_its_deadline_with_an_empty_answer(tmp_path, shards):
    with buffer_service(tmp_path, prompts_per_step=3, shards=shards) as (buffer, reader):

        def took(call):
            begun = time.monotonic()
            return call(), time.monotonic() - begun

        answer, took_s = took(lambda: reader.read_batch(0.3))
        assert answer is None and 0.3 <= took_s < 2.0

        async def wait(client):
            assert await client.capacity(0.3) == [0] * shards
            assert await client.lease("e", 4, 0.3) == []

        _, took_s = took(lambda: talk(buffer, wait))
        assert 0.6 <= took_s < 4.0
        waits = reader.status().waits_s
        assert 0.3 <= waits["learner waits for rollouts"] < 2.0
        assert 0.3 <= waits["prompts wait for staleness"] < 2.0
        assert waits["engines wait for prompts"] * shards >= 0.3


def test_an_admission_that_a_snapshot_holds_up_ends_at_its_deadline_by_name(world):
    """It was answered with a `Number`, in which the feeder looked for `admitted`."""
    buffer, reader = world

    async def frozen(client):
        for shard in range(client.shards):
            await client.ask(shard, wire.Freeze(seconds=60.0))
        with pytest.raises(BadRequest, match="nothing was admitted: a snapshot"):
            await client.admit(0, prompts(1), timeout_s=0.2)
        admission = asyncio.create_task(client.admit(0, prompts(1), timeout_s=20.0))
        await asyncio.sleep(0.1)
        assert not admission.done()
        await asyncio.to_thread(reader.snapshot, 1)
        assert (await admission).admitted == 1

    talk(buffer, frozen)
    assert reader.status().counts.admitted == 2


def test_what_waits_when_the_buffer_stops_is_answered(world):
    """An admission that a snapshot held up was told that the snapshot had lasted all the time."""
    buffer, reader = world

    async def wait(client):
        for shard in range(client.shards):
            await client.ask(shard, wire.Freeze(seconds=60.0))
        waiting = (
            wire.Lease(engine_id="e", limit=1, after=0, timeout_s=20.0),
            wire.ReadBatch(after=0, timeout_s=20.0, from_files=False),
            wire.Capacity(timeout_s=20.0),
        )
        asked = [asyncio.create_task(client.ask(0, request, timeout_s=20.0)) for request in waiting]
        admission = asyncio.create_task(client.admit(0, prompts(1), timeout_s=20.0))
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in (*asked, admission))
        await asyncio.to_thread(reader.stop)
        async with asyncio.timeout(5):
            with pytest.raises(BadRequest, match="nothing was admitted: the buffer is stopping"):
                await admission
            answers = [await task for task in asked]
        assert answers == [wire.Leases(rollouts=[]), wire.Number(value=0), wire.Number(value=0)]

    talk(buffer, wait)
    for thread in buffer.threads:
        thread.join(10)


def test_more_waiting_requests_than_there_is_room_for_are_refused_by_name(world, monkeypatch):
    monkeypatch.setattr(waiting, "MOST_WAITING", 3)
    buffer, _ = world
    with RawClient(buffer.address.endpoints[0], buffer.client_keys) as client:
        read = wire.ReadBatch(after=0, timeout_s=20.0, from_files=False)
        sent = [client.send_request(read) for _ in range(3)]
        refused = client.ask(wire.Lease(engine_id="e", limit=1, after=0, timeout_s=20.0))
        assert (
            refused.kind == BadRequest.__name__ and "3 requests wait at this shard already" in refused.message
        )
        assert isinstance(client.ask(wire.Status()), wire.Report)
        client.send_request(read, request_id=sent[0])  # the same once more takes no more room
        assert client.receive(0.2) is None


# ---- engines that are lost -------------------------------------------------------------------------------------------------


async def _begin_as_a(client):
    await admit_all(client, 3)
    lease = await lease_one(client, "a")
    assert await client.append("a", [part(lease.rollout_id, lease.lease_id, 0, 3)]) == []
    return lease


async def _go_on_as_b(client, lost):
    leases = {lease.rollout_id: lease for lease in await client.lease("b", 1000, 2.0)}
    again = leases[lost.rollout_id]
    assert again.lease_id > lost.lease_id
    assert np.frombuffer(again.tokens, np.int32).tolist() == part(lost.rollout_id, 1, 0, 3).tokens.tolist()
    assert again.prompt_tokens == lost.prompt_tokens and again.payload == lost.payload == '{"answer": "x"}'
    # The old holder can do nothing any more.
    assert await client.append("a", [part(lost.rollout_id, lost.lease_id, 3, 1)]) == [lost.rollout_id]
    assert await client.score([wire.Scored(lost.rollout_id, lost.lease_id, 1.0)]) == [lost.rollout_id]
    await client.fail(lost.rollout_id, lost.lease_id, "late")
    await client.release([(lost.rollout_id, lost.lease_id)])
    for lease in leases.values():
        have = len(lease.tokens) // 4
        rest = part(lease.rollout_id, lease.lease_id, have, TOKENS - have, finish_reason="stop")
        assert await client.append("b", [rest]) == []
        await score(client, lease)


@pytest.mark.parametrize("how", ["released", "engine lost"])
def test_a_rollout_that_lost_its_engine_goes_on_elsewhere_with_its_prefix(world, how):
    buffer, reader = world

    async def lose(client):
        lease = await _begin_as_a(client)
        if how == "released":
            await client.release([(lease.rollout_id, lease.lease_id)])
        else:
            assert await client.engine_lost("a") == 1
        await _go_on_as_b(client, lease)

    talk(buffer, lose)
    check_rows(reader.read_batch(2.0)[1], TOKENS)


def test_a_lease_without_a_sign_of_life_is_taken_back_and_a_heartbeat_keeps_it(tmp_path, shards):
    with buffer_service(tmp_path, prompts_per_step=3, shards=shards, lease_timeout_s=1.0) as (buffer, reader):
        reader.publish(0)

        async def lose(client):
            lease = await _begin_as_a(client)
            for _ in range(6):
                await asyncio.sleep(0.4)
                await client.heartbeat("a")
            assert await client.append("a", [part(lease.rollout_id, lease.lease_id, 0, 3)]) == []
            leases = reader.status().states["leased"]
            assert leases == 1
            await asyncio.sleep(3.2)  # past the deadline and a tick of the service
            assert reader.status().states["leased"] == 0
            await _go_on_as_b(client, lease)

        talk(buffer, lose)
        check_rows(reader.read_batch(2.0)[1], TOKENS)


def test_a_failed_attempt_begins_again_without_its_tokens(world):
    buffer, reader = world

    async def fail(client):
        lease = await _begin_as_a(client)
        await client.fail(lease.rollout_id, lease.lease_id, "the engine said no")
        again = next(x for x in await client.lease("b", 1000, 2.0) if x.rollout_id == lease.rollout_id)
        assert again.tokens == b"" and again.lease_id > lease.lease_id
        await client.engine_lost("b")
        await generate(client)

    talk(buffer, fail)
    check_rows(reader.read_batch(2.0)[1], TOKENS)


# ---- refusals --------------------------------------------------------------------------------------------------------------


def _append(lease, start=2, count=2, *, logprobs=None, body=None, **changes):
    """(request, body) of one segment; `body` replaces what belongs there."""
    segment = part(lease.rollout_id, lease.lease_id, start, count)
    numbers = segment.logprobs if logprobs is None else np.array(logprobs, np.float32)
    request = wire.Append(
        engine_id="e",
        rollout_ids=[lease.rollout_id],
        lease_ids=[lease.lease_id],
        starts=[start],
        versions=[0],
        lengths=[count],
        finish_reasons=[""],
    )
    whole = segment.tokens.tobytes() + numbers.tobytes()
    return msgspec.structs.replace(request, **changes), whole if body is None else body


def _admission(**changes):
    request = wire.Admit(positions=[500], prompt_ids=["p"], payloads=["{}"], lengths=[2], timeout_s=0.0)
    return msgspec.structs.replace(request, **changes), b"12345678"


def _scored(lease, reward, request=wire.Score):
    return request(rollouts=[wire.Scored(lease.rollout_id, lease.lease_id, reward)]), None


BAD = {
    "past the capacity": (lambda _: _admission(), "capacity is 0"),
    "admission of different lengths": (lambda _: _admission(payloads=[]), "differ in length"),
    "admission with too short a body": (
        lambda _: _admission(lengths=[3]),
        "8 bytes of tokens, the lengths say 12",
    ),
    "out of order": (lambda lease: _append(lease, 3), "starts at token 3, expected 2"),
    "overlapping": (lambda lease: _append(lease, 1), "starts at token 1, expected 2"),
    "NaN": (lambda lease: _append(lease, logprobs=[-1, math.nan]), "logprob nan"),
    "Inf": (lambda lease: _append(lease, logprobs=[math.inf, -1]), "logprob inf"),
    "-Inf": (lambda lease: _append(lease, logprobs=[-math.inf, -1]), "logprob -inf"),
    "short body": (lambda lease: _append(lease, body=b"1234567"), "expected a body of 16 bytes"),
    "long body": (lambda lease: _append(lease, body=b"1" * 17), "expected a body of 16 bytes"),
    "no body": (lambda lease: _append(lease, body=b""), "expected a body of 16 bytes"),
    "fewer leases than rollouts": (
        lambda lease: _append(lease, lease_ids=[]),
        "1 rollout_ids and 0 lease_ids",
    ),
    "more versions than rollouts": (
        lambda lease: _append(lease, versions=[0, 0]),
        "1 rollout_ids and 2 versions",
    ),
    "a version never published": (
        lambda lease: _append(lease, versions=[2]),
        "has version 2, published is 0",
    ),
    "reward NaN": (lambda lease: _scored(lease, math.nan), "must be finite"),
    "reward Inf": (lambda lease: _scored(lease, math.inf), "must be finite"),
    "reward past float32": (lambda lease: _scored(lease, 1e300), "must be finite"),
    "score of an unfinished rollout": (lambda lease: _scored(lease, 1.0), None),
    "commit of nothing": (lambda _: (wire.Commit(batch_id=7, version=1), None), "batch 7 is not handed over"),
    "commit of another version": (
        lambda _: (wire.Commit(batch_id=1, version=5), None),
        "publishes version 5, expected 1",
    ),
    "publish of another version": (
        lambda _: (wire.Publish(version=3), None),
        "version 3 published outside a commit",
    ),
    "restore of no snapshot": (lambda _: (wire.Restore(step=9), None), "no snapshot of step 9"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_by_name_and_nothing_is_lost(world, name):
    buffer, _ = world
    make, message = BAD[name]

    async def ask(client):
        lease = await _one_with_prefix(client)
        before = accounts(await client.status())
        request, body = make(lease)
        shard = lease.rollout_id % client.shards
        if message is None:  # a lease's matter: the rollout is named in the answer
            assert (await client.ask(shard, request, body)).rollout_ids == [lease.rollout_id]
        else:
            with pytest.raises(BadRequest, match=message):
                await client.ask(shard, request, body)
        assert accounts(await client.status()) == before
        await _finish_from_prefix(client, lease)

    talk(buffer, ask)
    goes_round(buffer)
    goes_round(buffer)


async def _one_with_prefix(client):
    """All that there is room for is admitted, and one rollout has two tokens."""
    await admit_all(client, 100)
    lease = await lease_one(client)
    assert await client.append("e", [part(lease.rollout_id, lease.lease_id, 0, 2)]) == []
    return lease


async def _finish_from_prefix(client, lease):
    rest = part(lease.rollout_id, lease.lease_id, 2, TOKENS - 2, finish_reason="stop")
    assert await client.append("e", [rest]) == []
    await score(client, lease)


def test_a_rollout_cannot_finish_without_a_token(world):
    buffer, _ = world

    async def ask(client):
        await admit_all(client, 100)
        lease = await lease_one(client)
        with pytest.raises(BadRequest, match="finished without a sampled token"):
            await client.append("e", [part(lease.rollout_id, lease.lease_id, 0, 0, finish_reason="stop")])
        # With a token before it an empty last segment is right, and right again when it comes twice.
        await client.append("e", [part(lease.rollout_id, lease.lease_id, 0, TOKENS)])
        for _ in range(2):
            last = part(lease.rollout_id, lease.lease_id, TOKENS, 0, finish_reason="stop")
            assert await client.append("e", [last]) == []
        await score(client, lease)

    talk(buffer, ask)
    goes_round(buffer)


def test_of_many_segments_those_with_a_lost_lease_are_named_and_the_others_taken(world):
    buffer, _ = world

    async def ask(client):
        await admit_all(client, 100)
        leases = await client.lease("e", 4, 2.0)
        segments = [part(x.rollout_id, x.lease_id + 900 * (i % 2), 0, 2) for i, x in enumerate(leases)]
        refused = await client.append("e", segments)
        assert sorted(refused) == sorted(x.rollout_id for x in leases[1::2])
        assert await client.append("e", [part(x.rollout_id, x.lease_id, 2, 1) for x in leases[0::2]]) == []
        await client.engine_lost("e")

    talk(buffer, ask)
    goes_round(buffer)


def test_a_region_of_an_arena_that_is_unknown_or_too_small_or_another_s_is_refused(world):
    buffer, _ = world

    async def ask(client):
        lease = await _one_with_prefix(client)
        shard = lease.rollout_id % client.shards
        before = accounts(await client.status())
        arena = Arena(4096)
        region = arena.allocate(16)
        inside, _ = _append(lease, region=region, body_hash=1)
        with pytest.raises(ArenaUnknown, match="attach it"):
            await client.ask(shard, inside)
        await client.ask(shard, wire.Attach(location=arena.location))
        with pytest.raises(BadRequest, match="not what was sent"):
            await client.ask(shard, inside)
        for wrong in (Region(0, 16), Region(4090, 16), Region(2**62, 16), Region(64, 2**62)):
            with pytest.raises(BadRequest, match="between the arena's header and its end"):
                await client.ask(shard, _append(lease, region=wrong)[0])
        assert accounts(await client.status()) == before
        arena.close()
        await _finish_from_prefix(client, lease)

    talk(buffer, ask)
    goes_round(buffer)


def test_a_location_that_is_no_arena_is_refused_with_the_reason_and_frames_are_used(world):
    buffer, _ = world
    arena = Arena(2**20)
    with RawClient(buffer.address.endpoints[0], buffer.client_keys) as client:
        for changes, reason in (
            ({"boot_id": "elsewhere"}, "another host"),
            ({"pid": 2**40}, "cannot be opened"),
            ({"fd": 2**40}, "cannot be opened"),
            ({"token": arena.location.token ^ 1}, "its token is another"),
            ({"size_bytes": 2**30}, "bytes, got"),
        ):
            location = msgspec.structs.replace(arena.location, **changes)
            assert reason in client.ask(wire.Attach(location=location)).refused
    arena.close()
    goes_round(buffer)


# ---- arenas and frames --------------------------------------------------------------------------------------------------------


def test_the_arena_and_frames_carry_the_same(world):
    buffer, reader = world

    async def long(client):
        await admit_all(client, 3)
        await generate(client, tokens=LONG)
        return client._attached, client._arena._regions.taken

    async def without_arena(client):
        """The same with bodies in frames alone."""
        await admit_all(client, 3)
        client._attached = dict.fromkeys(range(client.shards), False)
        await generate(client, tokens=LONG)

    attached, taken = talk(buffer, long)
    assert attached == dict.fromkeys(range(buffer.config.shards), True) and not taken
    talk(buffer, without_arena)
    for version in (1, 2):
        selection, rows = reader.read_batch(5.0)
        check_rows(rows, LONG)
        reader.commit(selection.batch_ids, version)


def test_a_batch_that_was_read_stays_as_it_is_while_the_next_ones_are_read(world):
    buffer, reader = world
    kept = []
    for version in range(3):
        talk(buffer, admit_all, 3)
        talk(buffer, _generate_at, version)
        selection, rows = reader.read_batch(5.0)
        kept.append((rows, rows.to_pylist()))
        reader.commit(selection.batch_ids, version + 1)
    assert all(rows.to_pylist() == was for rows, was in kept)


async def _generate_at(client, version):
    await generate(client, tokens=50, version=version)


def test_a_process_that_outlives_its_machine_s_death_does_not_get_what_was_freed(world):
    """It waited for work when its engine was given up: what it had held must go to another."""
    buffer, reader = world

    async def outlived(client):
        await _lease_all(client, "zombie")
        waiting = asyncio.create_task(client.lease("zombie", 8, 30.0))
        await asyncio.sleep(0.1)
        async with BufferClient(buffer.address) as supervisor:
            assert await supervisor.engine_lost("zombie", for_good=True) == 6
        with pytest.raises(EngineBarred):
            await waiting
        assert len(await _lease_all(client, "next")) == 6

    talk(buffer, admit_all, 3)
    talk(buffer, outlived)
    assert reader.status().states["leased"] == 6


# ---- sent twice, lost on the way -------------------------------------------------------------------------------------------------


def test_what_is_sent_twice_is_done_once(tmp_path):
    """Every request of a batch's way: under the same id, under another, and by another connection."""
    with buffer_service(tmp_path, prompts_per_step=1) as (buffer, _):
        address = buffer.address.endpoints[0]
        with (
            RawClient(address, buffer.client_keys) as first,
            RawClient(address, buffer.client_keys) as second,
        ):

            def thrice(request, body=None, again=None):
                """The answer. `again`: the answer to the repetitions, where it is another."""
                sent = first.send_request(request, body)
                reply = wire.decode_reply(first.receive()[1])
                after = accounts(first.ask(wire.Status()))
                repeated = (
                    first.ask(request, body, sent),
                    first.ask(request, body),
                    second.ask(request, body),
                )
                assert list(repeated) == [again or reply] * 3, request
                assert accounts(first.ask(wire.Status())) == after, request
                return reply

            thrice(wire.Publish(version=0))
            admission = wire.Admit(
                positions=[0], prompt_ids=["p"], payloads=["{}"], lengths=[2], timeout_s=1.0
            )
            thrice(admission, bytes(8), again=wire.Admitted(admitted=0, passed_over=1))
            leases = thrice(wire.Lease(engine_id="e", limit=2, after=0, timeout_s=1.0)).rollouts
            assert len(leases) == 2
            a, b = leases
            thrice(wire.Heartbeat(engine_id="e"))
            thrice(*_append(a, 0))
            thrice(*_append(a, 2, finish_reasons=["stop"]))
            thrice(*_append(b, 0, 1))
            refused = wire.Refused(rollout_ids=[b.rollout_id])
            thrice(wire.Release(leases=[(b.rollout_id, b.lease_id)]), again=refused)
            (b,) = thrice(wire.Lease(engine_id="e", limit=2, after=b.lease_id, timeout_s=1.0)).rollouts
            thrice(wire.Fail(rollout_id=b.rollout_id, lease_id=b.lease_id, reason="no"), again=refused)
            (b,) = thrice(wire.Lease(engine_id="f", limit=2, after=0, timeout_s=1.0)).rollouts
            thrice(wire.EngineLost(engine_id="f"), again=wire.Number(value=0))
            (b,) = thrice(wire.Lease(engine_id="e", limit=2, after=b.lease_id, timeout_s=1.0)).rollouts
            thrice(*_append(b, 0, 4, finish_reasons=["length"]))
            thrice(_scored(a, 1.0)[0])
            thrice(_scored(b, 0.5)[0])
            batch = thrice(wire.ReadBatch(after=0, timeout_s=1.0, from_files=True))
            assert batch.selection.batch_ids == (1,)
            thrice(wire.Snapshot(step=1, keep=[]))
            assert thrice(wire.Commit(batch_id=1, version=1)).counts.trained == 2
            assert thrice(wire.Restore(step=1)).version == 0
        life = [row["state"] for row in check_order(tmp_path / "rollouts").states.to_pylist()]
        assert life.count("SCORED") == life.count("BATCHED") == 2
        assert life.count("TRAINED") == 0  # the restore moved it aside


# ---- snapshots -----------------------------------------------------------------------------------------------------------


async def _generate_in_a_client_of_its_own(buffer, version):
    async with BufferClient(buffer.address) as client:
        await generate(client, version=version)


def _train(buffer, reader, prompts_wanted=3):
    """Admits, generates, reads and commits one batch; returns its prompts."""
    asyncio.run(admit(buffer.address, prompts_wanted))
    version = reader.status().version
    asyncio.run(_generate_in_a_client_of_its_own(buffer, version))
    selection, rows = reader.read_batch(5.0)
    reader.commit(selection.batch_ids, selection.version + 1)
    return sorted(prompt.tolist() for prompt in slices(rows["prompt_tokens"]))


def test_after_a_restore_the_same_prompts_are_trained_again_and_no_others(world):
    """Over all shards: what was committed after the snapshot comes again, what was before it does not."""
    buffer, reader = world
    first = _train(buffer, reader)
    taken = reader.snapshot(1)
    assert (taken.step, taken.version, taken.frontier) == (1, 1, 3)
    second, third = _train(buffer, reader), _train(buffer, reader)
    assert len({*map(tuple, first), *map(tuple, second), *map(tuple, third)}) == 9
    back = reader.restore(1)
    assert (back.version, back.frontier) == (1, 3) and not reader.status().serving
    assert reader.status().counts.trained == 6 and reader.read_batch(0.1) is None
    reader.publish(1)
    assert [_train(buffer, reader), _train(buffer, reader)] == [second, third]
    assert reader.status().counts.trained == 18


def test_a_snapshot_keeps_what_was_half_generated(world):
    """A partial rollout goes on from the tokens that it had at the snapshot, under a lease of its own."""
    buffer, reader = world
    asyncio.run(admit(buffer.address, 3))

    async def begin(client):
        lease = await lease_one(client)
        assert await client.append("e", [part(lease.rollout_id, lease.lease_id, 0, 3)]) == []
        return lease

    async def go_on(client, before):
        assert await client.append("e", [part(before.rollout_id, before.lease_id, 3, 1)]) == [
            before.rollout_id
        ]
        again = next(
            lease for lease in await _lease_all(client, "f") if lease.rollout_id == before.rollout_id
        )
        assert len(again.tokens) == 4 * 3 and again.lease_id > before.lease_id

    before = talk(buffer, begin)
    reader.snapshot(0)
    reader.restore(0)
    reader.publish(0)
    talk(buffer, go_on, before)


def _ask_again_soon(monkeypatch):
    monkeypatch.setattr(connection, "_ASK_AGAIN_S", 0.3)
    monkeypatch.setattr(connection, "_ASK_WAITING_S", 0.2)


@pytest.fixture
def proxied(world, monkeypatch):
    """(buffer, reader, proxies, the proxied address). Clients ask again soon."""
    _ask_again_soon(monkeypatch)
    buffer, reader = world
    proxies = [LosingProxy(endpoint) for endpoint in buffer.address.endpoints]
    address = BufferAddress(endpoints=tuple(p.endpoint for p in proxies), keys=buffer.client_keys)
    yield buffer, reader, proxies, address
    for proxy in proxies:
        proxy.close()


def test_every_answer_of_a_batchs_way_may_be_lost_once(proxied):
    buffer, _, proxies, address = proxied

    def lose():
        for proxy in proxies:
            proxy.lose()

    async def engine():
        async with BufferClient(address) as client:
            await client.status()
            lose()
            assert len(await client.capacity(1.0)) == client.shards
            rooms = await client.capacity(1.0)
            first = 0
            for shard, room in enumerate(rooms):
                lose()
                rows = prompts(room // 2, first)
                done = await client.admit(shard, rows)
                # When the second request came the first had been carried out: its prompts are known.
                assert (done.admitted, done.passed_over) == (0, len(rows))
                first += len(rows)
            lose()
            leases = await client.lease("e", 1000, 5.0)
            lose()
            leases += await client.lease("e", 1000, 1.0)
            assert len({lease.rollout_id for lease in leases}) == len(leases) == 6
            segments = [part(x.rollout_id, x.lease_id, 0, LONG) for x in leases]
            lose()
            assert await client.append("e", segments) == []
            lose()
            last = [part(x.rollout_id, x.lease_id, LONG, 1, finish_reason="stop") for x in leases]
            assert await client.append("e", last) == []
            lose()
            scored = [wire.Scored(x.rollout_id, x.lease_id, x.rollout_id % 3) for x in leases]
            assert await client.score(scored) == []

    asyncio.run(engine())
    reader = BlockingBufferClient(address)
    reader.status()
    lose()
    selection, rows = reader.read_batch(5.0)
    check_rows(rows, LONG + 1)
    assert set(selection.batch_ids) == {1} and rows.num_rows == 6
    lose()
    assert reader.commit(selection.batch_ids, 1).trained == 6
    reader.close()
    assert sum(p.lost for p in proxies) >= 8
    goes_round(buffer)


def test_what_a_client_did_not_read_before_it_ended_is_given_to_its_successor(world):
    buffer, reader = world
    asyncio.run(admit(buffer.address, 3))

    def ask_and_end(request):
        for endpoint in buffer.address.endpoints:
            with RawClient(endpoint, buffer.client_keys) as client:
                client.ask(wire.Heartbeat(engine_id="other"))  # the connection stands
                client.send_request(request)
                time.sleep(0.2)

    ask_and_end(wire.Lease(engine_id="e", limit=1000, after=0, timeout_s=1.0))
    assert reader.status().states["leased"] == 6

    async def successor(client):
        assert await client.lease("other", 1000, 0.1) == []
        leases = await _lease_all(client)
        assert len({x.rollout_id for x in leases}) == len(leases) == 6
        for lease in leases:
            whole = part(lease.rollout_id, lease.lease_id, 0, TOKENS, finish_reason="stop")
            assert await client.append("e", [whole]) == []
            await score(client, lease)

    talk(buffer, successor)
    ask_and_end(wire.ReadBatch(after=0, timeout_s=1.0, from_files=True))
    assert reader.status().states["batched"] == 6
    selection, rows = reader.read_batch(2.0)
    check_rows(rows, TOKENS)
    assert set(selection.batch_ids) == {1}
    assert reader.commit(selection.batch_ids, 1).trained == 6
    assert reader.read_batch(0.1) is None


def test_a_cancellation_that_comes_together_with_the_answer_is_not_lost(world):
    """`asyncio.wait_for` of Python 3.11 returned the answer and forgot the cancellation: an outbox that was told to end
    went on, and its dispatcher hung."""
    buffer, _ = world

    async def cancel_with_answer(client):
        waiting = wire.Lease(engine_id="e", limit=1, after=0, timeout_s=20.0)
        asking = asyncio.create_task(client.ask(0, waiting, timeout_s=20.0))
        await asyncio.sleep(0.2)  # the request is out, and its answer is awaited
        (asked,) = client._shards[0].asked.values()
        asked.answer.set_result([b"id", wire.encode(wire.Number(value=1))])
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    talk(buffer, cancel_with_answer)
    goes_round(buffer)


# ---- restarts -------------------------------------------------------------------------------------------------------------------


def test_clients_go_on_by_themselves_after_a_restart(world, monkeypatch):
    _ask_again_soon(monkeypatch)
    buffer, _ = world
    reader, got = BlockingBufferClient(buffer.address), []

    def read():
        """As the learner does: again until there is a batch."""
        while not got:
            found = reader.read_batch(20.0)
            if found:
                got.append(found)

    async def engine(client):
        await admit_all(client, 3)
        leases = await _lease_all(client)
        assert len(leases) == 6
        halves = [part(x.rollout_id, x.lease_id, 0, LONG) for x in leases]
        assert await client.append("e", halves) == []
        before = accounts(await client.status())
        waiting = asyncio.create_task(client.lease("idle", 4, 3.0))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(buffer.again)
        after = await client.status()
        assert after.recovery.live_rollouts == 6 and after.recovery.live_tokens == 6 * LONG
        assert after.recovery.cut_bytes == 0
        states = (after.states, after.counts, after.version, after.serving, after.frontier)
        assert states == (before.states, before.counts, before.version, before.serving, before.frontier)
        # The same leases hold, and the arena is shown to the new service without being asked for.
        rest = [part(x.rollout_id, x.lease_id, LONG, LONG, finish_reason="stop") for x in leases]
        assert await client.append("e", rest) == []
        for lease in leases:
            await score(client, lease)
        await waiting
        assert await client.engine_lost("idle") == 0

    waiting = threading.Thread(target=read)
    waiting.start()
    talk(buffer, engine)
    waiting.join(20)
    assert not waiting.is_alive()
    check_rows(got[0][1], 2 * LONG)
    assert reader.commit(got[0][0].batch_ids, 1).trained == 6
    reader.close()
    goes_round(buffer)


def test_a_single_call_outlives_a_kill_of_the_process(tmp_path, monkeypatch):
    """A read, a lease and a capacity wait in one shard when it is killed: each of the same calls brings the answer."""
    _ask_again_soon(monkeypatch)
    with process_buffer(tmp_path, prompts_per_step=1, rollouts_per_prompt=1, bound=0) as buffer:
        buffer.client.publish(0)
        reader, got = BlockingBufferClient(buffer.address), []
        reading = threading.Thread(target=lambda: got.append(reader.read_batch(30.0)))
        reading.start()

        async def engine(client):
            room = asyncio.create_task(client.lease("e", 1, 30.0))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(buffer.kill)
            buffer.start()
            assert await admit_all(client, 1) == 1
            (lease,) = await room
            await client.append(
                "e", [part(lease.rollout_id, lease.lease_id, 0, TOKENS, finish_reason="stop")]
            )
            await score(client, lease)

        talk(buffer, engine)
        reading.join(20)
        check_rows(got[0][1], TOKENS)
        assert reader.commit(got[0][0].batch_ids, 1).trained == 1
        reader.close()


# ---- figures and the log --------------------------------------------------------------------------------------------------------


def test_the_status_says_what_there_is(world):
    buffer, reader = world
    shards = buffer.config.shards

    async def some(client):
        assert (await client.status()).capacity_groups == 6
        await admit_all(client, 4)
        leases = await _lease_all(client)
        a, b, c, *others = leases
        await client.append("e", [part(a.rollout_id, a.lease_id, 0, 7, finish_reason="stop")])
        await client.append("e", [part(b.rollout_id, b.lease_id, 0, 7, finish_reason="stop")])
        await score(client, b)
        await client.release([(c.rollout_id, c.lease_id)])
        status = await client.status()
        assert status.version == 0 and status.serving
        assert status.states == {"queued": 1, "leased": 5, "complete": 1, "scored": 1, "batched": 0}
        assert (status.held_groups, status.capacity_groups, status.frontier) == (4, 2, 4)
        assert status.counts.admitted == status.counts.live == 8 and status.counts.holds
        assert status.memory_bytes == buffer.config.memory_bytes // shards * shards
        assert status.held_bytes == 2 * 7 * 8
        assert status.disk_full == "" and status.quarantined == 0 and status.recovery is None
        await client.release([(lease.rollout_id, lease.lease_id) for lease in others])
        await client.release([(a.rollout_id, a.lease_id)])

    talk(buffer, some)
    talk(buffer, lambda client: generate(client, tokens=7))
    selection, _ = reader.read_batch(2.0)
    reader.commit(selection.batch_ids, 1)
    status = reader.status()
    assert status.version == 1 and status.lengths == {7: 6} and status.dropped_lengths == {}
    assert (status.spanning_trained, status.most_versions) == (0, 1)


def test_a_prompt_that_fails_again_and_again_is_quarantined_and_replaced(world):
    buffer, _ = world

    async def poison(client):
        await admit_all(client, 100)
        bad = None
        for _ in range(buffer.config.max_attempts):
            leases = await _lease_all(client)
            bad = bad or leases[0].rollout_id
            lease = next(x for x in leases if x.rollout_id == bad)
            await client.append("e", [part(lease.rollout_id, lease.lease_id, 0, 5)])
            await client.fail(lease.rollout_id, lease.lease_id, "poison")
            await client.engine_lost("e")
        status = await client.status()
        assert status.quarantined == 1 and status.counts.failed == {"poison": 1} and status.counts.holds
        assert sum(status.counts.dropped.values()) == 1
        again = await client.admit(
            bad % client.shards, [PromptRow(prompt_id="p0", tokens=[1], payload="", position=90)]
        )
        assert again.admitted + again.passed_over == 1

    talk(buffer, poison)
    goes_round(buffer)


def test_the_log_holds_every_token_and_every_change_in_order(world):
    buffer, reader = world
    rows = goes_round(buffer, tokens=5)
    open_log = read_log(buffer.folder / "rollouts")  # while it is still written
    assert open_log.segments.num_rows == 12  # all that there was room for
    reader.stop()
    for thread in buffer.threads:
        thread.join(10)
    log = check_order(buffer.folder / "rollouts")
    trained = rows["rollout_id"].to_pylist()
    states = log.states.to_pylist()
    for rollout_id in trained:
        life = [s["state"] for s in states if s["rollout_id"] == rollout_id]
        assert life == ["QUEUED", "LEASED", "COMPLETE", "SCORED", "BATCHED", "TRAINED"]
    logged = logged_rollouts(buffer.folder / "rollouts")
    assert len(logged) == 12
    for rollout_id, row in logged.items():
        expected = part(rollout_id, 1, 0, 5)
        assert row["tokens"] == expected.tokens.tolist() and row["logprobs"] == expected.logprobs.tolist()
        assert row["state"] == ("TRAINED" if rollout_id in trained else "SCORED")


def test_a_torn_end_is_left_out_of_the_tables_and_cut_off_by_the_next_start(world):
    buffer, reader = world
    asyncio.run(admit(buffer.address, 3))
    talk(buffer, generate)
    before = accounts(reader.status())
    buffer.stop()
    whole = read_log(buffer.folder / "rollouts").segments
    for shard in range(buffer.config.shards):
        path = buffer.log(shard) / "segments-000001.arrows"
        with path.open("ab") as file:
            file.write(path.read_bytes()[-60:])
    torn = read_log(buffer.folder / "rollouts")
    assert torn.segments.equals(whole)
    buffer.start()
    after = reader.status()
    assert after.recovery.cut_bytes == 60 * buffer.config.shards
    assert (after.counts, after.states, after.lengths) == (before.counts, before.states, before.lengths)
    goes_round(buffer)


def test_noise_of_a_client_of_the_run_does_not_end_the_process(world):
    buffer, reader = world
    before = accounts(reader.status())
    for endpoint in buffer.address.endpoints:
        with RawClient(endpoint, buffer.client_keys) as client:
            for frames in (
                [b""],
                [b"1"],
                [b"1", b"\xff\xfe"],
                [b"1", b"\x80"],
                [b"1", b"2", b"3", b"4"],
                [b"1", b"\xc1", b""],
                [b"x" * 8, b"\xc1"],
                [b"x" * 8, b"\x80", b"", b"", b""],
            ):
                client.send(*frames)
            client.ask(
                wire.Heartbeat(engine_id="noise"), request_id=b"afterall"
            ) if client.receive() else None
    until(lambda: accounts(reader.status()) == before, 5, "the accounts as before")
    goes_round(buffer)
