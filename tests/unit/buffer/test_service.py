"""The buffer over its real socket: a batch's way, waiting requests, refusals, and the log that it leaves."""

import asyncio
import threading
import time

import pyarrow as pa
import pytest
import zmq

from asyncrl.buffer import BlockingBufferClient, BufferClient, wire
from asyncrl.buffer.client import BadRequest
from asyncrl.buffer.columns import slices
from asyncrl.buffer.log import read_stream
from asyncrl.generators.prompts import Prompt
from asyncrl.runtime.feeder import prompt_rows
from tests.buffers import buffer_service, segment_rows


def prompts(count):
    return prompt_rows([Prompt(f"p{i}", [1, 2, 3 + i], '{"answer": "x"}') for i in range(count)])


async def work(endpoint, *, tokens=4, version=0, limit=100):
    """Leases what there is, and finishes and scores it."""
    async with BufferClient(endpoint) as client:
        leases = await client.lease("e", limit, 2.0)
        for rollout_id, lease_id in zip(
            leases["rollout_id"].to_pylist(), leases["lease_id"].to_pylist(), strict=True
        ):
            rows = segment_rows(rollout_id, lease_id, 0, range(10, 10 + tokens), version, "stop")
            assert await client.append("e", rows) == []
            assert await client.score([wire.Scored(rollout_id, lease_id, float(rollout_id))]) == []
        return leases.num_rows


async def admit(endpoint, count):
    async with BufferClient(endpoint) as client:
        return await client.admit(prompts(count))


def test_a_batch_goes_the_whole_way(tmp_path):
    with buffer_service(tmp_path / "log") as (service, client):
        client.publish(0)
        assert asyncio.run(admit(service.endpoint, 2)) == 2
        assert asyncio.run(work(service.endpoint)) == 4
        selection, rows = client.read_batch(2.0)
        assert selection.version == 0 and rows.num_rows == 4 and selection.trainable_tokens == 16
        assert rows["group_id"].to_pylist() == [1, 1, 2, 2]
        assert [p.tolist() for p in slices(rows["prompt_tokens"])] == [
            [1, 2, 3],
            [1, 2, 3],
            [1, 2, 4],
            [1, 2, 4],
        ]
        assert all(t.tolist() == [10, 11, 12, 13] for t in slices(rows["tokens"]))
        assert all(flags.all() for flags in slices(rows["trainable"]))
        assert rows["reward"].to_pylist() == [1.0, 2.0, 3.0, 4.0]
        counts = client.commit(selection.batch_id, 1)
        assert counts.holds and counts.trained == 4
        assert client.status().states == dict.fromkeys(client.status().states, 0)


def test_a_read_waits_and_is_answered_as_soon_as_the_batch_is_whole(tmp_path):
    with buffer_service(tmp_path / "log") as (service, client):
        client.publish(0)
        reader = BlockingBufferClient(service.endpoint)
        got = []
        waiting = threading.Thread(target=lambda: got.append((reader.read_batch(20.0), time.monotonic())))
        waiting.start()
        asyncio.run(admit(service.endpoint, 2))
        asyncio.run(work(service.endpoint))
        done = time.monotonic()
        waiting.join(10)
        reader.close()
        assert got[0][0] is not None and got[0][1] - done < 2.0


def test_waiting_ends_at_its_deadline_with_an_empty_answer(tmp_path):
    with buffer_service(tmp_path / "log") as (service, client):
        assert client.read_batch(0.2) is None

        async def wait():
            async with BufferClient(service.endpoint) as asker:
                assert await asker.capacity(0.1) == 0
                assert (await asker.lease("e", 4, 0.1)).num_rows == 0

        asyncio.run(wait())
        waits = client.status().waits_s
        assert waits["learner waits for rollouts"] >= 0.2 and waits["prompts wait for staleness"] >= 0.1


def test_a_rollout_that_lost_its_engine_goes_on_elsewhere_with_its_prefix(tmp_path):
    async def lose_and_go_on(endpoint):
        async with BufferClient(endpoint) as a, BufferClient(endpoint) as b:
            lease = (await a.lease("a", 1, 1.0)).to_pylist()[0]
            await a.append("a", segment_rows(lease["rollout_id"], lease["lease_id"], 0, [7, 8, 9]))
            await a.release([(lease["rollout_id"], lease["lease_id"])])
            again = (await b.lease("b", 1, 1.0)).to_pylist()[0]
            assert again["rollout_id"] == lease["rollout_id"] and again["tokens"] == [7, 8, 9]
            refused = await a.append("a", segment_rows(lease["rollout_id"], lease["lease_id"], 3, [1]))
            assert refused == [lease["rollout_id"]]
            rows = segment_rows(again["rollout_id"], again["lease_id"], 3, [4], finish_reason="stop")
            assert await b.append("b", rows) == []

    with buffer_service(tmp_path / "log", prompts_per_step=1, rollouts_per_prompt=1) as (service, client):
        client.publish(0)
        asyncio.run(admit(service.endpoint, 1))
        asyncio.run(lose_and_go_on(service.endpoint))


def test_a_bad_request_is_told_to_its_asker_and_changes_nothing(tmp_path):
    async def ask(endpoint):
        async with BufferClient(endpoint) as client:
            with pytest.raises(BadRequest, match="capacity is 0"):
                await client.admit(prompts(1))
            with pytest.raises(BadRequest):
                await client.ask(wire.Append(engine_id="e"), pa.py_buffer(b"no arrow"))
            with pytest.raises(BadRequest, match="finite"):
                await client.score([wire.Scored(1, 1, float("nan"))])

    with buffer_service(tmp_path / "log") as (service, client):
        asyncio.run(ask(service.endpoint))
        assert client.status().counts.admitted == 0


def test_noise_on_the_socket_does_not_end_the_process(tmp_path):
    with buffer_service(tmp_path / "log") as (service, client):
        socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(service.endpoint)
        for frames in (
            [b""],
            [b"1"],
            [b"1", b"\xff\xfe"],
            [b"1", b"\x80"],
            [b"1", b"2", b"3", b"4"],
            [b"1", b"\xc1", b""],
        ):
            socket.send_multipart(frames)
        socket.close()
        assert client.status().version == -1


def test_the_log_holds_every_token_and_every_change_in_order(tmp_path):
    with buffer_service(tmp_path / "log") as (service, client):
        client.publish(0)
        asyncio.run(admit(service.endpoint, 2))
        asyncio.run(work(service.endpoint, tokens=5))
        selection, _ = client.read_batch(2.0)
        open_segments = read_stream(tmp_path / "log" / "segments.arrows")  # while it is still written
        client.commit(selection.batch_id, 1)
    assert open_segments.num_rows == 4
    states = read_stream(tmp_path / "log" / "states.arrows").to_pylist()
    life = [s["state"] for s in states if s["rollout_id"] == 1]
    assert life == ["QUEUED", "LEASED", "COMPLETE", "SCORED", "BATCHED", "TRAINED"]
    segments = read_stream(tmp_path / "log" / "segments.arrows").to_pylist()
    assert sum(len(s["tokens"]) for s in segments) == 20
    everything = [
        row["seq"]
        for name in ("prompts", "segments", "states")
        for row in read_stream(tmp_path / "log" / f"{name}.arrows").to_pylist()
    ]
    assert sorted(everything) == list(range(len(everything)))


def test_a_torn_end_is_left_out(tmp_path):
    with buffer_service(tmp_path / "log") as (service, client):
        client.publish(0)
        asyncio.run(admit(service.endpoint, 2))
        asyncio.run(work(service.endpoint))
    path = tmp_path / "log" / "segments.arrows"
    whole = path.read_bytes()
    path.write_bytes(whole[:-60])
    assert 0 <= read_stream(path).num_rows <= 4


def test_a_cancellation_that_comes_together_with_the_answer_is_not_lost(tmp_path):
    """`asyncio.wait_for` of Python 3.11 returned the answer and forgot the cancellation: an outbox that was told to end
    went on, and its dispatcher hung."""

    async def cancel_with_answer(endpoint):
        async with BufferClient(endpoint) as client:
            asking = asyncio.create_task(client.capacity(20.0))
            await asyncio.sleep(0.2)  # the request is out, and its answer is awaited
            (answer,) = client._answers.values()
            answer.set_result([zmq.Frame(b"id"), zmq.Frame(wire.encode(wire.Number(value=1)))])
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    with buffer_service(tmp_path / "log") as (service, _):
        asyncio.run(cancel_with_answer(service.endpoint))
