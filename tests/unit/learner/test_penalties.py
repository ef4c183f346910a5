from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.learner.aggregation import token_weights, weighted_sum
from asyncrl.learner.penalties import (
    constrained_advantages,
    kl_estimate,
    next_multiplier,
    overlong_penalty,
    rewards_less_kl,
)
from asyncrl.learner.surrogates import clipped_surrogate

Oracle = Any
"""The fixture's class in conftest, which a test cannot import."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_verl_estimates_the_kl_alike(oracle: Oracle, estimator: Any, dtype: torch.dtype) -> None:
    current = oracle.flat("logp", dtype).requires_grad_()
    kl = kl_estimate(current, oracle.flat("ref_logp", dtype), estimator)
    loss = weighted_sum(kl, token_weights("token_mean", oracle.mask, oracle.row, None).to(dtype))
    loss.backward()
    name = f"verl/kl_penalty/{estimator}/token-mean"
    assert loss.item() == pytest.approx(float(oracle.golden[name]), abs=1e-5)
    assert current.grad is not None
    torch.testing.assert_close(current.grad.double(), oracle.want(name + "#grad"), atol=1e-5, rtol=0)


def test_trl_has_the_same_loss_with_kl(oracle: Oracle) -> None:
    current = oracle.flat("logp", torch.float32).requires_grad_()
    losses = clipped_surrogate(
        current - oracle.flat("old_logp", torch.float32),
        oracle.per_token("adv_seq", torch.float32),
        0.2,
        0.28,
    )
    losses = losses + 0.04 * kl_estimate(current, oracle.flat("ref_logp", torch.float32), "k3")
    loss = weighted_sum(losses, token_weights("sequence_mean", oracle.mask, oracle.row, None))
    loss.backward()
    name = "trl/loss/grpo/token beta=.04 (k3)"
    assert loss.item() == pytest.approx(float(oracle.golden[name]), abs=1e-5)
    assert current.grad is not None
    torch.testing.assert_close(current.grad.double(), oracle.want(name + "#grad"), atol=1e-5, rtol=0)


def test_verl_has_the_same_reward_less_kl(oracle: Oracle) -> None:
    kl = kl_estimate(oracle.flat("old_logp"), oracle.flat("ref_logp"), "k1")
    ours = rewards_less_kl(oracle.flat("rewards"), kl, 0.1)
    theirs = oracle.want("verl/compute_rewards(kl .1)")
    torch.testing.assert_close(ours[oracle.mask], theirs[oracle.mask], atol=1e-5, rtol=0)


@given(st.lists(st.floats(-3, 0), min_size=3, max_size=3), st.lists(st.floats(-3, 0), min_size=3, max_size=3))
def test_k1_and_k3_are_unbiased_and_k2_has_the_right_gradient(p: list[float], q: list[float]) -> None:
    """Their means under the policy, against the KL itself over three tokens."""
    logits = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    policy = torch.log_softmax(logits, -1)
    reference = torch.log_softmax(torch.tensor(q, dtype=torch.float64), -1)
    kl = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        mean = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()  # type: ignore[arg-type]
        assert float(mean.detach()) == pytest.approx(float(kl.detach()), abs=1e-9)
    (want,) = torch.autograd.grad(kl, logits, retain_graph=True)
    sampled = {}
    for estimator in ("k1", "k2"):
        mean = (policy.detach().exp() * kl_estimate(policy, reference, estimator)).sum()  # type: ignore[arg-type]
        (sampled[estimator],) = torch.autograd.grad(mean, logits, retain_graph=True)
    torch.testing.assert_close(sampled["k2"], want, atol=1e-9, rtol=0)
    torch.testing.assert_close(sampled["k1"], torch.zeros_like(want), atol=1e-9, rtol=0)


def test_dapo_punishes_overlong_answers_alike(oracle: Oracle) -> None:
    ours = overlong_penalty(torch.from_numpy(oracle.inputs["lens"]), 8, 4, 1.0)
    theirs = oracle.golden["verl/dapo_overlong(len,max12,buf4,pen1)"]
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-9, rtol=0)


def test_the_penalty_falls_no_further_than_itself() -> None:
    lengths = torch.tensor([0, 10, 11, 15, 20, 21, 500])
    assert overlong_penalty(lengths, 10, 10, 0.5).tolist() == pytest.approx(
        [0, 0, -0.05, -0.25, -0.5, -0.5, -0.5]
    )


def test_the_multiplier_rises_with_costs_above_the_limit_and_falls_below() -> None:
    assert next_multiplier(1.0, 0.5, 0.5, 0.1, 10.0) == pytest.approx(1.0)
    assert next_multiplier(2.0, 1.5, 0.5, 0.1, 10.0) == pytest.approx(2.0 * math.exp(0.2))
    assert next_multiplier(2.0, -0.5, 0.5, 0.1, 10.0) == pytest.approx(2.0 * math.exp(-0.2))
    assert next_multiplier(9.9, 1e6, 0.0, 1.0, 10.0) == pytest.approx(10.0)
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        next_multiplier(1.0, math.nan, 0.0, 0.1, 10.0)


def test_the_multiplier_ascends_the_lagrangian_in_its_logarithm() -> None:
    log = torch.tensor(math.log(1.7), dtype=torch.float64, requires_grad=True)
    (log.exp() * (0.9 - 0.4)).backward()
    assert log.grad is not None
    want = (log + 0.3 * log.grad).exp().item()
    assert next_multiplier(1.7, 0.9, 0.4, 0.3, 10.0) == pytest.approx(want)


def test_advantages_under_a_constraint_weigh_reward_against_cost() -> None:
    reward, cost = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.5])
    assert constrained_advantages(reward, cost, 0.0).tolist() == [1.0, -1.0]
    assert constrained_advantages(reward, cost, 3.0).tolist() == pytest.approx([-0.5, -0.625])
