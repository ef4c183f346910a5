"""How the terms of a reward come to one score."""

import msgspec
import pytest

from asyncrl.generators.config import RewardModelConfig, RewardsConfig, RewardTerm
from asyncrl.generators.functions import FunctionError
from asyncrl.generators.reward_pool import RewardPool
from asyncrl.generators.score import CostMissing, combined

TERMS = [RewardTerm(function="sums", weight=2.0), RewardTerm(model="judge", weight=-0.5)]


def test_rewards_and_costs_are_weighted_sums():
    score = combined(TERMS, [{"reward": 1.0, "cost": 3.0, "length": 7.0}, {"reward": 4.0}], "16")
    assert (score.reward, score.cost, score.answer) == (0.0, 6.0, "16")
    assert score.parts == {"sums": 1.0, "sums/cost": 3.0, "sums/length": 7.0, "judge": 4.0}
    both = combined(TERMS, [{"reward": 0.0, "cost": 3.0}, {"reward": 0.0, "cost": 4.0}])
    assert both.cost == 6.0 - 2.0


def test_a_rollout_without_a_cost_costs_nothing_unless_the_objective_needs_one():
    values = [{"reward": 1.0}, {"reward": 1.0}]
    assert combined(TERMS, values).cost == 0.0
    with pytest.raises(CostMissing, match=r"no reward term gave a cost \(sums, judge\)"):
        combined(TERMS, values, needs_cost=True)
    assert combined(TERMS, [{"reward": 1.0}, {"reward": 1.0, "cost": 0.0}], needs_cost=True).cost == 0.0


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (RewardTerm(), "a term has one of `function` and `model`"),
        (RewardTerm(function="sums", model="judge"), "a term has one of `function` and `model`"),
        (RewardTerm(function="sums", serving=RewardModelConfig()), "`serving` is for a term with `model`"),
    ],
)
def test_a_term_is_a_rule_or_a_model(term, words):
    assert words in term.broken_rule
    with pytest.raises(FunctionError, match=words):
        RewardPool(RewardsConfig(terms=[RewardTerm(function="math"), term]))


def test_a_model_is_served_by_the_defaults_where_nothing_is_said():
    (term,) = msgspec.convert({"terms": [{"model": "judge"}]}, RewardsConfig).terms
    assert term.serving is None and term.served == RewardModelConfig() and term.name == "judge"
