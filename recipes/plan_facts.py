"""What a plan is made of: the work of one step, the constants of the estimates, and why a shape was turned down. Pure.

Every constant of `Efficiency` is a share of a data sheet's figure or a fixed cost that no data sheet has; how far off the
estimates are is measured by tools/check_plan.py and stated in docs/plan.md. Called by the planner's files.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated

import msgspec

from asyncrl.learner.lora_config import LoraConfig
from asyncrl.learner.sharding_config import ShardingConfig
from asyncrl.recipes.plan_lengths import Lengths

Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Cost = Annotated[float, msgspec.Meta(ge=0)]


class PlanError(ValueError):
    """Nothing fits, or what was asked for cannot be planned. The message names the nearest miss and the way out."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """One learner step, in rollouts and tokens."""

    prompts_per_step: int
    rollouts_per_prompt: int
    prompt_tokens: float
    """Mean."""
    mean_tokens: float
    max_tokens: int
    """Of an answer."""
    max_context_tokens: int
    minibatches_per_step: int = 1
    tokens_per_microbatch: int = 8192
    memory_fraction: float = 0.85
    lora: LoraConfig | None = None
    sharding: ShardingConfig = msgspec.field(default_factory=ShardingConfig)
    critic: bool = False
    """A critic of the policy's size trains too."""
    reference: bool = False
    """A reference of the policy's size is asked for logprobs."""
    reference_held: bool = False
    """It has weights of its own."""
    early_proximal: bool = False
    """Every minibatch has a forward pass before the one it is trained by, the first as well."""

    @property
    def rollouts(self) -> int:
        return self.prompts_per_step * self.rollouts_per_prompt

    @property
    def lengths(self) -> Lengths:
        return _lengths(self.mean_tokens, self.max_tokens)


_lengths = lru_cache(maxsize=64)(Lengths)


class Efficiency(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Set with `--assume NAME=VALUE`."""

    decode_bandwidth: Share = 0.75
    """Of memory bandwidth, reading weights and KV cache while decoding. Copy kernels reach 0.9 of it, attention less."""
    compute: Share = 0.6
    """Of dense FLOP/s in prefill and large decode batches. cuBLAS on large bfloat16 matrices reaches 0.7."""
    train_compute: Share = 0.33
    """Model FLOPs utilisation of forward and backward: what the two training-bound rows of tools/check_plan.py come to.
    Published runs reach 0.3 to 0.5 with dense models, mixtures often half of that."""
    link: Share = 0.7
    """Of link bandwidth, in large collectives. NCCL's own benchmark reaches 0.75 to 0.85."""
    decode_step_s: Cost = 0.005
    """Of each decode step beside the GPU's work: scheduling, launching, sampling. 2 to 10 ms in practice."""
    sequence_s: Cost = 15e-6
    """Of each sequence in a decode step, on the engine's CPU: its sampled token, streamed and accounted."""
    all_reduce_s: Cost = 15e-6
    """Latency of one all-reduce within a node; two a layer with tensor parallelism."""
    context_bytes: Cost = 1.5e9
    """On each GPU: CUDA context, kernels, communication buffers."""
    graph_bytes: Cost = 1.5e9
    """On each engine's GPU: CUDA graphs and the allocator's waste."""
    learner_memory: Share = 0.92
    """Of a GPU's memory that the learner may take; the rest is fragmentation."""
    batched_tokens: Annotated[int, msgspec.Meta(ge=1)] = 8192
    """Prefill tokens of one engine step, for which it keeps room."""
    most_slots: Annotated[int, msgspec.Meta(ge=1)] = 512
    """Rollouts that one engine is given at most."""


class Misfit(msgspec.Struct, frozen=True, kw_only=True):
    """A shape that does not fit, with its arithmetic."""

    gpu_type: str
    role: str
    """`engine` or `learner`."""
    gpus: int
    """Tensor parallelism of the engine, ranks of the learner."""
    reason: str
    lacking_bytes: float | None
    """Per GPU; None where memory is not what is wrong."""

    @property
    def shape(self) -> str:
        return f"{self.role} on {self.gpus} x {self.gpu_type}"
