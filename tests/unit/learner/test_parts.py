"""Critic, reference, constraint and baselines as they go on from step to step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from asyncrl.buffer.schema import BATCH
from asyncrl.learner.config import CriticConfig, LoraConfig, ReferenceConfig
from asyncrl.learner.constraint import Constraint
from asyncrl.learner.faults import NonFiniteLoss
from asyncrl.learner.objective_config import GRPO, KL, PPO, VAPO, CostLimit, Objective, ReMax
from asyncrl.learner.penalties import next_multiplier
from asyncrl.learner.step import Learner

Open = Callable[..., Learner]
Tables = Callable[..., pa.Table]
KL_IN_LOSS = KL(estimator="k3", coefficient=0.1, place="loss")


def _masters(one: Learner, name: str) -> dict[str, torch.Tensor]:
    return {key: p.detach().full_tensor().clone() for key, p in one.trained[name].parameters.items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _changed(table: pa.Table, **columns: Callable[[dict[str, Any]], object]) -> pa.Table:
    rows = [{**row, **{name: f(row) for name, f in columns.items()}} for row in table.to_pylist()]
    return pa.Table.from_pylist(rows, schema=BATCH)


def _ones(row: dict[str, Any]) -> int:
    return sum(token == 1 for token in row["tokens"])


# ---- the critic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [PPO(gae_lambda=0.95), VAPO(length_factor=0.5)])
def test_a_critic_learns_what_its_states_are_worth(
    learner: Open, make_table: Tables, objective: PPO | VAPO
) -> None:
    """Rewards that the prompt and the tokens so far foretell, on a fixed set of batches; the policy stays as it is."""
    one = learner(
        objective=objective,
        minibatches_per_step=2,
        critic=CriticConfig(learning_rate=3e-3, warmup_steps=1000),
    )
    tables = [
        _changed(
            make_table(seed=s, masked=0.0), reward=lambda r: 0.3 * _ones(r) + 0.1 * r["prompt_tokens"][0]
        )
        for s in range(3)
    ]
    before = _masters(one, "policy")
    seen = [one.train(tables[step % 3], 4) for step in range(36)]
    explained = [np.mean([m.explained_variance for m in seen[k : k + 3]]) for k in (0, 12, 33)]
    assert explained[0] < 0.1 and explained[1] < explained[2] > 0.4, explained
    assert seen[-1].value_loss < seen[0].value_loss / 4
    assert all(m.critic_grad_norm > 0 and m.critic_learning_rate == 3e-3 for m in seen)
    assert _same(before, _masters(one, "policy"))


def test_ppo_raises_the_probability_of_better_answers(learner: Open, make_table: Tables) -> None:
    one = learner(objective=PPO(), learning_rate=3e-3, critic=CriticConfig(learning_rate=1e-3))
    table = make_table(masked=0.0, seed=5)
    rewards = table["reward"].to_pylist()

    def mean_logprob(better: bool) -> float:
        rows = [
            r for r, x in zip(table.to_pylist(), rewards, strict=True) if (x > np.mean(rewards)) == better
        ]
        each = [one.logprobs(r["prompt_tokens"] + r["tokens"])[-len(r["tokens"]) :] for r in rows]
        return float(np.mean(np.concatenate(each)))

    before = {better: mean_logprob(better) for better in (True, False)}
    for _ in range(5):
        metrics = one.train(table, 4)
    assert mean_logprob(True) > before[True] + 0.2
    assert mean_logprob(True) - before[True] > mean_logprob(False) - before[False] + 0.2
    assert metrics.grad_norm > 0 and metrics.optimizer_steps == 5


def test_while_the_critic_warms_up_the_policy_stands_still(learner: Open, make_table: Tables) -> None:
    one = learner(
        objective=PPO(), critic=CriticConfig(warmup_steps=2, learning_rate=1e-3), minibatches_per_step=2
    )
    policy, critic = _masters(one, "policy"), _masters(one, "critic")
    tables = [make_table(seed=s) for s in range(3)]
    for table in tables[:2]:
        metrics = one.train(table, 4)
        assert math.isnan(metrics.loss) and math.isnan(metrics.grad_norm) and metrics.optimizer_steps == 0
        assert metrics.value_loss > 0 and metrics.entropy > 2 and metrics.drift_max > 0
        assert metrics.clip_fraction == 0
        assert _same(policy, _masters(one, "policy")) and not _same(critic, _masters(one, "critic"))
    assert one.extra_state() == {"batches": 2}
    metrics = one.train(tables[2], 4)
    assert math.isfinite(metrics.loss) and metrics.optimizer_steps == 2
    assert not _same(policy, _masters(one, "policy"))


def test_a_resumed_learner_does_not_warm_up_again(learner: Open, make_table: Tables) -> None:
    settings = {"objective": PPO(), "critic": CriticConfig(warmup_steps=1)}
    state = json.loads(json.dumps(_after_one_step(learner(**settings), make_table())))
    again = learner(**settings)
    again.load_extra_state(state)
    assert math.isfinite(again.train(make_table(), 4).loss)


def _after_one_step(one: Learner, table: pa.Table) -> dict[str, Any]:
    one.train(table, 4)
    return one.extra_state()


def test_the_division_into_micro_batches_changes_nothing_for_a_critic(
    learner: Open, make_table: Tables
) -> None:
    table = make_table(groups=6)
    results = []
    for tokens in (1, 90, 100_000):
        one = learner(objective=PPO(), tokens_per_microbatch=tokens, minibatches_per_step=2)
        results.append(([one.train(table, 4) for _ in range(2)], _masters(one, "critic")))
    (first, weights), *others = results
    for metrics, other in others:
        for ours, theirs in zip(first, metrics, strict=True):
            for name in ("loss", "grad_norm", "value_loss", "critic_grad_norm", "explained_variance"):
                assert getattr(theirs, name) == pytest.approx(getattr(ours, name), abs=2e-5, rel=1e-4), name
        for name in weights:
            torch.testing.assert_close(other[name], weights[name], atol=1e-5, rtol=1e-5)


def test_values_that_are_not_finite_are_a_fault_before_anything_moves(
    learner: Open, make_table: Tables
) -> None:
    one = learner(objective=PPO())
    one.trained["critic"].parameters["head.bias"].data.to_local().fill_(math.nan)
    before = _masters(one, "policy")
    with pytest.raises(NonFiniteLoss, match=r"critic: value is not finite on \d+ tokens: rollouts 100 "):
        one.train(make_table(), 4)
    assert _same(before, _masters(one, "policy")) and one.extra_state() == {"batches": 0}


def test_without_a_critic_its_figures_are_unknown(learner: Open, make_table: Tables) -> None:
    metrics = learner().train(make_table(), 4)
    names = (
        "value_loss",
        "critic_grad_norm",
        "critic_learning_rate",
        "explained_variance",
        "kl_reference",
        "cost_multiplier",
    )
    assert all(math.isnan(getattr(metrics, name)) for name in names)


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["own weights", "the base of adapters"])
def test_the_reference_is_the_model_that_the_run_started_from(
    learner: Open, make_table: Tables, lora: LoraConfig | None
) -> None:
    one = learner(objective=GRPO(kl=KL_IN_LOSS), learning_rate=3e-3, lora=lora)
    seen = [one.train(make_table(), 4).kl_reference for _ in range(4)]
    assert seen[0] == pytest.approx(0, abs=1e-9)
    assert 1e-4 < seen[1] < seen[3]


def test_a_reference_in_half_precision_says_what_the_policy_says(learner: Open, make_table: Tables) -> None:
    """It is stored as the policy's float32 masters are rounded for a pass: before any step there is no difference at all."""
    one = learner(objective=PPO(kl=KL_IN_LOSS), dtype="bfloat16", critic=CriticConfig(warmup_steps=1))
    first, second = one.train(make_table(), 4), one.train(make_table(), 4)
    assert first.kl_reference == second.kl_reference == 0
    assert second.value_loss != first.value_loss and math.isfinite(second.loss)


def test_a_kl_holds_the_policy_near(learner: Open, make_table: Tables) -> None:
    def after(objective: Objective) -> float:
        one = learner(objective=objective, learning_rate=3e-3)
        return [one.train(make_table(), 4).kl_reference for _ in range(8)][-1]

    loose = after(GRPO(kl=KL(estimator="k3", coefficient=1e-6, place="loss")))
    for estimator, place in (("k3", "loss"), ("k2", "loss"), ("k1", "reward")):
        held = GRPO(kl=KL(estimator=estimator, coefficient=3.0, place=place), normalise_std=False)  # type: ignore[arg-type]
        assert after(held) < loose / 2, (estimator, place)


def test_another_model_may_be_the_reference(
    learner: Open, make_table: Tables, untied_folder: Path, model_folder: Path
) -> None:
    other = ReferenceConfig(path=str(untied_folder))
    first = learner(objective=GRPO(kl=KL_IN_LOSS), reference=other).train(make_table(), 4)
    same = ReferenceConfig(path=str(model_folder))
    second = learner(objective=GRPO(kl=KL_IN_LOSS), reference=same).train(make_table(), 4)
    assert first.kl_reference > 0.01 and second.kl_reference == pytest.approx(0, abs=1e-9)


# ---- costs -----------------------------------------------------------------------------------------------------------


def test_the_multiplier_follows_the_costs_of_the_batches(learner: Open, make_table: Tables) -> None:
    limit = CostLimit(limit=0.5, multiplier=1.0, multiplier_rate=0.5)
    one = learner(objective=GRPO(cost=limit))
    costly = _changed(make_table(), cost=lambda r: 1.0 + (r["rollout_id"] % 2))
    free = _changed(make_table(seed=1), cost=lambda r: 0.0)
    seen = [one.train(table, 4) for table in (costly, costly, free)]
    assert [m.cost_mean for m in seen] == [1.5, 1.5, 0.0]
    second = next_multiplier(1.0, 1.5, 0.5, 0.5, 10.0)
    third = next_multiplier(second, 1.5, 0.5, 0.5, 10.0)
    assert [m.cost_multiplier for m in seen] == pytest.approx([1.0, second, third])
    state = json.loads(json.dumps(one.extra_state()))
    assert state["constraint"]["multiplier"] < third
    again = learner(objective=GRPO(cost=limit))
    again.load_extra_state(state)
    assert again.train(free, 4).cost_multiplier == state["constraint"]["multiplier"]


def test_a_multiplier_is_only_taken_from_a_run_that_had_one() -> None:
    constraint = Constraint(CostLimit(limit=0.0))
    for state in ({}, {"multiplier": 0.0}, {"multiplier": math.nan}):
        with pytest.raises(ValueError, match=r"written without learner\.objective\.cost"):
            constraint.load_state_dict(state)
    assert constraint.multiplier == 1.0


def test_a_large_multiplier_makes_cheap_answers_likelier(learner: Open, make_table: Tables) -> None:
    table = _changed(
        make_table(masked=0.0, seed=5), cost=lambda r: float(r["rollout_id"] % 2), reward=lambda r: 0.5
    )
    limit = CostLimit(limit=0.0, multiplier=10.0)
    one = learner(objective=GRPO(cost=limit), learning_rate=3e-3)

    def mean_logprob(parity: int) -> float:
        rows = [r for r in table.to_pylist() if r["rollout_id"] % 2 == parity]
        each = [one.logprobs(r["prompt_tokens"] + r["tokens"])[-len(r["tokens"]) :] for r in rows]
        return float(np.mean(np.concatenate(each)))

    before = [mean_logprob(0), mean_logprob(1)]
    for _ in range(4):
        one.train(table, 4)
    assert mean_logprob(0) > before[0] + 0.1 and mean_logprob(1) < before[1] - 0.1


# ---- greedy baselines ------------------------------------------------------------------------------------------------


def _with_baselines(table: pa.Table) -> pa.Table:
    """The first rollout of each group is the greedy one."""
    first: set[int] = set()
    rows = []
    for row in table.to_pylist():
        greedy = row["group_id"] not in first
        first.add(row["group_id"])
        trainable = [m and not greedy for m in row["trainable"]]
        rows.append({**row, "greedy": greedy, "trainable": trainable})
    return pa.Table.from_pylist(rows, schema=BATCH)


def test_greedy_rollouts_are_no_part_of_what_is_trained_or_counted(learner: Open, make_table: Tables) -> None:
    table = _with_baselines(make_table())
    rest = table.filter(pa.array([not g for g in table["greedy"].to_pylist()]))
    plain = {"objective": GRPO(), "minibatches_per_step": 2}
    one = learner(**plain)
    first, weights = one.train(table, 4), _masters(one, "policy")
    one = learner(**plain)
    second = one.train(rest, 4)
    assert _same(weights, _masters(one, "policy"))
    for name in (
        "loss",
        "reward_mean",
        "tokens_total",
        "tokens_trained",
        "tokens_masked",
        "drift_max",
        "response_length_max",
    ):
        assert getattr(first, name) == getattr(second, name), name


def test_the_greedy_answer_s_reward_is_the_baseline(learner: Open, make_table: Tables) -> None:
    """Without a baseline there would be a signal: every rollout earned 1, the greedy ones too."""
    table = _changed(_with_baselines(make_table()), reward=lambda r: 1.0)
    metrics = learner(objective=ReMax()).train(table, 4)
    assert metrics.groups_without_signal == 1 and metrics.advantage_mean == 0
    table = _changed(table, reward=lambda r: 0.25 if r["greedy"] else 1.0)
    assert learner(objective=ReMax()).train(table, 4).advantage_mean == pytest.approx(0.75)


def test_baselines_that_are_needed_and_not_there(learner: Open, make_table: Tables) -> None:
    one, table = learner(objective=ReMax()), _with_baselines(make_table())
    with pytest.raises(
        ValueError, match="4 groups of the learner's batch have no greedy rollout, the first is that of"
    ):
        one.train(make_table(), 4)
    with pytest.raises(ValueError, match="1 groups"):
        one.train(table.slice(1), 4)
    greedy = table.filter(table["greedy"])
    with pytest.raises(ValueError, match="4 greedy rollouts and none to train"):
        one.train(greedy, 4)
    with pytest.raises(ValueError, match="5 greedy rollouts in 4 groups"):
        one.train(pa.concat_tables([table, greedy.slice(0, 1)]), 4)
