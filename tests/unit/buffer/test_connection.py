"""One client's connection to a shard: many requests under way, one timer for all of them, and an end to every wait."""

import asyncio
import contextlib
import logging
import time

import pytest
import zmq

from asyncrl.buffer import connection, wire
from asyncrl.buffer.connection import BlockingConnection, Connection, ask_again_in
from asyncrl.buffer.errors import BadRequest, BufferUnreachable, DiskFull, LeaseLost
from asyncrl.buffer.keys import make_keys
from tests.buffer_world import free_port

LOOK_S, AGAIN_S, GRACE_S = 0.02, 0.1, 0.5
LEASE = wire.Lease(engine_id="e", limit=1, after=0, timeout_s=0.0)


@pytest.fixture
def hurried(monkeypatch):
    for name, seconds in (("_LOOK_S", LOOK_S), ("_ASK_AGAIN_S", AGAIN_S), ("GRACE_S", GRACE_S)):
        monkeypatch.setattr(connection, name, seconds)
    monkeypatch.setattr(connection, "_DISK_FULL_PAUSE_S", 0.1)


@pytest.fixture
def nobody(tmp_path, hurried):
    """(endpoint, keys) where nobody listens."""
    _, keys = make_keys(tmp_path / "keys")
    return f"tcp://127.0.0.1:{free_port()}", keys


class Silent:
    """Stands in for the socket: notes what is sent, and answers when it is told to."""

    def __init__(self, own):
        self.own, self.sent, self.answers = own, [], []

    def __getattr__(self, name):
        return getattr(self.own, name)

    def send_multipart(self, frames, *_, **__):
        self.sent.append(bytes(frames[0]))

    def recv_multipart(self, *_, **__):
        if not self.answers:
            raise zmq.Again
        return self.answers.pop(0)

    def getsockopt(self, option):
        return zmq.POLLIN if option == zmq.EVENTS and self.answers else 0

    def answer(self, request_id, reply):
        self.answers.append([request_id, wire.encode(reply)])


@contextlib.asynccontextmanager
async def silent(nobody):
    """(connection, socket)"""
    made = Connection(*nobody)
    made._socket = socket = Silent(made._socket)
    made.open()
    try:
        yield made, socket
    finally:
        await made.close()


def run(coroutine):
    async def within():
        async with asyncio.timeout(20):
            await coroutine

    asyncio.run(within())


def ask_many(made, count, timeout_s=0.0):
    return [asyncio.create_task(made.ask(LEASE, timeout_s=timeout_s)) for _ in range(count)]


def test_one_timer_looks_after_all_requests(nobody, monkeypatch):
    """A timer for each of a thousand engines' requests would cost more than the requests."""
    looks = []
    real = Connection._look
    monkeypatch.setattr(Connection, "_look", lambda self: (looks.append(len(self.asked)), real(self))[1])

    async def many():
        async with silent(nobody) as (made, socket):
            begun = time.monotonic()
            tasks = ask_many(made, 300)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            took_s = time.monotonic() - begun
            assert all(isinstance(result, BufferUnreachable) for result in results)
            assert "no answer from the buffer at tcp://127.0.0.1" in str(results[0])
            assert not made.asked
            assert 0 < len(looks) <= took_s / LOOK_S + 1 and max(looks) == 300
            assert GRACE_S <= took_s < GRACE_S + 2
            # Each was sent, and sent again every so often.
            times = [socket.sent.count(request_id) for request_id in {*socket.sent}]
            assert len(times) == 300 and min(times) >= 2 and max(times) <= GRACE_S / AGAIN_S + 1

    run(many())


def test_the_timer_rests_when_nothing_is_asked_and_runs_again_when_something_is(nobody):
    async def rest():
        async with silent(nobody) as (made, socket):
            for _ in range(2):
                (task,) = ask_many(made, 1)
                await asyncio.sleep(0)
                assert made._timer is not None
                (request_id,) = made.asked
                socket.answer(request_id, wire.Leases(rollouts=[]))
                made._take_answers()
                assert (await task).reply == wire.Leases(rollouts=[]) and not made.asked
                await asyncio.sleep(3 * LOOK_S)
                assert made._timer is None

    run(rest())


def test_every_answer_finds_its_request_in_whatever_order_they_come(nobody):
    async def shuffled():
        async with silent(nobody) as (made, socket):
            tasks = ask_many(made, 50)
            await asyncio.sleep(0)
            for n, request_id in reversed([*enumerate(made.asked)]):
                socket.answer(request_id, wire.Number(value=n))
            socket.answer(b"unknown!", wire.Number(value=-1))  # to one who gave up
            socket.answer(next(iter(made.asked)), wire.Number(value=-2))  # the same answered twice
            made._take_answers()
            assert [(await task).reply.value for task in tasks] == list(range(50))
            assert not made.asked

    run(shuffled())


def test_what_may_wait_is_given_its_time(nobody):
    async def wait():
        async with silent(nobody) as (made, _):
            begun = time.monotonic()
            short, long = made.ask(LEASE), made.ask(LEASE, timeout_s=0.6)
            results = await asyncio.gather(_until_over(short), _until_over(long))
            assert GRACE_S <= results[0] - begun < GRACE_S + 0.4
            assert GRACE_S + 0.6 <= results[1] - begun < GRACE_S + 1.0

    run(wait())


async def _until_over(asking):
    with pytest.raises(BufferUnreachable):
        await asking
    return time.monotonic()


def test_a_cancelled_request_is_forgotten_and_not_sent_again(nobody):
    async def cancel():
        async with silent(nobody) as (made, socket):
            first, second = ask_many(made, 2)
            await asyncio.sleep(0)
            gone, stays = made.asked
            first.cancel()
            await asyncio.sleep(2.5 * AGAIN_S)
            assert [*made.asked] == [stays]
            assert socket.sent.count(gone) == 1 and socket.sent.count(stays) >= 2
            socket.answer(stays, wire.Number(value=1))
            made._take_answers()
            assert (await second).reply.value == 1 and first.cancelled()

    run(cancel())


def test_closing_ends_what_is_under_way(nobody):
    async def close():
        async with silent(nobody) as (made, _):
            tasks = ask_many(made, 3)
            await asyncio.sleep(0)
        for task in tasks:
            with pytest.raises(asyncio.CancelledError):
                await task
        assert made._timer is not None and made._timer.cancelled()

    run(close())


@pytest.mark.parametrize("kind", [LeaseLost, BadRequest, "of a later version"])
def test_a_refusal_is_raised_by_its_name(nobody, kind):
    async def refuse():
        async with silent(nobody) as (made, socket):
            (task,) = ask_many(made, 1)
            await asyncio.sleep(0)
            name = kind if isinstance(kind, str) else kind.__name__
            socket.answer(next(iter(made.asked)), wire.Problem(kind=name, message="no"))
            made._take_answers()
            with pytest.raises(BadRequest if isinstance(kind, str) else kind, match="no"):
                await task

    run(refuse())


def test_a_full_disk_is_asked_again_for_a_long_time_without_being_taken_for_silence(nobody, monkeypatch):
    """Each refusal is a sign of life: the request's time begins anew, until that has lasted too long."""
    monkeypatch.setattr(connection, "_DISK_FULL_S", 1.2)
    refusal = wire.Problem(kind=DiskFull.__name__, message="no room")

    async def full(made, socket):
        """Refuses at once, whatever is asked."""
        while True:
            for request_id, asked in made.asked.items():
                if not asked.answer.done():
                    socket.answer(request_id, refusal)
            made._take_answers()
            await asyncio.sleep(0.01)

    async def ask():
        async with silent(nobody) as (made, socket):
            answering = asyncio.create_task(full(made, socket))
            begun = time.monotonic()
            with pytest.raises(DiskFull, match="no room"):
                await made.ask(LEASE)
            assert 1.2 <= time.monotonic() - begun < 2.0  # past the time after which silence is the end
            assert len({*socket.sent}) == 1 and len(socket.sent) >= 5
            answering.cancel()

    run(ask())


def test_asking_again_is_noted(nobody, caplog):
    async def ask():
        async with silent(nobody) as (made, _):
            with pytest.raises(BufferUnreachable):
                await made.ask(LEASE)

    with caplog.at_level(logging.INFO, "asyncrl.buffer.connection"):
        run(ask())
    assert f"Lease to {nobody[0]}: asking again" in caplog.text


def test_who_waits_long_is_asked_for_on_the_way_too():
    assert ask_again_in(0.0) == ask_again_in(-5.0) == 2.0
    assert ask_again_in(3.0) == 5.0 and ask_again_in(3600.0) == 10.0


def test_a_connection_that_is_not_open_says_so(nobody):
    made = Connection(*nobody)
    with pytest.raises(RuntimeError, match="is not open"):
        run(made.ask(LEASE))
    run(made.close())


def test_a_blocking_request_ends_too(nobody):
    made, begun = BlockingConnection(*nobody), time.monotonic()
    with pytest.raises(BufferUnreachable, match="to Lease within 0 s"):
        made.ask(LEASE, timeout_s=0.1, grace_s=0.3)
    assert 0.4 <= time.monotonic() - begun < 2.0
    made.close()
