"""Linear weights leave as float8 with their blocks' scales (`float8_blocks`): the cast is done here, before anything is sent.

Invariants: embeddings, norms, biases and the output head leave as they are; codes and scales of a weight are of the same master.
Called by `sending`. Making a tensor whole is a collective.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from asyncrl.learner.float8_blocks import block_scales, quantise
from asyncrl.learner.model import Policy
from asyncrl.learner.outgoing import Outgoing
from asyncrl.weight_sync.float8 import scale_name, scale_shape


def linear_weights(policy: Policy) -> set[str]:
    """Checkpoint names of the weights of all linear layers but the output head."""
    head = policy.lm.get_output_embeddings()
    return {
        f"{name}.weight".replace(".base_layer.", ".")
        for name, module in policy.lm.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    }


def in_float8(outgoing: Mapping[str, Outgoing], linear: Collection[str]) -> dict[str, Outgoing]:
    """`outgoing` with each weight of `linear` as its codes, and its scales after it.

    Raises ValueError if one is not there, and for a model with experts, whose weights lie in other tensors.
    """
    if experts := [name for name in outgoing if ".experts." in name]:
        raise ValueError(
            f'float8: {experts[0]} is an expert\'s, which are not cast yet; set weight_sync.wire_dtype = "auto"'
        )
    if unknown := sorted(set(linear) - outgoing.keys()):
        raise ValueError(
            f"float8: {len(unknown)} linear weights have no tensor to send, such as {unknown[0]}; set "
            'weight_sync.wire_dtype = "auto"'
        )
    found: dict[str, Outgoing] = {}
    for name, tensor in outgoing.items():
        if name in linear:
            pair = _Pair(tensor)
            shape = scale_shape(tensor.shape)
            found[name] = Outgoing(tensor.shape, torch.float8_e4m3fn, pair.codes, cast_from=tensor.dtype)
            found[scale_name(name)] = Outgoing(shape, torch.float32, pair.scales, cast_from=tensor.dtype)
        else:
            found[name] = tensor
    return found


class _Pair:
    """Codes and scales of one weight, which is gathered once for both: they are sent in this order."""

    def __init__(self, weight: Outgoing) -> None:
        self._weight = weight
        self._scales: torch.Tensor | None = None

    def codes(self) -> torch.Tensor:
        codes, self._scales = quantise(self._weight.make())
        return codes

    def scales(self) -> torch.Tensor:
        """Those of the codes that were made last; taken once, as the weight changes."""
        scales, self._scales = self._scales, None
        return block_scales(self._weight.make()) if scales is None else scales
