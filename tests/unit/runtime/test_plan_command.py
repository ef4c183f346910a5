"""`asyncrl plan` as it is typed: table, JSON, written recipe, exit codes."""

import json
import tomllib
from pathlib import Path

import pytest

from asyncrl.recipes import load_recipe
from asyncrl.runtime.cli import main
from tests.tiny import write_model

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}


@pytest.fixture
def config(tmp_path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG))
    return file


def test_the_table_shows_the_split_and_why_others_fell(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", "gsm8k", "--model-config", str(config), "--gpus", "H100:8x2,L40S:4"]) == 0
    out = capsys.readouterr().out
    assert "7.62 G parameters, 57,344 bytes of KV cache a token" in out
    for words in (
        "pool h100-0",
        "learner",
        "asynchronous",
        "synchronous",
        "what does not fit",
        "engine on 8 x H100",
    ):
        assert words in out
    assert "8 GPUs cannot share 28 attention heads and 4 KV heads" in out


def test_json_holds_the_same_plan(config, capsys):
    arguments = ["plan", "gsm8k", "--model-config", str(config), "--gpus", "H100:8x2", "--mean-tokens", "500"]
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 7_615_616_512
    assert plan["mean_tokens"] == 500
    assert plan["best"]["step_s"] == max(plan["best"]["generate_s"], plan["best"]["train_s"])
    assert main([*arguments, "--json", "--assume", "train_compute=0.8", "--assume", "compute=0.8"]) == 0
    faster = json.loads(capsys.readouterr().out)
    assert faster["assumptions"]["train_compute"] == 0.8
    assert faster["best"]["step_s"] < plan["best"]["step_s"]


def test_what_is_written_is_a_recipe_and_nothing_is_overwritten(config, tmp_path, capsys):
    file = tmp_path / "planned.toml"
    arguments = [
        "plan",
        "gsm8k",
        "--model-config",
        str(config),
        "--gpus",
        "L4:8",
        "--write",
        str(file),
        "--json",
    ]
    arguments += [
        "--set",
        "run.name=seven",
        "--set",
        "sampling.max_new_tokens=512",
        "--set",
        "model.max_context_tokens=1024",
    ]
    assert main(arguments) == 2  # too small for the learner
    assert not file.exists()
    arguments[arguments.index("L4:8")] = "H200:8"
    assert main(arguments) == 0
    plan, recipe = json.loads(capsys.readouterr().out), load_recipe(file)
    assert recipe.run.name == "seven"
    assert recipe.pools[0].concurrency == plan["best"]["pools"][0]["concurrency"]
    assert tomllib.loads(file.read_text())["cluster"] == [
        {"gpu_type": "H200", "gpus_per_node": 8, "nodes": 1}
    ]
    before = file.read_text()
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "which GPUs are there? Add [[cluster]] entries to the recipe, or pass --gpus H100:8x2,L40S:4"),
        (["--gpus", "H100:8x"], "--gpus 'H100:8x': expected TYPE:GPUS"),
        (["--gpus", "H900:8"], "no GPU of that name; known: H100"),
        (["--gpus", "T4:8"], "nothing fits"),
        (["--gpus", "H100:8", "--assume", "link=2"], "--assume: Expected `float` <= 1.0"),
        (["--gpus", "H100:8", "--assume", "nothing=2"], "known: decode_bandwidth"),
        (["--gpus", "H100:8", "--mean-tokens", "9999"], "--mean-tokens 9999"),
        (["--gpus", "H100:8", "--set", "run.stepz=1"], "unknown key; did you mean 'steps'?"),
    ],
)
def test_what_is_wrong_and_the_way_out(config, capsys, more, words):
    assert main(["plan", "gsm8k", "--model-config", str(config), *more]) == 2
    assert words in capsys.readouterr().err


def test_the_recipes_own_model_and_cluster(tmp_path, capsys):
    folder = write_model(tmp_path / "model", tied=True)
    arguments = [
        "plan",
        "gsm8k",
        "--json",
        "--set",
        f"model.path={folder}",
        "--set",
        "model.max_context_tokens=1024",
    ]
    arguments += ["--set", "sampling.max_new_tokens=512"]
    arguments += ["--set", "cluster=[{ gpu_type = 'T4', gpus_per_node = 2 }]"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["best"]["learner"]["dtype"] == "float32" and plan["best"]["pools"][0]["dtype"] == "float16"


def test_a_model_that_is_not_there(capsys):
    assert main(["plan", "gsm8k", "--gpus", "H100:8", "--set", "model.path=nowhere/model"]) == 2
    assert "give a model folder as model.path, or --model-config FILE" in capsys.readouterr().err
