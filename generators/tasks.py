"""Generated tasks: prompts that need no data set. Called by `sources`; pure, no state, no clock.

Invariants:
- Row `i` of a split is a function of (task, split, settings, seed, i) and of nothing else, on any machine: access is
  random, and a cursor is enough to go on after a crash.
- A question belongs to one split by a hash of its own text, so that train and test share no question, whatever
  their seeds and settings.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from random import Random
from typing import Final, Protocol

import msgspec

SPLITS: Final = ("train", "test")
TEST_SHARE: Final = 8
"""One question in so many is a test question."""


class TaskRow(msgspec.Struct, frozen=True):
    """One question of a generated task."""

    question: str
    answer: str
    """What the reward compares with."""
    solution: str | list[str]
    """A right answer in full: what supervised fine-tuning imitates. A list: what the model says in each of its turns."""


class TaskError(ValueError):
    """A task, split or setting that does not exist or cannot be."""


class SumsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of `sums`. How many terms a chain has decides how long its answer is."""

    min_terms: int = 2
    usual_terms: int = 6
    """Most chains have `min_terms` to `usual_terms` terms, each count equally often."""
    max_terms: int = 14
    tail_percent: int = 10
    """So many chains in a hundred have more than `usual_terms`, up to `max_terms`, longer ones less often."""

    def __post_init__(self) -> None:
        if not 2 <= self.min_terms <= self.usual_terms <= self.max_terms:
            raise ValueError(
                "expected 2 <= min_terms <= usual_terms <= max_terms, got "
                f"min_terms={self.min_terms}, usual_terms={self.usual_terms}, max_terms={self.max_terms}"
            )
        if not 0 <= self.tail_percent <= 100:
            raise ValueError(f"expected tail_percent in 0..100, got {self.tail_percent}")

    def draw_terms(self, random: Random) -> int:
        """Number of terms of one chain. In the tail the lesser of two draws counts: the weight falls linearly."""
        if self.usual_terms < self.max_terms and random.randrange(100) < self.tail_percent:
            return min(random.randint(self.usual_terms + 1, self.max_terms) for _ in range(2))
        return random.randint(self.min_terms, self.usual_terms)

    def draw(self, random: Random) -> TaskRow:
        """One chain sum of single-digit terms."""
        return sum_row([random.randrange(10) for _ in range(self.draw_terms(random))])


def sum_row(terms: list[int]) -> TaskRow:
    """Question `3+9+4=`, answer `16`, solution with running totals `3+9=12;12+4=16`."""
    total, steps = terms[0], []
    for term in terms[1:]:
        steps.append(f"{total}+{term}={total + term}")
        total += term
    return TaskRow(question="+".join(map(str, terms)) + "=", answer=str(total), solution=";".join(steps))


class ArithmeticSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of `arithmetic`: sums of products, for the environment `calculator`."""

    min_terms: int = 1
    max_terms: int = 3
    """Each count of terms equally often; a term is a number or, as often, a product of two."""
    max_digits: int = 2
    """Of one number; each count of digits equally often."""
    tool_percent: int = 25
    """So many solutions in a hundred call the calculator; the others have the answer at once, as from the head."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_terms <= self.max_terms or self.max_digits < 1:
            raise ValueError(
                "expected 1 <= min_terms <= max_terms and max_digits >= 1, got "
                f"min_terms={self.min_terms}, max_terms={self.max_terms}, max_digits={self.max_digits}"
            )
        if not 0 <= self.tool_percent <= 100:
            raise ValueError(f"expected tool_percent in 0..100, got {self.tool_percent}")

    def draw(self, random: Random) -> TaskRow:
        """A first term that is a product, so that nothing comes out of adding alone, then terms of both kinds."""
        terms = random.randint(self.min_terms, self.max_terms)
        factors = [2, *(random.randint(1, 2) for _ in range(terms - 1))]
        numbers = [[self._number(random) for _ in range(count)] for count in factors]
        return arithmetic_row(numbers, by_tool=random.randrange(100) < self.tool_percent)

    def _number(self, random: Random) -> int:
        digits = random.randint(1, self.max_digits)
        return random.randint(10 ** (digits - 1), 10**digits - 1)


def arithmetic_row(terms: list[list[int]], *, by_tool: bool) -> TaskRow:
    """Question `12*3+40=`, answer `76`, solution `76`, or by tool `<tool>12*3+40</tool>` and then `76`."""
    expression = "+".join("*".join(map(str, factors)) for factors in terms)
    answer = str(sum(math.prod(factors) for factors in terms))
    solution = [f"<tool>{expression}</tool>", answer] if by_tool else answer
    return TaskRow(question=expression + "=", answer=answer, solution=solution)


def split_of(question: str) -> str:
    """The split that a question belongs to, by its text alone."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_SHARE == 0 else "train"


class Settings(Protocol):
    """The checked settings of one task, which draw its rows."""

    def draw(self, random: Random) -> TaskRow: ...


TASKS: Final[dict[str, type[Settings]]] = {"sums": SumsSettings, "arithmetic": ArithmeticSettings}


class GeneratedTask:
    """The endless rows of one split of a task."""

    def __init__(self, name: str, split: str, settings: Mapping[str, int], seed: int) -> None:
        """Raises `TaskError`."""
        if name not in TASKS:
            raise TaskError(f"no generated task {name!r}; there are: {', '.join(sorted(TASKS))}")
        if split not in SPLITS:
            raise TaskError(f"task {name!r} has no split {split!r}; it has: {', '.join(SPLITS)}")
        self.name, self.split, self.seed = name, split, seed
        try:
            self._settings = msgspec.convert(dict(settings), TASKS[name])
        except msgspec.ValidationError as error:
            raise TaskError(f"settings of task {name!r}: {error}") from error

    def row(self, index: int) -> TaskRow:
        """Row `index`, from 0: the first question that `index` draws in the right split.

        Ends after a handful of draws, as every eighth question is a test question; the bound is for a task of so
        few questions that a split is empty.
        """
        random = Random(f"{self.name}/{self.split}/{self.seed}/{index}")
        for _ in range(10_000):
            row = self._settings.draw(random)
            if split_of(row.question) == self.split:
                return row
        raise TaskError(f"task {self.name!r} with {self._settings} has no question in split {self.split!r}")
