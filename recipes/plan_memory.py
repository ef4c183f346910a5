"""What fits: the memory of an engine's GPU and of a learner's, sum by sum. Pure.

Engine, per GPU: weights / tp + room for a prefill step + CUDA graphs and context; the rest, up to memory_fraction, is KV
cache. Learner, per rank (see `asyncrl.learner.model`, `optimizer`, `logprobs`): float32 masters 4 + gradients 4 + AdamW 8
bytes a parameter, over the shards, or adapters on a frozen base; the same again for a critic, a frozen reference; layers gathered for compute; activations of one
micro-batch, or what enters each layer where they are computed again; chunks of logits. More memory never turns a shape down. Called by `plan_search`.
"""

from __future__ import annotations

import math

import msgspec

from asyncrl.learner.lora_config import LoraConfig
from asyncrl.learner.sharding_config import ShardingConfig
from asyncrl.recipes.gpus import GPUSpec
from asyncrl.recipes.plan_facts import Efficiency, Misfit, Workload
from asyncrl.recipes.plan_lora import NF4_BYTES, TRAINED_BYTES, held_state
from asyncrl.recipes.plan_model import DTYPE_BYTES, ModelShape

KV_BLOCK_TOKENS = 16
"""vLLM's block on CUDA: a rollout's last block is half empty on average."""
LOGIT_CHUNKS = 3
"""Live at once in the learner's backward: logits, their exponentials, the slope in the compute type."""
CHUNK_BYTES = 64 * 2**20
"""As `asyncrl.learner.logprobs.CHUNK_BYTES`, which cannot be imported without torch; a test compares them."""


class EngineFit(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes per GPU of one engine."""

    dtype: str
    weights_bytes: float
    activation_bytes: float
    kv_bytes: float
    kv_tokens: int
    """Of the whole engine."""
    most_slots: int
    """Rollouts whose KV cache fits at once, with room for two standard deviations."""


class LearnerFit(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes per rank."""

    dtype: str
    tokens_per_microbatch: int
    state_bytes: float
    gathered_bytes: float
    activation_bytes: float
    logits_bytes: float
    free_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.state_bytes + self.gathered_bytes + self.activation_bytes + self.logits_bytes


def engine_dtype(gpu: GPUSpec) -> str:
    return "bfloat16" if gpu.has_bfloat16 else "float16"


def learner_dtype(gpu: GPUSpec) -> str:
    """The learner knows no float16."""
    return "bfloat16" if gpu.has_bfloat16 else "float32"


def fit_engine(
    model: ModelShape, gpu_type: str, gpu: GPUSpec, tensor_parallel: int, work: Workload, eff: Efficiency
) -> EngineFit | Misfit:
    def misfit(reason: str, lacking: float | None) -> Misfit:
        return Misfit(
            gpu_type=gpu_type, role="engine", gpus=tensor_parallel, reason=reason, lacking_bytes=lacking
        )

    if model.heads % tensor_parallel or (
        model.kv_heads % tensor_parallel and tensor_parallel % model.kv_heads
    ):
        return misfit(
            f"{tensor_parallel} GPUs cannot share {model.heads} attention heads and {model.kv_heads} KV heads",
            None,
        )
    dtype = engine_dtype(gpu)
    weights = model.weight_bytes(dtype) / tensor_parallel
    activations = _engine_activations(model, dtype, tensor_parallel, eff)
    allowed = work.memory_fraction * gpu.memory_bytes
    kv_bytes = allowed - weights - activations - eff.graph_bytes - eff.context_bytes
    per_token = model.kv_bytes_per_token_and_gpu(dtype, tensor_parallel)
    kv_tokens = max(0, int(kv_bytes // (per_token * KV_BLOCK_TOKENS)) * KV_BLOCK_TOKENS)
    if kv_tokens < work.max_context_tokens:
        needed = work.max_context_tokens * per_token
        parts = (
            f"weights {gigabytes(weights)} + prefill {gigabytes(activations)} + graphs and context "
            f"{gigabytes(eff.graph_bytes + eff.context_bytes)} + KV of one rollout of {work.max_context_tokens:,} tokens "
            f"{gigabytes(needed)} > {work.memory_fraction:g} x {gigabytes(gpu.memory_bytes)} = {gigabytes(allowed)}"
        )
        return misfit(parts, needed - kv_bytes)
    return EngineFit(
        dtype=dtype,
        weights_bytes=weights,
        activation_bytes=activations,
        kv_bytes=kv_bytes,
        kv_tokens=kv_tokens,
        most_slots=min(eff.most_slots, most_slots(kv_tokens, work)),
    )


def _engine_activations(model: ModelShape, dtype: str, tensor_parallel: int, eff: Efficiency) -> float:
    """Of a prefill step: hidden state in and out and residual, gate and up; and the sampler's float32 logits (raw,
    processed, logprobs) of every slot."""
    wide = 4 * model.hidden_size + 3 * model.intermediate_size / tensor_parallel
    step = eff.batched_tokens * DTYPE_BYTES[dtype] * wide
    return step + 3 * 4 * model.vocabulary * eff.most_slots


def most_slots(kv_tokens: int, work: Workload) -> int:
    """The most n with n mean + 2 deviation sqrt(n) <= kv_tokens, over what rollouts in slots hold; at least 1."""
    lengths = work.lengths
    mean = work.prompt_tokens + lengths.held_mean + KV_BLOCK_TOKENS / 2
    spread = lengths.held_deviation
    root = (-spread + math.sqrt(spread**2 + mean * kv_tokens)) / mean
    return max(1, int(root**2))


def fit_learner(
    model: ModelShape, gpu_type: str, gpu: GPUSpec, ranks: int, work: Workload, eff: Efficiency
) -> LearnerFit | Misfit:
    """With the recipe's tokens_per_microbatch, or the largest half, quarter ... of it that fits and still holds the
    longest rollout."""
    replicas = work.sharding.replicas
    if ranks % replicas:
        reason = f"learner.sharding.replicas = {replicas} does not divide {ranks} ranks"
        return Misfit(gpu_type=gpu_type, role="learner", gpus=ranks, reason=reason, lacking_bytes=None)
    dtype = learner_dtype(gpu)
    free = eff.learner_memory * gpu.memory_bytes - eff.context_bytes
    tokens = max(work.tokens_per_microbatch, work.max_context_tokens)
    while True:
        fit = learner_memory(
            model, dtype, ranks, tokens, free, work.lora, work.sharding, beside=_beside(model, work, dtype)
        )
        if fit.total_bytes <= free:
            return fit
        if tokens == work.max_context_tokens:
            break
        tokens = max(work.max_context_tokens, tokens // 2)
    reason = (
        f"state {gigabytes(fit.state_bytes)} ({_state_formula(model, work, dtype)} / {ranks // replicas}) + gathered "
        f"layers {gigabytes(fit.gathered_bytes)} + activations of {tokens:,} tokens {gigabytes(fit.activation_bytes)} + "
        f"logits {gigabytes(fit.logits_bytes)} > {eff.learner_memory:g} x {gigabytes(gpu.memory_bytes)} - context = "
        f"{gigabytes(free)}"
    )
    lacking = fit.total_bytes - free
    return Misfit(gpu_type=gpu_type, role="learner", gpus=ranks, reason=reason, lacking_bytes=lacking)


def learner_memory(
    model: ModelShape,
    dtype: str,
    ranks: int,
    tokens: int,
    free_bytes: float,
    lora: LoraConfig | None = None,
    sharding: ShardingConfig = ShardingConfig(),
    *,
    beside: float = 0.0,
) -> LearnerFit:
    """`tokens`: of one micro-batch, padding included. `beside`: bytes of what is held beside the policy, over all ranks.

    Gathered in the compute type: the root (embeddings, head) throughout a pass, and two layers at a time where they are freed
    after forward, else all of them; gradients of the root and of one layer before they are reduced in float32. Frozen weights
    have no gradients; those in 4 bits are gathered packed, and unpacked layer by layer. Offloaded state is none of the GPU's.
    """
    size, shards = DTYPE_BYTES[dtype], ranks // sharding.replicas
    held = held_state(model, lora)
    freed = sharding.reshard_after_forward and shards > 1
    layers: float = 2 * model.largest_layer_parameters if freed else model.layer_parameters
    summed = DTYPE_BYTES[sharding.reduce_dtype]
    whole = model.root_parameters + model.largest_layer_parameters
    gradients = whole if lora is None else held.trained_parameters / model.layers
    head_gradient = (4 + size) * model.head_parameters if lora is None else 0
    layer_size: float = size
    if lora is not None and lora.quantise == "nf4":
        layers, layer_size = layers + model.largest_layer_parameters * size / NF4_BYTES, NF4_BYTES
    return LearnerFit(
        dtype=dtype,
        tokens_per_microbatch=tokens,
        state_bytes=0 if sharding.cpu_offload else (held.total_bytes + beside) / shards,
        gathered_bytes=size * model.root_parameters + layer_size * layers + (size + summed) * gradients,
        activation_bytes=tokens
        * model.saved_bytes_per_token(dtype, recomputed=sharding.activation_checkpointing == "full"),
        logits_bytes=LOGIT_CHUNKS * CHUNK_BYTES + head_gradient,
        free_bytes=free_bytes,
    )


def _beside(model: ModelShape, work: Workload, dtype: str) -> float:
    """A critic with its optimizer, a frozen reference in the compute type; each as large as the policy."""
    return model.parameters * float(TRAINED_BYTES * work.critic + DTYPE_BYTES[dtype] * work.reference_held)


def _state_formula(model: ModelShape, work: Workload, dtype: str) -> str:
    formula = held_state(model, work.lora).formula
    if work.critic:
        formula += f" + as many x {TRAINED_BYTES} of a critic"
    if work.reference_held:
        formula += f" + as many x {DTYPE_BYTES[dtype]} of a reference"
    return formula if formula.count("+") == 0 else f"({formula})"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
