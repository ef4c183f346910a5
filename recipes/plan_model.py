"""The sizes of a model that a plan rests on: parameters, KV cache, multiply-adds, saved activations. Pure.

Tensor parallelism of the engines cuts attention by heads and everything else evenly; a KV head is copied where there are
fewer of them than GPUs. Made by `model_sizes` from a config.json; called by the planner's files.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
import numpy as np

from asyncrl.recipes.plan_lora import LinearLayers

Amount = TypeVar("Amount", float, np.ndarray)
"""One figure, or one for each of many loads: formulas are the same."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A dense or mixture-of-experts decoder with (grouped-query) attention. Counts are exact, from the built modules."""

    name: str
    parameters: int
    """Tied weights once: what is stored, trained and sent."""
    expert_parameters: int = 0
    """Of them, in experts of which each token uses `experts_per_token` of `experts`."""
    embedding_parameters: int
    """The input embedding: looked up, not multiplied."""
    head_parameters: int
    """The output head, counted also where it is the input embedding."""
    tied: bool
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    intermediate_size: int
    """Of one token through the feed-forward layers: with experts, those that it uses together."""
    experts: int = 0
    experts_per_token: int = 0
    query_key_norm: bool = False
    largest_layer_parameters: int
    max_context_tokens: int | None = None
    stored_dtype: str = "float32"
    """That config.json names for the weights in the files."""
    linears: dict[str, LinearLayers] = {}
    """By last name (`q_proj`); experts that are one fused parameter are not among them."""

    @property
    def stored_bytes(self) -> float:
        return self.parameters * DTYPE_BYTES.get(self.stored_dtype, 4)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets, embeddings included: what model names give as "A3B"."""
        if not self.experts:
            return self.parameters
        used = self.expert_parameters * self.experts_per_token // self.experts
        return self.parameters - self.expert_parameters + used

    @property
    def body_parameters(self) -> int:
        """Multiplied once for each token: active ones without embeddings and head."""
        outside = self.embedding_parameters if self.tied else self.embedding_parameters + self.head_parameters
        return self.active_parameters - outside

    @property
    def root_parameters(self) -> int:
        """Outside the decoder layers: embeddings, last norm, head."""
        return self.parameters - self.layer_parameters

    @property
    def layer_parameters(self) -> int:
        outside = self.embedding_parameters if self.tied else self.embedding_parameters + self.head_parameters
        return self.parameters - outside - self.hidden_size

    def kv_bytes_per_token(self, dtype: str) -> int:
        """2 (key, value) x layers x kv_heads x head_size x bytes: one copy of the cache."""
        return 2 * self.layers * self.kv_heads * self.head_size * DTYPE_BYTES[dtype]

    def kv_bytes_per_token_and_gpu(self, dtype: str, tensor_parallel: int) -> int:
        """On each GPU of an engine: at least one KV head, copied where there are fewer than GPUs."""
        heads = max(1, self.kv_heads // tensor_parallel)
        return 2 * self.layers * heads * self.head_size * DTYPE_BYTES[dtype]

    def weight_bytes(self, dtype: str) -> int:
        return self.parameters * DTYPE_BYTES[dtype]

    def read_parameters(self, tokens: Amount) -> Amount:
        """Parameters that a decode step of `tokens` sequences reads: experts that nobody chose stay unread.

        With uniform routing an expert is left out by all of them with probability (1 - k/E)^tokens.
        """
        dense = self.parameters - self.expert_parameters
        if not self.tied:
            dense -= self.embedding_parameters
        left_out = 1 - self.experts_per_token / self.experts if self.experts else 1.0
        unread: Amount = left_out**tokens
        return dense + self.expert_parameters * (1 - unread)

    def attention_flops(self, context_tokens: Amount) -> Amount:
        """Of one new token over `context_tokens`: q k^T and p v, 2 FLOPs each per head, position and channel."""
        return context_tokens * (4.0 * self.layers * self.heads * self.head_size)

    def forward_flops(self, context_tokens: Amount) -> Amount:
        """Of one token with its logits: 2 FLOPs a parameter and attention."""
        return self.attention_flops(context_tokens) + 2.0 * (self.body_parameters + self.head_parameters)

    def saved_bytes_per_token(self, dtype: str, *, recomputed: bool = False) -> int:
        """Activations that backward needs, of one token through all layers; `recomputed` what enters each layer, and all that
        one layer saves, when its turn comes.

        Counted as Hugging Face's Llama/Qwen modules with fused (flash) attention save them, c bytes an element:
        two RMSNorms (float32 input, normalised, scaled; one float32 per row): 2 ((4 + 2c) hidden + 4); q and output
        c heads x head_size each, k and v c kv_heads x head_size each, 4 bytes a head of log-sum-exp; gate, its SiLU, up and
        their product: 4c intermediate. Norms of q and k add (4 + c) bytes a channel and 4 a head. Korthikanti et al. 2022
        (arXiv:2205.05198) count the same way for GPT. The chosen experts' copies of a token are counted as c hidden in
        and out each.
        """
        c = DTYPE_BYTES[dtype]
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        layer = 2 * ((4 + 2 * c) * self.hidden_size + 4)
        layer += 2 * c * (queries + keys) + 4 * self.heads + 4 * c * self.intermediate_size
        if self.query_key_norm:
            layer += (4 + c) * (queries + keys) + 4 * (self.heads + self.kv_heads)
        if self.experts:
            layer += 2 * c * self.experts_per_token * self.hidden_size + 4 * self.experts
        ends = (4 + 2 * c) * self.hidden_size + 2 * c * self.head_size  # last norm; rotary cosines and sines
        if recomputed:
            return self.layers * c * self.hidden_size + layer + ends
        return self.layers * layer + ends
