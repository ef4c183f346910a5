"""The calculator: an environment that computes what the model writes between `<tool>` and `</tool>`.

    model:       <tool>12+30*2</tool> and its stop token
    environment: <result>72</result>
    model:       72 and its stop token          (no call: the rollout ends)

Invariants:
- A turn calls the tool when its last words are the call; anything after it but special tokens makes it an answer.
- An expression is computed exactly, over integers and fractions, by `evaluate` alone; whatever is wrong with it comes back
  as `error`. Its length and its numbers are bounded, so no call takes noticeable time.
Run by the workers of `turns`. Pure but for the tokenizer.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final

import msgspec

from asyncrl.generators.environment import Environment, Transcript
from asyncrl.generators.functions import FunctionError

MOST_CHARACTERS: Final = 200
"""Of an expression."""
MOST_DIGITS: Final = 40
"""Of a numerator or denominator on the way."""
ERROR: Final = "error"

_CALL: Final = re.compile(r"<tool>([^<>]*)</tool>")
_CHARACTERS: Final = re.compile(r"[0-9+\-*/() ]+")
_LEADING_ZEROS: Final = re.compile(r"(?<![0-9])0+(?=[0-9])")
_OPERATORS: Final[dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class CalculatorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[environment.settings]`."""

    reply: str = "<result>{}</result>"
    """What is appended, with the result in place of `{}`. Chat models want their template's turns around it."""

    def __post_init__(self) -> None:
        if self.reply.count("{}") != 1:
            raise ValueError(f"expected one {{}} in reply, got {self.reply!r}")


def calculator(tokenizer: Any, settings: dict[str, Any]) -> Environment:
    """The factory. Raises `FunctionError` for settings that are none, and where the tokenizer cannot write a result."""
    try:
        wanted = msgspec.convert(settings, CalculatorSettings)
    except msgspec.ValidationError as error:
        raise FunctionError(f"environment.settings of 'calculator': {error}") from error

    def encoded(result: str) -> list[int]:
        text = wanted.reply.replace("{}", result)
        return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]

    for result in (ERROR, "-1234567890/7"):
        found = tokenizer.decode(encoded(result))
        if result not in found:
            raise FunctionError(
                f"environment 'calculator': this tokenizer makes {found!r} of {wanted.reply.replace('{}', result)!r}; "
                "a new model's alphabet (sft.alphabet) needs all of its characters"
            )

    def reply(transcript: Transcript) -> list[int] | None:
        call = called(tokenizer.decode(transcript.last_turn), tokenizer.all_special_tokens)
        return None if call is None else encoded(evaluate(call))

    return reply


def called(turn: str, special_tokens: list[str]) -> str | None:
    """The expression that a turn asks for, where it ends in a call; `special_tokens` may stand after it."""
    calls = list(_CALL.finditer(turn))
    if not calls:
        return None
    rest = turn[calls[-1].end() :]
    for token in special_tokens:
        rest = rest.replace(token, "")
    return None if rest.strip() else calls[-1][1]


def evaluate(expression: str) -> str:
    """The value of an expression of + - * / and brackets over whole numbers: `72`, `-5`, `7/3`, or `error`."""
    text = expression.strip()
    if len(text) > MOST_CHARACTERS or not _CHARACTERS.fullmatch(text):
        return ERROR
    try:
        tree = ast.parse(_LEADING_ZEROS.sub("", text), mode="eval")
        return str(_value(tree.body))
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return ERROR


def _value(node: ast.expr) -> Fraction:
    """Raises ValueError for what is no arithmetic, ZeroDivisionError, OverflowError past `MOST_DIGITS`."""
    match node:
        case ast.Constant(value=int(number)):
            value = Fraction(number)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _value(operand) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.BinOp(left=left, op=between, right=right) if type(between) in _OPERATORS:
            value = _OPERATORS[type(between)](_value(left), _value(right))
        case _:
            raise ValueError(f"no arithmetic: {ast.dump(node)[:80]}")
    if max(abs(value.numerator), value.denominator) >= 10**MOST_DIGITS:
        raise OverflowError
    return value
