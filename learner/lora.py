"""LoRA: adapters by peft on the linear layers of the decoder, over a frozen base that may be in 4 bits.

Invariants:
- Adapters are float32 masters; nothing else of the model is trained. The base stays in the type in which it is stored.
- Every rank makes the same adapters, from `LoraConfig.seed`: sharding takes each rank's own copy.
- Weights are never merged in place: what leaves is computed (`outgoing`), so a publication changes nothing here.
Called by `model`, `outgoing` and `weights`. Imports peft, which takes a second, so callers import it where LoRA is asked for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from asyncrl.learner.loading import Blueprint
from asyncrl.learner.lora_config import LoraConfig
from asyncrl.learner.sharding import decoder_layers
from asyncrl.learner.weight_files import WeightFiles, read_rows

ADAPTER = "default"
"""peft's name of the one adapter."""
PEFT_PREFIX = "base_model.model."
"""Before a module's name in an adapter folder."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """What `loading.fill` has to know of a model with adapters."""

    fresh: Mapping[str, torch.Tensor]
    """Whole values by present names of what the files do not have as such: adapters, and a base in 4 bits."""

    @staticmethod
    def original(name: str) -> str:
        """From a parameter's name now to its name in the files."""
        return name.replace(".base_layer.", ".")


def adapt(blueprint: Blueprint, config: LoraConfig) -> Adapted:
    """Freezes the blueprint's model, makes room for 4 bits if asked to, and wraps the targets; still on the meta device.

    Raises ValueError if a target names no linear layer of the decoder's layers.
    """
    lm = blueprint.model
    lm.requires_grad_(False)
    targets = _targets(lm, config)
    fresh: dict[str, Callable[[], torch.Tensor]] = (
        _quantise(blueprint, targets) if config.quantise == "nf4" else {}
    )
    peft.inject_adapter_in_model(peft_config(config, targets), lm, adapter_name=ADAPTER)
    generator = torch.Generator().manual_seed(config.seed)
    for name, layer in adapted_layers(lm).items():
        layer.lora_A.float()
        layer.lora_B.float()
        a, b = matrices_of(layer)
        first = nn.init.kaiming_uniform_(torch.empty(a.shape), a=math.sqrt(5), generator=generator)
        fresh[f"{name}.lora_A.{ADAPTER}.weight"] = first.clone
        fresh[f"{name}.lora_B.{ADAPTER}.weight"] = partial(torch.zeros, b.shape)
    return Adapted(fresh=_Lazy(fresh))


class _Lazy(Mapping[str, torch.Tensor]):
    """Values that are made when they are asked for: a whole base in 4 bits is never held."""

    def __init__(self, makers: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def stored_dtype(path: str | Path) -> torch.dtype:
    """The type that config.json says the weights are in; float32 where it says nothing."""
    dtype = AutoConfig.from_pretrained(path).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def peft_config(config: LoraConfig, targets: list[str]) -> peft.LoraConfig:
    """What `adapter_config.json` says."""
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it, whole or not
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def adapted_layers(module: nn.Module) -> dict[str, LoraLayer]:
    """The layers with an adapter by name, in model order."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def matrices_of(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank]."""
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    assert isinstance(a, nn.Linear) and isinstance(b, nn.Linear)
    return a.weight, b.weight


@contextlib.contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Within, `module` is its base alone, without gradients. Raises ValueError if it has no adapters."""
    layers = list(adapted_layers(module).values())
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no adapters to switch off: its base is only there with [learner.lora]"
        )
    # Not `enable_adapters`: it clears requires_grad, and FSDP would keep that for the whole parameters that it makes at the
    # first pass; adapters whose first pass is the reference's would never get a gradient.
    for layer in layers:
        layer._disable_adapters = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _targets(lm: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Names of the layers to wrap."""
    linear = [name for name, _ in _linear_layers(lm)]
    if config.target_modules == "all-linear":
        return linear
    there = {_last(name) for name in linear}
    if unknown := sorted(set(config.target_modules) - there):
        raise ValueError(
            f"learner.lora.target_modules: {', '.join(unknown)} is no linear layer of {type(lm).__name__}'s decoder layers, "
            f'which have {", ".join(sorted(there))}: name some of these, or "all-linear"'
        )
    return [name for name in linear if _last(name) in config.target_modules]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _linear_layers(lm: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Of the decoder's layers: embeddings and output head stay as they are. Names are those within `lm`."""
    inside = {id(module) for layer in decoder_layers(lm) for module in layer.modules()}
    for name, module in lm.named_modules():
        if id(module) in inside and isinstance(module, nn.Linear):
            yield name, module


def _quantise(blueprint: Blueprint, targets: list[str]) -> dict[str, Callable[[], torch.Tensor]]:
    """Puts a `Linear4Bit` in the place of each linear layer; returns what makes their weights, by the names they will have."""
    from asyncrl.learner.quantised import Linear4Bit, pack

    makers: dict[str, Callable[[], torch.Tensor]] = {}
    for name, linear in list(_linear_layers(blueprint.model)):
        parent = blueprint.model.get_submodule(name.rpartition(".")[0])
        setattr(parent, _last(name), Linear4Bit(linear))
        wrapped = f"{name}.base_layer.weight" if name in targets else f"{name}.weight"
        makers[wrapped] = partial(_packed, blueprint, f"{name}.weight", linear.weight.shape, pack)
    return makers


def _packed(
    blueprint: Blueprint, name: str, shape: torch.Size, pack: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    with WeightFiles(blueprint.folder) as files:
        weight = read_rows(files, blueprint.sources[name], name, shape, 0, shape[0], blueprint.model.config)
    return pack(weight)
