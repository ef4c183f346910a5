"""Generated tasks: pure rows, disjoint splits, a long tail."""

import re
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.generators.calculator import called, evaluate
from asyncrl.generators.tasks import (
    GeneratedTask,
    SumsSettings,
    TaskError,
    arithmetic_row,
    split_of,
    sum_row,
)


def test_sum_row_is_the_documented_example():
    row = sum_row([3, 9, 4])
    assert (row.question, row.answer, row.solution) == ("3+9+4=", "16", "3+9=12;12+4=16")


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=40))
def test_every_step_of_a_solution_is_true_and_the_last_is_the_answer(terms):
    row = sum_row(terms)
    total = terms[0]
    for step, term in zip(row.solution.split(";"), terms[1:], strict=True):
        left, added, right = map(int, re.fullmatch(r"(\d+)\+(\d+)=(\d+)", step).groups())
        assert (left, added, right) == (total, term, total + term)
        total = right
    assert int(row.answer) == sum(terms) == total


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 5), st.sampled_from(["train", "test"]))
def test_a_row_depends_on_its_index_alone(index, seed, split):
    one, other = (GeneratedTask("sums", split, {}, seed) for _ in range(2))
    other.row(index + 1)
    assert one.row(index) == other.row(index)
    assert split_of(one.row(index).question) == split


def test_rows_are_the_same_on_every_machine():
    """Stored rows: a change of the generator would silently change what a resumed run trains on."""
    task = GeneratedTask("sums", "train", {}, 0)
    assert [task.row(i).question for i in (0, 1, 1000)] == STORED


STORED = ["6+8+6+4+1+3+0=", "5+5=", "6+7="]


def test_train_and_test_share_no_question_whatever_their_seeds():
    train = {GeneratedTask("sums", "train", {}, 1).row(i).question for i in range(3000)}
    test = {GeneratedTask("sums", "test", {"max_terms": 20}, 2).row(i).question for i in range(1000)}
    assert not train & test


def test_seeds_give_different_rows():
    rows = [[GeneratedTask("sums", "train", {}, seed).row(i) for i in range(20)] for seed in (0, 1)]
    assert rows[0] != rows[1]


def test_lengths_have_a_long_tail():
    task = GeneratedTask("sums", "train", {}, 0)
    terms = Counter(task.row(i).question.count("+") + 1 for i in range(4000))
    assert min(terms) == 2 and max(terms) == 14
    tail = sum(count for n, count in terms.items() if n > 6) / 4000
    assert 0.07 < tail < 0.13
    assert terms[7] > terms[14] > 0
    assert max(len(task.row(i).solution) for i in range(4000)) < 160


@settings(deadline=None)
@given(st.integers(2, 10), st.integers(0, 10), st.integers(0, 10), st.integers(0, 100), st.integers(0, 1000))
def test_term_counts_stay_in_their_bounds(low, usual, high, percent, seed):
    settings = SumsSettings(
        min_terms=low, usual_terms=low + usual, max_terms=low + usual + high, tail_percent=percent
    )
    drawn = settings.draw_terms(Random(seed))
    assert low <= drawn <= low + usual + high
    if percent == 0:
        assert drawn <= low + usual


@pytest.mark.parametrize(
    ("name", "split", "settings", "words"),
    [
        ("products", "train", {}, "there are: arithmetic, sums"),
        ("sums", "validation", {}, "it has: train, test"),
        ("sums", "train", {"terms": 3}, "terms"),
        ("sums", "train", {"min_terms": 1}, "2 <= min_terms"),
        ("sums", "train", {"tail_percent": 101}, "0..100"),
        ("arithmetic", "train", {"tool_percent": -1}, "0..100"),
        ("arithmetic", "train", {"min_terms": 4}, "1 <= min_terms <= max_terms"),
    ],
)
def test_errors_name_the_culprit_and_what_there_is(name, split, settings, words):
    with pytest.raises(TaskError, match=re.escape(words)):
        GeneratedTask(name, split, settings, 0)


def test_arithmetic_row_is_the_documented_example():
    row = arithmetic_row([[12, 3], [40]], by_tool=True)
    assert (row.question, row.answer, row.solution) == ("12*3+40=", "76", ["<tool>12*3+40</tool>", "76"])
    assert arithmetic_row([[12, 3], [40]], by_tool=False).solution == "76"


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 5), st.sampled_from(["train", "test"]))
def test_the_calculator_knows_every_answer_of_arithmetic(index, seed, split):
    row = GeneratedTask("arithmetic", split, {"max_terms": 5, "max_digits": 3}, seed).row(index)
    assert evaluate(row.question.removesuffix("=")) == row.answer and "*" in row.question
    if isinstance(row.solution, list):
        call, last = row.solution
        assert called(call, []) == row.question.removesuffix("=") and last == row.answer
    else:
        assert row.solution == row.answer


def test_so_many_solutions_in_a_hundred_call_the_calculator():
    for percent, low, high in ((0, 0, 0), (25, 0.2, 0.3), (100, 1, 1)):
        task = GeneratedTask("arithmetic", "train", {"tool_percent": percent}, 0)
        calls = sum(isinstance(task.row(i).solution, list) for i in range(1000)) / 1000
        assert low <= calls <= high
