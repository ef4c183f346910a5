"""What held-out answers come to: avg@k, pass@k, maj@k, each with its standard error over prompts. Pure.

Answers to one prompt are independent of one another, and prompts are drawn independently: so the spread over prompts holds both,
and nothing is assumed of how the answers to one prompt hang together. Called by `runtime.held_out`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec


class Estimate(msgspec.Struct, frozen=True):
    """A mean over prompts."""

    value: float
    standard_error: float
    """Of the mean: the standard deviation over prompts / sqrt(prompts). NaN with one prompt."""


def over_prompts(values: Sequence[float]) -> Estimate:
    """`values` [prompts], at least one."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, math.sqrt(variance / n))


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The chance that one of `k` answers is right, estimated from `right` of `answers`, without bias:
    1 - C(answers - right, k) / C(answers, k) (Chen et al. 2021, arXiv:2107.03374, equation 1)."""
    if not (0 <= right <= answers and 1 <= k <= answers):
        raise ValueError(
            f"pass@{k} of {answers} answers with {right} right: expected 0 <= right <= answers >= k >= 1"
        )
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def maj_at_k(finals: Sequence[str], right: Sequence[bool], k: int) -> float:
    """The chance that the answer which most of `k` answers end in is right, estimated from `finals` and `right` [answers].

    The answers are taken `k` at a time in the order in which they were asked for, those left over are not used: the mean over
    such parts has no bias, as the answers are exchangeable. A final answer of "" is none and has no vote; where nobody votes the
    majority is wrong. Of tied answers one is drawn: their mean stands for it. Where answers that end alike are not all right
    (a reward that looks at more than the end), the share of those that are counts.
    """
    if not (len(finals) == len(right) and 1 <= k <= len(finals)):
        raise ValueError(
            f"maj@{k} of {len(finals)} answers ({len(right)} judged): expected 1 <= k <= answers"
        )
    parts = [slice(start, start + k) for start in range(0, len(finals) - k + 1, k)]
    return sum(_majority(finals[part], right[part]) for part in parts) / len(parts)


def _majority(finals: Sequence[str], right: Sequence[bool]) -> float:
    votes = Counter(final for final in finals if final)
    if not votes:
        return 0.0
    most = max(votes.values())
    # Each of the tied has as many votes, so that the mean over them is the mean over their voters.
    voters = [bool(r) for final, r in zip(finals, right, strict=True) if votes[final] == most]
    return sum(voters) / len(voters)
