"""Which commits count: whole, in order, and with their bytes where they say."""

import itertools

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.buffer.journal import RECORD_BYTES, STREAMS, Record, committed, decode, whole_behind

STEPS = [(b"ab", b"", b"c"), (b"", b"defg", b""), (b"h", b"i", b"jk")]


def written(steps):
    """(journal, streams) after commits that added these bytes."""
    streams, journal = [b""] * len(STREAMS), b""
    for number, step in enumerate(steps):
        streams = [have + new for have, new in zip(streams, step, strict=True)]
        hashes = tuple(xxhash.xxh3_64_intdigest(new) for new in step)
        journal += Record(number, tuple(map(len, streams)), hashes, 1.5).encode()
    return journal, streams


def counted(journal, streams):
    return [r.number for r in committed(journal, [memoryview(bytes(s)) for s in streams])]


@settings(deadline=None)
@given(
    number=st.integers(0, 2**64 - 1),
    ends=st.tuples(*[st.integers(0, 2**64 - 1)] * 3),
    hashes=st.tuples(*[st.integers(0, 2**64 - 1)] * 3),
    unix_s=st.floats(0, 2e9),
)
def test_a_record_is_read_as_it_was_written(number, ends, hashes, unix_s):
    record = Record(number, ends, hashes, unix_s)
    assert len(record.encode()) == RECORD_BYTES and decode(record.encode()) == record


@pytest.mark.parametrize("at", range(RECORD_BYTES))
def test_a_record_with_any_byte_changed_is_none(at):
    data = bytearray(Record(3, (1, 2, 3), (4, 5, 6), 7.0).encode())
    data[at] ^= 1
    assert decode(bytes(data)) is None


def test_a_part_of_a_record_is_none():
    data = Record(3, (1, 2, 3), (4, 5, 6), 7.0).encode()
    assert [decode(data[:size]) for size in range(RECORD_BYTES)] == [None] * RECORD_BYTES
    assert decode(data + b"x") is None


def test_whole_commits_count_and_a_torn_one_does_not():
    journal, streams = written(STEPS)
    assert counted(journal, streams) == [0, 1, 2]
    assert counted(journal[:-1], streams) == [0, 1]
    assert counted(journal, [s + b"behind" for s in streams]) == [0, 1, 2]
    assert counted(b"", streams) == []


def test_commits_count_up_to_the_first_whose_bytes_are_not_there():
    journal, streams = written(STEPS)
    for lost, left in ((0, [0, 1]), (1, [0, 1]), (2, [0, 1])):
        shorter = [s[:-1] if n == lost else s for n, s in enumerate(streams)]
        assert counted(journal, shorter) == left
    assert counted(journal, [streams[0], streams[1][:3], streams[2]]) == [0]


def test_commits_count_up_to_the_first_whose_bytes_are_others():
    journal, (prompts, segments, states) = written(STEPS)
    assert counted(journal, [prompts, b"dEfgi", states]) == [0]
    assert counted(journal, [prompts, segments, b"Cjk"]) == []


def test_a_record_that_is_missing_or_twice_ends_the_count():
    journal, streams = written(STEPS)
    first, second, third = (journal[n * RECORD_BYTES : (n + 1) * RECORD_BYTES] for n in range(3))
    assert counted(first + third, streams) == [0]
    assert counted(first + first + second, streams) == [0]
    assert counted(second, streams) == []


def test_whole_records_behind_one_that_does_not_count_are_found():
    journal, _ = written(STEPS)
    assert [whole_behind(journal, number) for number in range(5)] == [2, 1, 0, 0, 0]
    assert whole_behind(journal[:-1], 0) == 1
    torn = bytearray(journal)
    torn[RECORD_BYTES] ^= 1
    assert whole_behind(bytes(torn), 0) == 1 and whole_behind(b"", 0) == 0


def test_a_stream_that_went_back_ends_the_count():
    _, streams = written(STEPS)
    nothing = xxhash.xxh3_64_intdigest(b"")
    hashes = tuple(xxhash.xxh3_64_intdigest(new) for new in STEPS[0])
    records = [Record(0, (2, 0, 1), hashes, 0.0), Record(1, (1, 0, 1), (nothing,) * 3, 0.0)]
    assert counted(b"".join(r.encode() for r in records), streams) == [0]


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.binary(max_size=5)] * 3), max_size=6), st.data())
def test_what_counts_is_exactly_what_is_there(steps, data):
    journal, streams = written(steps)
    sizes = [data.draw(st.integers(0, len(s))) for s in streams]
    records = data.draw(st.integers(0, len(steps)))
    ends = list(itertools.accumulate(steps, lambda have, new: tuple(map(bytes.__add__, have, new))))
    whole = itertools.takewhile(
        lambda end: all(len(e) <= size for e, size in zip(end, sizes, strict=True)), ends[:records]
    )
    cut = [s[:size] for s, size in zip(streams, sizes, strict=True)]
    assert len(counted(journal[: records * RECORD_BYTES], cut)) == len([*whole])
