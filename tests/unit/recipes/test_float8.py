"""Weights in float8: what a recipe must be for it, how many bytes travel, and which models do not have whole blocks."""

import json
import struct
from pathlib import Path

import pytest

from asyncrl.recipes import RecipeError, load_recipe
from asyncrl.recipes.model_folder import ModelFacts
from asyncrl.recipes.plan_lora import LinearLayers
from asyncrl.recipes.preflight import preflight
from asyncrl.recipes.sizes import wire_bytes, wire_dtype

QUICKSTART = Path(__file__).resolve().parents[3] / "recipes" / "quickstart.toml"
FLOAT8 = [
    'weight_sync.wire_dtype="float8"',
    'pools.0.engine="vllm"',
    'pools.0.device="cuda"',
    'pools.0.dtype="bfloat16"',
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('pools.0.device="cpu"', "needs vLLM engines on CUDA of compute capability"),
        ('pools.0.engine="fake"', "needs vLLM engines on CUDA of compute capability"),
        ('pools.0.dtype="float32"', 'needs pools[0].dtype = "bfloat16"'),
        ('learner.lora={ sync = "adapter" }', "needs whole models"),
        ('weight_sync.senders="all"', 'must be "one" with float8'),
    ],
)
def test_what_float8_needs(change, message):
    load_recipe(QUICKSTART, FLOAT8)
    with pytest.raises(RecipeError) as caught:
        load_recipe(QUICKSTART, [*FLOAT8, change])
    assert f"weight_sync.{'senders' if 'senders' in change else 'wire_dtype'}" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(("wanted", "dtype", "size"), [("auto", "float32", 4), ("bfloat16", "bfloat16", 2)])
def test_the_wire_dtype_is_the_engines_or_the_recipes(wanted, dtype, size):
    recipe = load_recipe(QUICKSTART, [f'weight_sync.wire_dtype="{wanted}"'])
    model = ModelFacts(parameters=1000, stored_bytes=2000, max_position_embeddings=None, architecture="x")
    assert wire_dtype(recipe) == dtype and wire_bytes(recipe, model) == 1000 * size


def test_codes_are_a_byte_and_scales_four_for_a_block():
    linears = {"q_proj": LinearLayers(sides=2 * 1024, parameters=1024 * 1024)}
    model = ModelFacts(
        parameters=1024 * 1024 + 500,
        stored_bytes=0,
        max_position_embeddings=None,
        architecture="x",
        linears=linears,
    )
    assert wire_bytes(load_recipe(QUICKSTART, FLOAT8), model) == 1024 * 1024 + 64 * 4 + 500 * 2


def write_model(folder, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    return folder


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("model.layers.0.mlp.gate_proj.weight", 256, ""),
        ("model.layers.0.mlp.gate_proj.weight", 192, "1 weights are not whole blocks in small, such as"),
        ("model.layers.0.mlp.experts.0.gate_proj.weight", 256, "models with experts"),
    ],
)
def test_a_model_that_has_no_whole_blocks_is_named_before_the_start(tmp_path, name, rows, message):
    model = write_model(tmp_path / "model", {name: (rows, 128)})
    found = preflight(load_recipe(QUICKSTART, [*FLOAT8, f"model.path={model}"])).problems
    told = [str(problem) for problem in found if problem.path == "weight_sync.wire_dtype"]
    assert len(told) == bool(message) and all(message in each for each in told)
