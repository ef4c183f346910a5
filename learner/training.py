"""One batch's training: what is computed at its start, its minibatches, and what the step says of itself.

    table --> rollouts to train, baselines --divide--> minibatches of micro-batches
          --> proximal, reference, values as the objective needs them (no gradient) --> advantages and returns
          --> for each minibatch: the policy's gradient and step, then the critic's --> figures

Invariants:
- All ranks call `train` with the same table, and every rank has the whole columns: nothing is decided on one rank alone.
- The gradient does not depend on the division into ranks and micro-batches: a loss is a sum over tokens with weights that come
  from the whole minibatch, and a forward pass has whole rollouts.
- What goes with a run from batch to batch (`state_dict`) moves only with a step that was no fault.
Called by `step`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from asyncrl.learner.baselines import Baselines, read_baselines
from asyncrl.learner.batch import Batch, make_microbatches, split_groups
from asyncrl.learner.columns import Columns
from asyncrl.learner.config import CriticConfig, LearnerConfig
from asyncrl.learner.constraint import Constraint
from asyncrl.learner.critic import outputs_of
from asyncrl.learner.critic_step import CriticStep
from asyncrl.learner.descent import Descent
from asyncrl.learner.faults import NormLimits
from asyncrl.learner.metrics import StepMetrics, figures_of
from asyncrl.learner.model import Policy
from asyncrl.learner.objective_needs import needs_of
from asyncrl.learner.passes import whole_column
from asyncrl.learner.policy_step import PolicyStep
from asyncrl.learner.preparation import fresh_columns, with_advantages
from asyncrl.learner.reference import Reference
from asyncrl.learner.rows import MicroBatch
from asyncrl.learner.stopwatch import Stopwatch
from asyncrl.learner.trained import Trained


@dataclass(frozen=True, slots=True)
class Minibatch:
    rows: np.ndarray
    """[n] int64: of the batch."""
    parts: list[MicroBatch]
    """This rank's passes; as many on every rank."""


class Training:
    def __init__(
        self,
        config: LearnerConfig,
        trained: Mapping[str, Trained],
        reference: Reference | None,
        temperature: float,
        stopwatch: Stopwatch,
        device: torch.device,
    ) -> None:
        """Args: `trained`, "policy", and "critic" where the objective has one; `reference`, where it has a KL."""
        self._config, self._objective, self._needs = config, config.objective, needs_of(config.objective)
        self._trained, self._reference, self._temperature = trained, reference, temperature
        self._stopwatch, self._device = stopwatch, device
        policy, critic = trained["policy"], config.critic or CriticConfig()
        assert isinstance(policy.module, Policy)
        self._policy = policy.module
        ratio = config.fault_grad_norm_ratio
        limits = NormLimits(config.fault_grad_norm, ratio, config.max_grad_norm)
        descent = Descent("policy", policy, limits, stopwatch)
        self._policy_step = PolicyStep(self._policy, descent, self._objective, temperature)
        self._critic_step: CriticStep | None = None
        if "critic" in trained:
            limits = NormLimits(0.0, ratio, critic.max_grad_norm)
            descent = Descent("critic", trained["critic"], limits, stopwatch)
            self._critic_step = CriticStep(trained["critic"].module, descent, self._objective, stopwatch)
        self._critic_alone = critic.warmup_steps if "critic" in trained else 0
        self._constraint = Constraint(self._objective.cost) if self._objective.cost is not None else None
        self._batches = 0

    def train(self, table: pa.Table, version: int, start_s: float) -> StepMetrics:
        """Trains on one batch, handed over while `version` was the learner's own. The step began at the stopwatch's `start_s`.

        Raises `LearnerFault`, on every rank alike, or ValueError for a table that is not a batch, or has not what the objective
        needs.
        """
        batch, baselines = read_baselines(table, needed="greedy rollouts" in self._needs.parts)
        minibatches = self._divide(batch)
        policy_trains = self._batches >= self._critic_alone
        columns = self._at_start(batch, baselines, minibatches, version, policy_trains=policy_trains)
        done = [
            self._minibatch(batch, one, columns, first=index == 0, policy_trains=policy_trains)
            for index, one in enumerate(minibatches)
        ]
        seconds = self._stopwatch.now() - start_s
        multiplier = self._constraint.multiplier if self._constraint else float("nan")
        self._count(batch)
        return StepMetrics(
            **{name: float(np.mean([each[name] for each in done])) for name in done[0]},
            **self._optimizer_figures(),
            **figures_of(batch, columns, self._objective, version),
            **self._stopwatch.take(),
            cost_multiplier=multiplier,
            tokens_padded=self._padding(minibatches),
            step_s=seconds,
            tokens_per_s=float(batch.sequences.lengths.sum()) / seconds,
        )

    def state_dict(self) -> dict[str, Any]:
        """What is neither a weight nor an optimizer's: plain numbers, for a checkpoint."""
        constraint = {} if self._constraint is None else {"constraint": self._constraint.state_dict()}
        return {"batches": self._batches, **constraint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if it is of a run with another objective."""
        if self._constraint is not None:
            self._constraint.load_state_dict(state.get("constraint", {}))
        self._batches = int(state["batches"])

    def _divide(self, batch: Batch) -> list[Minibatch]:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        limit, even_length = self._config.tokens_per_microbatch, self._policy.even_length
        return [
            Minibatch(rows, make_microbatches(batch, rows, limit, rank, ranks, even_length))
            for rows in split_groups(batch.group, self._config.minibatches_per_step)
        ]

    def _at_start(
        self,
        batch: Batch,
        baselines: Baselines,
        minibatches: list[Minibatch],
        version: int,
        *,
        policy_trains: bool,
    ) -> Columns:
        """The columns before any step. The first minibatch's proximal logprobs come from its own pass in training, unless they
        are needed before it or there is none."""
        rows = [each.rows for each in minibatches]
        columns = fresh_columns(
            batch, rows, version, self._objective, outputs_of(self._objective), self._device
        )
        every = list(itertools.chain.from_iterable(each.parts for each in minibatches))
        if self._needs.early_proximal or not policy_trains:
            columns.proximal.copy_(self._proximal(every, columns))
        elif "proximal" in self._needs.logprobs and len(minibatches) > 1:
            later = list(itertools.chain.from_iterable(each.parts for each in minibatches[1:]))
            places = batch.sequences.tokens_of(np.concatenate(rows[1:]))
            columns.proximal[places] = self._proximal(later, columns)[places]
        if not policy_trains:
            columns.current.copy_(columns.proximal)
        if self._reference is not None:
            reference, temperature = self._reference, self._temperature
            columns.reference.copy_(
                whole_column(
                    every, lambda p: reference.logprobs(p, temperature), columns.current, self._stopwatch
                )
            )
        if self._critic_step is not None:
            columns.values.copy_(self._critic_step.values(every, batch, columns.values))
        multiplier = self._constraint.multiplier if self._constraint else 0.0
        return with_advantages(columns, batch, baselines, self._objective, multiplier)

    def _proximal(self, parts: list[MicroBatch], columns: Columns) -> torch.Tensor:
        def logprobs(part: MicroBatch) -> torch.Tensor:
            return self._policy.logprobs_no_grad(part, self._temperature)

        return whole_column(parts, logprobs, columns.current, self._stopwatch)

    def _minibatch(
        self, batch: Batch, one: Minibatch, columns: Columns, *, first: bool, policy_trains: bool
    ) -> dict[str, float]:
        nan = float("nan")
        loss, norm, value_loss, critic_norm = nan, nan, nan, nan
        if policy_trains:
            fresh = first and not self._needs.early_proximal
            loss, norm = self._policy_step.minibatch(
                batch, one.rows, one.parts, columns, at_batch_start=fresh
            )
        if self._critic_step is not None:
            value_loss, critic_norm = self._critic_step.minibatch(batch, one.rows, one.parts, columns)
        return {"loss": loss, "grad_norm": norm, "value_loss": value_loss, "critic_grad_norm": critic_norm}

    def _count(self, batch: Batch) -> None:
        if self._constraint is not None:
            self._constraint.update(float(batch.cost.astype(np.float64).mean()))
        self._batches += 1

    def _optimizer_figures(self) -> dict[str, float]:
        critic = self._trained.get("critic")
        return {
            "learning_rate": self._trained["policy"].learning_rate,
            "optimizer_steps": float(self._trained["policy"].steps_taken),
            "critic_learning_rate": float("nan") if critic is None else critic.learning_rate,
        }

    def _padding(self, minibatches: list[Minibatch]) -> float:
        mine = sum(part.padding for one in minibatches for part in one.parts)
        total = torch.tensor(mine, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return float(total)
