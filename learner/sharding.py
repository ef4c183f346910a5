"""How a model is spread over the learner's ranks: `fully_shard` on each decoder layer and on the root.

Invariants: one path for every size, on CPU (gloo) and CUDA (NCCL), at 1 rank too; masters are float32, compute follows the
configured dtype; names of parameters are those of the model as it was built, whatever the settings. Called by `model` and what
else the learner holds sharded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from asyncrl.learner.sharding_config import Dtype, ShardingConfig


def shard(
    root: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    dtype: Dtype,
    sharding: ShardingConfig | None = None,
) -> None:
    """One group per layer, the rest (embeddings, norm, head) in the root. A collective.

    `mesh` is that of `distributed.init_distributed`: [ranks], or [replicas, shards].
    """
    sharding = sharding or ShardingConfig()
    precision = MixedPrecisionPolicy(
        param_dtype=getattr(torch, dtype), reduce_dtype=getattr(torch, sharding.reduce_dtype)
    )
    # Pinning needs a GPU; on a CPU the policy is only of use to tests.
    offload = (
        CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if sharding.cpu_offload else OffloadPolicy()
    )
    # One shard holds every byte anyway: freeing the whole layers after forward would save nothing but a copy.
    resharded = sharding.reshard_after_forward and mesh.size(mesh.ndim - 1) > 1
    for layer in layers:
        wrap_forward(layer, sharding)
        fully_shard(
            layer, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=resharded
        )
    fully_shard(root, mesh=mesh, mp_policy=precision, offload_policy=offload)


def wrap_forward(layer: nn.Module, sharding: ShardingConfig) -> None:
    """In place of the layer's method: a module around it would be in every parameter's name. FSDP's hooks stay outside, so that
    what is compiled or computed again sees whole parameters."""
    forward = layer.forward
    if sharding.compile:
        # Passes differ in length: without `dynamic` the first length would be compiled for itself.
        forward = torch.compile(forward, dynamic=True)
    if sharding.activation_checkpointing == "full":
        # Nothing in a layer is random: there is no generator's state to keep.
        forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    layer.forward = forward


def home_of(sharding: ShardingConfig, device: torch.device) -> torch.device:
    """Where masters and optimizer state are, for a learner that computes on `device`."""
    return torch.device("cpu") if sharding.cpu_offload else device


def reshard(root: nn.Module) -> None:
    """Frees what a pass without backward left whole: else the next pass would run on old weights."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def decoder_layers(lm: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers: the one ModuleList with an entry per hidden layer."""
    wanted = lm.config.get_text_config().num_hidden_layers
    lists = [m for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    if not lists:
        raise ValueError(f"{type(lm).__name__} has no list of its {wanted} decoder layers to shard")
    return lists[0]
