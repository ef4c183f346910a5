"""What is known to fail is told before anything starts: fast, all at once, without torch."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncrl.learner.tiny_model import character_tokenizer, new_model
from asyncrl.recipes import load_recipe
from asyncrl.recipes.learner_checks import part_bytes
from asyncrl.recipes.model_folder import ModelFolderError, inspect_model
from asyncrl.recipes.model_sizes import read_shape
from asyncrl.recipes.preflight import preflight
from asyncrl.recipes.reward_checks import reward_model_bytes

ROOT = Path(__file__).resolve().parents[3]


def write_model(folder, shape=(16, 8), limit=512):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": limit})
    )
    (folder / "tokenizer.json").write_text("{}")
    size = 2 * shape[0] * shape[1]
    header = json.dumps({"w": {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, size]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    return folder


def found(tmp_path, *overrides):
    model = write_model(tmp_path / "model")
    recipe = load_recipe(ROOT / "recipes" / "quickstart.toml", [f"model.path={model}", *overrides])
    return [str(problem) for problem in preflight(recipe).problems]


def test_a_sound_recipe_has_no_problem_and_knows_the_model(tmp_path):
    assert found(tmp_path) == []
    facts = inspect_model(tmp_path / "model")
    assert (facts.parameters, facts.stored_bytes) == (128, 256)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pools.0.cores=9999"], "9999 (small) + 1 x 1 (learner) cores are asked for, this machine has"),
        (["model.max_context_tokens=1024"], "the model was made for 512 at most"),
        (["pools.0.kv_cache_bytes=1000000000000000"], "lower kv_cache_bytes or engines"),
        (["prompts.source=nowhere.jsonl"], "prompts.source = 'nowhere.jsonl'"),
        (["prompts.task={ max_terms = 1 }"], "prompts.source = 'sums:train'"),
        (["prompts.prompt_field=text"], "prompts.source = 'sums:train'"),
        (['rewards.terms=[{ function = "sum" }]'], "rewards.terms[0].function = 'sum'"),
        (["run.control_host=203.0.113.7"], "run.control_host = '203.0.113.7': no port can be opened there"),
    ],
)
def test_each_lack_is_named(tmp_path, overrides, words):
    assert any(words in problem for problem in found(tmp_path, *overrides))


PPO = ['learner.objective={ type = "ppo" }']
GRPO_KL = [
    'learner.objective={ type = "grpo", kl = { estimator = "k3", coefficient = 0.1, place = "loss" } }'
]


@pytest.mark.parametrize(("key", "objective"), [("critic", PPO), ("reference", GRPO_KL)])
def test_the_learner_s_other_models_are_looked_at_too(tmp_path, key, objective):
    there = write_model(tmp_path / "other")
    short = write_model(tmp_path / "short", limit=64)
    assert found(tmp_path, *objective, f'learner.{key}={{ path = "{there}" }}') == []
    (problem,) = found(tmp_path, *objective, f'learner.{key}={{ path = "{tmp_path / "nowhere"}" }}')
    assert f"learner.{key}.path" in problem and "is no model folder" in problem
    (problem,) = found(tmp_path, *objective, f'learner.{key}={{ path = "{short}" }}')
    assert "was made for 64 tokens at most" in problem


def test_memory_of_critic_and_reference_is_counted(tmp_path):
    model = inspect_model(write_model(tmp_path / "model"))
    larger = write_model(tmp_path / "larger", shape=(32, 8))

    def bytes_of(*overrides):
        recipe = load_recipe(ROOT / "recipes" / "quickstart.toml", list(overrides))
        return part_bytes(recipe, model)

    assert bytes_of() == 0
    assert bytes_of(*PPO) == 16 * 128
    assert bytes_of(*PPO, f'learner.critic={{ path = "{larger}" }}') == 16 * 256
    assert bytes_of(*GRPO_KL) == 4 * 128
    assert bytes_of(*GRPO_KL, "learner.dtype=bfloat16") == 2 * 128
    assert bytes_of(*GRPO_KL, "learner.lora={ rank = 4 }") == 0
    assert (
        bytes_of(*GRPO_KL, "learner.lora={ rank = 4 }", f'learner.reference={{ path = "{larger}" }}')
        == 4 * 256
    )


def write_judge(folder, architecture="Qwen2ForSequenceClassification", template=True, **config):
    write_model(folder)
    config = {"architectures": [architecture], "max_position_embeddings": 128} | config
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ messages }}"} if template else {})
    )
    return folder


ONE_LABEL = {"id2label": {"0": "LABEL_0"}}


@pytest.mark.parametrize(
    ("config", "serving", "words"),
    [
        (ONE_LABEL, "", ""),
        ({"num_labels": 1}, "", ""),
        ({}, "", "has 2 labels, and a reward is one number"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "", "has 3 labels"),
        (
            ONE_LABEL | {"architecture": "Qwen2ForCausalLM"},
            "",
            "is a Qwen2ForCausalLM, and a reward model is",
        ),
        (ONE_LABEL | {"template": False}, "", "has no chat template, and serving.chat_template is true"),
        (ONE_LABEL | {"template": False}, ", chat_template = false", ""),
    ],
)
def test_the_folder_of_a_reward_model_is_looked_into(tmp_path, config, serving, words):
    judge = write_judge(tmp_path / "judge", **config)
    term = f'rewards.terms=[{{ model = "{judge}", serving = {{ device = "cpu"{serving} }} }}]'
    problems = found(tmp_path, term)
    assert len(problems) == bool(words) and words in "".join(problems)
    assert not problems or problems[0].startswith(f"rewards.terms[0].model = '{judge}'")


def test_a_reward_model_that_reads_less_than_is_written_is_noted(tmp_path):
    judge = write_judge(tmp_path / "judge", **ONE_LABEL)
    model = write_model(tmp_path / "model")
    term = f'rewards.terms=[{{ model = "{judge}", serving = {{ device = "cpu" }} }}]'
    result = preflight(load_recipe(ROOT / "recipes" / "quickstart.toml", [f"model.path={model}", term]))
    assert any("rewards.terms[0].model was made for 128 tokens" in note for note in result.notes)


def test_each_engine_s_copy_of_a_reward_model_needs_room(tmp_path):
    judge = write_judge(tmp_path / "judge", **ONE_LABEL)
    term = f'rewards.terms=[{{ model = "{judge}", serving = {{ device = "cpu", dtype = "float32" }} }}]'
    overrides = [f"model.path={write_model(tmp_path / 'model')}", term, "pools.0.engines=3"]
    assert reward_model_bytes(load_recipe(ROOT / "recipes" / "quickstart.toml", overrides)) == 3 * 4 * 128
    gone = found(tmp_path, f'rewards.terms=[{{ model = "{tmp_path}/none", serving = {{ device = "cpu" }} }}]')
    assert len(gone) == 1 and "is no model folder" in gone[0]


def test_a_run_needs_room_for_the_engines_that_it_begins_with(tmp_path):
    few = ("pools.0.engines=9999", "pools.0.min_engines=1", "pools.0.kv_cache_bytes=1048576")
    assert found(tmp_path, *few) == []
    assert any("9999 x 1 (small)" in problem for problem in found(tmp_path, *few, "pools.0.min_engines=0"))


def test_an_environment_is_loaded_with_the_model_s_tokenizer(tmp_path):
    model = write_model(tmp_path / "model")
    character_tokenizer("0123456789+=;").save_pretrained(model)
    recipe = ROOT / "recipes" / "quickstart.toml"
    for wrong, words in (
        ('environment={ stop_tokens = [";", "1+"] }', "stop token '1+' is 2 tokens"),
        ('environment={ function = "calculator" }', "sft.alphabet"),
        ("environment={ settings = { a = 1 } }", "'single_turn' has no settings"),
        ('environment={ stop_tokens = [";"] }', ""),
        ('environment={ function = "single_turn" }', ""),
    ):
        problems = preflight(load_recipe(recipe, [f"model.path={model}", wrong])).problems
        assert [p.path for p in problems] == (["environment"] if words else []) and words in "".join(
            map(str, problems)
        )


def test_of_a_model_that_is_made_first_the_environment_s_name_is_checked(tmp_path):
    missing = [f"model.path={tmp_path / 'none'}"]
    recipe = ROOT / "recipes" / "calculator.toml"
    assert preflight(load_recipe(recipe, missing)).problems == []
    wrong = load_recipe(recipe, [*missing, 'environment.function="calculater"'])
    assert "expected single_turn, calculator" in str(preflight(wrong).problems)


def test_all_lacks_are_named_at_once(tmp_path):
    assert (
        len(
            found(
                tmp_path,
                "pools.0.cores=9999",
                "prompts.source=nowhere.jsonl",
                "model.max_context_tokens=1024",
            )
        )
        == 3
    )


def test_a_missing_model_is_made_where_the_recipe_can(tmp_path):
    recipe = load_recipe(ROOT / "recipes" / "quickstart.toml", [f"model.path={tmp_path}/none"])
    result = preflight(recipe)
    assert result.problems == [] and "[sft] makes it first" in result.notes[0]


def test_a_missing_model_without_a_way_to_make_it():
    recipe = load_recipe(ROOT / "recipes" / "gsm8k.toml", ["model.path=Qwen/Qwen2.5-0.5B-Instruct"])
    text = [str(p) for p in preflight(recipe).problems if p.path == "model.path"]
    assert "hf download" in text[0]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_model_folder(tmp_path, missing):
    folder = write_model(tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(ModelFolderError):
        inspect_model(folder)


def test_a_torn_safetensors_file(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelFolderError, match="cut short"):
        inspect_model(folder)


def asyncrl(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-P", "-m", "asyncrl.runtime.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
    )


@pytest.mark.alone
def test_check_is_quick_and_says_the_sizes(tmp_path):
    model = write_model(tmp_path / "model")
    began = time.monotonic()
    done = asyncrl("check", "recipes/quickstart.toml", "--set", f"model.path={model}")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 10  # under 5 s on a machine that does nothing else
    assert "rollouts per step" in done.stdout


def test_gsm8k_passes_the_check_given_a_model_and_gpus_elsewhere(tmp_path):
    """Everything but the GPUs of this machine: the recipe joins a cluster."""
    model = write_model(tmp_path / "model", limit=32768)
    done = asyncrl(
        "check", "recipes/gsm8k.toml", "--set", f"model.path={model}", "--set", "run.ray_address=auto",
        "--set", "pools.0.engine=fake",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_bad_recipe_ends_with_exit_code_2_before_anything_starts(tmp_path):
    for command in ("check", "launch"):
        done = asyncrl(command, "recipes/quickstart.toml", "--set", "run.steps=0", "--set", "pools.0.cores=x")
        assert done.returncode == 2
        assert "2 problems" in done.stderr and "run.steps = 0" in done.stderr


def test_layers_for_adapters_are_looked_up_in_the_folder(tmp_path):
    assert found(tmp_path, 'learner.lora={ target_modules = ["q_proj"] }') == [
        "learner.lora.target_modules = ['q_proj']: q_proj is no linear layer of the model's decoder layers, which have : name some "
        'of these, or "all-linear"'
    ]
    model = tiny_folder(tmp_path / "real")
    linears = inspect_model(model).linears
    assert {name: (layer.sides, layer.parameters) for name, layer in linears.items()} == {
        name: (layer.sides, layer.parameters) for name, layer in read_shape(model).linears.items()
    }
    assert sorted(linears) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def tiny_folder(folder):
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(folder)
    new_model(tokenizer, hidden_size=64, layers=2, heads=2, max_tokens=128, seed=3).save_pretrained(folder)
    return folder
