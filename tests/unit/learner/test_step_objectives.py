"""What the learner does with each objective, against the same training written out rollout by rollout in float64.

The reference is plain Python over lists, with its own formulas; it shares no code with the learner.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from gathered import gathered
from transformers import AutoModelForCausalLM

from asyncrl.buffer.schema import BATCH
from asyncrl.learner.objective_config import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    RLOO,
    Decoupled,
    DrGRPO,
    Masked,
    NoCorrection,
    Objective,
    Overlong,
    ReinforcePP,
    ReinforcePPBaseline,
    Truncated,
)
from asyncrl.learner.step import Learner
from tests.batches import Row, aged, batch

Open = Callable[..., Learner]
VERSION, RATE = 4, 0.5
TIGHT = {"clip_low": 0.02, "clip_high": 0.03}
"""So tight that the first minibatch's step moves tokens of the second out of it."""

CASES: dict[str, Objective] = {
    "grpo": GRPO(),
    "grpo, clip": GRPO(**TIGHT),
    "grpo, dual clip": GRPO(clip_low=0.02, clip_high=0.03, dual_clip=1.01),
    "grpo, mean of means": GRPO(aggregation="sequence_mean", **TIGHT),
    "grpo, no correction": GRPO(correction=NoCorrection(), **TIGHT),
    "grpo, rollouts truncated": GRPO(correction=Truncated(level="sequence", cap=1.1), **TIGHT),
    "grpo, tokens masked": GRPO(correction=Masked(low=0.8, high=1.25), **TIGHT),
    "grpo, rollouts masked": GRPO(correction=Masked(level="sequence", low=0.5, high=2.0), **TIGHT),
    "grpo, decoupled": GRPO(correction=Decoupled(), **TIGHT),
    "grpo, interpolated": GRPO(correction=Decoupled(proximal="interpolated"), clip_low=0.3, clip_high=0.3),
    "grpo, interpolated and capped": GRPO(correction=Decoupled(proximal="interpolated", cap=1.02)),
    "grpo, entropy": GRPO(entropy_bonus=0.3, **TIGHT),
    "dr_grpo": DrGRPO(divisor_tokens=17, **TIGHT),
    "dapo": DAPO(overlong=Overlong(free_tokens=6, ramp_tokens=8, penalty=0.7), **TIGHT),
    "rloo": RLOO(**TIGHT),
    "reinforce_pp": ReinforcePP(discount=0.9, **TIGHT),
    "reinforce_pp_baseline": ReinforcePPBaseline(**TIGHT),
    "gspo": GSPO(clip_low=0.01, clip_high=0.01),
    "gspo, entropy and decoupled": GSPO(
        clip_low=0.01, clip_high=0.01, entropy_bonus=0.1, correction=Decoupled()
    ),
    "cispo": CISPO(clip_low=0.02, clip_high=0.03),
}


# ---- the reference ---------------------------------------------------------------------------------------------------


def _advantages(objective: Objective, rows: list[Row]) -> list[list[float]]:
    rewards = [row["reward"] for row in rows]
    if objective.overlong is not None:
        o = objective.overlong
        over = [
            min(max(len(row["tokens"]) - o.free_tokens, 0), o.ramp_tokens) / o.ramp_tokens for row in rows
        ]
        rewards = [r - o.penalty * x for r, x in zip(rewards, over, strict=True)]
    out: list[list[float]] = []
    for i, row in enumerate(rows):
        members = [j for j, other in enumerate(rows) if other["group_id"] == row["group_id"]]
        own = np.array([rewards[j] for j in members])
        others = [rewards[j] for j in members if j != i]
        sampled = [v >= 0 for v in row["versions"]]
        if isinstance(objective, ReinforcePP):
            later = [sum(sampled[t + 1 :]) for t in range(len(sampled))]
            out.append([rewards[i] * objective.discount**n for n in later])
            continue
        if isinstance(objective, RLOO):
            value = rewards[i] - sum(others) / len(others)
        elif isinstance(objective, DrGRPO | ReinforcePPBaseline):
            value = rewards[i] - own.mean()
        else:
            value = (rewards[i] - own.mean()) / (own.std(ddof=1) + 1e-6)
        out.append([value] * len(sampled))
    if isinstance(objective, ReinforcePP | ReinforcePPBaseline):
        kept = np.array(
            [
                a
                for each, row in zip(out, rows, strict=True)
                for a, m in zip(each, row["trainable"], strict=True)
                if m
            ]
        )
        scale = math.sqrt(kept.var(ddof=1) + 1e-8)
        out = [[(a - kept.mean()) / scale for a in each] for each in out]
    return out


def _distributions(model: torch.nn.Module, row: Row, temperature: float) -> torch.Tensor:
    """[answer tokens, vocabulary] logprobs."""
    prompt, answer = row["prompt_tokens"], row["tokens"]
    logits = model(torch.tensor([prompt + answer])).logits[0] / temperature
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]


def _weight(objective: Objective, ratios: list[float], t: int, kept: list[int]) -> float:
    correction = objective.correction
    if isinstance(correction, NoCorrection):
        return 1.0
    whole = not isinstance(correction, Decoupled) and correction.level == "sequence"
    ratio = math.prod(ratios[k] for k in kept) if whole else ratios[t]
    if isinstance(correction, Masked):
        return ratio if correction.low <= ratio <= correction.high else 0.0
    return ratio if correction.cap is None else min(ratio, correction.cap)


def _row_losses(
    objective: Objective, row: Row, advantages: list[float], every: torch.Tensor, start: list[float]
) -> list[torch.Tensor]:
    """Losses of the row's trainable tokens."""
    kept = [t for t, m in enumerate(row["trainable"]) if m]
    current = [every[t, token] for t, token in enumerate(row["tokens"])]
    proximal = list(start)
    if isinstance(objective.correction, Decoupled) and objective.correction.proximal == "interpolated":
        for t, version in enumerate(row["versions"]):
            behaviour, age = row["logprobs"][t], VERSION - version
            share = (age - 1) / age if age >= 1 else 0.0
            proximal[t] = (1 - share) * behaviour + share * current[t].item()
    ratios = [math.exp(p - b) for p, b in zip(proximal, row["logprobs"], strict=True)]
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    losses = []
    for t in kept:
        a = advantages[t]
        r = (current[t] - proximal[t]).exp()
        if isinstance(objective, GSPO):
            mean = torch.stack([current[k] - proximal[k] for k in kept]).mean().item()
            r = math.exp(mean) * (current[t] - current[t].detach()).exp()
        clipped = r.clamp(low, high)
        loss = (
            -clipped.detach() * a * current[t]
            if isinstance(objective, CISPO)
            else torch.max(-r * a, -clipped * a)
        )
        if isinstance(objective, GRPO) and objective.dual_clip is not None and a < 0:
            loss = torch.min(loss, torch.tensor(-objective.dual_clip * a))
        entropy = -(every[t].exp() * every[t]).sum()
        losses.append(_weight(objective, ratios, t, kept) * loss - objective.entropy_bonus * entropy)
    return losses


def _aggregate(objective: Objective, losses: list[list[torch.Tensor]]) -> torch.Tensor:
    filled = [torch.stack(row) for row in losses if row]
    if objective.aggregation == "token_mean":
        return torch.cat(filled).mean()
    if objective.aggregation == "sequence_mean":
        return torch.stack([row.mean() for row in filled]).mean()
    divisor = objective.divisor_tokens if objective.aggregation == "fixed_divisor" else 1
    return torch.stack([row.sum() / divisor for row in filled]).mean()


def _trained(
    folder: Path, rows: list[Row], objective: Objective, halves: list[list[int]], temperature: float
) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Mean loss, weights before and after one step of plain descent per half."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    advantages = _advantages(objective, rows)
    with torch.no_grad():
        start = [
            [float(d[t, token]) for t, token in enumerate(row["tokens"])]
            for row in rows
            for d in [_distributions(model, row, temperature)]
        ]
    means = []
    for half in halves:
        model.zero_grad()
        losses = [
            _row_losses(
                objective, rows[i], advantages[i], _distributions(model, rows[i], temperature), start[i]
            )
            for i in half
        ]
        loss = _aggregate(objective, losses)
        loss.backward()
        means.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad
    return float(np.mean(means)), before, {name: p.detach() for name, p in model.named_parameters()}


# ---- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """12 rollouts in 4 groups, ages 0 to 2, some wholly fresh; one all context, some with an environment's words inside."""

    def answer(random: np.random.Generator, group: int, number: int) -> Row:
        return aged(random, number, context=(group, number) == (2, 0))

    return batch(np.random.default_rng(11), 4, answer, prompt_tokens=3)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_formulas(
    learner: Open, model_folder: Path, table: pa.Table, name: str
) -> None:
    objective = CASES[name]
    one = learner(
        temperature=0.9,
        objective=objective,
        learning_rate=RATE,
        max_grad_norm=1e9,
        tokens_per_microbatch=60,
        minibatches_per_step=2,
    )
    one.trained["policy"].optimizer = torch.optim.SGD(one.trained["policy"].parameters.values(), lr=RATE)
    metrics = one.train(table, VERSION)
    halves = [list(range(6)), list(range(6, 12))]
    loss, before, after = _trained(model_folder, table.to_pylist(), objective, halves, 0.9)
    assert metrics.loss == pytest.approx(loss, abs=1e-5)
    plan = one.plan(10_000)
    found = gathered(one, plan)
    assert found.keys() == before.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(
            tensor.double() - before[key],
            after[key] - before[key],
            atol=4e-6,
            rtol=1e-3,
            msg=lambda m, k=key: f"{k}: {m}",
        )
    assert metrics.clip_fraction > 0
    if isinstance(objective.correction, Masked | Truncated):
        assert metrics.importance_capped > 0


def test_a_policy_that_is_interpolated_costs_no_pass_of_its_own(
    learner: Open, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its figures tell only what was measured: the first minibatch's logprobs at batch start."""
    passes = []
    for proximal in ("recomputed", "interpolated"):
        one = learner(objective=GRPO(correction=Decoupled(proximal=proximal)), minibatches_per_step=2)  # type: ignore[arg-type]
        count = 0
        plain = one._policy.logprobs_no_grad

        def counted(*args: Any, plain: Any = plain) -> torch.Tensor:
            nonlocal count
            count += 1
            return plain(*args)  # type: ignore[no-any-return]

        monkeypatch.setattr(one._policy, "logprobs_no_grad", counted)
        metrics = one.train(table, VERSION)
        passes.append((count, metrics.mismatch_tokens, metrics.drift_max, metrics.entropy))
    assert passes[0][0] > 0 and passes[1][0] == 0
    assert passes[0][1] > passes[1][1]
    assert all(math.isfinite(x) for x in passes[1])


def test_no_correction_has_no_weight(learner: Open, table: pa.Table) -> None:
    metrics = learner(objective=GRPO(correction=NoCorrection())).train(table, VERSION)
    assert metrics.importance_mean == 1 and metrics.importance_capped == 0


@pytest.mark.parametrize(("level", "high"), [("token", 1.1), ("sequence", 3.0)])
def test_masked_weights_show_in_the_figures(learner: Open, table: pa.Table, level: Any, high: float) -> None:
    correction = Masked(level=level, low=1 / high, high=high)
    metrics = learner(objective=GRPO(correction=correction)).train(table, VERSION)
    assert 0.05 < metrics.importance_capped < 1
    assert 0 < metrics.importance_mean < high * (1 - metrics.importance_capped) + 1e-6


def test_a_weight_without_end_on_a_token_that_is_context_hurts_nobody(learner: Open, table: pa.Table) -> None:
    """Without a cap its weight is infinite, and 0 x inf in the gradient would be NaN."""
    rows = table.to_pylist()
    for row in rows:
        row["logprobs"] = [x if m else -100.0 for x, m in zip(row["logprobs"], row["trainable"], strict=True)]
    wild = pa.Table.from_pylist(rows, schema=BATCH)
    for level in (Decoupled(), Truncated(level="sequence")):
        plain = learner(objective=GRPO(correction=level)).train(table, VERSION)
        other = learner(objective=GRPO(correction=level)).train(wild, VERSION)
        assert other.loss == pytest.approx(plain.loss) and other.grad_norm == pytest.approx(plain.grad_norm)


def test_groups_without_spread_have_no_signal_whatever_their_numbers(learner: Open, table: pa.Table) -> None:
    """(0.1 + 0.1 + 0.1) / 3 is not 0.1: a difference in the last bit is no signal."""
    rows = table.to_pylist()
    for row in rows:
        row["reward"] = 0.0 if row["group_id"] < 2 else row["reward"]
    every_answer = Overlong(free_tokens=1, ramp_tokens=1, penalty=0.1)
    one = learner(objective=DrGRPO(divisor_tokens=10, overlong=every_answer))
    assert one.train(pa.Table.from_pylist(rows, schema=BATCH), VERSION).groups_without_signal == 0.5
