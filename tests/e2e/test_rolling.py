"""Whole runs in which engines take versions one by one, a version or two behind the learner."""

import pytest

from asyncrl.runtime.facts import Evaluation, StepFacts
from asyncrl.runtime.metrics import read_facts
from tests.e2e.runs import launched, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def test_a_run_with_rolling_updates_an_engine_that_is_killed_and_evaluations_of_one_version(tmp_path, model):
    settings = (
        "run.steps=30",
        "staleness.max_staleness_versions=3",
        "weight_sync.max_lag_versions=2",
        "evaluation.every_steps=10",
        "evaluation.one_version=true",
        "pools.0.fake.step_s=0.01",
    )
    with launched(tmp_path, model, *settings) as run:
        run.wait_for_step()
        run.engine("fake-0").kill()
        run.wait_for(r"^note +engine fake-0 died \(.*\); starting it again in \d s")
        assert run.end(240) == 0, run.text
    facts = list(read_facts(run.folder / "metrics.jsonl"))
    steps = [fact for fact in facts if isinstance(fact, StepFacts)]
    assert [fact.version for fact in steps] == list(range(1, 31))
    assert sum(fact.engine_stall_s > 0 for fact in steps) > 10, "told by the step after"
    found = {fact.step: fact for fact in facts if isinstance(fact, Evaluation)}
    assert found.keys() == {0, 10, 20, 30}
    assert all(fact.version == fact.oldest_version == step for step, fact in found.items())
    summary = run.summary
    assert summary["conservation"]["holds"] and summary["rollouts_trained"] == 30 * 16
    assert summary["tokens_past_bound"] == 0
