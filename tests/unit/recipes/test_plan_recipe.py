"""GPUs as a recipe names them, and a plan written as a recipe."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.recipes import RecipeError, dump_recipe, load_recipe, recipe_from
from asyncrl.recipes.gpus import GPUS, GPUConfig, UnknownGPU, gpu_spec, parse_fleet
from asyncrl.recipes.model_sizes import shape_of
from asyncrl.recipes.plan import PlanError, make_plan, question_for
from asyncrl.recipes.plan_facts import Efficiency
from asyncrl.recipes.plan_recipe import planned_toml, to_toml

GSM8K = Path(__file__).resolve().parents[3] / "recipes" / "gsm8k.toml"
SMALL = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}


def plan_for(gpus, *overrides, **options):
    recipe = load_recipe(GSM8K, overrides)
    cluster = parse_fleet(gpus) if gpus else recipe.cluster
    question = question_for(recipe, shape_of(SMALL, "small"), cluster, Efficiency(), **options)
    return make_plan(question), cluster


# ---- GPUs --------------------------------------------------------------------------------------------------------------


def test_a_fleet_as_it_is_typed():
    first, second = parse_fleet("H100:8x2, L40S:4")
    assert (first.gpu_type, first.gpus_per_node, first.nodes, first.gpus) == ("H100", 8, 2, 16)
    assert (second.gpu_type, second.gpus_per_node, second.nodes) == ("L40S", 4, 1)


@pytest.mark.parametrize(
    "text", ["H100", "H100:", ":8", "H100:8x", "H100:0", "H100:8x0", "H100:eight", "H100:8,", ""]
)
def test_a_fleet_mistyped(text):
    with pytest.raises(ValueError, match="expected TYPE:GPUS or TYPE:GPUSxNODES"):
        parse_fleet(text)


@pytest.mark.parametrize("name", GPUS)
def test_a_row_is_within_what_such_hardware_does(name):
    """Dense figures: none above the ratio of dense tensor FLOP/s to memory bandwidth of any chip that was built."""
    gpu = GPUS[name]
    assert 30 <= gpu.flops_per_s / gpu.memory_bytes_per_s <= 500
    assert 16e9 <= gpu.memory_bytes <= 200e9
    assert gpu.float32_flops_per_s < gpu.flops_per_s
    assert gpu.cluster_link_bytes_per_s < gpu.node_link_bytes_per_s < gpu.memory_bytes_per_s
    assert gpu.source


PRODUCTS = {
    "H100": "NVIDIA H100 80GB HBM3",
    "H100-PCIE": "NVIDIA H100 PCIe",
    "H200": "NVIDIA H200",
    "B200": "NVIDIA B200",
    "A100-40G": "NVIDIA A100-SXM4-40GB",
    "A100-80G": "NVIDIA A100-SXM4-80GB",
    "L40S": "NVIDIA L40S",
    "L4": "NVIDIA L4",
    "A10G": "NVIDIA A10G",
    "H20": "NVIDIA H20",
    "RTX-4090": "NVIDIA GeForce RTX 4090",
    "RTX-3090": "NVIDIA GeForce RTX 3090",
    "T4": "Tesla T4",
    "V100": "Tesla V100-SXM2-16GB",
    "V100-32G": "Tesla V100-SXM2-32GB",
}


@pytest.mark.parametrize("name", GPUS)
def test_a_pool_asks_for_the_name_that_ray_gives_the_gpu(name):
    """A pool that asks for a type by another name would wait for a machine that never comes."""
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager as Manager

    assert GPUS[name].ray_name == Manager._gpu_name_to_accelerator_type(PRODUCTS[name])


def test_a_recipe_overrides_and_adds_gpus():
    faster = gpu_spec("H100", {"H100": GPUConfig(cluster_link_bytes_per_s=100e9)})
    assert faster.cluster_link_bytes_per_s == 100e9
    assert faster.memory_bytes == GPUS["H100"].memory_bytes
    assert "from [gpus.H100]" in faster.source
    with pytest.raises(
        UnknownGPU, match=r"\[gpus.X1\] lacks flops_per_s, float32_flops_per_s, memory_bytes_per_s"
    ):
        gpu_spec("X1", {"X1": GPUConfig(memory_bytes=1e9)})
    with pytest.raises(UnknownGPU, match="known: H100, H100-PCIE"):
        gpu_spec("X1", {})


def test_a_recipe_says_which_gpus_there_are():
    overrides = (
        "cluster=[{ gpu_type = 'mine', gpus_per_node = 2, nodes = 3 }]",
        "gpus.mine={ flops_per_s = 1e14, float32_flops_per_s = 1e13, memory_bytes = 8e10, memory_bytes_per_s = 1e12, "
        "node_link_bytes_per_s = 1e11, cluster_link_bytes_per_s = 1e10 }",
    )
    recipe = load_recipe(GSM8K, overrides)
    assert recipe.cluster[0].gpus == 6
    assert recipe_from(dump_recipe(recipe), "again") == recipe
    plan, _ = plan_for("", *overrides)
    assert plan.best.learner.gpu_type == "mine"
    with pytest.raises(RecipeError, match=r"cluster\[0\].gpu_type = 'mine': no GPU of that name"):
        load_recipe(GSM8K, overrides[:1])


# ---- what the recipe allows ----------------------------------------------------------------------------------------------


def test_lengths_that_the_recipe_does_not_allow():
    with pytest.raises(
        PlanError,
        match=r"--mean-tokens 2000: expected more than 0 and at most sampling\.max_new_tokens = 1024",
    ):
        plan_for("H100:8", mean_tokens=2000)
    with pytest.raises(PlanError, match="--prompt-tokens 600: expected more than 0 and at most 512"):
        plan_for("H100:8", prompt_tokens=600)
    with pytest.raises(PlanError, match=r"model\.max_context_tokens = 65536: the model was made for 32768"):
        plan_for("H100:8", "model.max_context_tokens=65536", "learner.tokens_per_microbatch=65536")


def test_staleness_stays_within_the_recipes_bound():
    plan, _ = plan_for("H100:8")
    assert plan.best.max_staleness_versions <= 2
    looser, _ = plan_for("H100:8", most_staleness=8)
    assert looser.best.step_s <= plan.best.step_s * 1.05


# ---- written ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_a_recipe_that_loads(tmp_path):
    plan, cluster = plan_for("H100:4,L4:8x2", mean_tokens=400)
    raw = tomllib.loads(GSM8K.read_text())
    file = tmp_path / "planned.toml"
    file.write_text(planned_toml(raw, plan, cluster, "asyncrl plan gsm8k"))
    recipe, before = load_recipe(file), load_recipe(GSM8K)
    assert recipe.learner.ranks == plan.best.learner.ranks
    assert recipe.staleness.max_staleness_versions == plan.best.max_staleness_versions
    assert [(p.gpu_type, p.engines, p.tensor_parallel, p.concurrency) for p in recipe.pools] == [
        (p.ray_name, p.engines, p.tensor_parallel, p.concurrency) for p in plan.best.pools
    ]
    assert list(recipe.cluster) == list(cluster)
    assert (recipe.run, recipe.model, recipe.prompts, recipe.sampling) == (
        before.run,
        before.model,
        before.prompts,
        before.sampling,
    )
    assert recipe.learner.objective == before.learner.objective
    assert f"# Predicted: {plan.best.step_s:.1f} s a step" in file.read_text()
    again = make_plan(
        question_for(recipe, shape_of(SMALL, "small"), recipe.cluster, Efficiency(), mean_tokens=400)
    )
    assert again.best.step_s == pytest.approx(plan.best.step_s, rel=0.05)


def test_engines_in_half_precision_are_not_verified_as_if_in_float32():
    plan, cluster = plan_for("H100:4")
    raw = tomllib.loads(GSM8K.read_text())
    raw["weight_sync"] = {"verify": "always"}
    written = tomllib.loads(planned_toml(raw, plan, cluster, "asyncrl plan gsm8k"))
    assert written["weight_sync"] == {"verify": "always", "verify_tolerance": 0.15}
    raw["weight_sync"]["verify_tolerance"] = 0.5
    written = tomllib.loads(planned_toml(raw, plan, cluster, "asyncrl plan gsm8k"))
    assert written["weight_sync"]["verify_tolerance"] == 0.5


keys = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8)
plain = st.one_of(
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12),
)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(keys, values, max_size=5))
def test_any_tables_come_back_as_they_were(tables):
    assert tomllib.loads(to_toml(tables, {"": ["made"], **{key: ["why"] for key in tables}})) == tables
