"""Losses as settings put them together, and what tokens that are context may not do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.learner.aggregation import token_weights
from asyncrl.learner.columns import Columns
from asyncrl.learner.objective import (
    clip_bites,
    correction_acts,
    correction_weights,
    loss_of,
    token_losses,
)
from asyncrl.learner.objective_config import (
    CISPO,
    GRPO,
    GSPO,
    KL,
    VAPO,
    Decoupled,
    Masked,
    NoCorrection,
    Objective,
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
    GRPO(kl=KL(estimator="k3", coefficient=0.2, place="loss")),
    CISPO(
        kl=KL(estimator="k2", coefficient=0.2, place="loss"), correction=Decoupled(proximal="interpolated")
    ),
    VAPO(imitation=0.3),
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
        reference=logprobs[0] - torch.sin(torch.arange(len(row)).double()),
        entropy=-logprobs[2],
        advantages=torch.cos(1.0 + row.double()),
        weights=token_weights(objective.aggregation, trainable, row, objective.divisor_tokens).double(),
        imitation=0.3 * (trainable & (row % 2 == 1)).double()
        if isinstance(objective, VAPO)
        else 0 * logprobs[0],
        values=logprobs[0][:, None],
        returns=logprobs[1][:, None],
        value_weights=trainable.double(),
        trainable=trainable,
        row=row,
        age=torch.arange(len(row)) % 4,
    )


def _loss(objective: Objective, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """And its gradient by `current`."""
    current = columns.current.clone().requires_grad_()
    own = dataclasses.replace(columns, current=current)
    loss = loss_of(own, token_losses(objective, own))
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
    reference = torch.where(columns.trainable, columns.reference, -wild)
    other = dataclasses.replace(columns, behaviour=behaviour, advantages=advantages, reference=reference)
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


@pytest.mark.parametrize(
    "objective", [o for o in OBJECTIVES if not isinstance(o, CISPO | VAPO) and o.kl is None]
)
def test_the_clip_bites_where_the_gradient_is_cut_off(objective: Objective) -> None:
    random = np.random.default_rng(2)
    rollouts = [[(*random.uniform(-3, 0, 3), True) for _ in range(5)] for _ in range(20)]
    columns = _columns(rollouts, objective)
    _, gradient = _loss(objective, columns)
    cut = clip_bites(objective, columns) | (correction_weights(objective, columns) == 0)
    assert 0 < cut.sum() < len(cut)
    torch.testing.assert_close(gradient == 0, cut)


def test_the_weights_of_the_correction_are_the_surrogate_s_alone() -> None:
    """Twice as rare under the engine: the surrogate weighs twice, KL and entropy as before."""
    correction = Truncated(cap=10.0)
    plain = GRPO(correction=correction)
    held = GRPO(
        correction=correction, kl=KL(estimator="k3", coefficient=0.2, place="loss"), entropy_bonus=0.1
    )
    columns = _columns([[(-1.0, -1.0, -1.2, True), (-0.5, -0.5, -0.4, True)]], plain)
    rare = dataclasses.replace(columns, behaviour=columns.behaviour - np.log(2))
    torch.testing.assert_close(token_losses(plain, rare), 2 * token_losses(plain, columns))
    for each in (columns, rare):
        added = token_losses(held, each) - token_losses(plain, each)
        d = each.current - each.reference
        torch.testing.assert_close(added, 0.2 * ((-d).exp() - 1 + d) - 0.1 * each.entropy)


def test_imitation_is_a_mean_over_the_tokens_of_what_was_right() -> None:
    """Beside the surrogate, with no ratio, clip or advantage in it."""
    objective, tokens = (
        VAPO(),
        [(-1.0, -1.1, -1.2, True), (-0.5, -0.4, -0.3, True), (-2.0, -2.0, -2.0, False)],
    )
    columns = _columns([tokens, tokens], objective)
    right = (columns.row == 1) & columns.trainable
    columns = dataclasses.replace(columns, imitation=0.1 * right.double() / right.sum())
    plain = dataclasses.replace(columns, imitation=0 * columns.imitation)
    (loss, gradient), (without, slope) = _loss(objective, columns), _loss(objective, plain)
    assert float(loss - without) == pytest.approx(0.1 * (1.2 + 0.3) / 2)
    torch.testing.assert_close(gradient - slope, -0.05 * right.double())
