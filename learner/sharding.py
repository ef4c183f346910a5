"""How a model is spread over the learner's ranks: `fully_shard` on each decoder layer and on the root.

Invariants: one path for every size, on CPU (gloo) and CUDA (NCCL), at 1 rank too; masters are float32, compute follows the
configured dtype, gradients are reduced in float32. Called by `model`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

Dtype = Literal["float32", "bfloat16"]


def shard(root: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, dtype: Dtype) -> None:
    """One group per layer, the rest (embeddings, norm, head) in the root. A collective."""
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    # One rank holds every byte anyway: freeing the whole layers after forward would save nothing but a copy.
    reshard: bool = mesh.size() > 1
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(root, mesh=mesh, mp_policy=precision)


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
