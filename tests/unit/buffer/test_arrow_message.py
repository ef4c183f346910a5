"""Messages that are made from a template are byte for byte those that pyarrow makes, whatever is in them; what the template
cannot do is refused."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncrl.buffer import arrow_message
from asyncrl.buffer import log as log_module
from asyncrl.buffer.arrow_message import (
    Lists,
    MessageTemplate,
    Strings,
    Values,
    offsets_of,
    string_column,
    strings,
)
from asyncrl.buffer.log import LAYOUTS, Log, SegmentRows, file_of, write_at
from asyncrl.buffer.records import Group, Rollout
from asyncrl.buffer.rows import StateRows
from asyncrl.buffer.schema import State

NUMBERS = (pa.int8(), pa.uint16(), pa.int32(), pa.int64(), pa.uint64(), pa.float32(), pa.float64())
KINDS = (*NUMBERS, pa.string(), *(pa.list_(pa.field("item", kind, nullable=False)) for kind in NUMBERS))


def number(kind):
    if pa.types.is_floating(kind):
        return st.floats(width=kind.bit_width, allow_nan=False)
    info = np.iinfo(kind.to_pandas_dtype())
    return st.integers(int(info.min), int(info.max))


def value(kind):
    if pa.types.is_string(kind):
        return st.text(max_size=6) | st.sampled_from(["", "ü", "漢字", "🜁" * 3])
    return st.lists(number(kind.value_type), max_size=5) if pa.types.is_list(kind) else number(kind)


def in_parts(whole, cuts):
    """The same values in several pieces, of each kind that is allowed."""
    at = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    pieces = [whole[first:end] for first, end in itertools.pairwise(at)]
    return [memoryview(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def column_of(kind, values, cuts):
    """(what the template takes, the bytes of its values)"""
    if pa.types.is_string(kind):
        encoded = [v.encode() for v in values]
        whole = b"".join(encoded)
        return Strings(offsets_of([len(v) for v in encoded]), in_parts(whole, cuts)), whole
    if pa.types.is_list(kind):
        flat = np.array([x for v in values for x in v], kind.value_type.to_pandas_dtype())
        return Lists(offsets_of([len(v) for v in values]), in_parts(flat, cuts)), flat.tobytes()
    flat = np.array(values, kind.to_pandas_dtype())
    return Values(in_parts(flat, cuts)), flat.tobytes()


def check(schema, rows, cuts=()):
    """`rows`: one list of values for each column."""
    made = [column_of(field.type, values, cuts) for field, values in zip(schema, rows, strict=True)]
    message = MessageTemplate(schema).message(len(rows[0]), [column for column, _ in made])
    data = b"".join(memoryview(part).cast("B") for part in message.parts if len(part))
    arrays = [pa.array(values, field.type) for field, values in zip(schema, rows, strict=True)]
    assert data == pa.record_batch(arrays, schema=schema).serialize().to_pybytes()
    assert message.nbytes == len(data)
    for at, (_, values) in zip(message.values_at, made, strict=True):
        assert data[at : at + len(values)] == values


def rows_of(schema, most=12):
    columns = st.integers(1, most).flatmap(
        lambda count: st.tuples(*(st.lists(value(f.type), min_size=count, max_size=count) for f in schema))
    )
    return columns


CUTS = st.lists(st.integers(0, 60), max_size=4)


@pytest.mark.parametrize("stream", LAYOUTS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_every_layout_of_the_log_is_what_pyarrow_makes_of_it(stream, data):
    check(LAYOUTS[stream], data.draw(rows_of(LAYOUTS[stream])), data.draw(CUTS))


@pytest.mark.parametrize("stream", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 1009, 20_000])
def test_many_rows_and_rows_as_many_as_the_template_was_made_with(stream, rows):
    def some(kind):
        if pa.types.is_string(kind):
            return ["ä" * (i % 4) for i in range(rows)]
        if pa.types.is_list(kind):
            return [[i] * (i % 3) for i in range(rows)]
        return list(range(rows))

    check(LAYOUTS[stream], [some(field.type) for field in LAYOUTS[stream]], cuts=[rows // 3])


@pytest.mark.parametrize("stream", LAYOUTS)
def test_nothing_but_empty_strings_and_lists(stream):
    empty = {True: [], False: ""}
    rows = [
        [empty[pa.types.is_list(kind)]] * 3 if pa.types.is_list(kind) or pa.types.is_string(kind) else [0] * 3
        for kind in LAYOUTS[stream].types
    ]
    check(LAYOUTS[stream], rows)


@settings(deadline=None, max_examples=150)
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), data=st.data())
@example(kinds=[pa.int64()], data=None)
@example(kinds=[pa.int8(), pa.int8()], data=None)
def test_other_schemas_of_numbers_strings_and_lists_too(kinds, data):
    """Also those in which one count of the metadata is the same as another."""
    schema = pa.schema([pa.field(str(i), kind, nullable=False) for i, kind in enumerate(kinds)])
    if data is None:
        check(schema, [[1, 2, 3] for _ in kinds])
    else:
        check(schema, data.draw(rows_of(schema)), data.draw(CUTS))


@pytest.mark.parametrize(
    "kind",
    [
        pa.bool_(),
        pa.large_string(),
        pa.binary(),
        pa.timestamp("s"),
        pa.dictionary(pa.int32(), pa.string()),
        pa.list_(pa.string()),
        pa.list_(pa.bool_()),
        pa.list_(pa.list_(pa.int32())),
        pa.large_list(pa.int32()),
        pa.struct([("x", pa.int32())]),
    ],
    ids=str,
)
def test_a_column_that_it_cannot_do_is_refused_by_its_name(kind):
    with pytest.raises(ValueError, match=r"column odd is .*: messages are made of integers, floats, strings"):
        MessageTemplate(pa.schema([("right", pa.int64()), ("odd", kind)]))


def test_a_schema_without_a_column_is_refused():
    with pytest.raises(ValueError, match="a message needs a column"):
        MessageTemplate(pa.schema([]))


def test_columns_of_another_number_are_refused():
    template = MessageTemplate(pa.schema([("a", pa.int64()), ("b", pa.int64())]))
    with pytest.raises(ValueError, match="zip"):
        template.message(1, [Values([np.array([1])])])


def test_a_pyarrow_that_lays_its_messages_out_in_another_way_is_noticed(monkeypatch):
    real = arrow_message._counts
    monkeypatch.setattr(
        arrow_message, "_counts", lambda *args: ([n + 1 for n in real(*args)[0]], real(*args)[1])
    )
    with pytest.raises(RuntimeError, match=f"pyarrow {pa.__version__} lays out its messages in another way"):
        MessageTemplate(LAYOUTS["states"])


def test_strings_by_their_numbers_are_the_strings():
    by_number = string_column(np.array([2, 0, 1, 2], np.int32), ["", "ü", "stop"])
    plain = strings(["stop", "", "ü", "stop"])
    assert by_number.offsets.tolist() == plain.offsets.tolist() and by_number.parts == plain.parts


# ---- the log ---------------------------------------------------------------------------------------------------------


def write_some(folder):
    """Two commits with rows of each stream."""
    log = Log(folder, 1, fsync=False)
    for first in (1, 20):
        group = Group(first, f"prömpt {first}", first, {r: None for r in range(first, first + 3)})
        log.prompts([group, group], [np.array([1, 2, 3], np.int32), np.array([], np.int32)], ['{"ü": 1}', ""])
        tokens = [np.arange(n, dtype=np.int32) for n in (4, 0, 3)]
        logprobs = [-t.astype(np.float32) / 2 for t in tokens]
        starts = log.segments(
            SegmentRows(
                [first, first + 1, first + 2],
                [7, 8, 9],
                [0, 5, 0],
                [1, 1, 2],
                ["", "stop", ""],
                [4, 0, 3],
                tokens,
                logprobs,
            )
        )
        rows = StateRows()
        rows.add(first, 1, State.LEASED, 0, 5, 0, 0, "engine-ä", "", 0.0, 0.0)
        rows.add_many([Rollout(r, group) for r in range(first, first + 40)], 3)
        rows.published(4)
        log.states(rows)
        log.commit()
        data = file_of(folder, "segments", 1).read_bytes()
        for at, values in zip(starts, (tokens, logprobs), strict=True):
            assert data[at : at + 28] == np.concatenate(values).tobytes()
    log.close()


@pytest.mark.parametrize("stream", LAYOUTS)
def test_the_files_of_the_log_are_what_pyarrow_would_have_written(tmp_path, stream):
    write_some(tmp_path)
    data = file_of(tmp_path, stream, 1).read_bytes()
    sink = pa.BufferOutputStream()
    with pa.ipc.open_stream(data) as reader, pa.ipc.new_stream(sink, LAYOUTS[stream]) as writer:
        for batch in reader:
            batch.validate(full=True)
            writer.write_batch(pa.RecordBatch.from_pylist(batch.to_pylist(), LAYOUTS[stream]))
    whole = sink.getvalue().to_pybytes()
    assert whole[:-8] == data  # without the mark of its end


class Slow:
    """`os.pwritev` that takes some bytes at a time and notes how many parts it was handed."""

    def __init__(self, monkeypatch, most):
        self.real, self.most, self.parts = log_module.os.pwritev, most, []
        monkeypatch.setattr(log_module.os, "pwritev", self)

    def __call__(self, fd, parts, at):
        self.parts.append(len(parts))
        left, some = self.most, []
        for part in parts:
            some.append(part[:left])
            left -= len(some[-1])
        return self.real(fd, some, at)


@pytest.mark.parametrize("most", [1, 3, 7, 1000])
def test_parts_are_written_one_behind_the_other_however_few_bytes_are_taken_at_a_time(
    tmp_path, monkeypatch, most
):
    slow = Slow(monkeypatch, most)
    parts = [bytes([i % 251] * (i % 5)) for i in range(60)]
    with (tmp_path / "file").open("wb") as file:
        write_at(file.fileno(), [memoryview(part) for part in parts if part], 5)
    assert (tmp_path / "file").read_bytes() == bytes(5) + b"".join(parts)
    assert len(slow.parts) >= sum(map(len, parts)) / most


def test_more_parts_than_the_system_takes_at_once_are_written(tmp_path, monkeypatch):
    slow = Slow(monkeypatch, 2**30)
    with (tmp_path / "file").open("wb") as file:
        write_at(file.fileno(), [memoryview(b"ab")] * 2500, 0)
    assert (tmp_path / "file").read_bytes() == b"ab" * 2500
    assert slow.parts == [1000, 1000, 500]
