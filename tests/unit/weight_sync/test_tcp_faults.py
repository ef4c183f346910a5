"""The `tcp` transport when the link, the server, the bytes or the keys are not as they should be."""

import asyncio
import logging
import time

import msgspec
import pytest
import zmq

from asyncrl.weight_sync import chunks, credit
from asyncrl.weight_sync.errors import ChecksumError, WeightSyncError
from asyncrl.weight_sync.opened import Opened
from asyncrl.weight_sync.pulling import Puller
from asyncrl.weight_sync.serving import ChunkServer
from tests.chunk_worlds import Bytes, Keys, Link, fetched, small_plan


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4096)


@pytest.fixture
def large_chunks(monkeypatch):
    """Large enough that they are sent without a copy."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 20)


@pytest.fixture
def server():
    with ChunkServer("127.0.0.1") as made:
        yield made


@pytest.fixture
def puller():
    made = Puller("e0")
    yield made
    made.close()


def test_a_connection_that_breaks_goes_on_from_the_chunk_that_is_missing(server, puller, small_chunks):
    version = Bytes(small_plan(tensors=20))
    version.open_at(server, 0)
    with Link(server.endpoint) as link:
        link.break_after(version.plan.total_bytes // 2)
        assert version.is_in(fetched(puller, version.offer(0, link.endpoint)))
        assert link.breaks == 1
    again = server.bytes_sent[0] - puller.bytes_pulled
    assert 0 < again <= 2 * chunks.WINDOW * chunks.CHUNK_BYTES, "only what was on its way is sent twice"


def test_a_delta_goes_on_over_a_new_connection_too(server, puller, small_chunks):
    before = Bytes(small_plan(tensors=20, bucket_bytes=64 * 1024))
    after = Bytes(before.plan, seed=1, base=before, share=0.3)
    before.open_at(server, 0)
    with Link(server.endpoint) as link:
        fetched(puller, before.offer(0, link.endpoint))
        after.open_at(server, 1)
        link.break_after(10_000)
        assert after.is_in(fetched(puller, after.offer(1, link.endpoint)))
        assert link.breaks == 1
    assert puller.bytes_pulled < before.plan.total_bytes / 2


def test_a_server_that_died_and_came_back_goes_on_where_the_other_stopped(puller, small_chunks):
    version = Bytes(small_plan(tensors=20))
    first = ChunkServer("127.0.0.1")
    version.open_at(first, 0)

    async def scenario():
        with Link(first.endpoint, bytes_per_s=400_000) as link:
            fetch = asyncio.create_task(puller.fetch(version.offer(0, link.endpoint), 20))
            await asyncio.to_thread(until, lambda: link.carried >= 50_000)
            await asyncio.to_thread(first.stop)
            sent = first.bytes_sent[0]
            assert not fetch.done() and sent < version.plan.total_bytes
            port = int(first.endpoint.rsplit(":", 1)[1])
            with ChunkServer("127.0.0.1", port=port) as second:
                version.open_at(second, 0)
                assert version.is_in(await fetch)
                assert second.bytes_sent[0] < version.plan.total_bytes - 30_000

    asyncio.run(scenario())


def test_nobody_there_ends_at_the_deadline_and_says_so(puller):
    version = Bytes(small_plan())
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match="never connected"):
        fetched(puller, version.offer(0, "tcp://127.0.0.1:9"), timeout_s=0.5)
    assert time.monotonic() - started < 3


def test_a_link_that_stands_still_ends_at_the_deadline_and_the_next_fetch_is_right(
    server, puller, small_chunks
):
    before = Bytes(small_plan(tensors=20))
    before.open_at(server, 0)
    with Link(server.endpoint) as link:
        link.stand_still(after=20_000)
        with pytest.raises(WeightSyncError, match=r"within 0\.5 s, .* of .* asked for came"):
            fetched(puller, before.offer(0, link.endpoint), timeout_s=0.5)
        link.go_on()
        assert before.is_in(fetched(puller, before.offer(0, link.endpoint)))


def test_a_cancelled_fetch_leaves_no_base(server, puller, small_chunks):
    before = Bytes(small_plan(tensors=20))
    after = Bytes(before.plan, seed=1, base=before, share=0.3)
    before.open_at(server, 0)
    fetched(puller, before.offer(0, server.endpoint))
    after.open_at(server, 1)

    async def scenario():
        with Link(server.endpoint, bytes_per_s=50_000) as link:
            fetch = asyncio.create_task(puller.fetch(after.offer(1, link.endpoint), 20))
            await asyncio.to_thread(until, lambda: link.carried >= 10_000)
            cancelled = time.monotonic()
            fetch.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetch
            assert time.monotonic() - cancelled < 1
        assert after.is_in(await puller.fetch(after.offer(1, server.endpoint), 20))

    asyncio.run(scenario())
    assert puller.bytes_pulled >= before.plan.total_bytes * 0.99, (
        "patched in part, it is no base for anything"
    )


def test_bytes_that_changed_at_the_learner_are_noticed(server, puller):
    version = Bytes(small_plan())
    version.map[5000] ^= 1
    version.open_at(server, 0)
    with pytest.raises(ChecksumError, match="bucket 0"):
        fetched(puller, version.offer(0, server.endpoint))


@pytest.mark.parametrize("wrong", ("another", "garbage"))
def test_a_delta_that_does_not_lead_to_the_right_bytes_is_replaced_by_the_whole_bucket(
    server, puller, monkeypatch, caplog, wrong
):
    before = Bytes(small_plan())
    after, other = (Bytes(before.plan, seed=seed, base=before) for seed in (1, 2))
    before.open_at(server, 0)
    fetched(puller, before.offer(0, server.endpoint))
    made = Opened(1, other.view, after.plan, after.checksums, None)
    right = Opened.make

    def make(self, bucket, base):
        if bucket == 1:
            return right(made, bucket, base) if wrong == "another" else b"no delta at all" * 9
        return right(self, bucket, base)

    monkeypatch.setattr(Opened, "make", make)
    after.open_at(server, 1)
    with caplog.at_level(logging.WARNING):
        assert after.is_in(fetched(puller, after.offer(1, server.endpoint)))
    assert "bucket=1" in caplog.text
    sizes = [bucket.size for bucket in after.plan.buckets]
    assert sizes[1] < puller.bytes_pulled < 2 * sizes[1]


def test_an_error_of_the_delta_maker_is_raised_and_engines_get_whole_buckets(server, puller, monkeypatch):
    before = Bytes(small_plan())
    after = Bytes(before.plan, seed=1, base=before)
    before.open_at(server, 0)
    fetched(puller, before.offer(0, server.endpoint))

    def broken(self, bucket, base):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Opened, "make", broken)
    after.open_at(server, 1)
    assert after.is_in(fetched(puller, after.offer(1, server.endpoint)))
    with pytest.raises(WeightSyncError, match="planted"):
        server.check()


def test_bytes_are_not_free_while_they_are_on_their_way(server, large_chunks):
    """The engine stands still with more asked for than its connection holds."""
    version = Bytes(small_plan(tensors=40, elements=512 * 1024, bucket_bytes=1 << 20))
    version.open_at(server, 0)
    context = zmq.Context()
    with Link(server.endpoint) as link:
        engine = context.socket(zmq.DEALER)
        engine.setsockopt(zmq.ROUTING_ID, b"slow")
        engine.connect(link.endpoint)
        link.stand_still(after=500)
        digest = Opened(0, version.view, version.plan, version.checksums, None).digest
        for number in range(credit.PIECES):
            start = number * chunks.CHUNK_BYTES
            ask = chunks.Get(question=number, version=0, digest=digest, start=start, size=chunks.CHUNK_BYTES)
            engine.send(chunks.encode(ask))
        until(lambda: server.bytes_sent[0] == credit.PIECES * chunks.CHUNK_BYTES)
        assert not server.close_version(0, timeout_s=0.2)
        assert not server.close_version(0, timeout_s=0.2), "asked again, it is no more free than before"
        link.go_on()
        assert server.close_version(0, timeout_s=10)
        engine.close(linger=0)
    context.term()
    version.view.release()
    version.map.close()  # raises while anybody has a view of it


def test_the_bytes_of_a_dead_engine_become_free(server, large_chunks):
    version = Bytes(small_plan(tensors=40, elements=512 * 1024, bucket_bytes=1 << 20))
    version.open_at(server, 0)
    with Link(server.endpoint) as link:
        context = zmq.Context()
        engine = context.socket(zmq.DEALER)
        engine.setsockopt(zmq.ROUTING_ID, b"dead")
        engine.connect(link.endpoint)
        link.stand_still(after=500)
        digest = Opened(0, version.view, version.plan, version.checksums, None).digest
        for number in range(credit.PIECES):
            ask = chunks.Get(question=number, version=0, digest=digest, start=0, size=chunks.CHUNK_BYTES)
            engine.send(chunks.encode(ask))
        until(lambda: server.bytes_sent[0] == credit.PIECES * chunks.CHUNK_BYTES)
        assert not server.close_version(0, timeout_s=0.1)
        context.destroy(linger=0)
    assert server.close_version(0, timeout_s=10)


@pytest.mark.parametrize(
    ("start", "size"), [(-1, 10), (0, 0), (0, -5), (0, chunks.CHUNK_BYTES + 1), (10**6, 10), (2**62, 2**20)]
)
def test_what_lies_outside_is_refused(server, start, size):
    version = Bytes(small_plan())
    version.open_at(server, 0)
    with engine_at(server) as ask:
        digest = Opened(0, version.view, version.plan, version.checksums, None).digest
        answer = ask(chunks.Get(question=1, version=0, digest=digest, start=start, size=size))
        assert isinstance(answer, chunks.Refused) and "bytes from" in answer.reason
        find = chunks.Find(question=2, version=0, digest=digest, base=0, base_digest=digest, bucket=10**9)
        assert isinstance(ask(find), chunks.Refused)
        assert isinstance(ask(msgspec.structs.replace(find, question=3, version=7)), chunks.Refused)


def test_what_is_no_question_is_counted_and_nothing_breaks(server, puller):
    version = Bytes(small_plan())
    version.open_at(server, 0)
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.connect(server.endpoint)
    for frames in ([b"\xff\xff"], [b""], [b"a", b"b", b"c"]):
        stranger.send_multipart(frames)
    until(lambda: server.ignored["malformed question"] == 3)
    context.destroy(linger=0)
    assert version.is_in(fetched(puller, version.offer(0, server.endpoint)))


@pytest.mark.parametrize("who", ("none", "another run's"))
def test_without_the_run_s_key_no_byte_comes(who):
    keys = Keys()
    version = Bytes(small_plan())
    with ChunkServer("127.0.0.1", keys.server) as server:
        version.open_at(server, 0)
        stranger = Puller("stranger", None if who == "none" else Keys().client)
        member = Puller("member", keys.client)
        try:
            with pytest.raises(WeightSyncError, match="never connected"):
                fetched(stranger, version.offer(0, server.endpoint), timeout_s=1)
            assert server.bytes_sent[0] == 0
            assert version.is_in(fetched(member, version.offer(0, server.endpoint)))
        finally:
            stranger.close()
            member.close()


def test_a_version_that_is_compared_is_closed_after_that(monkeypatch):
    """`close_version` waits for the bucket at work, and gives up at its deadline."""
    import threading

    before = Bytes(small_plan())
    after = Bytes(before.plan, seed=1, base=before)
    going, go_on, right = threading.Event(), threading.Event(), Opened.make

    def slow(self, bucket, base):
        going.set()
        assert go_on.wait(20)
        return right(self, bucket, base)

    monkeypatch.setattr(Opened, "make", slow)
    with ChunkServer("127.0.0.1") as server:
        before.open_at(server, 0)
        after.open_at(server, 1)
        with engine_at(server, wait=False) as ask:
            digests = [
                Opened(0, each.view, each.plan, each.checksums, None).digest for each in (before, after)
            ]
            ask(
                chunks.Find(
                    question=1, version=1, digest=digests[1], base=0, base_digest=digests[0], bucket=0
                )
            )
            assert going.wait(10)
            assert not server.close_version(0, timeout_s=0.2)
            assert not server.close_version(0, timeout_s=0.2), "asked again, it is no more free than before"
            go_on.set()
            assert server.close_version(0, timeout_s=10)


def until(condition, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class engine_at:
    """A bare engine: `ask(question)` returns the answer."""

    def __init__(self, server, *, wait=True):
        self._server, self._wait = server, wait

    def __enter__(self):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, b"bare")
        self._socket.connect(self._server.endpoint)
        return self._ask

    def __exit__(self, *error):
        self._context.destroy(linger=0)

    def _ask(self, question):
        self._socket.send(chunks.encode(question))
        if not self._wait:
            return None
        assert self._socket.poll(10_000)
        return chunks.decode_answer(self._socket.recv_multipart()[0])
