"""Objectives as their settings put them together: which advantages, and what tokens that are context may not do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.learner.aggregation import token_weights, weighted_sum
from asyncrl.learner.columns import Columns
from asyncrl.learner.objective import (
    clip_bites,
    correction_acts,
    correction_weights,
    shaped_rewards,
    token_advantages,
    token_losses,
)
from asyncrl.learner.objective_config import (
    CISPO,
    GRPO,
    GSPO,
    PPO,
    RLOO,
    VAPO,
    Decoupled,
    Masked,
    NoCorrection,
    Objective,
    Overlong,
    ReinforcePP,
    ReinforcePPBaseline,
    ReMax,
    Truncated,
)

OBJECTIVES: tuple[Objective, ...] = (
    GRPO(),
    GRPO(dual_clip=1.5, entropy_bonus=0.1, aggregation="sequence_mean"),
    GRPO(correction=NoCorrection(), aggregation="sequence_sum"),
    GRPO(correction=Masked(level="sequence")),
    GRPO(correction=Decoupled(proximal="interpolated"), aggregation="fixed_divisor", divisor_tokens=9),
    GSPO(correction=Truncated(level="sequence")),
    GSPO(correction=Masked()),
    CISPO(),
    CISPO(correction=Decoupled()),
)
TOKENS = st.lists(st.tuples(st.floats(-4, 0), st.floats(-4, 0), st.floats(-4, 0), st.booleans()), max_size=5)
ROLLOUTS = st.lists(TOKENS, min_size=1, max_size=6)


def _columns(rollouts: list[list[tuple[float, float, float, bool]]], objective: Objective) -> Columns:
    flat = [(i, *token) for i, each in enumerate(rollouts) for token in each]
    row = torch.tensor([f[0] for f in flat], dtype=torch.int64)
    logprobs = [torch.tensor([f[k] for f in flat], dtype=torch.float64) for k in (1, 2, 3)]
    trainable = torch.tensor([f[4] for f in flat], dtype=torch.bool)
    return Columns(
        behaviour=logprobs[0],
        proximal=logprobs[1],
        current=logprobs[2],
        entropy=-logprobs[2],
        advantages=torch.cos(1.0 + row.double()),
        weights=token_weights(objective.aggregation, trainable, row, objective.divisor_tokens).double(),
        trainable=trainable,
        row=row,
        age=torch.arange(len(row)) % 4,
    )


def _loss(objective: Objective, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """And its gradient by `current`."""
    current = columns.current.clone().requires_grad_()
    own = dataclasses.replace(columns, current=current)
    loss = weighted_sum(token_losses(objective, own), own.weights)
    (gradient,) = torch.autograd.grad(loss, current)
    return loss.detach(), gradient


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=30, deadline=None)
@given(rollouts=ROLLOUTS, ranks=st.integers(1, 3))
def test_any_division_into_whole_rollouts_has_the_same_gradient(
    objective: Objective, rollouts: list[list[tuple[float, float, float, bool]]], ranks: int
) -> None:
    """Empty rollouts, rollouts of nothing but context and ranks without a rollout included."""
    columns = _columns(rollouts, objective)
    loss, gradient = _loss(objective, columns)
    parts, whole = torch.zeros_like(loss), torch.zeros_like(gradient)
    for rank in range(ranks):
        place = torch.nonzero(columns.row % ranks == rank)[:, 0]
        part, slope = _loss(objective, columns.at(place))
        parts, whole[place] = parts + part, slope
    torch.testing.assert_close(parts, loss)
    torch.testing.assert_close(whole, gradient)


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=30, deadline=None)
@given(rollouts=ROLLOUTS, wild=st.sampled_from([-60.0, -1e4, 50.0]))
def test_context_changes_no_loss_and_has_no_gradient(
    objective: Objective, rollouts: list[list[tuple[float, float, float, bool]]], wild: float
) -> None:
    """Tokens of the environment and tokens past the bound: whatever stands in their columns."""
    columns = _columns(rollouts, objective)
    loss, gradient = _loss(objective, columns)
    assert not gradient[~columns.trainable].any() and bool(gradient.isfinite().all())
    behaviour = torch.where(columns.trainable, columns.behaviour, wild)
    advantages = torch.where(columns.trainable, columns.advantages, 1e3)
    other = dataclasses.replace(columns, behaviour=behaviour, advantages=advantages)
    again, slope = _loss(objective, other)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(slope, gradient)
    kept = columns.trainable
    for figure in (clip_bites, correction_acts, correction_weights):
        assert torch.equal(figure(objective, other)[kept], figure(objective, columns)[kept])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_trainable_token_that_is_not_a_number_is_not_hidden(objective: Objective) -> None:
    """A mask that took NaN for out of bounds would train on without a word."""
    if isinstance(objective.correction, NoCorrection):
        return
    columns = _columns([[(-1.0, -1.0, -1.0, True), (-1.0, -1.1, -1.0, True)]], objective)
    columns.behaviour[1] = torch.nan
    assert token_losses(objective, columns).isnan().any()


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if not isinstance(o, CISPO)])
def test_the_clip_bites_where_the_gradient_is_cut_off(objective: Objective) -> None:
    random = np.random.default_rng(2)
    rollouts = [[(*random.uniform(-3, 0, 3), True) for _ in range(5)] for _ in range(20)]
    columns = _columns(rollouts, objective)
    _, gradient = _loss(objective, columns)
    cut = clip_bites(objective, columns) | (correction_weights(objective, columns) == 0)
    assert 0 < cut.sum() < len(cut)
    torch.testing.assert_close(gradient == 0, cut)


def test_advantages_of_the_estimators() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0, 3.0, 0.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    row = torch.arange(6).repeat_interleave(2)
    sampled = torch.ones(12, dtype=torch.bool)
    trainable = row != 2
    loo = token_advantages(RLOO(), rewards, group, row, sampled, trainable)
    assert loo.tolist() == [1.0, 1.0, -0.5, -0.5, -0.5, -0.5, 1.5, 1.5, 1.5, 1.5, -3.0, -3.0]
    for objective in (ReinforcePP(), ReinforcePPBaseline()):
        found = token_advantages(objective, rewards, group, row, sampled, trainable)
        assert float(found[trainable].mean()) == pytest.approx(0, abs=1e-9)
        assert float(found[trainable].std()) == pytest.approx(1, abs=1e-6)


def test_returns_pass_over_an_environment_s_words_and_reach_the_turns_before() -> None:
    sampled = torch.tensor([True, False, False, True, True])
    found = token_advantages(
        ReinforcePP(discount=0.5),
        torch.tensor([8.0], dtype=torch.float64),
        torch.tensor([0]),
        torch.zeros(5, dtype=torch.int64),
        sampled,
        sampled,
    )
    returns = torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64)
    want = (returns - returns.mean()) / returns.std()
    torch.testing.assert_close(found[sampled], want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("objective", [PPO(), VAPO(), ReMax()])
def test_there_are_no_advantages_without_their_part(objective: Objective) -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(AssertionError, match="without its parts does not start"):
        token_advantages(objective, one, one.long() * 0, one.long() * 0, one.bool(), one.bool())


def test_overlong_answers_lose_reward_before_they_are_compared() -> None:
    rewards, lengths = torch.tensor([1.0, 1.0, 0.5]), torch.tensor([10, 15, 40])
    shaped = shaped_rewards(GRPO(overlong=Overlong(free_tokens=10, ramp_tokens=10)), rewards, lengths)
    assert shaped.tolist() == [1.0, 0.5, -0.5]
    assert shaped_rewards(GRPO(), rewards, lengths).tolist() == [1.0, 1.0, 0.5]
