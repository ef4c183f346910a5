"""A batch's columns before any forward pass: what follows from rewards, masks and versions alone. Pure; called by `step`.

Every rank derives the same columns from the same batch, without talking.
"""

from __future__ import annotations

import numpy as np
import torch

from asyncrl.learner.aggregation import token_weights
from asyncrl.learner.batch import Batch
from asyncrl.learner.columns import Columns
from asyncrl.learner.objective import shaped_rewards, token_advantages
from asyncrl.learner.objective_config import Objective


def fresh_columns(
    batch: Batch, minibatches: list[np.ndarray], version: int, objective: Objective, device: torch.device
) -> Columns:
    """Args: `minibatches`, the rows of each; `version`, the learner's at hand-over."""
    nothing = torch.zeros(batch.tokens, device=device)
    return Columns(
        behaviour=torch.tensor(batch.behaviour, device=device),
        proximal=torch.full_like(nothing, torch.nan),
        current=nothing,
        entropy=nothing.clone(),
        advantages=_advantages(batch, objective).float().to(device),
        weights=_weights(batch, minibatches, objective).to(device),
        trainable=torch.tensor(batch.trainable, device=device),
        row=torch.from_numpy(batch.sequences.row_of_token()).to(device),
        age=version - torch.tensor(batch.versions, dtype=torch.int64, device=device),
    )


def _advantages(batch: Batch, objective: Objective) -> torch.Tensor:
    """[tokens] float64, over the whole batch: a minibatch more or less changes none."""
    lengths = torch.from_numpy(batch.sequences.answer_lengths)
    rewards = shaped_rewards(objective, torch.from_numpy(batch.reward.astype(np.float64)), lengths)
    return token_advantages(
        objective,
        rewards,
        torch.from_numpy(batch.group),
        torch.from_numpy(batch.sequences.row_of_token()),
        torch.from_numpy(batch.sampled),
        torch.tensor(batch.trainable),
    )


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
