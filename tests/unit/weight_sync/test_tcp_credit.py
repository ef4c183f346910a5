"""The bound on what is on its way to one engine, when libzmq's word that pieces have left comes late: pyzmq hands it on in one
thread of the process, which waits for the GIL like any other (found at 2 GB: an engine that had all its answers was refused).
"""

import contextlib
import threading
import time

import pytest
import zmq

from asyncrl.weight_sync import chunks, credit
from asyncrl.weight_sync.opened import Opened
from asyncrl.weight_sync.pulling import Puller
from asyncrl.weight_sync.serving import ChunkServer
from tests.chunk_worlds import Bytes, Link, fetched, small_plan


@pytest.fixture(autouse=True)
def large_chunks(monkeypatch):
    """Large enough that they are sent without a copy, many to a version."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 20)


@contextlib.contextmanager
def late_word():
    """Until `go_on` is set, nobody in this process hears that a message sent without a copy has left."""
    stands, go_on = threading.Event(), threading.Event()

    class Held(bytearray):
        def __del__(self):
            stands.set()
            go_on.wait(20)

    context = zmq.Context()
    source, sink = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    try:
        sink.bind("inproc://late")
        source.connect("inproc://late")
        source.send(Held(1 << 20), copy=False)
        sink.recv()
        assert stands.wait(10)
        yield go_on
    finally:
        go_on.set()
        source.close(linger=0)
        sink.close(linger=0)
        context.term()


@pytest.fixture
def version():
    return Bytes(small_plan(tensors=40, elements=512 * 1024, bucket_bytes=16 << 20))


def test_an_engine_that_took_all_its_answers_is_not_refused_when_the_word_of_it_is_late(version):
    puller = Puller("e0")
    with ChunkServer("127.0.0.1", deltas=False) as server, late_word() as go_on:
        version.open_at(server, 0)
        threading.Timer(0.3, go_on.set).start()
        assert version.is_in(fetched(puller, version.offer(0, server.endpoint)))
        assert server.ignored["refused"] == 0
        assert server.close_version(0, timeout_s=10)
    puller.close()


def test_a_version_is_not_free_before_the_late_word():
    """Its engine has all of it, and yet libzmq may hold the pieces still."""
    puller = Puller("e0")
    with ChunkServer("127.0.0.1", deltas=False) as server:
        few = Bytes(small_plan(tensors=4, elements=512 * 1024, bucket_bytes=16 << 20))
        with late_word() as go_on:
            few.open_at(server, 0)
            assert few.is_in(fetched(puller, few.offer(0, server.endpoint)))
            assert not server.close_version(0, timeout_s=0.2)
            go_on.set()
            assert server.close_version(0, timeout_s=10)
    puller.close()


def test_who_asks_for_more_than_waits_is_refused_that_and_gets_the_rest(version):
    """It takes nothing for a while: what is on its way then is bounded, and the newest questions wait."""
    asked = 100
    context = zmq.Context()
    with ChunkServer("127.0.0.1") as server, Link(server.endpoint) as link:
        version.open_at(server, 0)
        engine = context.socket(zmq.DEALER)
        engine.setsockopt(zmq.ROUTING_ID, b"greedy")
        engine.connect(link.endpoint)
        link.stand_still(after=500)
        digest = Opened(0, version.view, version.plan, version.checksums, None).digest
        for number in range(asked):
            ask = chunks.Get(question=number, version=0, digest=digest, start=0, size=chunks.CHUNK_BYTES)
            engine.send(chunks.encode(ask))
        deadline = time.monotonic() + 10
        while server.ignored["refused"] < asked - 60 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.bytes_sent[0] < 60 * chunks.CHUNK_BYTES
        link.go_on()
        given_out, refused = [], []
        for _ in range(asked):
            assert engine.poll(10_000), "every question is answered"
            answer = chunks.decode_answer(engine.recv_multipart()[0])
            (refused if isinstance(answer, chunks.Refused) else given_out).append(answer.question)
        assert sorted(given_out + refused) == list(range(asked))
        assert given_out[-credit.HELD :] == list(range(asked - credit.HELD, asked))
        assert len(refused) == server.ignored["refused"]
        engine.close(linger=0)
    context.term()
