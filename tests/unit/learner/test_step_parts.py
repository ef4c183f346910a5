"""A whole step with critic, reference, costs and greedy baselines, against the same training written out token by token in float64.

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
from transformers import AutoModel, AutoModelForCausalLM

from asyncrl.learner.config import CriticConfig, ReferenceConfig
from asyncrl.learner.objective_config import (
    GRPO,
    KL,
    PPO,
    VAPO,
    CostLimit,
    Decoupled,
    Objective,
    Overlong,
    ReinforcePP,
    ReMax,
)
from asyncrl.learner.step import Learner
from tests.batches import Row, aged, batch

Open = Callable[..., Learner]
Lists = list[list[float]]
VERSION, RATE, CRITIC_RATE, TEMPERATURE = 4, 0.5, 0.1, 0.9
TIGHT = {"clip_low": 0.02, "clip_high": 0.03}
COST = CostLimit(limit=0.3, multiplier=1.5)

CASES: dict[str, Objective] = {
    "ppo": PPO(discount=0.95, gae_lambda=0.8, value_clip=0.02, **TIGHT),
    "ppo, dual clip, mean of means": PPO(
        dual_clip=1.01, value_clip=None, aggregation="sequence_mean", **TIGHT
    ),
    "ppo, kl in loss": PPO(kl=KL(estimator="k3", coefficient=0.3, place="loss"), **TIGHT),
    "ppo, kl in reward, cost": PPO(
        discount=0.9, kl=KL(estimator="k1", coefficient=0.3, place="reward"), cost=COST, **TIGHT
    ),
    "vapo": VAPO(length_factor=0.2, critic_lambda=0.9, imitation=0.2, right_above=0.6, **TIGHT),
    "vapo, cost": VAPO(length_factor=0.2, cost=COST, **TIGHT),
    "grpo, k2 in loss": GRPO(
        kl=KL(estimator="k2", coefficient=0.3, place="loss"), entropy_bonus=0.1, **TIGHT
    ),
    "grpo, k3 in loss, fixed divisor": GRPO(
        kl=KL(estimator="k3", coefficient=0.1, place="loss"),
        aggregation="fixed_divisor",
        divisor_tokens=17,
        **TIGHT,
    ),
    "grpo, k2 in reward": GRPO(kl=KL(estimator="k2", coefficient=0.3, place="reward"), **TIGHT),
    "grpo, k3 in reward, interpolated": GRPO(
        kl=KL(estimator="k3", coefficient=0.3, place="reward"),
        correction=Decoupled(proximal="interpolated"),
        clip_low=0.3,
        clip_high=0.3,
    ),
    "grpo, cost": GRPO(cost=COST, normalise_std=False, **TIGHT),
    "reinforce_pp, kl in reward": ReinforcePP(
        discount=0.9, kl=KL(estimator="k1", coefficient=0.3, place="reward"), **TIGHT
    ),
    "remax": ReMax(overlong=Overlong(free_tokens=4, ramp_tokens=5, penalty=0.7), **TIGHT),
    "remax, kl in reward, cost": ReMax(
        kl=KL(estimator="k1", coefficient=0.3, place="reward"), cost=COST, **TIGHT
    ),
}


# ---- the reference ---------------------------------------------------------------------------------------------------


class Written:
    """The step, written out. `rows` are the rollouts that are trained, `greedy` the baseline of each group."""

    def __init__(
        self, folder: Path, other: Path, objective: Objective, rows: list[Row], greedy: list[Row]
    ) -> None:
        self.objective, self.rows = objective, rows
        self.greedy = {row["group_id"]: row for row in greedy}
        self.policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.frozen = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float64)
        self.decoder = AutoModel.from_pretrained(other, dtype=torch.float64)
        self.outputs = 1 + (objective.cost is not None)
        head = _head(self.outputs)
        self.head = [each.double().requires_grad_() for each in head]
        self.losses: dict[str, list[float]] = {"loss": [], "value_loss": []}
        with torch.no_grad():
            self.proximal = [self._chosen(self.policy, row).tolist() for row in rows]
            self.reference = [self._chosen(self.frozen, row).tolist() for row in rows]
            self.values = [self._values(row).tolist() for row in rows]
        self.advantages, self.returns = self._estimates()

    def _logprobs(self, model: torch.nn.Module, row: Row) -> torch.Tensor:
        prompt, answer = row["prompt_tokens"], row["tokens"]
        logits = model(torch.tensor([prompt + answer])).logits[0] / TEMPERATURE
        return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]

    def _chosen(self, model: torch.nn.Module, row: Row) -> torch.Tensor:
        return self._logprobs(model, row).gather(1, torch.tensor(row["tokens"])[:, None])[:, 0]

    def _values(self, row: Row) -> torch.Tensor:
        """[answer tokens, outputs]: of the state before each."""
        prompt, answer = row["prompt_tokens"], row["tokens"]
        hidden = self.decoder(torch.tensor([prompt + answer])).last_hidden_state[0]
        return hidden[len(prompt) - 1 : -1] @ self.head[0].T + self.head[1]

    def _kl(self, i: int) -> list[float]:
        kl = self.objective.kl
        assert kl is not None
        out = []
        for t, version in enumerate(self.rows[i]["versions"]):
            d = self.proximal[i][t] - self.reference[i][t] if version >= 0 else 0.0
            out.append({"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kl.estimator])
        return out

    def _reward(self, row: Row) -> float:
        over = self.objective.overlong
        if over is None:
            return float(row["reward"])
        share = min(max(len(row["tokens"]) - over.free_tokens, 0), over.ramp_tokens) / over.ramp_tokens
        return float(row["reward"]) - over.penalty * share

    def _per_token(self, i: int, k: int) -> list[float]:
        """What sampled token by sampled token was earned (k = 0) or cost (k = 1)."""
        row = self.rows[i]
        kept = [t for t, v in enumerate(row["versions"]) if v >= 0]
        out = [0.0] * len(kept)
        out[-1] = self._reward(row) if k == 0 else row["cost"]
        if self.objective.kl is not None and self.objective.kl.place == "reward":
            sign = self.objective.kl.coefficient * (1 if k == 0 else -1)
            kl = self._kl(i)
            out = [x - sign * kl[t] for x, t in zip(out, kept, strict=True)]
        return out

    def _raw(self, i: int, k: int) -> tuple[list[float], list[float]]:
        """Advantages and returns of the sampled tokens, before any normalisation over group or batch."""
        o, row, earned = self.objective, self.rows[i], self._per_token(i, k)
        n = len(earned)
        if isinstance(o, PPO | VAPO):
            v = [self.values[i][t][k] for t, version in enumerate(row["versions"]) if version >= 0]
            policy = o.gae_lambda if isinstance(o, PPO) else max(0.0, 1 - 1 / (o.length_factor * n))
            critic = o.gae_lambda if isinstance(o, PPO) else o.critic_lambda
            advantages, for_critic = (_gae(earned, v, o.discount, x) for x in (policy, critic))
            return advantages, [a + b for a, b in zip(for_critic, v, strict=True)]
        if isinstance(o, ReinforcePP):
            return [sum(o.discount**s * x for s, x in enumerate(earned[t:])) for t in range(n)], []
        total = sum(earned)
        if isinstance(o, ReMax):
            best = self.greedy[row["group_id"]]
            return [total - (self._reward(best) if k == 0 else best["cost"])] * n, []
        members = [j for j, other in enumerate(self.rows) if other["group_id"] == row["group_id"]]
        own = np.array([sum(self._per_token(j, k)) for j in members])
        spread = own.std(ddof=1) + 1e-6 if isinstance(o, GRPO) and o.normalise_std else 1.0
        return [(total - own.mean()) / spread] * n, []

    def _estimates(self) -> tuple[Lists, list[Lists]]:
        """Advantages [row][token] and returns [row][token][output], 0 where nothing was sampled."""
        o = self.objective
        advantages, returns = [], []
        for i, row in enumerate(self.rows):
            kept = [t for t, v in enumerate(row["versions"]) if v >= 0]
            both = [self._raw(i, k) for k in range(self.outputs)]
            combined = both[0][0]
            if o.cost is not None:
                m = o.cost.multiplier
                combined = [(a - m * c) / (1 + m) for a, c in zip(both[0][0], both[1][0], strict=True)]
            advantages.append([0.0] * len(row["tokens"]))
            returns.append([[0.0] * self.outputs for _ in row["tokens"]])
            for place, t in enumerate(kept):
                advantages[i][t] = combined[place]
                if isinstance(o, PPO | VAPO):
                    returns[i][t] = [each[1][place] for each in both]
        if isinstance(o, PPO | VAPO | ReinforcePP):
            pairs = zip(advantages, self.rows, strict=True)
            chosen = np.array(
                [a for each, r in pairs for a, m in zip(each, r["trainable"], strict=True) if m]
            )
            scale = math.sqrt(chosen.var(ddof=1) + 1e-8)
            advantages = [[(a - chosen.mean()) / scale for a in each] for each in advantages]
        return advantages, returns

    def _policy_loss(self, half: list[int]) -> torch.Tensor:
        o, rows, imitated = self.objective, [], []
        for i in half:
            row, every = self.rows[i], self._logprobs(self.policy, self.rows[i])
            losses = []
            for t, token in enumerate(row["tokens"]):
                if not row["trainable"][t]:
                    continue
                current, behaviour = every[t, token], row["logprobs"][t]
                proximal, cap = self.proximal[i][t], 2.0
                if isinstance(o.correction, Decoupled):
                    age, cap = VERSION - row["versions"][t], math.inf
                    share = (age - 1) / age if age >= 1 else 0.0
                    proximal = (1 - share) * behaviour + share * current.item()
                a, ratio = self.advantages[i][t], (current - proximal).exp()
                loss = torch.max(-ratio * a, -ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * a)
                if isinstance(o, PPO) and o.dual_clip is not None and a < 0:
                    loss = torch.min(loss, torch.tensor(-o.dual_clip * a))
                loss = loss * min(math.exp(proximal - behaviour), cap)
                loss = loss + o.entropy_bonus * (every[t].exp() * every[t]).sum()
                if o.kl is not None and o.kl.place == "loss":
                    d = current - self.reference[i][t]
                    kl = d * d / 2 if o.kl.estimator == "k2" else (-d).exp() - 1 + d
                    loss = loss + o.kl.coefficient * kl
                losses.append(loss)
                if isinstance(o, VAPO) and row["reward"] > o.right_above:
                    imitated.append(-current)
            if losses:
                rows.append(torch.stack(losses))
        if o.aggregation == "sequence_mean":
            total = torch.stack([row.mean() for row in rows]).mean()
        elif o.aggregation in ("sequence_sum", "fixed_divisor"):
            total = torch.stack([row.sum() / (o.divisor_tokens or 1) for row in rows]).mean()
        else:
            total = torch.cat(rows).mean()
        return (
            total + o.imitation * torch.stack(imitated).mean() if imitated and isinstance(o, VAPO) else total
        )

    def _value_loss(self, half: list[int]) -> torch.Tensor:
        assert isinstance(self.objective, PPO | VAPO)
        clip, losses = self.objective.value_clip, []
        for i in half:
            values = self._values(self.rows[i])
            for t, trainable in enumerate(self.rows[i]["trainable"]):
                if not trainable:
                    continue
                loss = torch.zeros((), dtype=torch.float64)
                for k in range(self.outputs):
                    now, old, target = values[t, k], self.values[i][t][k], self.returns[i][t][k]
                    squares = [(now - target) ** 2]
                    if clip is not None:
                        squares.append((now.clamp(old - clip, old + clip) - target) ** 2)
                    loss = loss + torch.stack(squares).max() / 2
                losses.append(loss)
        return torch.stack(losses).mean()

    def train(self, half: list[int]) -> None:
        """Plain descent on the minibatch."""
        self._descend("loss", self._policy_loss(half), list(self.policy.parameters()), RATE)
        if isinstance(self.objective, PPO | VAPO):
            parameters = [*self.decoder.parameters(), *self.head]
            self._descend("value_loss", self._value_loss(half), parameters, CRITIC_RATE)

    def _descend(self, name: str, loss: torch.Tensor, parameters: list[torch.Tensor], rate: float) -> None:
        self.losses[name].append(loss.item())
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * gradient


def _gae(rewards: list[float], values: list[float], discount: float, factor: float) -> list[float]:
    out, later = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        ahead = values[t + 1] if t + 1 < len(values) else 0.0
        later = rewards[t] + discount * ahead - values[t] + discount * factor * later
        out[t] = later
    return out


def _head(outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(3)
    weight = torch.tensor(random.normal(0, 0.03, (2, 64)), dtype=torch.float32)
    return weight[:outputs].clone(), torch.tensor([0.1, -0.2])[:outputs].clone()


# ---- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """12 rollouts in 4 groups and a greedy one in each; ages 0 to 2, one all context, some with an environment's words inside."""

    def answer(random: np.random.Generator, group: int, number: int) -> Row:
        row = aged(random, number, context=number == 0 or (group, number) == (2, 1))
        return row | {"cost": float(random.integers(0, 4)) / 4, "greedy": number == 0}

    return batch(np.random.default_rng(11), 4, answer, rollouts=4, prompt_tokens=3)


def _open(learner: Open, folder: Path, other: Path, objective: Objective, **settings: Any) -> Learner:
    """With plain descent, so that changes are gradients, and a critic that is not 0 everywhere."""
    one = learner(
        folder,
        TEMPERATURE,
        objective=objective,
        learning_rate=RATE,
        max_grad_norm=1e9,
        reference=ReferenceConfig(path=str(other)) if objective.kl else None,
        critic=CriticConfig(path=str(other), learning_rate=CRITIC_RATE, max_grad_norm=1e9),
        **{"tokens_per_microbatch": 60, "minibatches_per_step": 2, **settings},
    )
    for name, trained in one.trained.items():
        rate = RATE if name == "policy" else CRITIC_RATE
        trained.optimizer = torch.optim.SGD(trained.parameters.values(), lr=rate)
    if "critic" in one.trained:
        parameters = one.trained["critic"].parameters
        for name, value in zip(("weight", "bias"), _head(1 + (objective.cost is not None)), strict=True):
            parameters[f"head.{name}"].data.to_local().copy_(value)
    return one


def _masters(one: Learner, name: str) -> dict[str, torch.Tensor]:
    return {key: p.detach().full_tensor().clone() for key, p in one.trained[name].parameters.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_formulas(
    learner: Open, model_folder: Path, untied_folder: Path, table: pa.Table, name: str
) -> None:
    objective = CASES[name]
    one = _open(learner, model_folder, untied_folder, objective)
    rows = table.to_pylist()
    trained, greedy = [r for r in rows if not r["greedy"]], [r for r in rows if r["greedy"]]
    written = Written(model_folder, untied_folder, objective, trained, greedy)
    before = {part: _masters(one, part) for part in one.trained}
    metrics = one.train(table, VERSION)
    for half in (list(range(6)), list(range(6, 12))):
        written.train(half)
    assert metrics.loss == pytest.approx(np.mean(written.losses["loss"]), abs=1e-5, rel=1e-5)
    wanted: dict[str, dict[str, torch.Tensor]] = {"policy": dict(written.policy.named_parameters())}
    if "critic" in one.trained:
        assert metrics.value_loss == pytest.approx(np.mean(written.losses["value_loss"]), abs=1e-5, rel=1e-5)
        decoder = {f"decoder.{key}": p for key, p in written.decoder.named_parameters()}
        wanted["critic"] = {**decoder, "head.weight": written.head[0], "head.bias": written.head[1]}
    for part, want in wanted.items():
        found = _masters(one, part)
        assert found.keys() == want.keys() == before[part].keys()
        moved = max(float((found[key] - before[part][key]).abs().max()) for key in want)
        assert moved > 1e-3
        for key, tensor in found.items():
            torch.testing.assert_close(
                tensor.double() - before[part][key],
                want[key].detach() - before[part][key],
                atol=4e-6,
                rtol=1e-3,
                msg=lambda m, k=f"{part} {key}": f"{k}: {m}",
            )
    assert metrics.clip_fraction > 0
    if objective.kl is not None:
        assert metrics.kl_reference > 0.01
