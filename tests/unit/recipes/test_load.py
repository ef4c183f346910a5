"""Recipes: what is wrong is said all at once, with file, key path, value and the way out."""

from pathlib import Path

import msgspec
import pytest

from asyncrl.recipes import RecipeError, dump_recipe, load_recipe, recipe_from
from asyncrl.recipes.sizes import derived_sizes, wire_bytes, wire_dtype

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = ROOT / "recipes" / "quickstart.toml"


def problems(*overrides, path=QUICKSTART):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", ["quickstart", "gsm8k", "calculator"])
def test_the_recipes_that_we_ship_are_sound(name):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.toml")
    assert recipe.run.name == name
    assert recipe_from(dump_recipe(recipe), "again") == recipe


def test_a_name_ends_where_its_line_ends():
    assert "run.name = 'x\\n'" in problems('run.name="x\\n"')


def test_every_problem_is_told_at_once():
    text = problems(
        "run.stepz=5", "pools.0.concurrency=-8", "learner.objective.clip_low=x", "pools.0.tensor_paralel=2"
    )
    assert text.splitlines() == [
        f"{QUICKSTART}: 4 problems",
        "  run.stepz = 5: unknown key; did you mean 'steps'?",
        "  pools[0].tensor_paralel = 2: unknown key; did you mean 'tensor_parallel'?",
        "  pools[0].concurrency = -8: Expected `int` >= 1",
        "  learner.objective.clip_low = 'x': Expected `float`, got `str`",
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prompts.rollouts_per_prompt=1"], "prompts.rollouts_per_prompt = 1: objective `grpo` compares"),
        (
            ["learner.minibatches_per_step=64"],
            "learner.minibatches_per_step = 64: a minibatch holds whole groups",
        ),
        (["prompts.system=hello"], "prompts.system = 'hello': is used by the chat template only"),
        (["sampling.max_new_tokens=4096"], "sampling.max_new_tokens = 4096: leaves no room for a prompt"),
        (["learner.tokens_per_microbatch=16"], "learner.tokens_per_microbatch = 16: one rollout may have"),
        (["pools.0.tensor_parallel=2"], 'must be 1 with device = "cpu"'),
        (
            ["learner.objective.type=grop"],
            "learner.objective.type = 'grop': expected one of 'grpo', 'dr_grpo', 'dapo', ",
        ),
        (["learner.objective.type=grop"], "'vapo'; did you mean 'grpo'?"),
        (
            ["learner.objective={clip_low=0.2}"],
            "learner.objective.type: is missing; expected one of 'grpo', 'dr_grpo'",
        ),
        (["learner.objective=3"], "learner.objective = 3: Expected `object`, got `int`"),
        (
            ["learner.objective.correction={ type = 'truncated', kap = 2.0 }"],
            "learner.objective.correction.kap = 2.0: unknown key; did you mean 'cap'?",
        ),
        (["learner.objective.clip_low=1.5"], "learner.objective.clip_low = 1.5: Expected `float` <= 1.0"),
        (
            ["learner.objective.correction={ type = 'none' }"],
            'learner.objective.correction = { type = "none" }: an asynchronous run trains tokens of up to 1 versions ago',
        ),
        (["learner.objective={ type = 'ppo' }"], "learner.objective.type = 'ppo': needs a critic"),
        (["learner.objective={ type = 'vapo' }"], "learner.objective.type = 'vapo': needs a critic"),
        (["learner.objective={ type = 'remax' }"], "learner.objective.type = 'remax': needs a greedy answer"),
        (
            ["learner.objective.kl={ estimator = 'k3', coefficient = 0.01, place = 'loss' }"],
            "learner.objective.kl: needs logprobs of a reference model, which the learner does not have yet",
        ),
        (["learner.objective.cost={ limit = 0.1 }"], "learner.objective.cost: needs a cost of each rollout"),
        (
            ["learner.objective={ type = 'dapo' }"],
            'learner.objective.type = "dapo": samples dynamically: set buffer.dynamic_sampling = true',
        ),
        (
            ["learner.objective={ type = 'dr_grpo' }"],
            'learner.objective.divisor_tokens: is missing; aggregation = "fixed_divisor" divides by it',
        ),
        (
            ["learner.objective.overlong={ free_tokens = 160, ramp_tokens = 16 }"],
            "learner.objective.overlong.free_tokens = 160: no answer is longer than sampling.max_new_tokens = 160",
        ),
        (["learner.objective.importance_cap=2.0"], "learner.objective.importance_cap = 2.0: unknown key"),
        (
            ["sft.heads=8"],
            "sft.heads = 8: sft.hidden_size / sft.heads = 16; engines know heads of (32, 64, 128)",
        ),
        (
            ["buffer.shards=17"],
            "buffer.shards = 17: each shard gives at least one prompt's group to every batch, and a step has 16",
        ),
        (
            ["buffer.dynamic_sampling=true", "prompts.rollouts_per_prompt=1"],
            "buffer.dynamic_sampling = true: drops every group whose rewards are all equal",
        ),
        (["buffer.memory_bytes=1000"], "buffer.memory_bytes = 1000: Expected `int` >= 1048576"),
        (
            ["buffer.group_policy.type=first"],
            "buffer.group_policy.type = 'first': expected one of 'full', 'first_k'; did you mean 'first_k'?",
        ),
        (["pools=[]"], "pools = []: Expected `array` of length >= 1"),
        (["pools=3"], "pools = 3: Expected `array`, got `int`"),
        (["run=3"], "run = 3: expected a table"),
        (["run.name=a/b"], "run.name = 'a/b'"),
        (["staleness.over_stale=maybe"], "staleness.over_stale = 'maybe'"),
        (["nothing.at.all=1"], "nothing = {'at': {'all': 1}}: unknown key; known here: run, model"),
    ],
)
def test_what_is_wrong_and_the_way_out(overrides, words):
    assert words in problems(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["learner.objective={ type = 'dr_grpo', divisor_tokens = 160 }"],
        [
            "learner.objective={ type = 'dapo', overlong = { free_tokens = 120, ramp_tokens = 40 } }",
            "buffer.dynamic_sampling=true",
        ],
        ["learner.objective={ type = 'gspo', correction = { type = 'masked', level = 'sequence' } }"],
        ["learner.objective={ type = 'reinforce_pp', discount = 0.99 }", "prompts.rollouts_per_prompt=1"],
        ["learner.objective.correction={ type = 'none' }", "staleness.max_staleness_versions=0"],
    ],
)
def test_objectives_that_a_recipe_may_ask_for(overrides):
    recipe = load_recipe(QUICKSTART, overrides)
    assert recipe_from(dump_recipe(recipe), "again") == recipe


def test_two_pools_of_one_name(tmp_path):
    path = tmp_path / "two.toml"
    path.write_text(QUICKSTART.read_text() + '\n[[pools]]\nname = "small"\ndevice = "cpu"\n')
    assert "pools[1].name = 'small': pools[0] has this name already" in problems(path=path)


def test_a_missing_key_and_a_missing_table(tmp_path):
    path = tmp_path / "short.toml"
    path.write_text('[run]\nname = "x"\n')
    text = problems(path=path)
    assert "run.steps: is missing; expected a whole number" in text
    assert "pools: is missing; expected a list of tables" in text


def test_a_syntax_error_has_its_line(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("[run\n")
    assert "line 1" in problems(path=path)


def test_overrides_set_values_of_every_kind():
    recipe = load_recipe(
        QUICKSTART,
        [
            "run.steps=7",
            "pools.0.concurrency=3",
            "run.name=other",
            "prompts.chat_template=true",
            "sampling.temperature=0.5",
        ],
    )
    assert (recipe.run.steps, recipe.pools[0].concurrency, recipe.run.name) == (7, 3, "other")
    assert recipe.prompts.chat_template is True and recipe.sampling.temperature == 0.5


@pytest.mark.parametrize(
    "override", ["run.steps", "=3", "run..steps=3", "pools.7.cores=1", "run.steps.more=1"]
)
def test_an_override_that_fits_nowhere(override):
    assert repr(override) in problems(override)


def test_derived_sizes_show_their_arithmetic():
    recipe = load_recipe(QUICKSTART, ["staleness.max_staleness_versions=2", "run.steps=60"])
    sizes = {size.name: (size.value, size.formula) for size in derived_sizes(recipe, 1_000_000)}
    assert sizes["rollouts per step"] == ("128", "16 prompts_per_step x 8 rollouts_per_prompt")
    assert sizes["prompts under way, at most"] == (
        "48",
        "(2 max_staleness_versions + 1) x 16 prompts_per_step",
    )
    assert sizes["bytes per version"][0] == "3.8 MiB"
    assert wire_dtype(recipe) == "float32" and wire_bytes(recipe, 10) == 40


def test_spare_rollouts_count_among_those_under_way():
    policy = 'buffer.group_policy={ type = "first_k", spare_rollouts_per_prompt = 2 }'
    recipe = load_recipe(QUICKSTART, [policy])
    assert recipe.rollouts_per_step == 128 and recipe_from(dump_recipe(recipe), "again") == recipe
    sizes = {size.name: (size.value, size.formula) for size in derived_sizes(recipe, None)}
    assert sizes["rollouts under way, at most"] == ("320", "32 prompts x (8 rollouts_per_prompt + 2 spare)")
    value, formula = sizes["answers under way, at most"]
    assert value == "400.0 KiB" and formula.startswith("320 rollouts x 160 max_new_tokens x 8 bytes")


def test_a_recipe_is_frozen():
    recipe = load_recipe(QUICKSTART)
    with pytest.raises(AttributeError):
        recipe.run.steps = 3
    assert msgspec.structs.asdict(recipe.run)["steps"] == recipe.run.steps
