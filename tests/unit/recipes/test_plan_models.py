"""The planner's sizes against real models: published parameter counts, files on disk, tensors after a real step."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from asyncrl.learner import logprobs
from asyncrl.learner.distributed import init_distributed, leave_distributed
from asyncrl.learner.lora_config import LoraConfig
from asyncrl.learner.model import load_policy, trained_parameters
from asyncrl.learner.optimizer import adamw
from asyncrl.learner.rows import assemble, rows_of
from asyncrl.learner.sharding import decoder_layers, wrap_forward
from asyncrl.learner.sharding_config import ShardingConfig
from asyncrl.learner.tiny_model import character_tokenizer, new_model
from asyncrl.recipes.model_sizes import ModelConfigError, read_shape, shape_of
from asyncrl.recipes.plan_facts import PlanError
from asyncrl.recipes.plan_lora import TRAINED_BYTES, adapter_parameters
from asyncrl.recipes.plan_memory import CHUNK_BYTES, learner_memory
from asyncrl.recipes.plan_model import DTYPE_BYTES

QWEN = {"model_type": "qwen2", "vocab_size": 151936}
LLAMA = {"model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": False}


def sizes(hidden, intermediate, layers, heads, kv_heads, **more):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


MIXED = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
# The models' own config.json, and the bytes that their published safetensors hold at two bytes a parameter (the index
# files' total_size; of the two smallest the count that the hub shows). KV bytes per token in bfloat16.
PUBLISHED = {
    "Qwen2.5-0.5B": (QWEN | sizes(896, 4864, 24, 14, 2, tie_word_embeddings=True), 2 * 494_032_768, 12_288),
    "Qwen2.5-1.5B": (
        QWEN | sizes(1536, 8960, 28, 12, 2, tie_word_embeddings=True),
        2 * 1_543_714_304,
        28_672,
    ),
    "Qwen2.5-7B": (
        QWEN | sizes(3584, 18944, 28, 28, 4, tie_word_embeddings=False, vocab_size=152064),
        15_231_233_024,
        57_344,
    ),
    "Qwen2.5-32B": (
        QWEN | sizes(5120, 27648, 64, 40, 8, tie_word_embeddings=False, vocab_size=152064),
        65_527_752_704,
        262_144,
    ),
    "Llama-3.1-8B": (LLAMA | sizes(4096, 14336, 32, 32, 8), 16_060_522_496, 131_072),
    "Llama-3.1-70B": (LLAMA | sizes(8192, 28672, 80, 64, 8), 141_107_412_992, 327_680),
    "Qwen3-30B-A3B": (MIXED | sizes(2048, 6144, 48, 32, 4), 61_064_245_248, 98_304),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_that_were_published(name):
    config, stored_bytes, kv_bytes = PUBLISHED[name]
    shape = shape_of(config, name)
    assert shape.weight_bytes("bfloat16") == stored_bytes
    assert shape.kv_bytes_per_token("bfloat16") == kv_bytes
    assert shape.kv_bytes_per_token_and_gpu("bfloat16", 2) == kv_bytes // 2
    assert shape.parameters == shape.root_parameters + shape.layer_parameters
    assert shape.tied == config["tie_word_embeddings"]


def test_active_parameters_of_a_mixture():
    shape = shape_of(PUBLISHED["Qwen3-30B-A3B"][0], "A3B")
    assert shape.active_parameters == 3_353_032_704  # the model card says 3.3 G
    assert shape.read_parameters(1) == pytest.approx(shape.active_parameters - shape.embedding_parameters)
    assert shape.read_parameters(10_000) == pytest.approx(shape.parameters - shape.embedding_parameters)


def test_a_kv_head_is_copied_where_there_are_fewer_than_gpus():
    shape = shape_of(PUBLISHED["Qwen2.5-0.5B"][0], "small")
    one = shape.kv_bytes_per_token_and_gpu("bfloat16", 2)
    assert shape.kv_bytes_per_token_and_gpu("bfloat16", 4) == one == shape.kv_bytes_per_token("bfloat16") // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(folder)
    new_model(tokenizer, hidden_size=64, layers=2, heads=2, max_tokens=128, seed=3).save_pretrained(folder)
    return folder


def test_weight_bytes_are_those_of_the_file(folder):
    shape, state = read_shape(folder), load_file(folder / "model.safetensors")
    assert shape.tied
    assert shape.weight_bytes("float32") == sum(t.numel() * t.element_size() for t in state.values())
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little") + 8
    assert shape.weight_bytes("float32") == (folder / "model.safetensors").stat().st_size - header
    assert read_shape(folder / "config.json").parameters == shape.parameters


@pytest.mark.parametrize(
    "lora",
    [
        None,
        LoraConfig(rank=4),
        LoraConfig(rank=4, target_modules=["v_proj"]),
        LoraConfig(rank=4, quantise="nf4"),
    ],
)
def test_the_learners_state_is_that_of_a_real_step(folder, lora):
    """Masters, gradients and moments of the FSDP2 policy with AdamW, as the learner makes them, and a frozen base."""
    mesh = init_distributed(0, 1, "", "cpu", 60.0)
    try:
        policy = load_policy(folder, mesh, "bfloat16", lora)
        trained = trained_parameters(policy).values()
        optimizer = adamw(trained, (0.9, 0.95), 0.0)
        part = assemble(rows_of([([0, 1], [2, 3, 4]), ([5], [6, 7])]), np.arange(2))
        policy(part, 1.0).sum().backward()
        optimizer.step()
        held = [*policy.parameters(), *(p.grad for p in trained)]
        held += [v for state in optimizer.state.values() for v in state.values() if v.ndim]
        measured = sum(t.numel() * t.element_size() for t in held)
    finally:
        leave_distributed()
    shape = read_shape(folder)
    assert learner_memory(shape, "bfloat16", 1, 16, 0.0, lora).state_bytes == measured
    assert CHUNK_BYTES == logprobs.CHUNK_BYTES
    if lora is None:
        assert measured == TRAINED_BYTES * shape.parameters
    else:
        assert adapter_parameters(shape, lora) == sum(p.numel() for p in trained)


def test_adapters_take_a_fraction_of_the_memory():
    """Qwen2.5-7B in bfloat16: the sums written out."""
    shape = shape_of(
        {**QWEN, **sizes(3584, 18944, 28, 28, 4), "tie_word_embeddings": False, "dtype": "bfloat16"}, "7B"
    )
    sides = 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert adapter_parameters(shape, LoraConfig(rank=16)) == 16 * sides
    full, lora, qlora = (
        learner_memory(shape, "bfloat16", 1, 1024, 0.0, each)
        for each in (None, LoraConfig(rank=16), LoraConfig(rank=16, quantise="nf4"))
    )
    assert full.state_bytes == pytest.approx(121.9e9, rel=0.01)
    assert lora.state_bytes == pytest.approx(2 * shape.parameters + 16 * 16 * sides)
    assert (
        qlora.state_bytes < 0.42 * lora.state_bytes
        and qlora.total_bytes < lora.total_bytes < full.total_bytes
    )
    with pytest.raises(PlanError, match=r"qproj is no linear layer .* which have down_proj, gate_proj"):
        learner_memory(shape, "bfloat16", 1, 1024, 0.0, LoraConfig(target_modules=["qproj"]))


def saved_bytes(model, rows, length):
    """What autograd keeps of the decoder's forward pass, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, found = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept.append(tensor)  # alive, so that no address comes twice
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, model.config.vocab_size, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_decoder()(input_ids=ids, attention_mask=None, use_cache=False)
    return sum(found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_activations_are_those_that_autograd_keeps(kind, dtype):
    config = sizes(128, 320, 6, 4, 2) | {
        "model_type": kind,
        "vocab_size": 50,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "max_position_embeddings": 256,
    }
    shape = shape_of(config, kind)
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa")
    measured = saved_bytes(built.to(getattr(torch, dtype)).eval(), 2, 200) / 400
    assert shape.saved_bytes_per_token(dtype) == pytest.approx(measured, rel=0.03)


class Tracker(TorchDispatchMode):
    """Storages that operations made."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(out):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def living_bytes(self):
        return sum(nbytes for ref, nbytes in self.made.values() if not ref.expired())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_computed_again_is_not_kept(dtype):
    """After the forward pass only what enters each layer is left; backward then needs one layer's own at a time."""
    config = sizes(128, 320, 6, 4, 2) | {"model_type": "qwen3", "vocab_size": 50, "head_dim": 32}
    shape = shape_of(config, "qwen3")
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa")
    built = built.to(getattr(torch, dtype)).eval()
    for layer in decoder_layers(built):
        wrap_forward(layer, ShardingConfig(activation_checkpointing="full"))
    with Tracker() as tracker:
        out = built.get_decoder()(
            input_ids=torch.randint(0, 50, (2, 200)), attention_mask=None, use_cache=False
        )
    own = {p.untyped_storage()._cdata for p in built.parameters()}
    tracker.made = {key: each for key, each in tracker.made.items() if key not in own}
    left = tracker.living_bytes() / 400
    recomputed = shape.saved_bytes_per_token(dtype, recomputed=True)
    plain = shape.saved_bytes_per_token(dtype)
    one_layer = (plain - recomputed + 6 * 128 * DTYPE_BYTES[dtype]) / 5
    assert recomputed - one_layer == pytest.approx(left, rel=0.03)
    assert recomputed < plain / 2
    out.last_hidden_state.sum().backward()  # and it is enough


def test_what_cannot_be_planned_for_is_told(tmp_path):
    with pytest.raises(ModelConfigError, match="no model_type"):
        shape_of({"hidden_size": 8}, "here")
    with pytest.raises(ModelConfigError, match="cannot build model_type 'nothing'"):
        shape_of({"model_type": "nothing"}, "here")
    with pytest.raises(ModelConfigError, match=r"config\.json cannot be read"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelConfigError, match="is not JSON"):
        read_shape(tmp_path)
    latent = {
        "model_type": "deepseek_v3",
        **sizes(64, 64, 2, 4, 4),
        "vocab_size": 100,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    }
    with pytest.raises(ModelConfigError, match="multi-head latent attention"):
        shape_of(latent, "here")


def test_a_saved_config_reads_like_the_model(tmp_path):
    config = Qwen3Config(**sizes(64, 96, 2, 4, 2), head_dim=32, vocab_size=50, tie_word_embeddings=False)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.query_key_norm and shape.head_size == 32
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"
