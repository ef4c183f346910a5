"""What a critic and a reference beside the policy do to a plan."""

from asyncrl.recipes.gpus import GPUS, ClusterEntry
from asyncrl.recipes.load import load_recipe
from asyncrl.recipes.plan import workload
from asyncrl.recipes.plan_facts import Efficiency, Misfit, Workload
from asyncrl.recipes.plan_memory import fit_learner
from asyncrl.recipes.plan_model import ModelShape
from asyncrl.recipes.plan_speed import learner_time, train_flops

EFF = Efficiency()
SHAPE = ModelShape(
    name="decoder",
    parameters=1_000_000_000,
    expert_parameters=0,
    embedding_parameters=100_000_000,
    head_parameters=100_000_000,
    tied=True,
    layers=20,
    hidden_size=2048,
    heads=16,
    kv_heads=4,
    head_size=128,
    vocabulary=50_000,
    intermediate_size=8192,
    experts=0,
    experts_per_token=0,
    largest_layer_parameters=45_000_000,
)


def work(**more):
    return Workload(
        prompts_per_step=32,
        rollouts_per_prompt=8,
        prompt_tokens=200.0,
        mean_tokens=800.0,
        max_tokens=4096,
        max_context_tokens=4608,
        **more,
    )


def fit(**more):
    return fit_learner(SHAPE, "H100", GPUS["H100"], 4, work(**more), EFF)


def test_their_state_is_counted_over_the_ranks():
    plain = fit().state_bytes
    assert fit(critic=True).state_bytes == plain + 16e9 / 4
    assert fit(reference=True).state_bytes == plain
    assert fit(reference=True, reference_held=True).state_bytes == plain + 2e9 / 4
    small = fit_learner(SHAPE, "T4", GPUS["T4"], 1, work(critic=True, reference_held=True), EFF)
    assert isinstance(small, Misfit)
    assert "as many x 16 of a critic + as many x 4 of a reference) / 1)" in small.reason


def test_their_passes_are_counted():
    plain = train_flops(SHAPE, work())
    one_pass = train_flops(SHAPE, work(reference=True)) - plain
    assert plain / 4 < one_pass < plain / 3
    assert train_flops(SHAPE, work(early_proximal=True)) == plain + one_pass
    assert train_flops(SHAPE, work(early_proximal=True, minibatches_per_step=2)) == plain + one_pass
    critic = train_flops(SHAPE, work(critic=True)) - plain
    assert plain < critic < 1.25 * plain  # four passes of the layers against three and four of the head
    seconds = [
        learner_time(
            SHAPE,
            ClusterEntry(gpu_type="H100", gpus_per_node=8, nodes=1),
            GPUS["H100"],
            4,
            fit(**more),
            work(**more),
            EFF,
            wire_dtype="bfloat16",
            across_nodes=False,
        )
        for more in ({}, {"reference": True}, {"critic": True})
    ]
    assert seconds[0].traffic_s < seconds[1].traffic_s < seconds[2].traffic_s / 2 * 1.5
    assert (
        seconds[2].optimizer_s == 2 * seconds[0].optimizer_s
        and seconds[1].optimizer_s == seconds[0].optimizer_s
    )


def test_a_recipe_says_what_it_needs(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        """
[run]
name = "test"
steps = 1
[model]
path = "model"
[prompts]
source = "sums:train"
[[pools]]
name = "a"
[rewards]
terms = [{ function = "sums" }]
[learner]
objective = { type = "ppo", kl = { estimator = "k1", coefficient = 0.1, place = "reward" } }
"""
    )
    found = workload(load_recipe(recipe, []), None, None)
    assert found.critic and found.reference and found.reference_held and found.early_proximal
    found = workload(load_recipe(recipe, ["learner.lora={ rank = 8 }"]), None, None)
    assert found.critic and found.reference and not found.reference_held
    found = workload(load_recipe(recipe, ['learner.objective={ type = "grpo" }']), None, None)
    assert not (found.critic or found.reference or found.reference_held or found.early_proximal)
