from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.learner.division import LINEAR, divide

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)
EVEN_LENGTHS = st.sampled_from([LINEAR, 40.0, 500.0])


def long_tailed(rows: int, seed: int) -> np.ndarray:
    """Median 660, a hundredth beyond 6,800, none beyond 10,240."""
    lengths = np.exp(np.random.default_rng(seed).normal(6.5, 1.0, rows))
    return lengths.clip(16, 10_240).astype(np.int64)


def loads(parts: list[list[np.ndarray]], weights: np.ndarray) -> np.ndarray:
    return np.array([sum(weights[rows].sum() for rows in own) for own in parts])


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 2000), st.integers(1, 5), EVEN_LENGTHS)
def test_each_row_is_in_one_pass_of_one_rank(
    lengths: list[int], limit: int, ranks: int, even_length: float
) -> None:
    sizes = np.array(lengths)
    parts = divide(sizes, limit, ranks, even_length)
    assert len(parts) == ranks and len({len(own) for own in parts}) == 1
    rows = np.concatenate([part for own in parts for part in own])
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    for part in (part for own in parts for part in own):
        assert len(part) <= 1 or sizes[part].sum() <= limit
        assert (np.diff(sizes[part]) <= 0).all()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 2000), st.integers(1, 5), EVEN_LENGTHS)
def test_every_rank_divides_alike(lengths: list[int], limit: int, ranks: int, even_length: float) -> None:
    """Ranks divide without talking."""
    once, again = (divide(np.array(lengths), limit, ranks, even_length) for _ in range(2))
    assert [[part.tolist() for part in own] for own in once] == [
        [part.tolist() for part in own] for own in again
    ]


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(300, 2000), st.integers(1, 5))
def test_passes_are_less_than_twice_as_many_as_tokens_need(
    lengths: list[int], limit: int, ranks: int
) -> None:
    passes = len(divide(np.array(lengths), limit, ranks)[0])
    # With one pass less, some row found no room though every bin was to be at least half full.
    assert passes == 1 or (passes - 1) * ranks * limit < 2 * sum(lengths)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 2000), st.integers(1, 5))
def test_no_two_ranks_differ_by_more_than_the_longest_row(lengths: list[int], limit: int, ranks: int) -> None:
    sizes = np.array(lengths)
    total = loads(divide(sizes, limit, ranks), sizes)
    assert total.max() - total.min() <= max(lengths)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_even_on_a_long_tail(ranks: int, seed: int) -> None:
    """In what they cost, and in what a step waits for: the slowest rank of each pass. So nearly in tokens as well."""
    lengths, even_length = long_tailed(1024, seed), 12 * 1024.0
    cost = lengths * (1 + lengths / even_length)
    parts = divide(lengths, 16_384, ranks, even_length)
    for weights, bound in ((lengths, 1.06), (cost, 1.01)):
        total = loads(parts, weights)
        assert total.max() <= bound * total.mean()
    slowest = sum(max(cost[own[turn]].sum() for own in parts) for turn in range(len(parts[0])))
    assert slowest <= 1.02 * cost.sum() / ranks
    assert len(parts[0]) <= -(-lengths.sum() // (16_384 * ranks)) + 1


def test_attention_counts() -> None:
    """One row of 1,000 costs as much as eleven of 100 if attention costs as much as the rest at 1,000."""
    lengths = np.array([1000] + [100] * 18)
    long, short = sorted(divide(lengths, 10_000, 2, even_length=1000.0), key=lambda own: len(own[0]))
    assert len(long[0]) == 1 and len(short[0]) == 18
    even = divide(lengths, 10_000, 2)
    assert abs(lengths[even[0][0]].sum() - lengths[even[1][0]].sum()) <= 100


def test_more_ranks_than_rows_leaves_ranks_without_rows() -> None:
    parts = divide(np.array([5, 9]), 100, 4)
    assert sorted(len(own[0]) for own in parts) == [0, 0, 1, 1]
