from __future__ import annotations

from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.learner.division import PASS_OVERHEAD_TOKENS, divide

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(100, 2000), st.integers(1, 5))
def test_each_row_is_in_one_pass_of_one_rank(lengths: list[int], limit: int, ranks: int) -> None:
    sizes = np.array(lengths)
    parts = divide(sizes, limit, ranks)
    assert len(parts) == ranks and len({len(own) for own in parts}) == 1
    rows = np.concatenate([part for own in parts for part in own])
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    for part in (part for own in parts for part in own if len(part)):
        assert len(part) == 1 or len(part) * sizes[part].max() <= limit


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 5))
def test_ranks_get_nearly_the_same_tokens(lengths: list[int], ranks: int) -> None:
    sizes = np.array(lengths)
    loads = [int(sum(sizes[part].sum() for part in own)) for own in divide(sizes, 500, ranks)]
    assert max(loads) - min(loads) <= max(lengths)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=10), st.integers(60, 600))
def test_no_cut_costs_less(lengths: list[int], limit: int) -> None:
    sizes = sorted(lengths, reverse=True)

    @cache
    def least(start: int) -> int:
        """Every cut of sizes[start:] tried."""
        if start == len(sizes):
            return 0
        ends = [
            e
            for e in range(start + 1, len(sizes) + 1)
            if e == start + 1 or (e - start) * sizes[start] <= limit
        ]
        return min((e - start) * sizes[start] + PASS_OVERHEAD_TOKENS + least(e) for e in ends)

    parts = divide(np.array(lengths), limit, 1)[0]
    cost = sum(len(part) * max(lengths[row] for row in part) + PASS_OVERHEAD_TOKENS for part in parts)
    assert cost == least(0)


def test_padding_of_a_long_tailed_batch_is_within_the_budget() -> None:
    random = np.random.default_rng(0)
    lengths = 8 + random.geometric(1 / 40, 512)
    parts = divide(lengths, 8192, 1)[0]
    padded = sum(len(part) * lengths[part].max() for part in parts)
    assert padded / lengths.sum() - 1 <= 0.05
