"""Settings of how a model is spread over the learner's ranks, and the rules that they can break. Pure.

Called by `config`, `sharding`, the recipe's checks and the planner.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

Dtype = Literal["float32", "bfloat16"]


class ShardingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[learner.sharding]`: FSDP2, of the policy and of what else the learner holds. None of it changes what is computed, but for
    rounding where a type is bfloat16."""

    replicas: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Copies of the sharded model: ranks = replicas x shards, consecutive ranks share a copy. With as many replicas as nodes,
    parameters travel within a node only, and gradients alone between nodes; memory is that of the shards."""
    reshard_after_forward: bool = True
    """Free a layer's whole parameters after its forward pass and gather them again for backward. False saves that traffic and
    keeps all layers whole between the two."""
    cpu_offload: bool = False
    """Masters, gradients and optimizer state in host memory, the step on the CPU; only with device = "cuda"."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """`full`: keep only what enters each decoder layer, and compute the layer again in backward: about a third more time."""
    compile: bool = False
    """torch.compile on each decoder layer."""
    reduce_dtype: Dtype = "float32"
    """In which gradients are summed over ranks."""


def broken_sharding_rules(
    sharding: ShardingConfig, ranks: int, device: Literal["cpu", "cuda"]
) -> Iterator[tuple[str, str, str]]:
    """(key path, what was found, the way out) of each rule that is broken."""
    if ranks % sharding.replicas:
        yield (
            "learner.sharding.replicas",
            str(sharding.replicas),
            f"must divide learner.ranks = {ranks}: each replica has ranks / replicas shards",
        )
    if sharding.cpu_offload and device == "cpu":
        yield (
            "learner.sharding.cpu_offload",
            "true",
            'moves masters and optimizer state from the GPU into host memory, where learner.device = "cpu" has them already: '
            "leave it out",
        )
