"""Packed rollouts through whole models: as if each ran alone, or the model is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from asyncrl.learner.distributed import init_distributed, leave_distributed
from asyncrl.learner.model import Policy, even_length, load_policy
from asyncrl.learner.rows import assemble, rows_of

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
HALF_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
PACKED: dict[str, tuple[str, dict[str, object]]] = {
    "Qwen2": ("Qwen2", {}),
    "Qwen2 with a window": ("Qwen2", {"use_sliding_window": True, **HALF_SLIDING}),
    "Llama": ("Llama", {}),
    "Qwen3": ("Qwen3", {"head_dim": 16}),
    "Qwen3 with experts": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    "Mistral": ("Mistral", {"sliding_window": 6}),
    "Gemma": ("Gemma", {"head_dim": 16}),
    "Gemma 3": ("Gemma3Text", {"head_dim": 16, **HALF_SLIDING}),
    "DeepSeek V3": (
        "DeepseekV3",
        {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
    ),
    "GPT-2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
}
REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "state space": ("Mamba", {"state_size": 8}, "has an attention of its own"),
    "biased by distance": ("Bloom", {"n_head": 4, "n_layer": 2}, "has an attention of its own"),
    "table of its own": ("Falcon", {}, "falcon: it looks its attention up"),
    "convolution": ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "has layers of type conv"),
    "chunks": (
        "Llama4Text",
        {"head_dim": 16, "num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 96},
        "layers of type chunked_attention",
    ),
    "capped scores": ("Gemma2", {"head_dim": 16, "final_logit_softcapping": None}, "softcap"),
    "sinks": ("GptOss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, "s_aux"),
}


def random_model(kind: str, settings: dict[str, object]) -> PreTrainedModel:
    """Its weights are large enough that what a rollout sees shows in its logprobs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.08)
    return lm


@pytest.fixture(scope="module")
def mesh() -> Iterator[torch.distributed.device_mesh.DeviceMesh]:
    yield init_distributed(0, 1, "", "cpu", 60.0)
    leave_distributed()


def loaded(
    lm: PreTrainedModel, folder: Path, mesh: torch.distributed.device_mesh.DeviceMesh, dtype: str = "float32"
) -> Policy:
    lm.save_pretrained(folder)
    return load_policy(folder, mesh, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PACKED)
def test_packed_logprobs_are_those_of_each_rollout_alone(
    name: str, tmp_path: Path, mesh: torch.distributed.device_mesh.DeviceMesh
) -> None:
    """Alone is transformers' own eager attention, one rollout a pass. Some are longer than the window."""
    lm = random_model(*PACKED[name])
    policy = loaded(lm, tmp_path / "model", mesh)
    random = np.random.default_rng(1)
    pairs = [
        (random.integers(0, VOCABULARY, 3).tolist(), random.integers(0, VOCABULARY, size).tolist())
        for size in (30, 20, 9, 9, 9, 4, 1)
    ]
    got = policy.logprobs_no_grad(assemble(rows_of(pairs), np.arange(len(pairs))), 1.0)
    lm.set_attn_implementation("eager")
    want = []
    for prompt, answer in pairs:
        with torch.no_grad():
            logits = lm(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        want.append(
            logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
        )
    torch.testing.assert_close(got, torch.cat(want), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_keep_rollouts_apart_is_refused(
    name: str, tmp_path: Path, mesh: torch.distributed.device_mesh.DeviceMesh
) -> None:
    kind, settings, why = REFUSED[name]
    with pytest.raises(ValueError, match=why):
        loaded(random_model(kind, settings), tmp_path / "model", mesh)


@pytest.mark.parametrize("kind", ["Jamba", "Rwkv", "Bloom"])
def test_the_probe_finds_what_a_model_does_not_say(
    kind: str, tmp_path: Path, mesh: torch.distributed.device_mesh.DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States along the row, and an attention that sees the whole of it, in models that claim to have neither."""
    settings: dict[str, dict[str, object]] = {
        "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        "Rwkv": {},
        "Bloom": {"n_head": 4, "n_layer": 2},
    }
    lm = random_model(kind, settings[kind])
    monkeypatch.setattr("asyncrl.learner.loading.check_kind", lambda model: None)
    with pytest.raises(ValueError, match="see other ones in the same row"):
        loaded(lm, tmp_path / "model", mesh)


def test_the_probe_lets_16_bits_pass(tmp_path: Path, mesh: torch.distributed.device_mesh.DeviceMesh) -> None:
    for name in ("Qwen2", "Qwen3 with experts", "Gemma 3"):
        loaded(random_model(*PACKED[name]), tmp_path / name, mesh, "bfloat16")


def test_length_at_which_attention_costs_as_much_as_the_rest() -> None:
    """Layers of 64 x (64 + 2 x 32 + 64) attention weights and 3 x 64 x 96 others; head 64 x 40; 4 heads of 16."""
    layer = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 96
    small = 2 * 2 * 64 + 64  # norms
    expected = (2 * layer + 64 * VOCABULARY + small) / (2 * 64)
    for tied in (True, False):
        lm = random_model("Llama", {"tie_word_embeddings": tied})
        assert even_length(lm) == pytest.approx(expected)
    experts = random_model("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})
    assert even_length(experts) == pytest.approx(
        (2 * (64 * (64 + 2 * 32 + 64) + 2 * 3 * 64 * 96 + 4 * 64) + 64 * VOCABULARY + small) / (2 * 64)
    )
