"""Answers by rollout, made of pieces; and lists of numbers as Arrow keeps them."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.buffer.columns import Columns, Prompt, flat_lists, list_array, slices
from asyncrl.buffer.handover import joined, split
from asyncrl.buffer.schema import FLAGS, LOGPROBS, TOKENS
from asyncrl.buffer.token_files import Piece, TokenFiles


@pytest.fixture
def columns(tmp_path):
    """Rollouts 1 and 2 of group 7; one message with two pieces of 1 and one of 2."""
    path = tmp_path / "segments"
    tokens = np.arange(6, dtype=np.int32)
    path.write_bytes(bytes(100) + tokens.tobytes() + (tokens / 2).astype(np.float32).tobytes())
    columns = Columns(TokenFiles(2**20, lambda generation: path))
    columns.put_prompt(7, Prompt(np.array([9], np.int32), "{}"), [1, 2])
    for rollout_id, first, count, version in ((1, 0, 2, 0), (2, 2, 1, 0), (1, 3, 3, 1)):
        columns.append(rollout_id, Piece(1, 100 + 4 * first, 124 + 4 * first, count, version))
    return columns


def read(columns, *rollout_ids):
    pieces = [piece for rollout_id in rollout_ids for piece in columns.answers[rollout_id]]
    tokens, logprobs = split(joined(pieces, columns.files), sum(piece.length for piece in pieces))
    return tokens.tolist(), logprobs.tolist()


def test_an_answer_is_its_pieces_in_their_order(columns):
    assert columns.files.held_bytes == 48
    assert np.frombuffer(columns.tokens(1), np.int32).tolist() == [0, 1, 3, 4, 5]
    assert read(columns, 2, 1) == ([2, 0, 1, 3, 4, 5], [1.0, 0.0, 0.5, 1.5, 2.0, 2.5])
    assert read(columns) == ([], [])


def test_an_answer_that_starts_again_is_empty_and_holds_nothing(columns):
    columns.restart(1)
    assert columns.tokens(1) == b"" and columns.files.held_bytes == 8
    assert np.frombuffer(columns.tokens(2), np.int32).tolist() == [2]
    columns.restart(2)
    assert columns.files.held_bytes == 0


def test_what_is_dropped_is_gone_and_holds_nothing(columns):
    columns.drop([1], [])
    assert columns.files.held_bytes == 8 and 7 in columns.prompts and 1 not in columns.answers
    columns.drop([2], [7])
    assert not columns.prompts and not columns.answers and columns.files.held_bytes == 0


def test_nobody_adds_to_a_rollout_that_is_gone(columns):
    columns.drop([1], [])
    with pytest.raises(KeyError):
        columns.append(1, Piece(1, 100, 124, 1, 0))
    assert columns.files.held_bytes == 8


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5), max_size=6))
def test_lists_are_read_back_as_they_were_put(parts):
    arrays = [np.array(part, np.int32) for part in parts]
    column = list_array(arrays, TOKENS)
    assert column.type == TOKENS and column.to_pylist() == parts
    assert [part.tolist() for part in slices(column)] == parts
    assert [part.tolist() for part in slices(pa.chunked_array([column, column]))] == parts * 2


def test_numbers_are_not_copied_and_flags_are():
    flat = np.array([1, 2, 3], np.float32)
    column = flat_lists(np.array([0, 1, 3], np.int32), flat, LOGPROBS)
    assert column.to_pylist() == [[1.0], [2.0, 3.0]]
    assert column.values.buffers()[1].address == flat.ctypes.data
    flags = flat_lists(np.array([0, 1, 3], np.int32), flat > 1, FLAGS)
    assert [part.tolist() for part in slices(flags)] == [[False], [True, True]]


def test_a_slice_of_a_column_is_read_as_the_slice():
    column = list_array([np.array([n], np.int32) for n in range(5)], TOKENS)
    assert [part.tolist() for part in slices(column[2:4])] == [[2], [3]]
