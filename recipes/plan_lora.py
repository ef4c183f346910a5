"""What a learner holds of a model, and what an adapter has: every weight with its optimizer state, or adapters on a frozen
base. Pure. Called by `plan_memory`, the table of sizes and the preflight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from asyncrl.learner.lora_config import LoraConfig
from asyncrl.recipes.plan_facts import PlanError

TRAINED_BYTES = 16
"""A trained parameter: float32 master 4, gradient 4, AdamW 8."""
NF4_BYTES = 0.5 + 4 / 64
"""A weight in 4 bits: half a byte, and a float32 scale for 64 of them."""


class LinearLayers(msgspec.Struct, frozen=True, kw_only=True):
    """The linear layers of one name in all decoder layers together."""

    sides: int = 0
    """Sum of inputs and outputs: what an adapter of rank 1 has."""
    parameters: int = 0
    """Biases left out."""

    def with_another(self, inputs: int, outputs: int) -> LinearLayers:
        return LinearLayers(
            sides=self.sides + inputs + outputs, parameters=self.parameters + inputs * outputs
        )


class Weights(Protocol):
    """A model as far as is needed here."""

    @property
    def parameters(self) -> int: ...
    @property
    def stored_bytes(self) -> float: ...
    @property
    def linears(self) -> Mapping[str, LinearLayers]:
        """By last name (`q_proj`)."""
        ...


class UnknownTarget(PlanError):
    """A layer that is to get an adapter is not there; the message names those that are."""


class HeldState(msgspec.Struct, frozen=True, kw_only=True):
    """Over all ranks."""

    trained_parameters: int
    frozen_bytes: float
    formula: str
    """Of a trained parameter: 4 master, 4 gradient, 8 AdamW."""

    @property
    def total_bytes(self) -> float:
        return TRAINED_BYTES * self.trained_parameters + self.frozen_bytes


def held_state(model: Weights, lora: LoraConfig | None) -> HeldState:
    """A frozen base is held in the type in which it is stored, or in 4 bits. Raises UnknownTarget."""
    state = f"{TRAINED_BYTES} bytes x {model.parameters:,} parameters"
    if lora is None:
        return HeldState(trained_parameters=model.parameters, frozen_bytes=0.0, formula=state)
    adapters = adapter_parameters(model, lora)
    rounded = sum(layer.parameters for layer in model.linears.values()) if lora.quantise == "nf4" else 0
    stored = model.stored_bytes / model.parameters
    frozen = stored * (model.parameters - rounded) + NF4_BYTES * rounded
    formula = f"{TRAINED_BYTES} bytes x {adapters:,} parameters of adapters + a frozen base of {frozen / 1e9:.2f} GB"
    return HeldState(trained_parameters=adapters, frozen_bytes=frozen, formula=formula)


def adapter_parameters(model: Weights, lora: LoraConfig) -> int:
    """rank x (in + out) of every layer with an adapter. Raises UnknownTarget."""
    names = list(model.linears) if lora.target_modules == "all-linear" else list(lora.target_modules)
    if unknown := sorted(set(names) - model.linears.keys()):
        raise UnknownTarget(
            f"{', '.join(unknown)} is no linear layer of the model's decoder layers, which have "
            f'{", ".join(sorted(model.linears))}: name some of these, or "all-linear"'
        )
    return lora.rank * sum(model.linears[name].sides for name in names)


def sent_parameters(model: Weights, lora: LoraConfig | None) -> int:
    """Of one version on its way to the engines. Raises UnknownTarget."""
    if lora is not None and lora.sync == "adapter":
        return adapter_parameters(model, lora)
    return model.parameters
