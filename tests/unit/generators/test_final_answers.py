"""What counts as the same answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.generators.final_answers import final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3+9=12;12+4=16", "16"),
        ("it is \\boxed{\\frac{1}{2}} I think, of 7", "\\frac{1}{2}"),
        ("\\boxed{3} no, \\boxed{ 1,000 }", "1000"),
        ("\\boxed{cut {off", "cut{off"),
        ("48/2 = 24\n#### 72\nbye 5", "72"),
        ("#### $1,250.50", "2501/2"),
        ("0.50", "1/2"),
        (".5", "1/2"),
        ("-3", "-3"),
        ("10-7", "7"),
        ("7.", "7"),
        ("  yes,\n it is ", "yes,itis"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


@given(st.integers(-(10**9), 10**9))
def test_equal_numbers_are_one_answer(number):
    texts = {
        f"x {number}",
        f"\\boxed{{{number:,}}}",
        f"#### {number}.00",
        f"it is {number:,}.",
        f"\\boxed{{${number}$}}",
    }
    assert {final_answer(text) for text in texts} == {str(number)}


@given(st.text(max_size=60))
def test_any_text_has_one_and_it_is_found_again(text):
    found = final_answer(text)
    assert found == "".join(found.split())
    assert final_answer(f"\\boxed{{{text}}}") == final_answer(f"\\boxed{{{text}}} ")
