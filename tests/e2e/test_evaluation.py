"""Evaluation in a run: before, during and after it, beside training and with the learner waiting for it."""

import pytest

from asyncrl.runtime.facts import Evaluation, EvaluationMissed, StepFacts
from asyncrl.runtime.metrics import read_facts
from tests.e2e.runs import launched, tiny_model

SETTINGS = (
    "run.steps=7",
    "evaluation.every_steps=2",
    "evaluation.rollouts_per_prompt=2",
    "evaluation.k=[1, 2]",
    "evaluation.slots_per_engine=4",
    "pools.0.fake.step_s=0.01",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("one_version", ["false", "true"])
def test_evaluations_during_a_run(tmp_path, model, one_version):
    with launched(tmp_path, model, *SETTINGS, f"evaluation.one_version={one_version}") as run:
        run.wait_for(r"^note +held-out accuracy at step 0")
        run.wait_until(lambda: run.status()["snapshot"]["held_out"]["step"] == 0, timeout_s=20)
        assert run.end() == 0, run.text
    facts = list(read_facts(run.folder / "metrics.jsonl"))
    steps = [fact.step for fact in facts if isinstance(fact, StepFacts)]
    found = {fact.step: fact for fact in facts if isinstance(fact, Evaluation)}
    missed = {fact.step for fact in facts if isinstance(fact, EvaluationMissed)}
    assert steps == list(range(1, 8))
    assert found.keys() | missed == {0, 2, 4, 6, 7} and {0, 7} <= found.keys()
    for step, fact in found.items():
        assert (fact.prompts, fact.rollouts_per_prompt) == (16, 2) and fact.pass_at.keys() == {1, 2}
        assert fact.oldest_version >= step and fact.failed == 0
    if one_version == "true":
        assert not missed and all(fact.version == fact.oldest_version == s for s, fact in found.items())
    else:  # the learner's steps are far shorter than an evaluation
        assert any(fact.version > fact.oldest_version for fact in found.values())
    summary = run.summary
    assert summary["evaluations"] == len(found) and summary["evaluations_missed"] == len(missed)
    assert summary["conservation"]["holds"] and summary["rollouts_trained"] == 7 * 16
