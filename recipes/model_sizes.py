"""From a config.json to a `ModelShape`: transformers builds the modules without memory (torch's meta device) and every
parameter is counted, so biases, norms, tied heads and experts are exact. No weights are read.

Called by `asyncrl plan`. Reads one file; imports torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from asyncrl.recipes.plan_lora import LinearLayers
from asyncrl.recipes.plan_model import ModelShape


class ModelConfigError(ValueError):
    """The file is no config.json of a model that can be planned for; the message says why and what to do."""


def read_shape(path: Path) -> ModelShape:
    """`path`: a model folder, or a config.json by itself. Raises ModelConfigError."""
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ModelConfigError(
            f"{file} cannot be read ({error}): give a model folder as model.path, or --model-config FILE"
        ) from error
    except json.JSONDecodeError as error:
        raise ModelConfigError(f"{file} is not JSON: {error}") from error
    return shape_of(values, str(path))


def shape_of(values: dict[str, Any], name: str) -> ModelShape:
    """`values`: what stands in a config.json. Raises ModelConfigError."""
    kind = values.get("model_type")
    if not kind:
        raise ModelConfigError(f"{name}: config.json has no model_type, so the architecture is not known")
    try:
        config = AutoConfig.for_model(**values)
        text = config.get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelConfigError(f"{name}: transformers cannot build model_type {kind!r}: {error}") from error
    _refuse(text, name)
    return _shape(model, text, name)


def _refuse(config: Any, name: str) -> None:
    """Architectures whose cache or cost the formulas do not describe."""
    if getattr(config, "kv_lora_rank", None):
        raise ModelConfigError(
            f"{name}: multi-head latent attention is not planned for; its KV cache has another size"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ModelConfigError(
            f"{name}: layers of kind {sorted(kinds)}; only attention layers are planned for"
        )


def _shape(model: PreTrainedModel, config: Any, name: str) -> ModelShape:
    parameters = {n: p.numel() for n, p in model.named_parameters()}
    head, embedding = _weight(model.get_output_embeddings()), _weight(model.get_input_embeddings())
    experts = int(getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0) or 0)
    used = int(getattr(config, "num_experts_per_tok", 0) or 0) if experts else 0
    heads = int(config.num_attention_heads)
    wide = int(getattr(config, "moe_intermediate_size", 0) or config.intermediate_size) * used
    by_layer = [sum(p.numel() for p in layer.parameters()) for layer in _layers(model, config)]
    return ModelShape(
        name=name,
        parameters=sum(parameters.values()),
        expert_parameters=sum(n for k, n in parameters.items() if ".experts." in k) if experts else 0,
        embedding_parameters=embedding.numel(),
        head_parameters=head.numel(),
        tied=head is embedding,
        layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_size=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocabulary=int(config.vocab_size),
        intermediate_size=wide or int(config.intermediate_size),
        experts=experts,
        experts_per_token=used,
        query_key_norm=any(k.endswith("q_norm.weight") for k in parameters),
        largest_layer_parameters=max(by_layer),
        max_context_tokens=getattr(config, "max_position_embeddings", None),
        stored_dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        linears=_linears(_layers(model, config)),
    )


def _linears(layers: nn.ModuleList) -> dict[str, LinearLayers]:
    found: dict[str, LinearLayers] = {}
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear):
            last = name.rpartition(".")[2]
            found[last] = found.get(last, LinearLayers()).with_another(
                module.in_features, module.out_features
            )
    return found


def _weight(module: nn.Module | None) -> torch.Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise ModelConfigError(
            f"{type(module).__name__} has no weight: a causal language model has an embedding and a head"
        )
    return weight


def _layers(model: PreTrainedModel, config: Any) -> nn.ModuleList:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise ModelConfigError(f"{type(model).__name__} has no list of its {config.num_hidden_layers} layers")
