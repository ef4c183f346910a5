"""Settings of the learner and of the supervised warm start. Objectives have a file of their own, `objective_config`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from asyncrl.learner.lora_config import LoraConfig
from asyncrl.learner.objective_config import GRPO, Objective
from asyncrl.learner.sharding_config import Dtype, ShardingConfig

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]


HEAD_SIZES = (32, 64, 128)
"""Head sizes that every attention kernel of vLLM, on CPU and CUDA, has."""


class CriticConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[learner.critic]`: the value model of `ppo` and `vapo`, with an optimizer of its own."""

    path: str = ""
    """Folder or hub name of a decoder to begin with; empty: the policy's. The value head begins as 0."""
    learning_rate: PositiveFloat = 1e-5
    warmup_steps: NonNegative = 0
    """Learner steps, the run's first, in which the critic alone trains. What is published then are the weights that the policy
    started with, under new versions."""
    rate_warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up of the learning rate."""
    rate_decay_steps: NonNegative = 0
    """Optimizer steps over which the rate falls in a straight line to a tenth; 0: it stays."""
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0


class ReferenceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[learner.reference]`: the frozen policy of `kl`."""

    path: str = ""
    """Folder or hub name; empty: the model that the run starts from."""


class LearnerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[learner]`: the FSDP2 learner."""

    objective: Objective = msgspec.field(default_factory=GRPO)
    critic: CriticConfig | None = None
    """For objectives with a critic; none: its defaults."""
    reference: ReferenceConfig | None = None
    """For objectives with a KL; none: its defaults."""
    lora: LoraConfig | None = None
    """With it adapters are trained, without it every weight."""
    ranks: Positive = 1
    device: Literal["cpu", "cuda"] = "cuda"
    cores: Positive = 1
    """Threads per rank (CPU)."""
    gpu_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Part of a GPU that a rank takes on Ray's books; below 1 it shares one with engines."""
    learning_rate: PositiveFloat = 1e-6
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up."""
    decay_steps: NonNegative = 0
    """Optimizer steps over which the rate falls in a straight line to a tenth; 0: it stays."""
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to that norm."""
    fault_grad_norm: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """A gradient of a larger norm, before scaling, is a fault; 0: of none."""
    fault_grad_norm_ratio: Annotated[float, msgspec.Meta(ge=0)] = 1000.0
    """So is one of so many times the median norm of the last steps, or of `max_grad_norm` where that is larger; 0: none is."""
    on_fault: Literal["stop", "restore"] = "stop"
    """What a run does when a step is no good (loss, gradient or weights not finite, a gradient past the limits above) or a rank
    dies: end with the rollouts named, or go on from its last checkpoint."""
    max_restores: Positive = 3
    """Restores without a step of progress in between, before the run ends after all."""
    minibatches_per_step: Positive = 1
    """Optimizer steps per batch; from 2 on the clip acts, as the proximal policy is the one at batch start."""
    tokens_per_microbatch: Positive = 8192
    """Prompt and answer tokens of one forward pass on one rank, at most; a rollout that is longer runs alone."""
    dtype: Dtype = "float32"
    """Compute type; masters are always float32."""
    sharding: ShardingConfig = msgspec.field(default_factory=ShardingConfig)
    start_timeout_s: PositiveFloat = 600.0
    step_timeout_s: PositiveFloat = 1800.0


def base_is_reference(learner: LearnerConfig) -> bool:
    """Where a KL is asked for: its reference is the policy's own base with the adapters off, no model beside it."""
    return learner.lora is not None and not (learner.reference and learner.reference.path)


class SFTConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[sft]`: makes `model.path` by supervised fine-tuning when it is not there yet."""

    source: str
    """Prompt/answer pairs, named like `prompts.source`."""
    answer_field: str = "solution"
    """The field that holds the text to imitate, or a list with the text of each turn: `[environment]` answers in between."""
    steps: Positive
    pairs_per_step: Positive = 64
    learning_rate: PositiveFloat = 1e-3
    warmup_steps: NonNegative = 20
    cosine_decay: bool = False
    """Lower the rate to 0 towards the last step. For a model that reinforcement learning goes on with, better not: stopped at
    the full rate it has errors that a few steps of GRPO remove, while from an annealed one they make it worse at first."""
    seed: int = 0
    init: str = ""
    """A model folder to start from; empty: a new model of the sizes below with a character tokenizer."""
    hidden_size: Positive = 128
    layers: Positive = 3
    heads: Positive = 4
    alphabet: str = "0123456789+=;"
    """Characters of the new tokenizer; end-of-sequence and padding are added to it."""
