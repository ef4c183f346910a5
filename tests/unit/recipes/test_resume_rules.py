"""What a run that goes on may change of its recipe; and what one needs that is to come out the same to the last bit."""

from pathlib import Path

import pytest

from asyncrl.recipes import RecipeError, load_recipe
from asyncrl.recipes.resume_rules import FIXED, changes_refused, fixed_digest

QUICKSTART = Path(__file__).resolve().parents[3] / "recipes" / "quickstart.toml"
EXACT = (
    "run.deterministic=true",
    "staleness.max_staleness_versions=0",
    "pools.0.concurrency=1",
    "pools.0.max_concurrency=1",
    "weight_sync.prefix_cache=false",
)


def recipe(*overrides):
    return load_recipe(QUICKSTART, overrides)


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("prompts.seed=3", "prompts.seed"),
        ("prompts.rollouts_per_prompt=4", "prompts.rollouts_per_prompt"),
        ("prompts.task.max_terms=3", "prompts.task.max_terms"),
        ("model.path=elsewhere", "model.path"),
        ("sampling.temperature=0.7", "sampling.temperature"),
        ("staleness.max_staleness_versions=5", "staleness.max_staleness_versions"),
        ("buffer.shards=2", "buffer.shards"),
        (
            'buffer.group_policy={ type = "first_k", spare_rollouts_per_prompt = 1 }',
            "buffer.group_policy.type",
        ),
        ("learner.objective.type=rloo", "learner.objective.type"),
    ],
)
def test_what_stays_is_named_with_what_it_was_and_why(override, path):
    refused = changes_refused(recipe(), recipe(override))
    assert refused[0].path == path
    assert "when the run began" in refused[0].advice and "begin a new run" in refused[0].advice
    if not path.startswith("run."):
        assert fixed_digest(recipe()) != fixed_digest(recipe(override))


@pytest.mark.parametrize(
    "override",
    [
        "run.steps=900",
        "learner.ranks=2",
        "learner.learning_rate=1e-5",
        "pools.0.concurrency=4",
        "checkpoints.keep=5",
    ],
)
def test_the_rest_may_be_changed(override):
    assert recipe(override) != recipe()
    assert changes_refused(recipe(), recipe(override)) == []
    assert fixed_digest(recipe()) == fixed_digest(recipe(override))


def test_a_run_that_is_copied_elsewhere_keeps_its_checkpoints():
    assert fixed_digest(recipe()) == fixed_digest(recipe("run.folder=/elsewhere", "run.name=other"))
    assert {"run.folder", "run.name"} < FIXED.keys()


def test_what_a_deterministic_run_needs_is_told_all_at_once():
    assert recipe(*EXACT).run.deterministic
    with pytest.raises(RecipeError) as caught:
        recipe("run.deterministic=true", "buffer.shards=2", "learner.device=cuda", "evaluation.every_steps=5")
    text = str(caught.value)
    for key in (
        "pools[0].concurrency",
        "pools[0].max_concurrency",
        "staleness.max_staleness_versions",
        "weight_sync.prefix_cache",
        "buffer.shards",
        "learner.device",
        "evaluation.every_steps",
    ):
        assert f"  {key} = " in text


@pytest.mark.parametrize(
    "override",
    [
        "learner.ranks=2",
        "pools.0.engines=2",
        "pools.0.device=cuda",
        'buffer.group_policy={ type = "first_k", spare_rollouts_per_prompt = 1 }',
    ],
)
def test_each_of_them_alone_is_refused(override):
    with pytest.raises(RecipeError, match=r"run\.deterministic"):
        recipe(*EXACT, override)


def test_a_fake_engine_may_work_on_several():
    assert recipe(*EXACT[:2], "pools.0.engine=fake").pools[0].concurrency > 1


def test_what_is_not_set_and_what_is_empty_are_the_same():
    bare, named = (
        recipe("learner.objective.type=ppo"),
        recipe("learner.objective.type=ppo", 'learner.critic.path=""'),
    )
    assert bare != named
    assert changes_refused(bare, named) == [] and fixed_digest(bare) == fixed_digest(named)
    other = recipe("learner.objective.type=ppo", "learner.critic.path=elsewhere")
    assert changes_refused(bare, other)[0].path == "learner.critic.path"
