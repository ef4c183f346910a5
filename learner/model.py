"""A Hugging Face causal LM under FSDP2: loading, sharding, and the one forward pass the learner needs.

Invariants:
- One path for every size: `fully_shard` on each decoder layer and on the root, on CPU (gloo) and CUDA (NCCL), at 1 rank too.
- Masters are float32; compute follows the configured dtype; gradients are reduced in float32.
- `Policy.parameters()` are the sharded masters between passes. A pass without backward leaves modules whole, so every such
  pass goes through `logprobs_no_grad`, which shards them again: else the next pass would run on old weights.
- No dropout: a token's logprob is a function of weights and context alone, as in the engines.
Called by `step` and `sft`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from asyncrl.learner.logprobs import token_logprobs, token_logprobs_and_entropies

Dtype = Literal["float32", "bfloat16"]


class Policy(nn.Module):
    """Wraps the causal LM so that the output weight is used inside the sharded root's forward pass."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self._parts = _Parts(lm)

    def forward(
        self,
        input_ids: torch.Tensor,
        predictors: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        with_entropy: bool = False,
    ) -> torch.Tensor:
        """Logprobs of `targets`: [tokens] float32; `with_entropy` [2, tokens], the entropies of their distributions below them.

        Args:
            input_ids: [rows, longest], padded on the right. Causal attention never looks right, so no mask is needed.
            predictors: [tokens] positions in the flattened `input_ids` whose output predicts the target.
            targets: [tokens].
            temperature: the sampling temperature; logits are divided by it.
        """
        out = self._parts.decoder(input_ids=input_ids, attention_mask=None, use_cache=False)
        hidden: torch.Tensor = out.last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, predictors)
        weight = self._parts.head.weight
        if with_entropy:
            return torch.stack(token_logprobs_and_entropies(hidden, weight, targets, temperature))
        return token_logprobs(hidden, weight, targets, temperature)

    def logprobs_no_grad(
        self, input_ids: torch.Tensor, predictors: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """As `forward`, with no graph; whatever the pass left whole is sharded again. A collective."""
        with torch.no_grad():
            out: torch.Tensor = self(input_ids, predictors, targets, temperature)
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
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
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    return shard_policy(lm, mesh, dtype)


def shard_policy(lm: PreTrainedModel, mesh: DeviceMesh, dtype: Dtype) -> Policy:
    """Shards a loaded model over `mesh`: one group per decoder layer, the rest (embeddings, norm, head) in the root."""
    policy = Policy(lm)
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    # One rank holds every byte anyway: freeing the whole layers after forward would save nothing but a copy.
    reshard: bool = mesh.size() > 1
    for layer in decoder_layers(lm):
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    return policy.eval()


def decoder_layers(lm: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers: the one ModuleList with an entry per hidden layer."""
    wanted = lm.config.get_text_config().num_hidden_layers
    lists = [m for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    if not lists:
        raise ValueError(f"{type(lm).__name__} has no list of its {wanted} decoder layers to shard")
    return lists[0]


def checkpoint_parameters(policy: Policy) -> dict[str, nn.Parameter]:
    """Sharded masters under checkpoint names, each tied weight once (under its input name), in model order."""
    return {name.removeprefix("lm."): parameter for name, parameter in policy.named_parameters()}
