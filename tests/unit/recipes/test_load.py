"""Recipes: what is wrong is said all at once, with file, key path, value and the way out."""

from pathlib import Path

import msgspec
import pytest

from asyncrl.recipes import RecipeError, dump_recipe, load_recipe, recipe_from
from asyncrl.recipes.model_folder import ModelFacts
from asyncrl.recipes.plan_lora import LinearLayers, UnknownTarget, held_state
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


def test_what_an_objective_needs_of_the_engines_follows_from_it():
    plain = load_recipe(QUICKSTART)
    assert not plain.greedy_baseline and not plain.needs_costs
    remax = load_recipe(QUICKSTART, ['learner.objective={ type = "remax", cost = { limit = 1.0 } }'])
    assert remax.greedy_baseline and remax.needs_costs
    assert remax.rollouts_per_group == plain.rollouts_per_group + 1
    assert remax.rollouts_per_step == plain.rollouts_per_step
    assert any("+ 1 greedy)" in size.formula for size in derived_sizes(remax, None))


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
        (
            ["learner.lora={ dropout = 0.1 }"],
            "learner.lora.dropout = 0.1: must be 0: a token's logprob has to be",
        ),
        (
            ['learner.lora={ sync = "adapter", quantise = "nf4" }'],
            'learner.lora.sync = "adapter": with learner.lora.quantise = "nf4" engines would put the adapter on',
        ),
        (["learner.lora={ ranks = 4 }"], "learner.lora.ranks = 4: unknown key; did you mean 'rank'?"),
        (["learner.ranks=4", "learner.sharding.replicas=3"], "learner.sharding.replicas = 3: must divide"),
        (["learner.sharding.cpu_offload=true"], "learner.sharding.cpu_offload = true: moves masters and"),
        (
            ["learner.sharding.activation_checkpointing=half"],
            "learner.sharding.activation_checkpointing = 'half': Invalid enum value",
        ),
        (["prompts.system=hello"], "prompts.system = 'hello': is used by the chat template only"),
        (["sampling.max_new_tokens=4096"], "sampling.max_new_tokens = 4096: leaves no room for a prompt"),
        (["learner.tokens_per_microbatch=16"], "learner.tokens_per_microbatch = 16: one rollout may have"),
        (["pools.0.tensor_parallel=2"], 'must be 1 with device = "cpu"'),
        (
            ["rewards.terms=[{}]"],
            "rewards.terms[0] = function '', model '': a term has one of `function` and `model`",
        ),
        (
            ['rewards.terms=[{ function = "sums", model = "x" }]'],
            "rewards.terms[0] = function 'sums', model 'x': a term has one of",
        ),
        (
            ['rewards.terms=[{ function = "sums", serving = {} }]'],
            "`serving` is for a term with `model`, and this has a function",
        ),
        (
            ['rewards.terms=[{ model = "x", serving = { devise = "cpu" } }]'],
            "rewards.terms[0].serving.devise = 'cpu': unknown key; did you mean 'device'?",
        ),
        (
            [
                'rewards.terms=[{ model = "x", serving = { device = "cpu" } }, { model = "x", serving = { device = "cpu" } }]'
            ],
            "rewards.terms[1] = 'x': is listed twice",
        ),
        (
            ['rewards.terms=[{ model = "x" }]'],
            'rewards.terms[0].serving.device = "cuda": a reward model stands beside each engine, on its GPU',
        ),
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


MODEL = ModelFacts(
    parameters=1_000_000,
    stored_bytes=2_000_000,
    max_position_embeddings=None,
    architecture="Qwen2ForCausalLM",
    linears={
        "q_proj": LinearLayers().with_another(100, 50).with_another(100, 50),
        "up_proj": LinearLayers().with_another(300, 100),
    },
)


def test_derived_sizes_show_their_arithmetic():
    recipe = load_recipe(QUICKSTART, ["staleness.max_staleness_versions=2", "run.steps=60"])
    sizes = {size.name: (size.value, size.formula) for size in derived_sizes(recipe, MODEL)}
    assert sizes["rollouts per step"] == ("128", "16 prompts_per_step x 8 rollouts_per_prompt")
    assert sizes["prompts under way, at most"] == (
        "48",
        "(2 max_staleness_versions + 1) x 16 prompts_per_step",
    )
    assert sizes["bytes per version"][0] == "3.8 MiB"
    assert sizes["learner state per rank"] == (
        "15.3 MiB",
        "(16 bytes x 1,000,000 parameters) / 1 ranks",
    )
    assert wire_dtype(recipe) == "float32" and wire_bytes(recipe, MODEL) == 4_000_000


def test_sizes_of_adapters():
    """2 layers of q_proj [100, 50] and one of up_proj [300, 100]; the base is stored in bfloat16."""
    lora = 'learner.lora={ rank = 4, target_modules = ["q_proj"], sync = "adapter" }'
    recipe = load_recipe(QUICKSTART, [lora])
    assert recipe.adapter_rank == 4
    sizes = {size.name: (size.value, size.formula) for size in derived_sizes(recipe, MODEL)}
    assert sizes["bytes per version"] == ("4.7 KiB", "adapter x float32")
    assert sizes["learner state per rank"] == (
        "1.9 MiB",
        "(16 bytes x 1,200 parameters of adapters + a frozen base of 0.00 GB) / 1 ranks",
    )
    nf4 = load_recipe(QUICKSTART, ['learner.lora={ rank = 4, quantise = "nf4" }'])
    assert nf4.adapter_rank == 0 and wire_bytes(nf4, MODEL) == 4_000_000
    want = 16 * 4 * (300 + 400) + 2 * 960_000 + 0.5625 * 40_000
    assert held_state(MODEL, nf4.learner.lora).total_bytes == pytest.approx(want)
    with pytest.raises(UnknownTarget, match=r"v_proj is no linear layer .* which have q_proj, up_proj"):
        derived_sizes(load_recipe(QUICKSTART, ['learner.lora={ target_modules = ["v_proj"] }']), MODEL)


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
