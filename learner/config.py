"""Settings of the learner and of the supervised warm start. Objectives have a file of their own, `objective_config`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from asyncrl.learner.objective_config import GRPO, Objective

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]


HEAD_SIZES = (32, 64, 128)
"""Head sizes that every attention kernel of vLLM, on CPU and CUDA, has."""


class LearnerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[learner]`: the FSDP2 learner."""

    objective: Objective = msgspec.field(default_factory=GRPO)
    ranks: Positive = 1
    device: Literal["cpu", "cuda"] = "cuda"
    cores: Positive = 1
    """Threads per rank (CPU)."""
    learning_rate: PositiveFloat = 1e-6
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up."""
    decay_steps: NonNegative = 0
    """Optimizer steps over which the rate falls in a straight line to a tenth; 0: it stays."""
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: PositiveFloat = 1.0
    minibatches_per_step: Positive = 1
    """Optimizer steps per batch; from 2 on the clip acts, as the proximal policy is the one at batch start."""
    tokens_per_microbatch: Positive = 8192
    """Prompt and answer tokens, padding included, of one forward pass on one rank."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; masters are always float32."""
    start_timeout_s: PositiveFloat = 600.0
    step_timeout_s: PositiveFloat = 1800.0


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
