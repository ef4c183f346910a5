"""What one training step says of itself, and how it is computed from whole-batch columns.

Every rank has the whole columns (see `batch`), so every rank computes the same figures. Called by `training`.
"""

from __future__ import annotations

import msgspec
import numpy as np
import torch

from asyncrl.learner.batch import Batch
from asyncrl.learner.columns import Columns
from asyncrl.learner.mismatch import difference, sampled_by
from asyncrl.learner.objective import clip_bites, correction_acts, correction_weights
from asyncrl.learner.objective_config import Objective
from asyncrl.learner.penalties import kl_estimate

ROUNDING = 1e-8
"""An advantage of at most that is 0: rewards that are all equal may differ from their mean in the last bit."""


class StepMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one batch. Logprobs in nats; `nan` where there was nothing to measure."""

    loss: float
    """Mean over the minibatches, each before its own optimizer step; nan where the critic alone trained, as `grad_norm`."""
    grad_norm: float
    """Before clipping, mean over the minibatches."""
    learning_rate: float
    optimizer_steps: float
    value_loss: float
    """Of the critic, mean over the minibatches; nan without one, as the three below."""
    critic_grad_norm: float
    critic_learning_rate: float
    explained_variance: float
    """1 - Var(return - value) / Var(return) over trainable tokens, values at batch start: 1 is a critic that knows, 0 one that
    might as well say the mean."""
    kl_reference: float
    """Mean k3 estimate of KL(learner || reference) over trainable tokens, at their own pass; nan without a reference."""
    cost_mean: float
    """Of a rollout."""
    cost_multiplier: float
    """That acted in this step; nan without a constraint."""
    reward_mean: float
    reward_std: float
    advantage_mean: float
    """Over trainable tokens."""
    advantage_std: float
    groups_without_signal: float
    """Fraction of groups whose advantages are all 0."""
    entropy: float
    """Estimate: -mean logprob of the trainable tokens under the learner at batch start."""
    clip_fraction: float
    """Of trainable tokens, those whose gradient the clip cut off (`cispo`: whose ratio in it the clip bounded)."""
    importance_mean: float
    """Of the correction's weights; 1 with none."""
    importance_capped: float
    """Fraction of trainable tokens whose importance weight is at the cap, or masked."""
    mismatch_tokens: float
    mismatch_max: float
    mismatch_mean: float
    mismatch_p95: float
    mismatch_k3: float
    drift_max: float
    drift_mean: float
    drift_p95: float
    drift_k3: float
    tokens_trained: float
    tokens_masked: float
    """Sampled tokens kept as context only."""
    tokens_environment: float
    """Answer tokens that the environment gave: context as well."""
    tokens_padded: float
    tokens_total: float
    """Prompt and answer tokens, without padding."""
    response_length_mean: float
    response_length_max: float
    forward_s: float
    backward_s: float
    optimizer_s: float
    gather_s: float
    """Spent in gathering weights since the step before."""
    step_s: float
    tokens_per_s: float
    """tokens_total / step_s."""


def figures_of(batch: Batch, columns: Columns, objective: Objective, version: int) -> dict[str, float]:
    """All that follows from the columns once the batch was trained. `version` is that at hand-over."""
    return {
        **learning_figures(batch, columns, objective),
        **part_figures(batch, columns),
        **mismatch_figures(batch, columns.proximal.cpu().numpy(), version),
        **size_figures(batch),
    }


def learning_figures(batch: Batch, columns: Columns, objective: Objective) -> dict[str, float]:
    """Rewards, advantages, policy, correction and clip."""
    kept = columns.trainable
    advantages = columns.advantages[kept]
    signal = np.zeros(int(batch.group.max()) + 1, dtype=bool)
    nonzero = columns.advantages.abs().cpu().numpy() > ROUNDING
    np.logical_or.at(signal, batch.group[batch.sequences.row_of_token()], nonzero & batch.sampled)
    return {
        "reward_mean": float(batch.reward.mean()),
        "reward_std": float(batch.reward.std()),
        "advantage_mean": _mean(advantages),
        "advantage_std": float(advantages.std(correction=0)) if len(advantages) else float("nan"),
        "groups_without_signal": float(1 - signal.mean()),
        "entropy": -_mean(columns.proximal[kept & ~columns.proximal.isnan()]),
        "clip_fraction": _mean(clip_bites(objective, columns)[kept]),
        "importance_mean": _mean(correction_weights(objective, columns)[kept]),
        "importance_capped": _mean(correction_acts(objective, columns)[kept]),
    }


def part_figures(batch: Batch, columns: Columns) -> dict[str, float]:
    """Of critic, reference and costs."""
    kept = columns.trainable
    unexplained = float("nan")
    if columns.values.shape[1] and bool(kept.any()):
        returns, values = columns.returns[kept, 0].double(), columns.values[kept, 0].double()
        spread = returns.var(correction=0)
        unexplained = float((returns - values).var(correction=0) / spread) if spread > 0 else float("nan")
    kl = kl_estimate(columns.current[kept].double(), columns.reference[kept].double(), "k3")
    return {
        "explained_variance": 1 - unexplained,
        "kl_reference": _mean(kl),
        "cost_mean": float(batch.cost.mean()),
    }


def mismatch_figures(batch: Batch, proximal: np.ndarray, version: int) -> dict[str, float]:
    """`mismatch_*` and `drift_*`; see `mismatch`. The learner's logprobs are those at batch start, NaN where none were computed:
    such tokens are in no figure."""
    lengths, known = batch.sequences.answer_lengths, ~np.isnan(proximal)
    fresh = sampled_by(version, batch.versions, batch.trainable, lengths)
    same = difference(proximal, batch.behaviour, fresh & known)
    every = difference(proximal, batch.behaviour, batch.sampled & known)
    return {
        "mismatch_tokens": float(same.tokens),
        "mismatch_max": same.max_abs,
        "mismatch_mean": same.mean_abs,
        "mismatch_p95": same.p95_abs,
        "mismatch_k3": same.k3,
        "drift_max": every.max_abs,
        "drift_mean": every.mean_abs,
        "drift_p95": every.p95_abs,
        "drift_k3": every.k3,
    }


def size_figures(batch: Batch) -> dict[str, float]:
    trained, sampled = int(batch.trainable.sum()), int(batch.sampled.sum())
    lengths = batch.sequences.answer_lengths
    return {
        "tokens_trained": float(trained),
        "tokens_masked": float(sampled - trained),
        "tokens_environment": float(batch.tokens - sampled),
        "tokens_total": float(batch.sequences.lengths.sum()),
        "response_length_mean": float(lengths.mean()),
        "response_length_max": float(lengths.max()),
    }


def _mean(values: torch.Tensor) -> float:
    return float(values.double().mean()) if len(values) else float("nan")
