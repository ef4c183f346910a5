"""Models for the weight sync benchmark: the tensors of a Qwen2, by size. Called by `bench_weight_sync`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from asyncrl.weight_sync.plan import Plan, make_plan

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A Qwen2 with tied embeddings."""

    hidden: int
    inner: int
    layers: int
    key_value: int
    """Width of keys, and of values."""
    vocabulary: int


MODELS: Final = {
    "2M": Shape(hidden=256, inner=512, layers=3, key_value=256, vocabulary=16),
    "50M": Shape(hidden=512, inner=1408, layers=12, key_value=128, vocabulary=32_000),
    "500M": Shape(hidden=896, inner=4864, layers=24, key_value=128, vocabulary=151_936),
}
"""The last is Qwen2.5-0.5B: 290 tensors, 988 MB in bfloat16."""


def tensor_shapes(model: Shape) -> dict[str, tuple[int, ...]]:
    """By checkpoint name, in the model's order."""
    hidden, inner, width = model.hidden, model.inner, model.key_value
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocabulary, hidden)}
    for layer in range(model.layers):
        for name, shape in {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (width, hidden),
            "self_attn.k_proj.bias": (width,),
            "self_attn.v_proj.weight": (width, hidden),
            "self_attn.v_proj.bias": (width,),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def random_weights(model: str, dtype: str, device: str = "cpu") -> Weights:
    kind: torch.dtype = getattr(torch, dtype)
    return {
        name: torch.randn(shape, device=device).to(kind)
        for name, shape in tensor_shapes(MODELS[model]).items()
    }


def plan_of(weights: Weights, dtype: str, bucket_bytes: int) -> Plan:
    """`dtype`: of the wire."""
    return make_plan([(name, dtype, tensor.shape) for name, tensor in weights.items()], bucket_bytes)


def blank(plan: Plan, device: str = "cpu") -> Weights:
    """Room for a version, every page of it touched."""
    return {
        spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
        for spec in plan.tensors
    }
