"""Runs of objectives that need more than the policy: what they are made of meets in a launch, and shows in its metrics."""

import math

import pytest

from asyncrl.runtime.facts import StepFacts
from asyncrl.runtime.metrics import read_facts
from tests.e2e.runs import launched, tiny_model

REWARD = """
def judge(answer_text, payload):
    return {"reward": answer_text.count("1") / 4, "cost": len(answer_text) / 10}
"""

CASES = {
    "ppo": (
        'learner.objective={ type = "ppo", kl = { estimator = "k1", coefficient = 0.01, place = "reward" } }',
        "learner.critic={ learning_rate = 1e-3, warmup_steps = 1 }",
    ),
    "remax": (
        'learner.objective={ type = "remax", cost = { limit = 0.0 }, '
        'kl = { estimator = "k3", coefficient = 0.01, place = "loss" } }',
    ),
}


JUDGE = 'rewards.terms=[{ function = "judge:judge" }]'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", CASES)
def test_a_run_has_what_its_objective_needs(tmp_path, model, name):
    (tmp_path / "judge.py").write_text(REWARD)
    with launched(tmp_path, model, "run.steps=4", JUDGE, *CASES[name]) as run:
        assert run.end() == 0, run.text
    steps = [fact for fact in read_facts(run.folder / "metrics.jsonl") if isinstance(fact, StepFacts)]
    learner = [fact.learner for fact in steps]
    assert len(steps) == 4
    if name == "ppo":
        assert [math.isnan(fact.loss) for fact in steps] == [True, False, False, False]
        assert all(each["value_loss"] > 0 and math.isfinite(each["explained_variance"]) for each in learner)
        assert learner[1]["kl_reference"] == pytest.approx(0, abs=1e-9)
        assert learner[3]["kl_reference"] > 1e-9
    else:
        assert learner[3]["kl_reference"] > 0 and all(each["cost_mean"] > 0 for each in learner)
        multipliers = [each["cost_multiplier"] for each in learner]
        assert multipliers[0] == 1.0 and sorted(multipliers) == multipliers and multipliers[3] > 1
        assert run.summary["conservation"]["holds"]
