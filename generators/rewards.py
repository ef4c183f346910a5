"""Reward functions: what an answer is worth. Run by the workers of `reward_pool`, never on an event loop.

A reward function is `function(answer_text: str, payload: dict) -> float | dict`:
- `answer_text` is the sampled answer without special tokens; `payload` is the prompt's row, with `prompt_id`,
  `question` and `answer`.
- It returns a finite number, or a dict of finite numbers that has "reward"; the others are reported beside it. "answer" in the
  dict is a text: the final answer as the function understands it, for maj@k (`estimates`).
- It may hang, raise, take more memory than it is given or end its process: that costs its own rollout and nothing else.
Named in a recipe by a built-in name (`sums`, `math`, `format`) or by an import path `package.module:function`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from asyncrl.generators.functions import FunctionError, load_function

RewardFunction = Callable[[str, dict[str, Any]], float | Mapping[str, float | str]]

BUILT_IN: Final = {
    "sums": "asyncrl.generators.rewards:sums",
    "math": "asyncrl.generators.reward_math:math_answer",
    "format": "asyncrl.generators.rewards:think_format",
}

_FINAL_NUMBER: Final = re.compile(r"(?:^|[^0-9])([0-9]+)\s*$")
_THINK: Final = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


class Values(msgspec.Struct, frozen=True):
    """What a worker says."""

    numbers: dict[str, float]
    answer: str | None


class Question(msgspec.Struct, frozen=True):
    """What a worker is asked: the score by function number `function`."""

    function: int
    answer_text: str
    payload: str
    """A JSON object."""


def answerer(setup: bytes) -> Callable[[bytes], bytes]:
    """What a worker of `reward_pool` runs. `setup`: the functions' names, as a JSON list. Raises `FunctionError`."""
    names = msgspec.json.decode(setup, type=list[str])
    functions: list[RewardFunction] = [load_function("reward function", name, BUILT_IN) for name in names]

    def answer(body: bytes) -> bytes:
        asked = msgspec.msgpack.decode(body, type=Question)
        payload = msgspec.json.decode(asked.payload, type=dict[str, Any])
        returned = functions[asked.function](asked.answer_text, payload)
        name = names[asked.function]
        return msgspec.msgpack.encode(Values(reward_values(name, returned), stated_answer(returned)))

    return answer


def sums(answer_text: str, payload: Mapping[str, Any]) -> float:
    """1 if the answer ends in a number and that number is `payload["answer"]`, else 0.

    Nothing may follow the number: an answer that goes on was cut off or does not know that it was done.
    """
    final = _FINAL_NUMBER.search(answer_text)
    return float(final is not None and int(final[1]) == int(payload["answer"]))


def think_format(answer_text: str, payload: Mapping[str, Any]) -> float:
    """1 if the answer is one `<think>...</think>` with thoughts in it, then an answer without such tags; else 0."""
    match = _THINK.fullmatch(answer_text)
    if match is None:
        return 0.0
    thoughts, answer = match.groups()
    tags = any(tag in part for tag in ("<think>", "</think>") for part in match.groups())
    return float(bool(thoughts.strip()) and bool(answer.strip()) and not tags)


def stated_answer(returned: Any) -> str | None:
    """The final answer that a reward function names; None where it names none."""
    answer = returned.get("answer") if isinstance(returned, Mapping) else None
    return answer if isinstance(answer, str) else None


def reward_values(name: str, returned: Any) -> dict[str, float]:
    """What a reward function returned, as numbers by name; "reward" is always among them. Raises `FunctionError`."""
    values = returned if isinstance(returned, Mapping) else {"reward": returned}
    if "reward" not in values:
        raise FunctionError(
            f"reward function {name!r} returned a dict without 'reward': {sorted(map(str, values))}"
        )
    numbers = {}
    for key, value in values.items():
        if key == "answer" and isinstance(value, str):
            continue
        try:
            numbers[str(key)] = float(value)
        except (TypeError, ValueError):
            raise FunctionError(
                f"reward function {name!r} returned {key} = {value!r}; expected a number"
            ) from None
        if not math.isfinite(numbers[str(key)]):
            raise FunctionError(
                f"reward function {name!r} returned {key} = {value}; expected a finite number"
            )
    return numbers
