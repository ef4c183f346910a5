"""The `math` reward: is the final answer mathematically the gold one? Run by the workers of `reward_pool`.

Where the answer stands, in an answer text as in a gold one: after `</think>` where there is one; there, the last
`####` (GSM8K, Cobbe et al. 2021, arXiv:2110.14168) or the last `\\boxed{}` (MATH, Hendrycks et al. 2021,
arXiv:2103.03874), whichever is later; with neither, the last number or formula of the last line, or of the text where
that line has no digit.

Two plain numbers are compared exactly and at once. Everything else goes to math-verify, whose own time limits are
off: they work by SIGALRM and only in a main thread; the pool's `timeout_s` is the limit.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final

from math_verify import parse, verify

# They warn once per process that the time limits are off, which is meant.
logging.getLogger("math_verify.parser").setLevel(logging.ERROR)
logging.getLogger("math_verify.grader").setLevel(logging.ERROR)

_NUMBER: Final = re.compile(r"\\?\$?\s*([-+]?)\s*\\?\$?\s*(\d{1,3}(?:(?:,|\{,\})\d{3})+|\d+)?(\.\d+)?\.?")
_GSM8K_NUMBER: Final = re.compile(r"\s*(-?\s*\\?\$?\s*-?[\d.,]*\d)(?!\s*[\d/%^\\*+-])")
_DIGIT_RUN: Final = re.compile(r"\d[\d,]*\d|\d")
_UNMARKED_TAIL: Final = 2_000
"""Characters at the end of an unmarked text in which its answer is looked for: extraction slows with the length."""


def math_answer(answer_text: str, payload: Mapping[str, Any]) -> float:
    """1 if the final answer of `answer_text` equals that of `payload["answer"]`, else 0. Raises ValueError where the
    gold answer is no mathematics."""
    gold, answer = final_answer(str(payload["answer"])), final_answer(answer_text)
    gold_number, number = plain_number(gold), plain_number(answer)
    if gold_number is not None and number is not None:
        return float(gold_number == number)
    if gold_number is not None and _ends_in_misplaced_commas(answer):
        return 0.0
    expected = _parse_gold(gold)
    if not expected:
        raise ValueError(f"no mathematics in the gold answer {gold!r}; is answer_field the right one?")
    return float(verify(expected, parse(answer, parsing_timeout=None), timeout_seconds=None))


def final_answer(text: str) -> str:
    """The part of a text that is its answer: a number, `\\boxed{...}`, or the end of a text without a mark."""
    text = text.rpartition("</think>")[2]
    hashes, box = text.rfind("####"), text.rfind("\\boxed{")
    if hashes > box:
        rest = text[hashes + 4 :].strip().partition("\n")[0]
        number = _GSM8K_NUMBER.match(rest)
        return number[1].strip() if number else rest
    if box >= 0:
        return text[box : _end_of_box(text, box)]
    tail = text[-_UNMARKED_TAIL:].strip()
    last_line = tail.rpartition("\n")[2]
    # A line of its own where it can be: math-verify pairs dollar signs, also those of two prices lines apart.
    return last_line if any(character.isdigit() for character in last_line) else tail


def plain_number(answer: str) -> Fraction | None:
    """The value of an answer that is nothing but a number, with a sign, a dollar sign or thousands' commas; None for
    any other answer."""
    if answer.startswith("\\boxed{") and answer.endswith("}"):
        answer = answer[len("\\boxed{") : -1]
    match = _NUMBER.fullmatch(answer.strip())
    if match is None or (match[2] is None and match[3] is None):
        return None
    whole = re.sub(r"[{},]", "", match[2] or "0")
    return Fraction(f"{match[1]}{whole}{match[3] or ''}")


def _ends_in_misplaced_commas(answer: str) -> bool:
    """Whether the last digits of an answer are no number, as in `850,0007`: math-verify reads 850,000 there, so that
    appending digits to a right answer would leave it right."""
    runs = _DIGIT_RUN.findall(answer)
    return bool(runs) and plain_number(runs[-1]) is None


def _end_of_box(text: str, start: int) -> int:
    """Index past the brace that closes the box at `start`; the end of the text where it was cut off."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0 and text[index] == "}":
            return index + 1
    return len(text)


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list[Any]:
    """math-verify's view of a gold answer; one that is bare LaTeX is put in a box first. The answers of one prompt
    come close together, so that it is parsed once."""
    marked = gold if "$" in gold or "\\boxed" in gold or "\\(" in gold else f"\\boxed{{{gold}}}"
    return list(parse(marked, parsing_timeout=None) or parse(gold, parsing_timeout=None))
