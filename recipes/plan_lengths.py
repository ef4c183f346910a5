"""Answer lengths known by mean and maximum only, and what their tail does. Pure.

Of all distributions on [0, maximum] with a given mean the least presuming (of greatest entropy) has the density
exp(-rate x), cut off at the maximum: short answers many and a tail up to the limit for a low mean, uniform at half of the
maximum, most answers cut off near it for a high one. Its survival function S(x) = P(length > x) gives the rest:
- mean of the longest of n:                 integral of 1 - (1 - S)^n
- tokens that a rollout in a slot has:      density S / mean (renewal theory), so mean E[x^2] / (2 mean)
Integrals are sums over `GRID` parts, finer towards 0. Called by `plan_memory`, `plan_speed` and `plan_search`.
"""

from __future__ import annotations

import math

import numpy as np

GRID = 256


class Lengths:
    """Of answers, in tokens. Raises ValueError unless 0 < mean <= maximum."""

    def __init__(self, mean_tokens: float, max_tokens: int) -> None:
        if not 0 < mean_tokens <= max_tokens:
            raise ValueError(
                f"mean answer tokens must be within 0..{max_tokens} (max_new_tokens), got {mean_tokens:g}"
            )
        self.max_tokens = max_tokens
        edges = (np.arange(GRID + 1) / GRID) ** 2
        self.widths = np.diff(edges) * max_tokens
        """[GRID] tokens"""
        self.middles = (edges[1:] + edges[:-1]) / 2 * max_tokens
        """[GRID] tokens"""
        self.survival = _survival(_rate(mean_tokens / max_tokens), self.middles / max_tokens)
        """[GRID] P(length > middle)"""
        # The sum over the grid stands for the mean everywhere, so that shares of it add up.
        self.mean = float((self.survival * self.widths).sum())
        self.mean_square = float((2 * self.middles * self.survival * self.widths).sum())

    @property
    def held_mean(self) -> float:
        """Answer tokens that a rollout in a slot has on average."""
        return self.mean_square / (2 * self.mean)

    @property
    def held_deviation(self) -> float:
        square = float((self.middles**2 * self.survival * self.widths).sum()) / self.mean
        return math.sqrt(max(0.0, square - self.held_mean**2))

    def mean_of_longest(self, count: int) -> float:
        """Of `count` answers."""
        return float(((1 - (1 - self.survival) ** count) * self.widths).sum())

    def residual_survival(self) -> np.ndarray:
        """[GRID] P(a rollout met in a slot goes on for more than this)."""
        parts = self.survival * self.widths
        return np.asarray((np.cumsum(parts[::-1])[::-1] - parts / 2) / self.mean)


def _rate(share: float) -> float:
    """a with 1/a - 1/(e^a - 1) = share: the mean of exp(-a x) cut to [0, 1]. The left side falls from 1 to 0."""
    low, high = -1000.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        if _mean(middle) > share:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _mean(a: float) -> float:
    if abs(a) < 1e-4:
        return 0.5 - a / 12
    return 1 / a - (0.0 if a > 500 else 1 / math.expm1(a))


def _survival(a: float, x: np.ndarray) -> np.ndarray:
    if abs(a) < 1e-4:
        return 1 - x
    if a > 0:
        return np.asarray((np.exp(-a * x) - math.exp(-a)) / -math.expm1(-a))
    return np.asarray(-np.expm1(a * (1 - x)) / -math.expm1(a))
