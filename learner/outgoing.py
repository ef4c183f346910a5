"""The policy's tensors as they leave, for engines and for folders: whole, under checkpoint names, with adapters merged in.

Invariants: the model is not changed by it; the same weights give the same bytes, on every rank; each tied weight leaves once.
Called by `sending` and `weights`. Making a tensor whole is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from asyncrl.learner.model import Policy, checkpoint_parameters
from asyncrl.weight_sync.plan import Tied

if TYPE_CHECKING:
    from asyncrl.learner.quantised import Linear4Bit

Make = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One tensor on its way out."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """That it is made in."""
    make: Make
    parameter: nn.Parameter | None = None
    """The master that it is, where it is one as it stands: then each rank has rows of it."""
    cast_from: torch.dtype | None = None
    """The master's, where `make` casts: it then travels in `dtype` whatever the others do."""

    def whole(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """From all ranks' shards, in `dtype` (None: its own), contiguous, on the learner's device. A collective.

        May share memory with the master on one rank: copy it before the next step if it must last.
        """
        return self.make().to(dtype or self.dtype).contiguous()


def whole_model(policy: Policy) -> dict[str, Outgoing]:
    """Every tensor of the model under its checkpoint name, in model order: W + alpha / rank B A where there is an adapter."""
    if policy.lora is None:
        return {name: _plain(parameter) for name, parameter in checkpoint_parameters(policy).items()}
    return dict(_merged(policy))


def adapter_alone(policy: Policy) -> dict[str, Outgoing]:
    """The adapter's tensors under the names that they have in an adapter folder of peft, in model order."""
    from asyncrl.learner.lora import ADAPTER, PEFT_PREFIX

    return {
        PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): _plain(parameter)
        for name, parameter in checkpoint_parameters(policy).items()
        if parameter.requires_grad
    }


def tied(policy: Policy) -> list[Tied]:
    """Further names of the tensors of `whole_model`, as checkpoints have them."""
    first: dict[int, str] = {}
    found = []
    for name, parameter in policy.lm.named_parameters(remove_duplicate=False):
        name = name.replace(".base_layer.", ".")
        if first.setdefault(id(parameter), name) != name:
            found.append(Tied(name=name, of=first[id(parameter)]))
    return found


def _merged(policy: Policy) -> Iterator[tuple[str, Outgoing]]:
    from asyncrl.learner.lora import Adapted, adapted_layers, matrices_of
    from asyncrl.learner.quantised import Linear4Bit

    assert policy.lora is not None
    packed = {id(module.weight): module for module in policy.modules() if isinstance(module, Linear4Bit)}
    adapters = {
        id(layer.get_base_layer().weight): matrices_of(layer) for layer in adapted_layers(policy).values()
    }
    for name, parameter in checkpoint_parameters(policy).items():
        if parameter.requires_grad:
            continue
        linear = packed.get(id(parameter))
        base = _plain(parameter) if linear is None else _dequantised(linear, parameter)
        if id(parameter) in adapters:
            base = _with_adapter(base, *adapters[id(parameter)], policy.lora.scale)
        yield Adapted.original(name), base


def _plain(parameter: nn.Parameter) -> Outgoing:
    return Outgoing(tuple(parameter.shape), parameter.dtype, lambda: _full(parameter), parameter)


def _dequantised(linear: Linear4Bit, parameter: nn.Parameter) -> Outgoing:
    shape = (linear.out_features, linear.in_features)
    return Outgoing(shape, torch.float32, lambda: linear.dequantised(_full(parameter)))


def _with_adapter(base: Outgoing, a: torch.Tensor, b: torch.Tensor, scale: float) -> Outgoing:
    def merged() -> torch.Tensor:
        return base.make().float() + scale * (_full(b) @ _full(a))

    return Outgoing(base.shape, torch.float32, merged)


def _full(parameter: torch.Tensor) -> torch.Tensor:
    data = parameter.detach()
    return data.full_tensor() if isinstance(data, DTensor) else data
