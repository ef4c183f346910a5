"""What objectives declare, and which settings are refused, each with its reason. No torch is needed for it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.learner.objective_config import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    KL,
    PPO,
    RLOO,
    VAPO,
    CostLimit,
    Decoupled,
    DrGRPO,
    Masked,
    NoCorrection,
    Objective,
    Overlong,
    ReinforcePP,
    ReinforcePPBaseline,
    ReMax,
)
from asyncrl.learner.objective_needs import Surroundings, broken_rules, name_of, needs_of

AROUND = Surroundings(
    max_staleness_versions=2, rollouts_per_prompt=8, dynamic_sampling=True, max_new_tokens=100
)
READY = (
    GRPO(),
    DrGRPO(divisor_tokens=100),
    DAPO(overlong=Overlong(free_tokens=80, ramp_tokens=20)),
    RLOO(),
    ReinforcePP(),
    ReinforcePPBaseline(),
    GSPO(),
    CISPO(),
)
KL_IN_LOSS = KL(estimator="k3", coefficient=0.01, place="loss")


def _broken(objective: Objective, **changes: Any) -> dict[str, str]:
    around = msgspec.structs.replace(AROUND, **changes)
    return {path: f"{found}: {advice}" for path, found, advice in broken_rules(objective, around)}


@pytest.mark.parametrize("objective", READY, ids=name_of)
def test_what_needs_the_policy_alone_is_ready(objective: Objective) -> None:
    assert _broken(objective) == {}
    needs = needs_of(objective)
    assert needs.logprobs == {"current", "proximal", "behaviour"} and not needs.parts and not needs.entropy


@pytest.mark.parametrize(
    ("objective", "parts"),
    [
        (PPO(), {"critic"}),
        (VAPO(), {"critic"}),
        (ReMax(), {"greedy rollouts"}),
        (GRPO(kl=KL_IN_LOSS), {"reference model"}),
        (PPO(kl=KL_IN_LOSS, cost=CostLimit(limit=1.0)), {"critic", "reference model", "costs"}),
    ],
)
def test_what_needs_another_part_says_so(objective: Objective, parts: set[str]) -> None:
    assert needs_of(objective).parts == parts
    assert _broken(objective) == {}


def test_which_logprobs_a_loss_is_made_of() -> None:
    assert needs_of(GRPO(correction=NoCorrection())).logprobs == {"current", "proximal"}
    assert needs_of(GRPO(correction=Decoupled())).logprobs == {"current", "proximal", "behaviour"}
    between = GRPO(correction=Decoupled(proximal="interpolated"))
    assert needs_of(between).logprobs == {"current", "behaviour"}
    assert needs_of(GRPO(kl=KL_IN_LOSS)).logprobs == {"current", "proximal", "behaviour", "reference"}
    in_reward = KL(estimator="k1", coefficient=0.01, place="reward")
    early = needs_of(GRPO(correction=Decoupled(proximal="interpolated"), kl=in_reward))
    assert early.logprobs == {"current", "proximal", "behaviour", "reference"} and early.early_proximal
    assert not needs_of(GRPO(kl=KL_IN_LOSS)).early_proximal
    assert needs_of(GRPO(entropy_bonus=0.01)).entropy


@pytest.mark.parametrize(
    ("objective", "changes", "path", "words"),
    [
        (
            GRPO(correction=NoCorrection()),
            {},
            "learner.objective.correction",
            "an asynchronous run trains tokens of up to 2 versions ago",
        ),
        (
            GRPO(correction=Masked(low=1.1)),
            {},
            "learner.objective.correction",
            "low 1.1, high 5: masks tokens on which",
        ),
        (
            GRPO(correction=Masked(low=0.0, high=0.9)),
            {},
            "learner.objective.correction",
            "set low <= 1 <= high",
        ),
        (DrGRPO(), {}, "learner.objective.divisor_tokens", "sampling.max_new_tokens = 100"),
        (
            GRPO(divisor_tokens=5),
            {},
            "learner.objective.divisor_tokens",
            '5: is for aggregation = "fixed_divisor" only',
        ),
        (
            RLOO(),
            {"rollouts_per_prompt": 1},
            "prompts.rollouts_per_prompt",
            "1: objective `rloo` compares the rollouts of one prompt",
        ),
        (DAPO(), {"dynamic_sampling": False}, "learner.objective.type", "set buffer.dynamic_sampling = true"),
        (
            GRPO(overlong=Overlong(free_tokens=100, ramp_tokens=1)),
            {},
            "learner.objective.overlong.free_tokens",
            "no answer is longer than sampling.max_new_tokens = 100",
        ),
        (
            GRPO(kl=KL(estimator="k1", coefficient=0.1, place="loss")),
            {},
            "learner.objective.kl.estimator",
            "gradient of mean 0",
        ),
        (
            GRPO(),
            {"critic_warmup_steps": 0},
            "learner.critic",
            "objective `grpo` has no critic: leave it out",
        ),
        (
            PPO(),
            {"critic_warmup_steps": 50, "steps": 50},
            "learner.critic.warmup_steps",
            "50: the policy would never train: the run has 50 steps",
        ),
        (GRPO(), {"reference": True}, "learner.reference", "has no `kl`"),
    ],
)
def test_what_is_unsafe_and_the_way_out(
    objective: Objective, changes: dict[str, Any], path: str, words: str
) -> None:
    told = _broken(objective, **changes)
    assert words in told[path], told


def test_a_synchronous_run_needs_no_correction() -> None:
    assert _broken(GRPO(correction=NoCorrection()), max_staleness_versions=0) == {}


@pytest.mark.parametrize("objective", [ReinforcePP(), PPO(), VAPO(), ReMax()], ids=name_of)
def test_what_compares_no_rollouts_may_have_one_per_prompt(objective: Objective) -> None:
    assert "prompts.rollouts_per_prompt" not in _broken(objective, rollouts_per_prompt=1)


@given(st.sampled_from(READY), st.integers(0, 3), st.integers(1, 3), st.booleans())
def test_settings_survive_being_written_down(
    objective: Objective, bound: int, rollouts: int, dynamic: bool
) -> None:
    assert msgspec.convert(msgspec.to_builtins(objective), Objective) == objective
    told = _broken(
        objective, max_staleness_versions=bound, rollouts_per_prompt=rollouts, dynamic_sampling=dynamic
    )
    assert ("prompts.rollouts_per_prompt" in told) == (rollouts == 1 and name_of(objective) != "reinforce_pp")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"type": "grpo", "clip_low": 1.5}, "<= 1.0"),
        ({"type": "grpo", "dual_clip": 1.0}, "> 1.0"),
        ({"type": "grpo", "entropy_bonus": -1.0}, ">= 0.0"),
        ({"type": "reinforce_pp", "discount": 1.01}, "<= 1.0"),
        ({"type": "rloo", "normalise_std": True}, "unknown field `normalise_std`"),
        ({"type": "gspo", "correction": {"type": "truncated", "level": "word"}}, "Invalid enum value 'word'"),
        ({"type": "grpo", "overlong": {"free_tokens": 5}}, "missing required field `ramp_tokens`"),
    ],
)
def test_what_no_objective_can_mean(table: dict[str, Any], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words.replace("(", r"\(")):
        msgspec.convert(table, Objective)


def test_a_recipe_is_checked_without_torch() -> None:
    program = (
        "import sys; import asyncrl.learner.config, asyncrl.learner.objective_needs; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, timeout=60).returncode == 0
