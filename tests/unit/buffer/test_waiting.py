"""Requests that wait: in order, each until its deadline, and no more of them than there is room for."""

import pytest

from asyncrl.buffer import waiting, wire
from asyncrl.buffer.errors import BadRequest
from asyncrl.buffer.waiting import Look, WaitingRoom

A, B, C, D = ((b"asker", bytes([n])) for n in range(4))


def lease(timeout_s=10.0):
    return wire.Lease(engine_id="e", limit=1, after=0, timeout_s=timeout_s)


def read(timeout_s=10.0):
    return wire.ReadBatch(after=0, timeout_s=timeout_s, from_files=True)


def keys(found):
    return [w.key for w in found]


def served(room, answers=0, no_room=()):
    """Keys that are looked at while the first `answers` of them get something, but for those that have no room for it."""
    seen = []

    def attempt(found):
        seen.append(found.key)
        if found.key in no_room:
            return Look.NOT_FOR_IT
        return Look.ANSWERED if len(seen) <= answers else Look.NOTHING

    room.serve(attempt)
    return seen


def test_of_one_kind_one_that_gets_nothing_stands_for_all_but_new_ones_are_looked_at():
    room = WaitingRoom()
    for key in (A, B, C):
        room.put(key, lease(), b"", 0.0)
    assert served(room) == [A, A, B, C]  # as the first of its kind, and each once because it is new
    assert served(room) == [A]
    room.put(D, read(), b"", 0.0)
    assert served(room) == [A, D, D]
    assert served(room, answers=2) == [A, B, C, D]
    assert keys(room) == [C, D]


def test_one_without_room_holds_nobody_up():
    room = WaitingRoom()
    for key in (A, B, C, D):
        room.put(key, lease(), b"", 0.0)
    assert served(room, answers=3, no_room=[A, B]) == [A, B, C, D, A, B, D]
    assert keys(room) == [A, B, D]
    assert served(room, answers=2, no_room=[A]) == [A, B, D] and keys(room) == [A, D]


def test_requests_are_numbered_as_they_come_and_one_that_comes_again_keeps_its_number():
    room = WaitingRoom()
    for key in (A, B, A, C):
        room.put(key, lease(), b"", 0.0)
    assert [(w.key, w.number) for w in room] == [(A, 1), (B, 2), (C, 3)]


def test_each_waits_until_its_deadline():
    room = WaitingRoom()
    room.put(A, lease(5.0), b"", 0.0)
    room.put(B, read(2.0), b"", 1.0)
    room.put(C, lease(9.0), b"", 1.0)
    assert room.next_deadline() == 3.0
    assert keys(room.late(2.9)) == [] and keys(room.late(3.0)) == [B]
    assert keys(room.late(20.0)) == [A, C] and keys(room) == []
    assert room.next_deadline() == float("inf")


def test_the_same_request_once_more_keeps_its_place_and_its_deadline():
    room = WaitingRoom()
    room.put(A, lease(5.0), b"first", 0.0)
    room.put(B, lease(5.0), b"", 1.0)
    room.put(A, lease(5.0), b"again", 4.0)
    assert [(w.key, w.body, w.deadline) for w in room] == [(A, b"again", 5.0), (B, b"", 6.0)]
    assert keys(room.late(5.0)) == [A]


def test_beyond_the_bound_the_newest_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(waiting, "MOST_WAITING", 2)
    room = WaitingRoom()
    room.put(A, lease(), b"", 0.0)
    room.put(B, read(), b"", 0.0)
    with pytest.raises(BadRequest, match=r"2 requests wait at this shard already, .* Lease was refused"):
        room.put(C, lease(), b"", 1.0)
    room.put(B, read(), b"", 1.0)  # no new one
    assert keys(room) == [A, B]
    assert served(room, answers=1)[:1] == [A]
    room.put(C, lease(), b"", 2.0)  # there is room again
    assert {*keys(room)} == {B, C}


def test_the_bound_is_one_hundred_thousand():
    room = WaitingRoom()
    for n in range(100_000):
        room.put((b"asker", n.to_bytes(8, "big")), lease(), b"", 0.0)
    with pytest.raises(BadRequest, match="100,000 requests wait"):
        room.put(A, read(), b"", 0.0)


def test_nothing_is_kept_of_requests_that_are_over(monkeypatch):
    """Neither of those that were answered long before their deadline, nor, while the disk is full and none is looked at, of
    those that were told so."""
    monkeypatch.setattr(waiting, "MOST_WAITING", 10)
    room = WaitingRoom()
    for n in range(1000):
        room.put((b"asker", n.to_bytes(8, "big")), lease(3600.0), b"", 0.0)
        room.serve(lambda _: Look.ANSWERED)
        assert len(room._deadlines) <= 20
    for n in range(1000):
        room.put((b"asker", n.to_bytes(8, "big")), lease(0.5), bytes(1000), float(n))
        assert len(keys(room.late(n + 0.5))) == 1
    assert not room._new and not keys(room)


def test_one_that_asks_again_and_again_leaves_one_deadline():
    room = WaitingRoom()
    for n in range(1000):
        room.put(A, lease(3600.0), b"", float(n))
    assert len(room._deadlines) == 1
    assert keys(room.late(3600.0)) == [A]


def test_all_are_taken_out_at_the_end():
    room = WaitingRoom()
    for key, request in ((A, lease()), (B, read()), (C, lease())):
        room.put(key, request, b"", 0.0)
    assert {*keys(room.clear())} == {A, B, C} and not keys(room)
