"""The built-in reward functions, and how functions are found and read."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.generators.functions import FunctionError, load_function
from asyncrl.generators.reward_math import final_answer, math_answer, plain_number
from asyncrl.generators.rewards import BUILT_IN, reward_values, stated_answer, sums, think_format
from asyncrl.generators.tasks import sum_row

SAMPLE = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data" / "gsm8k_sample.jsonl").read_text().splitlines()
]


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=14))
def test_sums_likes_each_solution_and_no_changed_or_cut_one(terms):
    row = sum_row(terms)
    payload = {"answer": row.answer}
    assert sums(row.solution, payload) == 1
    assert sums(row.answer, payload) == 1
    assert sums(row.solution + "\n", payload) == 1
    assert sums(row.solution + "0", payload) == (1 if row.answer == "0" else 0)
    assert sums(row.solution + ";", payload) == 0
    assert sums(f"{row.solution};{row.answer}+", payload) == 0
    assert sums(row.solution[: -len(row.answer)] + str(int(row.answer) + 1), payload) == 0


@pytest.mark.parametrize("text", ["", "=", "3+9=12;", "no", "16 apples", "١٦"])
def test_sums_gives_nothing_for_what_ends_in_no_number(text):
    assert sums(text, {"answer": "16"}) == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think>b", 1),
        ("\n<think>\na\nb\n</think>\n\nc", 1),
        ("<think>a</think>", 0),
        ("<think>a</think>  \n", 0),
        ("<think> </think>b", 0),
        ("a</think>b", 0),
        ("<think>a", 0),
        ("x<think>a</think>b", 0),
        ("<think>a</think>b</think>c", 0),
        ("<think><think>a</think>b", 0),
        ("<think>a</think>b<think>c</think>d", 0),
        ("b", 0),
        ("", 0),
    ],
)
def test_format(text, value):
    assert think_format(text, {}) == value


@pytest.mark.parametrize("row", SAMPLE, ids=lambda row: row["question"][:20])
def test_math_on_real_gsm8k_rows(row):
    reasoning, _, number = row["answer"].rpartition("####")
    number = number.strip()
    changed = str(int(number.replace(",", "")) + 1)
    right = [row["answer"], f"{reasoning}\\boxed{{{number}}}", f"{reasoning}\nThat makes ${number}."]
    wrong = [
        f"{reasoning}#### {changed}",
        f"{reasoning}\\boxed{{{changed}}}",
        f"{reasoning}\nThat makes ${changed}.",
        f"{reasoning}#### {number}7",
        f"{reasoning}\\boxed{{{number}7}}",
        "",
    ]
    assert [math_answer(text, row) for text in right] == [1.0] * 3
    assert [math_answer(text, row) for text in wrong] == [0.0] * 6


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        ("#### 1,000", "#### $1000.", 1),
        ("#### 1000", r"\boxed{1{,}000}", 1),
        ("#### 1000", r"\boxed{\$1,000.00}", 1),
        ("#### 850,000", "#### 850,0007", 0),
        ("#### 850,000", "It is 850,0007.", 0),
        ("72", "#### 72 clips in 2 months", 1),
        ("72", "####72", 1),
        ("72", "72 clips", 1),
        ("72", "**72**", 1),
        ("72", "#### 144/2", 1),
        ("72", "#### 72/2", 0),
        ("72", "#### 72\n\nThis is 2 more than 70.", 1),
        ("72", r"\boxed{72\text{ clips}}", 1),
        ("72", r"\boxed{71} or rather \boxed{72}", 1),
        ("72", r"\boxed{72} or rather \boxed{71}", 0),
        ("72", r"#### 71, then \boxed{72}", 1),
        ("72", r"\boxed{72, 73}", 0),
        ("72", "So it is 72.\n\nI hope this helps!", 1),
        ("72", r"<think>\boxed{72}</think>I do not know.", 0),
        ("72", r"<think>\boxed{71}</think>\boxed{72}", 1),
        ("72", r"\boxed{", 0),
        ("72", "####", 0),
        ("-3", "-$3", 1),
        ("-3", "#### 3", 0),
        ("3", "#### -3", 0),
        ("0.5", r"\boxed{\frac{1}{2}}", 1),
        (r"\frac{1}{2}", "The answer is $0.5$.", 1),
        (r"\frac{3}{4}", r"\boxed{\frac{6}{8}}", 1),
        ("(1,2)", r"\boxed{(1,2)}", 1),
        ("(1,2)", r"\boxed{(2,1)}", 0),
        ("x^2+1", r"\boxed{1+x^2}", 1),
        (r"\sqrt{2}", r"\boxed{2^{1/2}}", 1),
        ("1/3", "#### 0.333", 0),
    ],
)
def test_math_cases(gold, answer, value):
    assert math_answer(answer, {"answer": gold}) == value


@settings(deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6))
def test_math_numbers_in_any_dress(number, difference):
    payload = {"answer": f"#### {number}"}
    for text in (f"#### {number:,}", f"#### {number}.", f"\\boxed{{{number:,}}}", f"\\boxed{{{number}.00}}"):
        assert math_answer(text, payload) == 1
    assert math_answer(f"#### {number + difference:,}", payload) == 0


def test_a_gold_answer_without_mathematics_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="answer_field"):
        math_answer("7", {"answer": ""})


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234.50", 1234.5), ("$5", 5), ("-.5", -0.5), ("12,34", None), ("", None), (".", None), ("1/2", None)],
)
def test_plain_number(text, number):
    assert plain_number(text) == number


def test_final_answer_is_cheap_on_a_very_long_text():
    assert len(final_answer("word " * 100_000)) <= 2000


def test_functions_are_found_by_name_and_by_path():
    for name, path in BUILT_IN.items():
        assert load_function("reward function", name, BUILT_IN) is load_function(
            "reward function", path, BUILT_IN
        )
    assert load_function("reward function", "operator:add", BUILT_IN)(1, 2) == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sum", "expected sums, math, format"),
        ("no_such_module_of_anyone:score", "PYTHONPATH"),
        ("operator:no_such_function", "no_such_function"),
        ("string:digits", "cannot be called"),
        (":score", "package.module:function"),
    ],
)
def test_a_function_that_is_not_there_names_the_way_out(name, words):
    with pytest.raises(FunctionError, match=words):
        load_function("reward function", name, BUILT_IN)
    assert "no_such_module_of_anyone" not in sys.modules


def test_values_are_numbers_by_name():
    assert reward_values("f", True) == {"reward": 1.0}
    assert reward_values("f", {"reward": 1, "length": 3}) == {"reward": 1.0, "length": 3.0}


def test_a_final_answer_is_a_text_beside_them():
    assert reward_values("f", {"reward": 1, "answer": "7"}) == {"reward": 1.0}
    assert stated_answer({"reward": 1, "answer": "7"}) == "7"
    assert reward_values("f", {"reward": 1, "answer": 7}) == {"reward": 1.0, "answer": 7.0}
    assert stated_answer({"reward": 1, "answer": 7}) is None and stated_answer(1.0) is None


@pytest.mark.parametrize(
    "returned", [None, "good", float("nan"), float("inf"), {"length": 3}, {"reward": None}]
)
def test_what_is_no_reward_is_refused(returned):
    with pytest.raises(FunctionError, match="'f'"):
        reward_values("f", returned)
