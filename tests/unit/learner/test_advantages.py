from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.learner.advantages import (
    above_greedy,
    discounted_returns,
    group_relative,
    leave_one_out,
    on_last_token,
    whiten,
)

Oracle = Any
"""The fixture's class in conftest, which a test cannot import."""
ALONE = 12
"""The 13th rollout is alone in its group; there the projects differ by convention, and ours is 0."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("normalise_std", "name", "tolerance"),
    [
        (True, "verl/adv/grpo", 1e-5),
        (False, "verl/adv/grpo_no_std(dr_grpo)", 1e-5),
        (True, "trl/adv/grpo scale=group [first12]", 5e-4),  # TRL adds 1e-4 to the deviation
        (False, "trl/adv/grpo scale=none [first12]", 1e-5),
    ],
)
def test_other_projects_have_the_same_advantages(
    oracle: Oracle, normalise_std: bool, name: str, tolerance: float, dtype: torch.dtype
) -> None:
    score = torch.from_numpy(oracle.inputs["score"]).to(dtype)
    ours = group_relative(score, oracle.group, normalise_std=normalise_std).numpy()
    theirs = oracle.golden[name]
    theirs = theirs[:, 0] if theirs.ndim == 2 else theirs
    np.testing.assert_allclose(ours[:ALONE], theirs[:ALONE], atol=tolerance)
    assert ours[ALONE] == 0


@pytest.mark.parametrize("name", ["verl/adv/rloo", "verl/adv/rloo_vectorized"])
def test_verl_leaves_one_out_alike(oracle: Oracle, name: str) -> None:
    ours = leave_one_out(torch.from_numpy(oracle.inputs["score"]).float(), oracle.group)
    np.testing.assert_allclose(ours.numpy()[:ALONE], oracle.golden[name][:ALONE, 0], atol=1e-5)
    assert ours[ALONE] == 0


def test_verl_has_the_same_advantages_over_the_greedy_answer(oracle: Oracle) -> None:
    score, greedy = (torch.from_numpy(oracle.inputs[n]).float() for n in ("score", "greedy_baseline"))
    ours = above_greedy(score, greedy)[oracle.row]
    kept = oracle.mask
    want = oracle.want("verl/adv/remax")
    torch.testing.assert_close(ours[kept].double(), want[kept], atol=1e-5, rtol=0)


def test_verl_discounts_alike_but_across_an_environment_s_turn(oracle: Oracle) -> None:
    """verl begins anew at a hole in the mask, so that the reward does not reach the turns before; ours does."""
    own = oracle.row[oracle.mask]
    rewards = on_last_token(torch.from_numpy(oracle.inputs["score"]).float(), own)
    ours = discounted_returns(rewards, own, 0.99)
    theirs = oracle.want("verl/ret/reinforce_plus_plus(g=.99)")[oracle.mask]
    holes = np.flatnonzero(oracle.inputs["mask"].sum(1) < oracle.inputs["lens"])
    whole = ~torch.isin(own, torch.from_numpy(holes))
    assert len(holes) and whole.sum() > 60
    torch.testing.assert_close(ours[whole].double(), theirs[whole], atol=1e-5, rtol=0)
    for hole in holes:
        score = oracle.inputs["score"][hole]
        want = score * 0.99 ** np.arange(int((own == hole).sum()))[::-1]
        np.testing.assert_allclose(ours[own == hole].numpy(), want, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verl_normalises_over_the_batch_alike(oracle: Oracle, dtype: torch.dtype) -> None:
    returns = oracle.want("verl/ret/reinforce_plus_plus(g=.99)").to(dtype)
    ours = whiten(returns, oracle.mask)
    want = oracle.want("verl/adv/reinforce_plus_plus(g=.99)")
    torch.testing.assert_close(ours.double(), want, atol=1e-5, rtol=0)


def test_verl_has_the_same_reinforce_pp_with_baseline(oracle: Oracle) -> None:
    """With verl's convention for the rollout that is alone in its group: its raw reward."""
    score = torch.from_numpy(oracle.inputs["score"])
    centred = group_relative(score, oracle.group, normalise_std=False)
    centred[ALONE] = score[ALONE]
    ours = whiten(centred[oracle.row], oracle.mask)
    want = oracle.want("verl/adv/reinforce_plus_plus_baseline")
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(-10, 10, width=32)), min_size=1, max_size=40),
    st.booleans(),
)
def test_each_group_is_centred_and_scaled_alone(rows: list[tuple[int, float]], normalise_std: bool) -> None:
    _, group = np.unique([g for g, _ in rows], return_inverse=True)
    reward = np.array([r for _, r in rows], dtype=np.float64)
    ours = group_relative(
        torch.from_numpy(reward), torch.from_numpy(group), normalise_std=normalise_std
    ).numpy()
    for g in range(group.max() + 1):
        own = reward[group == g]
        want = own - own.mean()
        if normalise_std and len(own) > 1:
            want = want / (own.std(ddof=1) + 1e-6)
        np.testing.assert_allclose(ours[group == g], want, atol=1e-6, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-10, 10, width=32)), min_size=1, max_size=40))
def test_the_baseline_is_the_mean_of_the_others(rows: list[tuple[int, float]]) -> None:
    _, group = np.unique([g for g, _ in rows], return_inverse=True)
    reward = np.array([r for _, r in rows], dtype=np.float64)
    ours = leave_one_out(torch.from_numpy(reward), torch.from_numpy(group)).numpy()
    for i in range(len(rows)):
        others = np.delete(reward, i)[np.delete(group, i) == group[i]]
        want = reward[i] - others.mean() if len(others) else 0.0
        assert ours[i] == pytest.approx(want, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5, width=32), st.booleans()), max_size=30))
def test_normalised_values_have_mean_0_and_deviation_1(tokens: list[tuple[float, bool]]) -> None:
    values = torch.tensor([v for v, _ in tokens], dtype=torch.float64)
    mask = torch.tensor([m for _, m in tokens], dtype=torch.bool)
    found = whiten(values, mask)
    assert not found[~mask].any() and not found.isnan().any()
    kept = values[mask].numpy()
    if len(kept) > 1:
        want = (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8)
        np.testing.assert_allclose(found[mask].numpy(), want, atol=1e-7)
    else:
        assert not found.any()


def test_a_rollout_without_a_token_gets_its_reward_nowhere() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert on_last_token(rewards, torch.tensor([0, 0, 2, 2, 2, 3])).tolist() == [0, 1, 0, 0, 3, 4]
    assert on_last_token(rewards, torch.zeros(0, dtype=torch.int64)).tolist() == []
