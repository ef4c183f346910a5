"""The critic: a decoder like the policy's with a linear head, under the same sharding and over the same packed passes.

It gives the value of the state before each answer token, the environment's included (what becomes of those is `estimation`'s).
With a cost under constraint the head has a second output, the cost's value.
The head begins as 0: all values are 0 until it has learned, and no random number is needed.
Called by `step`, and through `forward` by `critic_step`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModel, PreTrainedModel

from asyncrl.learner import attention
from asyncrl.learner.config import CriticConfig
from asyncrl.learner.distributed import this_device
from asyncrl.learner.loading import build, fill
from asyncrl.learner.model import states_before
from asyncrl.learner.objective_config import Objective
from asyncrl.learner.objective_needs import needs_of
from asyncrl.learner.optimizer import adamw
from asyncrl.learner.rows import MicroBatch
from asyncrl.learner.sharding import decoder_layers, home_of, reshard, shard
from asyncrl.learner.sharding_config import Dtype, ShardingConfig
from asyncrl.learner.trained import Schedule, Trained

_HEADS = ("lm_head.weight", "score.weight")


class Critic(nn.Module):
    def __init__(self, decoder: PreTrainedModel, outputs: int) -> None:
        super().__init__()
        self.decoder = decoder
        width = decoder.config.get_text_config().hidden_size
        self.head = nn.Linear(width, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, part: MicroBatch) -> torch.Tensor:
        """[tokens, outputs] float32: values of the state before each token of `part.targets`."""
        values: torch.Tensor = self.head(states_before(self.decoder, part))
        return values.float()

    def values_no_grad(self, part: MicroBatch) -> torch.Tensor:
        """As `forward`, with no graph; whatever the pass left whole is sharded again. A collective."""
        with torch.no_grad():
            out: torch.Tensor = self(part)
        reshard(self)
        return out


def outputs_of(objective: Objective) -> int:
    """How many values a critic for the objective gives: of the reward, and of a cost under constraint; 0: it has no critic."""
    return 1 + (objective.cost is not None) if "critic" in needs_of(objective).parts else 0


def load_critic(
    path: str | Path, outputs: int, mesh: DeviceMesh, dtype: Dtype, sharding: ShardingConfig | None = None
) -> Critic:
    """Loads the decoder of the folder (or hub name) `path` with float32 masters and shards it over `mesh`. A collective.

    The head of a language or reward model in the folder is passed over.
    """
    sharding = sharding or ShardingConfig()
    blueprint = build(path, attention.NAME, make=AutoModel, spare=_HEADS)
    critic = Critic(blueprint.model, outputs)
    shard(critic, decoder_layers(blueprint.model), mesh, dtype, sharding)
    fill(blueprint, home_of(sharding, this_device(mesh.device_type)))
    return critic.eval()


def trained_critic(critic: Critic, config: CriticConfig, betas: tuple[float, float]) -> Trained:
    parameters = dict(critic.named_parameters())
    return Trained(
        module=critic,
        parameters=parameters,
        optimizer=adamw(parameters.values(), betas, config.weight_decay),
        schedule=Schedule(config.learning_rate, config.rate_warmup_steps, config.rate_decay_steps),
    )
