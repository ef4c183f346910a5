"""A model of a wanted size for `gpu_check`'s engines: Qwen2's shapes, random bf16 weights on the GPU, no checkpoint on disk.

Imports torch and transformers alone.
"""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 32_000
HIDDEN = 1024
INTERMEDIATE = 2816


def config_of(mb: int) -> Qwen2Config:
    """About `mb` x 10^6 bytes in bfloat16, of at least one layer; tied, so that the output head is no tensor of its own."""
    layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 8 + 3 * HIDDEN * INTERMEDIATE
    layers = max(1, round((mb * 10**6 / 2 - VOCABULARY * HIDDEN) / layer))
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        dtype="bfloat16",
    )


def random_weights(config: Qwen2Config, device: torch.device) -> dict[str, torch.Tensor]:
    """Under checkpoint names, in model order."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Qwen2ForCausalLM(config).named_parameters()}
    return {
        name: 0.02 * torch.randn(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes.items()
    }
