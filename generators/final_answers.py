"""The final answer of a text, for counting which answer most agree on. Pure.

A reward function that knows better says it itself: it returns a dict with "answer" (see `rewards`), and this is not asked.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

_NUMBER: Final = re.compile(r"(?:(?<!\d)-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
_BOX: Final = "\\boxed{"


def final_answer(text: str) -> str:
    """What stands in the last `\\boxed{}`; else what stands after the last `####` up to the line's end; else the last number;
    else all of the text. Numbers that are equal come out as one text, spaces do not count. Empty where there is nothing.
    """
    box = text.rfind(_BOX)
    if box >= 0:
        return _plain(_to_closing_brace(text[box + len(_BOX) :]))
    if "####" in text:
        return _plain(text.rpartition("####")[2].strip().partition("\n")[0])
    numbers = _NUMBER.findall(text)
    return _plain(numbers[-1] if numbers else text)


def _to_closing_brace(text: str) -> str:
    """Up to the brace that closes the one before `text`; all of it where it was cut off."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return text[:index]
    return text


def _plain(answer: str) -> str:
    bare = answer.strip().strip("$").strip().rstrip(".")
    if _NUMBER.fullmatch(bare):
        return str(Fraction(bare.replace(",", "")))
    return "".join(answer.split())
