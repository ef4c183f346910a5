"""How long: a decode step, a step's generation, a step's training, a publication. Pure.

Decoding is a roofline: weights and KV cache over bandwidth, or multiplications over FLOP/s, whichever takes longer
(Williams et al. 2009; Pope et al. 2022, arXiv:2211.05102), plus the all-reduces of tensor parallelism and a fixed cost.
Training is 6 FLOPs a parameter and token (Kaplan et al. 2020, arXiv:2001.08361) plus attention, or FSDP's traffic where
that takes longer. Times grow with load and fall with bandwidth and GPUs. Called by `plan_search`.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from asyncrl.recipes.gpus import ClusterEntry, GPUSpec
from asyncrl.recipes.plan_facts import Efficiency, Workload
from asyncrl.recipes.plan_memory import EngineFit, LearnerFit
from asyncrl.recipes.plan_model import DTYPE_BYTES, Amount, ModelShape


class EngineSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of one shape, at work."""

    model: ModelShape
    gpu: GPUSpec
    tensor_parallel: int
    fit: EngineFit
    work: Workload
    eff: Efficiency

    def decode_s(self, rollouts: Amount, context_tokens: Amount) -> Amount:
        """One decode step of `rollouts` sequences with `context_tokens` each on average: one token for each."""
        model, gpu, eff, tp = self.model, self.gpu, self.eff, self.tensor_parallel
        size = DTYPE_BYTES[self.fit.dtype]
        kv = model.kv_bytes_per_token_and_gpu(self.fit.dtype, tp) * context_tokens * rollouts
        read = size * model.read_parameters(rollouts) / tp + kv
        memory_s = read / (gpu.memory_bytes_per_s * eff.decode_bandwidth)
        compute_s = rollouts * model.forward_flops(context_tokens) / (tp * gpu.flops_per_s * eff.compute)
        fixed_s = eff.decode_step_s + eff.sequence_s * rollouts
        step_s: Amount = np.maximum(memory_s, compute_s) + self._all_reduces_s(rollouts) + fixed_s
        return step_s

    def _all_reduces_s(self, tokens: Amount) -> Amount:
        """Two a layer, each 2 (tp - 1) / tp of the hidden states over the link."""
        tp = self.tensor_parallel
        if tp == 1:
            return tokens * 0.0
        size = tokens * (DTYPE_BYTES[self.fit.dtype] * self.model.hidden_size * 2 * (tp - 1) / tp)
        each = size / (self.gpu.node_link_bytes_per_s * self.eff.link) + self.eff.all_reduce_s
        return each * (2 * self.model.layers)

    def prefill_s(self, tokens: float) -> float:
        """One prompt; the KV cache of a group's common prompt may be reused, which is not counted on."""
        model, tp = self.model, self.tensor_parallel
        flops = tokens * (2.0 * model.body_parameters + model.attention_flops(tokens / 2))
        return flops / (tp * self.gpu.flops_per_s * self.eff.compute) + self._all_reduces_s(tokens)

    def step_s(self, rollouts: Amount) -> Amount:
        """One engine step in the steady state: every finished rollout made room for one, whose prompt is computed."""
        held = self.work.prompt_tokens + self.work.lengths.held_mean
        admitted = rollouts / self.work.lengths.mean
        return self.decode_s(rollouts, rollouts * 0.0 + held) + admitted * self.prefill_s(
            self.work.prompt_tokens
        )

    def rollouts_per_s(self, rollouts: Amount) -> Amount:
        """Finished, with so many under way (a mean, so fractions count)."""
        return rollouts / (self.step_s(rollouts) * self.work.lengths.mean)

    def batch_s(self, rollouts: float, slots: float) -> float:
        """To generate `rollouts` and wait for the last: full slots while there are more, then the tail runs dry."""
        lengths, prompt = self.work.lengths, self.work.prompt_tokens
        if rollouts > slots:
            first_s = (rollouts - slots) / self.rollouts_per_s(slots)
            survival, held = lengths.residual_survival(), lengths.held_mean
        else:
            first_s = rollouts * self.prefill_s(prompt)
            survival, held = lengths.survival, 0.0
        alive = min(rollouts, slots) * survival
        context = prompt + np.minimum(held + lengths.middles, lengths.max_tokens)
        # A tail of less than half a rollout is one that did not happen.
        tail_s = np.where(alive >= 0.5, lengths.widths * self.decode_s(alive, context), 0.0)
        return float(first_s + tail_s.sum())


class LearnerTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one step."""

    compute_s: float
    traffic_s: float
    """FSDP's gathers and reductions; they overlap with compute, so the longer counts."""
    optimizer_s: float
    publish_s: float
    """Gathering the weights and sending one copy; the learner waits for it."""

    @property
    def total_s(self) -> float:
        return max(self.compute_s, self.traffic_s) + self.optimizer_s + self.publish_s


def step_tokens(work: Workload) -> float:
    """Prompt and answer tokens that the learner computes in a step."""
    return work.rollouts * (work.prompt_tokens + work.lengths.mean)


def train_flops(model: ModelShape, work: Workload) -> float:
    """Of one step: 6 a parameter and token, 8 for the head (its logits are computed again in backward, on answer tokens
    alone), 3 times the causal attention; and a forward pass more for minibatches after the first, and of the layers where
    activations are computed again. A critic has the layers' part again, and a pass for its values; a reference has one pass."""
    lengths, n = work.lengths, work.rollouts
    prompt = work.prompt_tokens
    squares = prompt**2 + 2 * prompt * lengths.mean + lengths.mean_square
    body = 2.0 * model.body_parameters * step_tokens(work) + n * model.attention_flops(1) * squares / 2
    head = 2.0 * model.head_parameters * n * lengths.mean
    again = 1.0 if work.early_proximal else (work.minibatches_per_step - 1) / work.minibatches_per_step
    again += work.reference
    recomputed = work.sharding.activation_checkpointing == "full"
    critic = (4 + recomputed) * body if work.critic else 0.0
    return (3 + again + recomputed) * body + (4 + again) * head + critic


def learner_time(
    model: ModelShape,
    entry: ClusterEntry,
    gpu: GPUSpec,
    ranks: int,
    fit: LearnerFit,
    work: Workload,
    eff: Efficiency,
    *,
    wire_dtype: str,
    across_nodes: bool,
) -> LearnerTime:
    """`across_nodes`: some engine is on another node than the learner, so versions travel over the cluster's links."""
    peak = gpu.flops_per_s if fit.dtype != "float32" else gpu.float32_flops_per_s
    sharding = work.sharding
    shards = ranks // sharding.replicas
    within, between = (
        gpu.node_link_bytes_per_s if count <= entry.gpus_per_node else gpu.cluster_link_bytes_per_s
        for count in (shards, ranks)
    )
    size, summed, others = DTYPE_BYTES[fit.dtype], DTYPE_BYTES[sharding.reduce_dtype], (shards - 1) / shards
    passes = math.ceil(step_tokens(work) / ranks / fit.tokens_per_microbatch)
    gathers = 2 if sharding.reshard_after_forward else 1
    traffic_s = (gathers * size + summed) * model.parameters * others / within
    # Replicas sum the gradients of each shard: an all-reduce sends everything twice.
    traffic_s += 2 * summed * model.parameters / shards * (1 - 1 / sharding.replicas) / between
    traffic_s *= 1 + work.critic
    traffic_s += (work.critic + work.reference) * size * model.parameters * others / within
    out = gpu.cluster_link_bytes_per_s if across_nodes else gpu.node_link_bytes_per_s
    gathered = 4 * model.parameters * others / (within * eff.link)
    return LearnerTime(
        compute_s=train_flops(model, work) / (ranks * peak * eff.train_compute),
        traffic_s=passes * traffic_s / eff.link,
        # Gradient, master and both moments are read, the last three written: 28 bytes a parameter.
        optimizer_s=work.minibatches_per_step
        * (1 + work.critic)
        * 28
        * model.parameters
        / shards
        / (gpu.memory_bytes_per_s * eff.decode_bandwidth),
        publish_s=gathered + model.weight_bytes(wire_dtype) / (out * eff.link),
    )
