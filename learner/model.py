"""A Hugging Face causal LM under FSDP2: loading, sharding, and the one forward pass the learner needs.

Invariants:
- Sharding has a module of its own, `sharding`: one path for every size, 1 rank too; masters are float32.
- Rollouts run packed, and attention does not cross them (`attention`).
- `Policy.parameters()` are the sharded masters between passes. A pass without backward leaves modules whole, so every such
  pass goes through `logprobs_no_grad`, which shards them again: else the next pass would run on old weights.
- No dropout: a token's logprob is a function of weights and context alone, as in the engines.
Called by `step` and `sft`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedModel

from asyncrl.learner import attention
from asyncrl.learner.logprobs import token_logprobs, token_logprobs_and_entropies
from asyncrl.learner.rows import MicroBatch
from asyncrl.learner.sharding import Dtype, decoder_layers, reshard, shard


class Policy(nn.Module):
    """Wraps the causal LM so that the output weight is used inside the sharded root's forward pass."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self._parts = _Parts(lm)

    def forward(self, part: MicroBatch, temperature: float, with_entropy: bool = False) -> torch.Tensor:
        """Logprobs of `part.targets`: [tokens] float32; `with_entropy` [2, tokens], the entropies of their distributions below
        them. `temperature` is the sampling temperature: logits are divided by it."""
        hidden = self._hidden(part)
        weight = self._parts.head.weight
        if with_entropy:
            return torch.stack(token_logprobs_and_entropies(hidden, weight, part.targets, temperature))
        return token_logprobs(hidden, weight, part.targets, temperature)

    def _hidden(self, part: MicroBatch) -> torch.Tensor:
        """[tokens, width]: the output at the position before each token."""
        out = self._parts.decoder(
            input_ids=part.input_ids,
            position_ids=part.position_ids,
            attention_mask=None,
            use_cache=False,
            packing=part.packing,
        )
        hidden: torch.Tensor = out.last_hidden_state
        return hidden[0].index_select(0, part.predictors)

    def logprobs_no_grad(self, part: MicroBatch, temperature: float) -> torch.Tensor:
        """As `forward`, with no graph; whatever the pass left whole is sharded again. A collective."""
        with torch.no_grad():
            out: torch.Tensor = self(part, temperature)
        reshard(self)
        return out


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


def load_policy(path: str | Path, mesh: DeviceMesh, dtype: Dtype) -> Policy:
    """Loads the folder (or hub name) `path` with float32 masters and shards it over `mesh`. A collective.

    Raises ValueError for models whose logits are not `hidden @ weight.T` (a head with bias, capped logits).
    """
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention.NAME)
    policy = Policy(lm)
    shard(policy, decoder_layers(lm), mesh, dtype)
    return policy.eval()


def checkpoint_parameters(policy: Policy) -> dict[str, nn.Parameter]:
    """Sharded masters under checkpoint names, each tied weight once (under its input name), in model order."""
    return {name.removeprefix("lm."): parameter for name, parameter in policy.named_parameters()}
