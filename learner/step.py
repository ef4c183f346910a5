"""One rank of the learner: a batch in, new weights and figures out.

    table --share--> every rank --train (`training`)--> new weights --gather--> buckets for the engines

Invariants:
- All public methods but `plan`, `checkpoint_finished` and `close` are collectives: every rank calls them in the same order.
- No optimizer step is taken on a loss or gradient that is not finite, nor on a gradient past the recipe's limits; all ranks
  then raise the same `faults.LearnerFault`, as they do where the step itself leaves a weight that is not finite.
One thread of one process per rank calls it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.distributed.device_mesh import DeviceMesh

from asyncrl.learner.checkpoint import Checkpoints
from asyncrl.learner.config import CriticConfig, LearnerConfig, base_is_reference
from asyncrl.learner.critic import load_critic, outputs_of, trained_critic
from asyncrl.learner.distributed import init_distributed, leave_distributed, share_table, this_device
from asyncrl.learner.group_ranks import GroupRanks
from asyncrl.learner.metrics import StepMetrics
from asyncrl.learner.model import load_policy, trained_parameters
from asyncrl.learner.objective_needs import needs_of
from asyncrl.learner.optimizer import adamw
from asyncrl.learner.outgoing import adapter_alone, tied, whole_model
from asyncrl.learner.outgoing_float8 import linear_weights
from asyncrl.learner.reference import BaseOfPolicy, FrozenModel, Reference
from asyncrl.learner.rows import assemble, rows_of
from asyncrl.learner.sending import Sending
from asyncrl.learner.sharding import home_of
from asyncrl.learner.stopwatch import Stopwatch
from asyncrl.learner.trained import Schedule, Trained
from asyncrl.learner.training import Training
from asyncrl.learner.weights import save_folder
from asyncrl.weight_sync.config import Senders
from asyncrl.weight_sync.plan import Adapter, Bucket, Plan
from asyncrl.weight_sync.ranks import Ranks

logger = logging.getLogger(__name__)


class Learner:
    """`rank` of `ranks`, which meet at `address` (host:port; unused with one rank)."""

    def __init__(
        self,
        config: LearnerConfig,
        model_path: str | Path,
        temperature: float,
        rank: int = 0,
        ranks: int = 1,
        address: str = "",
    ) -> None:
        """`temperature` is the sampling temperature: logprobs are of the distribution that was sampled from."""
        if config.device == "cpu":
            torch.set_num_threads(config.cores)
        mesh = init_distributed(
            rank,
            ranks,
            address,
            config.device,
            config.step_timeout_s,
            start_timeout_s=config.start_timeout_s,
            replicas=config.sharding.replicas,
            on_host=config.sharding.cpu_offload,
        )
        self._config, self._model_path, self._temperature = config, model_path, temperature
        self._rank, self._ranks = rank, ranks
        self._device = this_device(config.device)
        self._group_ranks = GroupRanks(self._device)
        self._policy = load_policy(model_path, mesh, config.dtype, config.lora, config.sharding)
        self._sending = self._outlet(mesh)
        self.trained = {"policy": self._trained_policy()}
        """By name: all that an optimizer moves."""
        if outputs := outputs_of(config.objective):
            settings = config.critic or CriticConfig()
            critic = load_critic(settings.path or model_path, outputs, mesh, config.dtype, config.sharding)
            self.trained["critic"] = trained_critic(critic, settings, (config.adam_beta1, config.adam_beta2))
        self._checkpoints = Checkpoints(self.trained, rank, ranks, self._device, config.step_timeout_s)
        self._stopwatch = Stopwatch(self._device)
        self._training = Training(
            config, self.trained, self._reference(mesh), temperature, self._stopwatch, self._device
        )

    def train(self, table: pa.Table | None, version: int) -> StepMetrics:
        """Trains on one batch of schema `buffer.schema.BATCH`, handed over while `version` was the learner's own.

        Rank 0 gives the table; the others give None and get it from rank 0. Raises `LearnerFault`, or ValueError for a table
        that is not a batch.
        """
        start = self._stopwatch.now()
        self._sending.forget()
        table, version = share_table(table, version, self._rank, self._device)
        return self._training.train(table, version, start)

    @property
    def device(self) -> torch.device:
        """This rank's."""
        return self._device

    @property
    def ranks(self) -> Ranks:
        """The learner's ranks, to talk over. Its calls are collectives."""
        return self._group_ranks

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding: every token id is below it."""
        return int(self._policy.lm.config.vocab_size)

    def plan(self, bucket_bytes: int, wire_dtype: str | None = None, senders: Senders = "one") -> Plan:
        """The buckets of what engines get: this model's parameters in checkpoint names, tied ones once, or its adapter's alone
        in peft's names (`[learner.lora] sync`); the same on every rank.

        `wire_dtype`: a torch dtype's name, None for that of the masters, or `float8`: linear weights as codes and scales, the
        rest as bfloat16. `senders`: rank 0 with all that there is, or every rank with its own rows, which raises ValueError
        where tensors are computed from several parameters.
        """
        return self._sending.plan(bucket_bytes, wire_dtype, senders)

    def _trained_policy(self) -> Trained:
        config, parameters = self._config, trained_parameters(self._policy)
        return Trained(
            module=self._policy,
            parameters=parameters,
            optimizer=adamw(parameters.values(), (config.adam_beta1, config.adam_beta2), config.weight_decay),
            schedule=Schedule(config.learning_rate, config.warmup_steps, config.decay_steps),
        )

    def _reference(self, mesh: DeviceMesh) -> Reference | None:
        if "reference model" not in needs_of(self._config.objective).parts:
            return None
        if base_is_reference(self._config):
            return BaseOfPolicy(self._policy)
        path = self._config.reference.path if self._config.reference else ""
        return FrozenModel(path or self._model_path, mesh, self._config.dtype, self._config.sharding)

    def _outlet(self, mesh: DeviceMesh) -> Sending:
        lora, policy = self._config.lora, self._policy
        home = home_of(self._config.sharding, self._device)
        if lora is not None and lora.sync == "adapter":
            adapter = Adapter(rank=lora.rank, alpha=lora.alpha)
            return Sending(adapter_alone(policy), mesh, home, tied=[], adapter=adapter)
        linear = linear_weights(policy)
        return Sending(whole_model(policy), mesh, home, tied=tied(policy), adapter=None, linear=linear)

    def gather(self, plan: Plan, bucket: Bucket) -> list[torch.Tensor]:
        """The pieces of a bucket of `plan`, each flat [count], where the masters are, on the rank that sends it; nothing on
        others. A collective of all ranks, but for a rank's own rows.

        In the wire dtype, or the master's where they are views of masters: whoever writes them casts. Valid until the next
        `train`, and until the second `gather` after this one. Buckets come in the plan's order.
        """
        with self._stopwatch.measure("gather_s"):
            return self._sending.gather(plan, bucket)

    def logprobs(self, tokens: list[int]) -> list[float]:
        """Logprob of each token after the first at temperature 1: [len(tokens) - 1]. A collective, same tokens on all ranks."""
        rows = rows_of([(tokens[:1], tokens[1:])])
        part = assemble(rows, np.zeros(1, dtype=np.int64)).to(self._device)
        return [float(value) for value in self._policy.logprobs_no_grad(part, 1.0).cpu()]

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint needs beside weights and optimizers: plain numbers, the same on every rank."""
        return self._training.state_dict()

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError if it is of a run with another objective."""
        self._training.load_state_dict(state)

    def save(self, folder: str | Path) -> None:
        """Writes a Hugging Face folder, atomically, on rank 0. A collective. Raises FileExistsError if it is there."""
        save_folder(self._policy, self._model_path, Path(folder), rank=self._rank)

    def checkpoint(self, folder: str | Path) -> None:
        """Writes all of the present state into `folder`, which must not be there, in the background. A collective.

        Returns when the state is copied; what is trained from then on is not in it. Name it `step-N` in a folder of checkpoints
        for `checkpoint_folder.newest` to find. Waits for the checkpoint before, and raises `CheckpointFailed` if that failed.
        """
        self._checkpoints.write(Path(folder), self.extra_state())

    def checkpoint_finished(self, timeout_s: float) -> Path | None:
        """The last checkpoint that is whole, after waiting up to `timeout_s` for the one under way. No collective: any rank's
        answer holds for all. Raises `CheckpointFailed`, once, on every rank, for one that failed."""
        return self._checkpoints.finished(timeout_s)

    def restore(self, folder: str | Path) -> None:
        """Goes on from a checkpoint of any number of ranks, also after a fault. A collective.

        Raises `BrokenCheckpoint`, on every rank, before anything was changed, if a byte is not as it was written or the recipe
        trains something else.
        """
        self.load_extra_state(self._checkpoints.restore(Path(folder)))

    def close(self) -> None:
        """Leaves the process group, after the checkpoint under way; the learner cannot be used any more."""
        self._checkpoints.close()
        leave_distributed()
