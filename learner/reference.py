"""The reference of a KL: a frozen policy, with weights of its own or the policy's base with its adapters off. Called by `training`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh

from asyncrl.learner import attention
from asyncrl.learner.distributed import this_device
from asyncrl.learner.loading import build, fill
from asyncrl.learner.model import Policy
from asyncrl.learner.rows import MicroBatch
from asyncrl.learner.sharding import decoder_layers, home_of, shard
from asyncrl.learner.sharding_config import Dtype, ShardingConfig


class Reference(Protocol):
    def logprobs(self, part: MicroBatch, temperature: float) -> torch.Tensor:
        """Of `part.targets`: [tokens] float32, without a graph. A collective."""
        ...


class FrozenModel:
    """Sharded over the same mesh as the policy, without gradients or an optimizer, and in the type that it computes in."""

    def __init__(
        self, path: str | Path, mesh: DeviceMesh, dtype: Dtype, sharding: ShardingConfig | None = None
    ) -> None:
        """Loads the folder (or hub name). A collective."""
        sharding = sharding or ShardingConfig()
        blueprint = build(path, attention.NAME, dtype=getattr(torch, dtype))
        blueprint.model.requires_grad_(False)
        self._model = Policy(blueprint.model).eval()
        shard(self._model, decoder_layers(blueprint.model), mesh, dtype, sharding)
        fill(blueprint, home_of(sharding, this_device(mesh.device_type)))

    def logprobs(self, part: MicroBatch, temperature: float) -> torch.Tensor:
        return self._model.logprobs_no_grad(part, temperature)


class Adapted(Protocol):
    """A policy with adapters."""

    def adapters_off(self) -> AbstractContextManager[None]:
        """Within it the policy is its base alone."""
        ...

    def logprobs_no_grad(self, part: MicroBatch, temperature: float) -> torch.Tensor: ...


class BaseOfPolicy:
    """Costs no memory: the policy itself, as it was before its adapters learned anything."""

    def __init__(self, policy: Adapted) -> None:
        self._policy = policy

    def logprobs(self, part: MicroBatch, temperature: float) -> torch.Tensor:
        with self._policy.adapters_off():
            return self._policy.logprobs_no_grad(part, temperature)
