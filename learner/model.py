"""A Hugging Face causal LM under FSDP2: loading, sharding, and the one forward pass the learner needs.

Invariants:
- Sharding has a module of its own, `sharding`: one path for every size, 1 rank too; masters are float32.
- Rollouts run packed, and attention does not cross them (`attention`).
- `Policy.parameters()` are the sharded masters between passes. A pass without backward leaves modules whole, so every such
  pass goes through `logprobs_no_grad`, which shards them again: else the next pass would run on old weights.
- No dropout: a token's logprob is a function of weights and context alone, as in the engines.
`states_before` serves the critic too. Called by `step`, `critic`, `reference` and `sft`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from asyncrl.learner import attention
from asyncrl.learner.distributed import this_device
from asyncrl.learner.loading import build, fill
from asyncrl.learner.logprobs import token_logprobs, token_logprobs_and_entropies
from asyncrl.learner.lora_config import LoraConfig
from asyncrl.learner.packing_check import check_apart
from asyncrl.learner.rows import MicroBatch
from asyncrl.learner.sharding import decoder_layers, home_of, reshard, shard
from asyncrl.learner.sharding_config import Dtype, ShardingConfig


class Policy(nn.Module):
    """Wraps the causal LM so that the output weight is used inside the sharded root's forward pass."""

    def __init__(self, lm: PreTrainedModel, lora: LoraConfig | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.lora = lora
        self._parts = _Parts(lm)
        self.even_length = even_length(lm)

    def forward(self, part: MicroBatch, temperature: float, with_entropy: bool = False) -> torch.Tensor:
        """Logprobs of `part.targets`: [tokens] float32; `with_entropy` [2, tokens], the entropies of their distributions below
        them. `temperature` is the sampling temperature: logits are divided by it."""
        hidden = states_before(self._parts.decoder, part)
        weight = self._parts.head.weight
        if with_entropy:
            return torch.stack(token_logprobs_and_entropies(hidden, weight, part.targets, temperature))
        return token_logprobs(hidden, weight, part.targets, temperature)

    def logprobs_no_grad(self, part: MicroBatch, temperature: float) -> torch.Tensor:
        """As `forward`, with no graph; whatever the pass left whole is sharded again. A collective."""
        with torch.no_grad():
            out: torch.Tensor = self(part, temperature)
        reshard(self)
        return out

    def adapters_off(self) -> AbstractContextManager[None]:
        """Within it, the policy is the frozen base that its adapters are put on, without gradients: a reference that costs no memory.

        Raises ValueError without adapters.
        """
        from asyncrl.learner.lora import adapters_off

        return adapters_off(self)


def states_before(decoder: nn.Module, part: MicroBatch) -> torch.Tensor:
    """[tokens, width]: the decoder's output at the position before each token."""
    out = decoder(
        input_ids=part.input_ids,
        position_ids=part.position_ids,
        attention_mask=None,
        use_cache=False,
        packing=part.packing,
    )
    hidden: torch.Tensor = out.last_hidden_state
    return hidden[0].index_select(0, part.predictors)


class _Parts:
    """Decoder and output head. Not a module, so that their parameters are registered once, under the causal LM's names.

    Raises ValueError if the logits are not `hidden @ head.weight.T`.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self.decoder: nn.Module = lm.get_decoder()
        head = lm.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise ValueError(
                f"{type(lm).__name__}: the learner needs a linear output head without bias, got {head}; use another model"
            )
        self.head: nn.Linear = head
        text = lm.config.get_text_config()
        for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(text, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"{type(lm).__name__}: config.{name} = {getattr(text, name)} changes the logits, which the learner does "
                    "not do; its logprobs would differ from the engines'. Use another model"
                )


def even_length(lm: PreTrainedModel) -> float:
    """The length at which attention costs a rollout as much as all the rest, the head included.

    A weight is 2 FLOPs for each token (of experts only the chosen ones, of the input embedding none), and attention 4 for each
    pair of positions and channel, half of the square of the length.
    """
    config = lm.config.get_text_config()
    counts = [
        getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
    ]
    share = (getattr(config, "num_experts_per_tok", None) or 1) / next(filter(None, counts), 1)
    unread = lm.get_input_embeddings().weight
    weights = 0.0
    for name, parameter in lm.named_parameters():
        if parameter is not unread or parameter is lm.get_output_embeddings().weight:
            weights += parameter.numel() * (share if ".experts." in name else 1.0)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return float(weights / (config.num_hidden_layers * config.num_attention_heads * size))


def load_policy(
    path: str | Path,
    mesh: DeviceMesh,
    dtype: Dtype,
    lora: LoraConfig | None = None,
    sharding: ShardingConfig | None = None,
) -> Policy:
    """Loads the folder (or hub name) `path` with float32 masters and shards it over `mesh`. A collective.

    With `lora` the model is frozen, in the type in which it is stored, and its adapters are the masters. Raises ValueError for
    models whose logits are not `hidden @ weight.T` (a head with bias, capped logits), and for those that do not keep packed
    rollouts apart: one small pass shows it.
    """
    sharding = sharding or ShardingConfig()
    if lora is None:
        policy = _load_whole(path, mesh, dtype, sharding)
    else:
        policy = _load_adapted(path, mesh, dtype, lora, sharding)
    vocabulary = policy.lm.config.get_text_config().vocab_size
    device = this_device(mesh.device_type)
    check_apart(str(path), lambda part: policy.logprobs_no_grad(part, 1.0), vocabulary, device)
    return policy


def _load_whole(path: str | Path, mesh: DeviceMesh, dtype: Dtype, sharding: ShardingConfig) -> Policy:
    blueprint = build(path, attention.NAME)
    policy = Policy(blueprint.model)
    shard(policy, decoder_layers(blueprint.model), mesh, dtype, sharding)
    fill(blueprint, home_of(sharding, this_device(mesh.device_type)))
    return policy.eval()


def _load_adapted(
    path: str | Path, mesh: DeviceMesh, dtype: Dtype, lora: LoraConfig, sharding: ShardingConfig
) -> Policy:
    from asyncrl.learner.lora import adapt, stored_dtype

    blueprint = build(path, attention.NAME, dtype=stored_dtype(path))
    as_stored = even_length(blueprint.model)  # before bytes stand for weights
    adapted = adapt(blueprint, lora)
    policy = Policy(blueprint.model, lora)
    policy.even_length = as_stored
    shard(policy, decoder_layers(blueprint.model), mesh, dtype, sharding)
    home = home_of(sharding, this_device(mesh.device_type))
    fill(blueprint, home, original=adapted.original, fresh=adapted.fresh)
    return policy.eval()


def checkpoint_parameters(policy: Policy) -> dict[str, nn.Parameter]:
    """Sharded masters under checkpoint names, each tied weight once (under its input name), in model order."""
    return {name.removeprefix("lm."): parameter for name, parameter in policy.named_parameters()}


def trained_parameters(policy: Policy) -> dict[str, nn.Parameter]:
    """Of these the ones that are trained: all, or the adapters."""
    return {
        name: parameter
        for name, parameter in checkpoint_parameters(policy).items()
        if parameter.requires_grad
    }
