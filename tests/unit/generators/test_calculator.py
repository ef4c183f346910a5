"""The calculator: what it computes, what it takes for a call, and what it appends."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.generators.calculator import MOST_CHARACTERS, calculator, called, evaluate
from asyncrl.generators.environment import Transcript
from asyncrl.generators.functions import FunctionError
from asyncrl.learner.tiny_model import character_tokenizer

ALPHABET = "0123456789+-*/()=<>torelsu"
CALL = "<tool>12+30*2</tool>"


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(ALPHABET)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12+30*2", "72"),
        (" 12 + 30 * 2 ", "72"),
        ("(12+30)*2", "84"),
        ("1-3", "-2"),
        ("-5", "-5"),
        ("--5", "5"),
        ("6/4", "3/2"),
        ("6/3", "2"),
        ("1/3+2/3", "1"),
        ("007+08", "15"),
        ("1000*0", "0"),
        ("0", "0"),
        ("9" * 39 + "*10", "9" * 39 + "0"),
    ],
)
def test_arithmetic(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "1/0",
        "1+",
        "(1",
        "1)",
        "2**3",
        "7//2",
        "7%2",
        "1.5",
        "1e9",
        "0x10",
        "1_000",
        "x",
        "f(1)",
        "(1,2)",
        "()",
        "1 2",
        "1;2",
        "1\n2",
        "９+1",
        "(" * 199,
        "-" * 200,
        "9" * 40 + "+1",
        "9" * 30 + "*" + "9" * 30,
        "1" * (MOST_CHARACTERS + 1),
        "__import__('os').system('true')",
    ],
)
def test_what_is_no_arithmetic_or_too_much_comes_back_as_an_error(expression):
    assert evaluate(expression) == "error"


EXPRESSIONS = st.recursive(
    st.integers(0, 999).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda p: f"({p[0]}{p[1]}{p[2]})"),
        inner.map(lambda e: f"-{e}"),
    ),
    max_leaves=8,
)


def exact(expression):
    """The same by Python's own rules, over fractions."""
    counted, number = [], ""
    for character in expression + " ":
        if character.isdigit():
            number += character
            continue
        counted.append((f"Fraction({number})" if number else "") + character)
        number = ""
    return eval("".join(counted), {"Fraction": Fraction})  # noqa: S307 - of the strategy's own making


@settings(deadline=None)
@given(EXPRESSIONS)
def test_every_expression_is_computed_exactly(expression):
    try:
        expected = str(exact(expression))
    except ZeroDivisionError:
        expected = "error"
    if len(expression) <= MOST_CHARACTERS:
        assert evaluate(expression) == expected


@settings(deadline=None)
@given(st.text(alphabet="0123456789+-*/() ", max_size=60))
def test_any_characters_give_a_number_or_an_error(text):
    value = evaluate(text)
    assert value == "error" or Fraction(value) == Fraction(evaluate(value.replace("-", "0-", 1)))


@pytest.mark.parametrize(
    ("turn", "call"),
    [
        (CALL, "12+30*2"),
        (f"{CALL}<eos>", "12+30*2"),
        (f"{CALL} <eos>", "12+30*2"),
        (f"I compute {CALL}<eos>", "12+30*2"),
        (f"{CALL}<tool>1+1</tool><eos>", "1+1"),
        ("<tool></tool>", ""),
        (f"{CALL}72<eos>", None),
        ("72<eos>", None),
        ("<tool>1+1<eos>", None),
        ("<tool>1<2</tool>", None),
        ("", None),
    ],
)
def test_a_call_is_the_last_thing_that_a_turn_says(turn, call):
    assert called(turn, ["<eos>", "<pad>"]) == call


def transcript(tokenizer, *turns):
    """What model and calculator said in turn, beginning with the model."""
    answer, sampled = [], []
    for number, text in enumerate(turns):
        tokens = tokenizer.encode(text) + ([] if number % 2 else [tokenizer.eos_token_id])
        answer += tokens
        sampled += [number % 2 == 0] * len(tokens)
    return Transcript(tokenizer.encode("12+30*2="), answer, sampled, {})


def test_it_answers_calls_and_lets_answers_end(tokenizer):
    environment = calculator(tokenizer, {})
    assert tokenizer.decode(environment(transcript(tokenizer, CALL))) == "<result>72</result>"
    assert environment(transcript(tokenizer, CALL, "<result>72</result>", "72")) is None
    again = transcript(tokenizer, CALL, "<result>72</result>", "<tool>1/0</tool>")
    assert tokenizer.decode(environment(again)) == "<result>error</result>"
    assert environment(transcript(tokenizer, "72")) is None


def test_a_call_of_an_earlier_turn_is_no_call(tokenizer):
    """Nor is one that the result itself seems to make."""
    environment = calculator(tokenizer, {"reply": "<tool>{}</tool>"})
    assert environment(transcript(tokenizer, CALL, "<tool>72</tool>", "72")) is None


def test_the_reply_is_the_recipe_s_to_word(tokenizer):
    environment = calculator(tokenizer, {"reply": "={}="})
    assert tokenizer.decode(environment(transcript(tokenizer, CALL))) == "=72="


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"replay": "{}"}, "replay"),
        ({"reply": "result"}, "expected one {} in reply"),
        ({"reply": 1}, "reply"),
    ],
)
def test_settings_that_are_none_are_named(tokenizer, settings, words):
    with pytest.raises(FunctionError, match=f"environment.settings of 'calculator'.*{words}"):
        calculator(tokenizer, settings)


def test_a_tokenizer_that_cannot_write_a_result_is_refused():
    with pytest.raises(FunctionError, match=r"sft\.alphabet"):
        calculator(character_tokenizer("0123456789+*=<>/tolresu"), {})  # no minus
