"""A batch's columns, as far as they follow from it without a gradient. Pure; called by `training`.

    fresh_columns     from rewards, masks and versions alone
    with_advantages   once proximal, reference and values are there, as far as the objective needs them

Every rank derives the same columns from the same batch, without talking.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from asyncrl.learner.aggregation import token_weights
from asyncrl.learner.baselines import Baselines
from asyncrl.learner.batch import Batch
from asyncrl.learner.columns import Columns
from asyncrl.learner.estimation import Layout, Signal, advantages_and_returns, shaped_rewards
from asyncrl.learner.objective_config import VAPO, Objective
from asyncrl.learner.penalties import kl_estimate


def fresh_columns(
    batch: Batch,
    minibatches: list[np.ndarray],
    version: int,
    objective: Objective,
    outputs: int,
    device: torch.device,
) -> Columns:
    """Args: `minibatches`, the rows of each; `version`, the learner's at hand-over; `outputs`, the critic's, 0 without one."""
    nothing, none = (
        torch.zeros(batch.tokens, device=device),
        torch.zeros((batch.tokens, outputs), device=device),
    )
    return Columns(
        behaviour=torch.tensor(batch.behaviour, device=device),
        proximal=torch.full_like(nothing, torch.nan),
        current=nothing,
        reference=torch.full_like(nothing, torch.nan),
        entropy=nothing.clone(),
        advantages=nothing.clone(),
        weights=_weights(batch, minibatches, objective).to(device),
        imitation=_imitation(batch, minibatches, objective).to(device),
        values=none,
        returns=none.clone(),
        value_weights=_mean_weights(batch, minibatches, batch.trainable).to(device),
        trainable=torch.tensor(batch.trainable, device=device),
        row=torch.from_numpy(batch.sequences.row_of_token()).to(device),
        age=version - torch.tensor(batch.versions, dtype=torch.int64, device=device),
    )


def with_advantages(
    columns: Columns, batch: Batch, baselines: Baselines, objective: Objective, multiplier: float
) -> Columns:
    """Advantages and returns over the whole batch: a minibatch more or less changes none.

    Args: `multiplier`, the cost's; without meaning where none is under a constraint.
    """
    layout = Layout(
        group=torch.from_numpy(batch.group),
        row=torch.from_numpy(batch.sequences.row_of_token()),
        sampled=torch.from_numpy(batch.sampled),
        trainable=torch.tensor(batch.trainable),
    )
    signals, values = _signals(columns, batch, baselines, objective), columns.values.cpu().double()
    advantages, returns = advantages_and_returns(objective, signals, multiplier, layout, values)
    device = columns.advantages.device
    return dataclasses.replace(
        columns, advantages=advantages.float().to(device), returns=returns.float().to(device)
    )


def kl_of_sampled(columns: Columns, batch: Batch, objective: Objective) -> torch.Tensor:
    """[tokens] float64 on the CPU: KL to the reference at batch start, 0 where nothing was sampled or there is no reference."""
    kl = torch.zeros(batch.tokens, dtype=torch.float64)
    if objective.kl is not None:
        sampled = torch.from_numpy(batch.sampled)
        proximal, reference = columns.proximal.cpu().double(), columns.reference.cpu().double()
        kl[sampled] = kl_estimate(proximal[sampled], reference[sampled], objective.kl.estimator)
    return kl


def _signals(columns: Columns, batch: Batch, baselines: Baselines, objective: Objective) -> list[Signal]:
    """The reward's, and the cost's where that is under a constraint.

    Both carry the KL, with opposite signs, as in Safe RLHF (arXiv:2310.12773): so its pull does not depend on the multiplier.
    The paper halves the coefficient in each; here it is the one that the recipe says.
    """
    place = objective.kl if objective.kl is not None and objective.kl.place == "reward" else None
    kl = torch.zeros(batch.tokens, dtype=torch.float64)
    if place is not None:
        kl = kl_of_sampled(columns, batch, objective)
    coefficient = 0.0 if place is None else place.coefficient
    signals = [
        Signal(
            earned=_shaped(objective, batch.reward, batch.sequences.answer_lengths),
            greedy=_shaped(objective, baselines.reward, baselines.tokens),
            kl=kl,
            kl_coefficient=coefficient,
        )
    ]
    if objective.cost is not None:
        costs, greedy = (torch.from_numpy(c.astype(np.float64)) for c in (batch.cost, baselines.cost))
        signals.append(Signal(earned=costs, greedy=greedy, kl=kl, kl_coefficient=-coefficient))
    return signals


def _shaped(objective: Objective, rewards: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    return shaped_rewards(objective, torch.from_numpy(rewards.astype(np.float64)), torch.from_numpy(lengths))


def _weights(batch: Batch, minibatches: list[np.ndarray], objective: Objective) -> torch.Tensor:
    """[tokens] float32: each minibatch is a loss of its own."""
    row, trainable = torch.from_numpy(batch.sequences.row_of_token()), torch.tensor(batch.trainable)
    weights = torch.zeros(batch.tokens)
    for rows in minibatches:
        own = torch.from_numpy(batch.sequences.tokens_of(rows))
        weights[own] = token_weights(
            objective.aggregation, trainable[own], row[own], objective.divisor_tokens
        )
    return weights


def _imitation(batch: Batch, minibatches: list[np.ndarray], objective: Objective) -> torch.Tensor:
    """[tokens] float32: `imitation` / trainable tokens of the minibatch's rollouts that were right, on those tokens."""
    if not isinstance(objective, VAPO):
        return torch.zeros(batch.tokens)
    right = batch.reward > objective.right_above
    chosen = batch.trainable & right[batch.sequences.row_of_token()]
    return objective.imitation * _mean_weights(batch, minibatches, chosen)


def _mean_weights(batch: Batch, minibatches: list[np.ndarray], chosen: np.ndarray) -> torch.Tensor:
    """[tokens] float32: 1 / chosen tokens of the minibatch, on those."""
    weights = torch.zeros(batch.tokens)
    for rows in minibatches:
        own = batch.sequences.tokens_of(rows)
        weights[own[chosen[own]]] = 1 / max(int(chosen[own].sum()), 1)
    return weights
