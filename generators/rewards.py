"""Reward functions: what an answer is worth. Run by the workers of `reward_pool`, never on an event loop.

A reward function is `function(answer_text: str, payload: dict) -> float | dict`:
- `answer_text` is the sampled answer without special tokens; `payload` is the prompt's row, with `prompt_id`,
  `question` and `answer`.
- It returns a finite number, or a dict of finite numbers that has "reward"; the others are reported beside it.
- It may hang, raise or end its process: that costs its own rollout and nothing else.
Named in a recipe by a built-in name (`sums`, `math`, `format`) or by an import path `package.module:function`.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

RewardFunction = Callable[[str, dict[str, Any]], float | Mapping[str, float]]

BUILT_IN: Final = {
    "sums": "asyncrl.generators.rewards:sums",
    "math": "asyncrl.generators.reward_math:math_answer",
    "format": "asyncrl.generators.rewards:think_format",
}

_FINAL_NUMBER: Final = re.compile(r"(?:^|[^0-9])([0-9]+)\s*$")
_THINK: Final = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


class RewardError(ValueError):
    """A reward function that cannot be found, or whose value is no reward."""


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


def load_function(name: str) -> RewardFunction:
    """The function of a built-in name or import path. Raises `RewardError`, which says the way out."""
    path = BUILT_IN.get(name, name)
    module_name, colon, function_name = path.partition(":")
    if not colon or not module_name or not function_name:
        raise RewardError(
            f"no reward function {name!r}; expected {', '.join(BUILT_IN)}, or package.module:function"
        )
    try:
        function: RewardFunction = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise RewardError(
            f"reward function {name!r}: importing {module_name!r} failed: {error}. Put its folder on PYTHONPATH or "
            "install its package."
        ) from error
    except AttributeError as error:
        raise RewardError(f"reward function {name!r}: {error}") from error
    if not callable(function):
        raise RewardError(f"reward function {name!r} is a {type(function).__name__}, which cannot be called")
    return function


def reward_values(name: str, returned: Any) -> dict[str, float]:
    """What a reward function returned, as numbers by name; "reward" is always among them. Raises `RewardError`."""
    values = returned if isinstance(returned, Mapping) else {"reward": returned}
    if "reward" not in values:
        raise RewardError(
            f"reward function {name!r} returned a dict without 'reward': {sorted(map(str, values))}"
        )
    numbers = {}
    for key, value in values.items():
        try:
            numbers[str(key)] = float(value)
        except (TypeError, ValueError):
            raise RewardError(
                f"reward function {name!r} returned {key} = {value!r}; expected a number"
            ) from None
        if not math.isfinite(numbers[str(key)]):
            raise RewardError(f"reward function {name!r} returned {key} = {value}; expected a finite number")
    return numbers
