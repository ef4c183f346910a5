"""Loading by parts against from_pretrained, bit for bit; and every way in which files and model may not belong together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from asyncrl.learner.loading import Blueprint, build, fill

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
KINDS: dict[str, dict[str, Any]] = {
    "tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "rotary constants of long context": {"model_type": "llama", "rope_parameters": ROPE},
    "norms of queries and keys": {"model_type": "qwen3", "head_dim": 16},
    "experts": {"model_type": "qwen3_moe", "head_dim": 16, **EXPERTS},
    "experts under other names": {"model_type": "mixtral", "num_local_experts": 4},
}

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def write(kind: str, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
        torch.manual_seed(1)
        config = AutoConfig.for_model(**SIZES, **KINDS[kind])
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(tmp_path, **how)
        return tmp_path

    return write


def loaded(folder: Path, **how: Any) -> PreTrainedModel:
    blueprint = build(folder, "sdpa", **how)
    fill(blueprint, torch.device("cpu"))
    return blueprint.model


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_from_pretrained_loads(make: Make, kind: str, dtype: torch.dtype) -> None:
    folder = make(kind, dtype, max_shard_size="20KB" if dtype == torch.bfloat16 else "1GB")
    assert (folder / "model.safetensors.index.json").is_file() == (dtype == torch.bfloat16)
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = loaded(folder)
    for name, tensors in (("state", "state_dict"), ("buffers", "named_buffers")):
        ours, theirs = dict(getattr(found, tensors)()), dict(getattr(want, tensors)())
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), (name, key)
    assert len(list(found.parameters())) == len(list(want.parameters()))  # tied ones are one
    ids = torch.arange(20)[None]
    assert torch.equal(found(ids).logits, want(ids).logits)
    assert found.generation_config == want.generation_config


def test_nothing_is_read_before_it_is_asked_for(make: Make) -> None:
    model = build(make("tied"), "sdpa").model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    torch.nn.Linear(2, 2).weight.sum().item()  # modules made later are real


def test_saving_writes_the_names_that_were_read(make: Make, tmp_path: Path) -> None:
    folder = make("experts")
    loaded(folder).save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_type_may_be_asked_for(make: Make) -> None:
    found = loaded(make("tied"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}


def test_a_part_of_the_model_with_something_new(make: Make) -> None:
    """As a critic is made: the decoder alone, and a parameter that is in no file."""
    folder = make("untied")
    with pytest.raises(ValueError, match=r"lm_head\.weight beside"):
        build(folder, "sdpa", make=AutoModel)
    blueprint = build(folder, "sdpa", make=AutoModel, spare=("lm_head.weight",))
    blueprint.model.register_parameter("extra", torch.nn.Parameter(torch.empty(3, device="meta")))
    with pytest.raises(ValueError, match="has no extra"):
        fill(blueprint, torch.device("cpu"))
    fill(blueprint, torch.device("cpu"), fresh={"extra": torch.arange(3.0)})
    assert blueprint.model.get_parameter("extra").tolist() == [0, 1, 2]
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_decoder()
    ids = torch.arange(20)[None]
    assert torch.equal(
        blueprint.model(ids).last_hidden_state, want.eval()(ids, use_cache=False).last_hidden_state
    )


def test_what_was_renamed_since_is_found(make: Make) -> None:
    blueprint: Blueprint = build(make("untied"), "sdpa")
    layer = blueprint.model.get_decoder().layers[0]
    layer.mlp.up_proj = torch.nn.Sequential(layer.mlp.up_proj)
    fill(blueprint, torch.device("cpu"), original=lambda name: name.replace("up_proj.0.", "up_proj."))
    want = load_file(blueprint.folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(layer.mlp.up_proj[0].weight, want)


def test_old_files_hold_constants_that_nobody_needs(make: Make) -> None:
    folder = make("tied")
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert loaded(folder) is not None


def test_a_tied_weight_may_stand_under_either_name_or_both(make: Make) -> None:
    folder = make("tied")
    want = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(loaded(folder).lm_head.weight, want)
    edit(folder, lambda t: t.pop("model.embed_tokens.weight"))
    found = loaded(folder)
    assert (
        torch.equal(found.lm_head.weight, want)
        and found.get_input_embeddings().weight is found.lm_head.weight
    )


def broken(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        build(folder, "sdpa")


def test_names_that_do_not_belong_together_are_told(make: Make) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    broken(make("tied"), lambda t: t.pop(norm), rf"it lacks {norm} and has nothing beside")
    broken(make("tied"), lambda t: t.update(odd=torch.ones(1)), "lacks nothing and has odd beside")
    broken(make("tied"), lambda t: t.update({norm: torch.ones(3)}), r"has shape \(3,\), config.json makes")


def test_weights_that_are_tied_and_differ_are_refused(make: Make) -> None:
    """from_pretrained would untie them, and the engines would not."""

    def other_head(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1, -1] += 1
        tensors["lm_head.weight"] = head

    broken(make("tied"), other_head, "set tie_word_embeddings = false")


def test_an_expert_that_is_not_there_is_told(make: Make) -> None:
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    broken(
        make("experts"), lambda t: t.pop(name), r"has 4 of mlp.experts.\*.up_proj.weight .* makes 5 experts"
    )


def test_folders_that_cannot_be_read_say_why(make: Make, tmp_path: Path) -> None:
    folder = make("tied", max_shard_size="20KB")
    (gone, *_) = sorted(folder.glob("model-*"))
    content = gone.read_bytes()
    gone.unlink()
    with pytest.raises(ValueError, match=rf"names {gone.name}, which is not there"):
        build(folder, "sdpa")
    gone.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot be read .* copy the folder again"):
        build(folder, "sdpa")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="convert the weights with save_pretrained"):
        build(folder, "sdpa")


def test_quantised_weights_are_refused(make: Make) -> None:
    folder = make("tied")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its weights are quantised"):
        build(folder, "sdpa")
