from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.learner.aggregation import token_weights, weighted_sum

Oracle = Any
"""The fixture's class in conftest, which a test cannot import."""
AGGREGATIONS = ("token_mean", "sequence_sum", "sequence_mean", "fixed_divisor")


@pytest.mark.parametrize(
    ("aggregation", "name"),
    [
        ("token_mean", "verl/agg_loss/token-mean"),
        ("sequence_sum", "verl/agg_loss/seq-mean-token-sum"),
        ("sequence_mean", "verl/agg_loss/seq-mean-token-mean"),
        ("fixed_divisor", "verl/agg_loss/seq-mean-token-sum-norm"),
    ],
)
def test_verl_aggregates_alike(oracle: Oracle, aggregation: Any, name: str) -> None:
    """Of the column `values`, which stands for losses here."""
    weights = token_weights(aggregation, oracle.mask, oracle.row, 12 if "fixed" in aggregation else None)
    found = weighted_sum(oracle.flat("values"), weights.double())
    assert float(found) == pytest.approx(float(oracle.golden[name]), abs=1e-5)


ROWS = st.lists(st.lists(st.booleans(), max_size=6), min_size=1, max_size=8)
"""Each rollout's tokens, trainable or not; there are empty ones."""


def _written_out(aggregation: str, rows: list[list[bool]], losses: list[list[float]]) -> float:
    kept = [[x for x, m in zip(a, b, strict=True) if m] for a, b in zip(losses, rows, strict=True)]
    kept = [row for row in kept if row]
    if not kept:
        return 0.0
    if aggregation == "token_mean":
        return float(np.mean([x for row in kept for x in row]))
    if aggregation == "sequence_mean":
        return float(np.mean([np.mean(row) for row in kept]))
    return float(np.mean([np.sum(row) for row in kept])) / (7 if aggregation == "fixed_divisor" else 1)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@settings(max_examples=60, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 9), ranks=st.integers(1, 3))
def test_the_parts_of_any_division_add_up_to_the_formula(
    aggregation: Any, rows: list[list[bool]], seed: int, ranks: int
) -> None:
    """Whatever is masked or empty, and whoever computes which rollout."""
    random = np.random.default_rng(seed)
    losses = [random.normal(size=len(row)).tolist() for row in rows]
    mask = torch.tensor([m for row in rows for m in row], dtype=torch.bool)
    row = torch.tensor([i for i, each in enumerate(rows) for _ in each], dtype=torch.int64)
    flat = torch.tensor([x for each in losses for x in each], dtype=torch.float64)
    weights = token_weights(aggregation, mask, row, 7).double()
    flat[~mask] = torch.nan  # what is context only may be anything
    parts = [weighted_sum(flat[row % ranks == k], weights[row % ranks == k]) for k in range(ranks)]
    assert sum(map(float, parts)) == pytest.approx(_written_out(aggregation, rows, losses), abs=1e-6)


def test_what_is_not_finite_is_seen_where_it_counts() -> None:
    losses, weights = torch.tensor([torch.nan, 1.0]), torch.tensor([0.5, 0.5])
    assert weighted_sum(losses, weights).isnan()
    assert weighted_sum(losses, torch.tensor([0.0, 0.5])) == 0.5
