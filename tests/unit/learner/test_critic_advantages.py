"""GAE and the losses around a critic, against other projects and against their recursions written out in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.learner.advantages import on_last_token, whiten
from asyncrl.learner.critic_advantages import gae, length_adaptive_lambda, value_losses
from asyncrl.learner.scan import discounted_sums

Oracle = Any
"""The fixture's class in conftest, which a test cannot import."""

ROWS = st.lists(st.lists(st.tuples(*[st.floats(-3, 3)] * 3), max_size=9), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(ROWS, st.floats(0, 1))
def test_a_scan_is_its_recursion(rows: list[list[tuple[float, float, float]]], factor: float) -> None:
    flat = [(i, x) for i, each in enumerate(rows) for x, *_ in each]
    row = torch.tensor([i for i, _ in flat], dtype=torch.int64)
    values = torch.tensor([x for _, x in flat], dtype=torch.float64)
    found = discounted_sums(values, factor, row)
    later = 0.0
    for t in reversed(range(len(flat))):
        same = t + 1 < len(flat) and flat[t + 1][0] == flat[t][0]
        later = flat[t][1] + (factor * later if same else 0.0)
        assert float(found[t]) == pytest.approx(later, abs=1e-9)


def test_a_long_rollout_needs_no_loop_over_tokens() -> None:
    found = discounted_sums(torch.ones(5000, dtype=torch.float64), 1.0, torch.zeros(5000, dtype=torch.int64))
    assert torch.equal(found, torch.arange(5000, 0, -1, dtype=torch.float64))


@settings(max_examples=80, deadline=None)
@given(ROWS, st.floats(0, 1), st.floats(0, 1))
def test_gae_is_its_recursion(
    rows: list[list[tuple[float, float, float]]], discount: float, lam: float
) -> None:
    flat = [(i, r, v) for i, each in enumerate(rows) for r, v, _ in each]
    row = torch.tensor([i for i, *_ in flat], dtype=torch.int64)
    rewards, values = (torch.tensor([f[k] for f in flat], dtype=torch.float64) for k in (1, 2))
    found = gae(rewards, values, row, discount, lam)
    place = 0
    for each in rows:
        for t in range(len(each)):
            want = 0.0  # the sum of discounted TD errors, as the paper has it
            for k in range(t, len(each)):
                ahead = each[k + 1][1] if k + 1 < len(each) else 0.0
                want += (discount * lam) ** (k - t) * (each[k][0] + discount * ahead - each[k][1])
            assert float(found[place]) == pytest.approx(want, abs=1e-8)
            place += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_projects_estimate_alike(oracle: Oracle, dtype: torch.dtype) -> None:
    own, kept = oracle.row[oracle.mask], oracle.mask
    values = oracle.flat("values", dtype)[kept]
    rewards = on_last_token(torch.from_numpy(oracle.inputs["score"]).to(dtype), own)
    ours = gae(rewards, values, own, 0.99, 0.95)
    returns = oracle.want("verl/ret/gae(g=.99,l=.95)")[kept]
    torch.testing.assert_close((ours + values).double(), returns, atol=1e-5, rtol=0)
    normalised = whiten(ours, torch.ones(len(own), dtype=torch.bool))
    theirs = oracle.want("verl/adv/gae(g=.99,l=.95)")[kept]
    torch.testing.assert_close(normalised.double(), theirs, atol=1e-5, rtol=0)


def test_areal_estimates_alike_without_an_environment(oracle: Oracle) -> None:
    """AReaL lets values of the environment's tokens count; on rollouts without any the two agree."""
    own, kept = oracle.row[oracle.mask], oracle.mask
    rewards = on_last_token(torch.from_numpy(oracle.inputs["score"]), own)
    ours = gae(rewards, oracle.flat("values")[kept], own, 0.99, 0.95)
    theirs = oracle.want("areal/gae(g=.99,l=.95) raw adv")[kept]
    holes = np.flatnonzero(oracle.inputs["mask"].sum(1) < oracle.inputs["lens"])
    whole = ~torch.isin(own, torch.from_numpy(holes))
    torch.testing.assert_close(ours[whole], theirs[whole], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["verl/value_loss[.2]", "areal/value_loss[.2]"])
def test_other_projects_have_the_same_value_loss(oracle: Oracle, name: str) -> None:
    predicted = oracle.flat("vpreds", torch.float32).requires_grad_()
    values = oracle.flat("values", torch.float32)
    losses = value_losses(predicted, values, values + 0.3, 0.2)  # the case's returns
    loss = losses[oracle.mask].mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(oracle.golden[name]), abs=1e-5)
    if name + "#grad" in oracle.golden:
        assert predicted.grad is not None
        torch.testing.assert_close(predicted.grad.double(), oracle.want(name + "#grad"), atol=1e-5, rtol=0)


def test_without_a_clip_the_value_loss_is_half_the_square() -> None:
    values = torch.tensor([1.0, 5.0])
    assert value_losses(values, torch.zeros(2), torch.zeros(2), None).tolist() == [0.5, 12.5]
    assert value_losses(values, torch.zeros(2), torch.full((2,), 5.0), 0.5).tolist() == [10.125, 10.125]


def test_lambda_grows_with_the_length_and_is_never_negative() -> None:
    found = length_adaptive_lambda(torch.tensor([0, 5, 20, 100, 2000]), 0.05)
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.0, 0.8, 0.99])


def test_each_rollout_may_have_a_lambda_of_its_own() -> None:
    rewards, values = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.2, 0.4, 0.2, 0.4])
    row = torch.tensor([0, 0, 1, 1])
    both = gae(rewards, values, row, 1.0, torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert torch.equal(both[:2], gae(rewards, values, row, 1.0, 0.0)[:2])
    assert torch.equal(both[2:], gae(rewards, values, row, 1.0, 1.0)[2:])
    assert both.tolist() == pytest.approx([0.2, 0.6, 0.8, 0.6])
