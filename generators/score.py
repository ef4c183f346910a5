"""What an answer is worth by all reward terms together. Pure. Called by `reward_pool`.

    reward = sum over terms of weight x reward          cost = sum over terms of weight x cost

A term that gives no cost adds none: a rollout's cost is 0 where no term gives one, and `needs_cost` refuses that where the
objective holds costs below a limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from asyncrl.generators.config import RewardTerm

Numbers = Mapping[str, float]
"""What one term says of an answer: `reward`, `cost` where it has one, and whatever else it reports."""


class Score(msgspec.Struct, frozen=True):
    """What an answer is worth."""

    reward: float
    """Sum of weight * reward over the terms."""
    cost: float
    """Sum of weight * cost over the terms that give one; 0 where none does."""
    parts: dict[str, float]
    """Reward of each term by its name, before weighting; its further numbers as `name/key`."""
    answer: str | None = None
    """The final answer, as the first term that names one understands it."""


class RewardFailed(RuntimeError):
    """One answer could not be scored; its rollout fails with this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class CostMissing(RuntimeError):
    """The objective limits costs and no reward term gave one: to go on would train as if everything were harmless."""


def combined(
    terms: Sequence[RewardTerm],
    values: Sequence[Numbers],
    answer: str | None = None,
    *,
    needs_cost: bool = False,
) -> Score:
    """`values`: what each of the terms says. Raises CostMissing, where `needs_cost` and none of them gives a cost."""
    if needs_cost and not any("cost" in numbers for numbers in values):
        raise CostMissing(
            f"no reward term gave a cost ({', '.join(term.name for term in terms)}), and learner.objective.cost holds the mean "
            'cost of a rollout below a limit: have a reward function return {"reward": ..., "cost": ...} for every answer, add '
            'a model with serving = { gives = "cost" }, or leave learner.objective.cost out'
        )
    parts = {
        term.name if key == "reward" else f"{term.name}/{key}": value
        for term, numbers in zip(terms, values, strict=True)
        for key, value in numbers.items()
    }
    return Score(
        reward=_weighted(terms, values, "reward"),
        cost=_weighted(terms, values, "cost"),
        parts=parts,
        answer=answer,
    )


def _weighted(terms: Sequence[RewardTerm], values: Sequence[Numbers], key: str) -> float:
    return sum(term.weight * numbers.get(key, 0.0) for term, numbers in zip(terms, values, strict=True))
