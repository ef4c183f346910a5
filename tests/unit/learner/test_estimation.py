"""From rewards and costs to advantages and returns, against plain Python over lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.learner.advantages import whiten
from asyncrl.learner.estimation import Layout, Signal, advantages_and_returns, shaped_rewards
from asyncrl.learner.objective_config import (
    GRPO,
    PPO,
    RLOO,
    VAPO,
    CostLimit,
    DrGRPO,
    Objective,
    Overlong,
    ReinforcePP,
    ReinforcePPBaseline,
    ReMax,
)

Oracle = Any
"""The fixture's class in conftest, which a test cannot import."""

NONE = torch.zeros(0)


def _signal(earned: list[float], tokens: int, **changes: Any) -> Signal:
    plain = {
        "earned": torch.tensor(earned, dtype=torch.float64),
        "greedy": torch.full((len(earned),), torch.nan, dtype=torch.float64),
        "kl": torch.zeros(tokens, dtype=torch.float64),
        "kl_coefficient": 0.0,
    }
    return Signal(**{**plain, **changes})


def _layout(row: torch.Tensor, group: list[int], **changes: torch.Tensor) -> Layout:
    every = torch.ones(len(row), dtype=torch.bool)
    return Layout(
        **{"group": torch.tensor(group), "row": row, "sampled": every, "trainable": every, **changes}
    )


def _of(
    objective: Objective,
    signals: list[Signal],
    layout: Layout,
    values: torch.Tensor | None = None,
    multiplier: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.zeros((len(layout.row), 0), dtype=torch.float64) if values is None else values
    return advantages_and_returns(objective, signals, multiplier, layout, values)


def test_advantages_without_a_critic() -> None:
    layout = _layout(torch.arange(6).repeat_interleave(2), [0, 0, 0, 1, 1, 1])
    signal = _signal([1.0, 0.0, 0.0, 3.0, 3.0, 0.0], 12)
    loo, returns = _of(RLOO(), [signal], layout)
    assert loo.tolist() == [1.0, 1.0, -0.5, -0.5, -0.5, -0.5, 1.5, 1.5, 1.5, 1.5, -3.0, -3.0]
    assert returns.shape == (12, 0)
    trainable = layout.row != 2
    for objective in (ReinforcePP(), ReinforcePPBaseline()):
        found, _ = _of(objective, [signal], _layout(layout.row, [0, 0, 0, 1, 1, 1], trainable=trainable))
        assert float(found[trainable].mean()) == pytest.approx(0, abs=1e-9)
        assert float(found[trainable].std()) == pytest.approx(1, abs=1e-6)


def test_returns_pass_over_an_environment_s_words_and_reach_the_turns_before() -> None:
    sampled = torch.tensor([True, False, False, True, True])
    layout = _layout(torch.zeros(5, dtype=torch.int64), [0], sampled=sampled, trainable=sampled)
    found, _ = _of(ReinforcePP(discount=0.5), [_signal([8.0], 5)], layout)
    returns = torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64)
    want = (returns - returns.mean()) / returns.std()
    torch.testing.assert_close(found[sampled], want, atol=1e-6, rtol=0)


def test_overlong_answers_lose_reward_before_they_are_compared() -> None:
    rewards, lengths = torch.tensor([1.0, 1.0, 0.5]), torch.tensor([10, 15, 40])
    shaped = shaped_rewards(GRPO(overlong=Overlong(free_tokens=10, ramp_tokens=10)), rewards, lengths)
    assert shaped.tolist() == [1.0, 0.5, -0.5]
    assert shaped_rewards(GRPO(), rewards, lengths).tolist() == [1.0, 1.0, 0.5]


def test_a_rollout_is_measured_by_the_greedy_one() -> None:
    greedy = torch.tensor([0.25, 0.25, 1.0], dtype=torch.float64)
    signal = _signal([1.0, 0.0, 1.0], 3, greedy=greedy)
    found, _ = _of(ReMax(), [signal], _layout(torch.arange(3), [0, 0, 1]))
    assert found.tolist() == [0.75, -0.25, 0.0]


def test_kl_in_the_reward_is_the_rollout_s_where_there_are_no_returns_per_token() -> None:
    kl = torch.tensor([1.0, 2.0, 9.0, 4.0], dtype=torch.float64)
    sampled = torch.tensor([True, True, False, True])
    layout = _layout(torch.tensor([0, 0, 0, 1]), [0, 0], sampled=sampled, trainable=sampled)
    signal = _signal([1.0, 1.0], 4, kl=kl, kl_coefficient=0.1)
    found, _ = _of(DrGRPO(divisor_tokens=4), [signal], layout)
    assert found[[0, 3]].tolist() == pytest.approx([0.05, -0.05])  # 1 - 0.3 and 1 - 0.4, less their mean


def test_kl_in_the_reward_is_in_the_returns_where_there_are() -> None:
    kl = torch.tensor([1.0, 9.0, 2.0, 4.0], dtype=torch.float64)
    sampled = torch.tensor([True, False, True, True])
    layout = _layout(torch.tensor([0, 0, 0, 1]), [0, 1], sampled=sampled, trainable=sampled)
    signal = _signal([1.0, 1.0], 4, kl=kl, kl_coefficient=0.1)
    found, _ = _of(ReinforcePP(), [signal], layout)
    want = whiten(torch.tensor([0.7, 0.8, 0.6], dtype=torch.float64), torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(found[sampled], want)
    _, returns = _of(PPO(), [signal], layout, torch.zeros((4, 1), dtype=torch.float64))
    assert returns[sampled, 0].tolist() == pytest.approx([0.7, 0.8, 0.6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ppo_estimates_as_verl_does(oracle: Oracle, dtype: torch.dtype) -> None:
    kept = oracle.mask
    layout = Layout(oracle.group, oracle.row, kept, kept)
    signal = _signal(oracle.inputs["score"].tolist(), len(kept))
    values = oracle.flat("values", dtype).double()[:, None]
    found, returns = _of(PPO(discount=0.99, gae_lambda=0.95), [signal], layout, values)
    theirs = oracle.want("verl/adv/gae(g=.99,l=.95)")[kept]
    torch.testing.assert_close(found[kept].double(), theirs, atol=1e-5, rtol=0)
    theirs = oracle.want("verl/ret/gae(g=.99,l=.95)")[kept]
    torch.testing.assert_close(returns[kept, 0].double(), theirs, atol=1e-5, rtol=0)


ROLLOUTS = st.lists(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2), st.booleans()), min_size=1, max_size=7),
    min_size=2,
    max_size=5,
)


def _gae(rewards: list[float], values: list[float], discount: float, factor: float) -> list[float]:
    out, later = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        ahead = values[t + 1] if t + 1 < len(values) else 0.0
        later = rewards[t] + discount * ahead - values[t] + discount * factor * later
        out[t] = later
    return out


@settings(max_examples=60, deadline=None)
@given(ROLLOUTS, st.floats(0, 5), st.booleans())
def test_a_critic_for_reward_and_cost(
    rollouts: list[list[tuple[float, float, bool]]], multiplier: float, vapo: bool
) -> None:
    """Each output has returns of its own; the policy's advantage is their combination, normalised after it."""
    objective: PPO | VAPO = PPO(discount=0.9, gae_lambda=0.7, cost=CostLimit(limit=0.0))
    if vapo:
        objective = VAPO(discount=0.9, length_factor=0.5, critic_lambda=0.8, cost=CostLimit(limit=0.0))
    flat = [(i, *token) for i, each in enumerate(rollouts) for token in each]
    row, sampled = torch.tensor([f[0] for f in flat]), torch.tensor([f[3] for f in flat])
    if not sampled.any():
        return
    values = torch.tensor([[f[1], f[2]] for f in flat], dtype=torch.float64)
    earned = [[float(i), 0.5 - i] for i in range(len(rollouts))]
    signals = [_signal([e[k] for e in earned], len(flat)) for k in (0, 1)]
    layout = _layout(row, list(range(len(rollouts))), sampled=sampled, trainable=sampled)
    found, returns = _of(objective, signals, layout, values, multiplier)
    raw, place = [], 0
    for i, each in enumerate(rollouts):
        own = [place + t for t, token in enumerate(each) if token[2]]
        place += len(each)
        factor, critics = 0.7, 0.7
        if vapo:
            factor, critics = max(0.0, 1 - 1 / (0.5 * max(len(own), 1))), 0.8
        pair = []
        for k in (0, 1):
            v = [float(values[p, k]) for p in own]
            r = [0.0] * len(own)
            if own:
                r[-1] = earned[i][k]
            pair.append(_gae(r, v, 0.9, factor))
            want = [a + b for a, b in zip(_gae(r, v, 0.9, critics), v, strict=True)]
            assert returns[own, k].tolist() == pytest.approx(want, abs=1e-9)
        raw += [(a - multiplier * c) / (1 + multiplier) for a, c in zip(*pair, strict=True)]
    want_all = whiten(torch.tensor(raw, dtype=torch.float64), torch.ones(len(raw), dtype=torch.bool))
    torch.testing.assert_close(found[sampled], want_all, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("objective", [RLOO(), DrGRPO(divisor_tokens=9), ReMax(), ReinforcePP(discount=0.9)])
def test_a_cost_is_weighed_against_the_reward(objective: Objective) -> None:
    """Advantages of (r - m c) / (1 + m): as estimators are linear, the paper's combination before its normalisation."""
    random = np.random.default_rng(0)
    layout = _layout(torch.arange(6).repeat_interleave(2), [0, 0, 0, 1, 1, 1])
    earned, costs, greedy = (random.normal(size=6) for _ in range(3))
    kl = torch.from_numpy(random.random(12))
    best = torch.from_numpy(greedy)
    reward = _signal(earned.tolist(), 12, greedy=best, kl=kl, kl_coefficient=0.2)
    cost = _signal(costs.tolist(), 12, greedy=best, kl=kl, kl_coefficient=-0.2)
    found, _ = _of(objective, [reward, cost], layout, multiplier=3.0)
    both = _signal(
        ((earned - 3 * costs) / 4).tolist(), 12, greedy=(best - 3 * best) / 4, kl=kl, kl_coefficient=0.2
    )
    want, _ = _of(objective, [both], layout)
    torch.testing.assert_close(found, want)
    if not isinstance(objective, ReinforcePP):
        apart = [_of(objective, [each], layout)[0] for each in (reward, cost)]
        torch.testing.assert_close(found, (apart[0] - 3 * apart[1]) / 4)
