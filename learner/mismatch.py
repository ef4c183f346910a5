"""How far the engines' logprobs are from the learner's. Measured in every step, on all tokens of the batch at once.

`mismatch`: trainable tokens of rollouts that the learner's present version sampled as a whole. Same weights, so the
difference is numerics or a bug.
`drift`: all sampled tokens; older versions count too, so it is off-policyness and mismatch together.
What the environment gave has no logprob and is in neither.
Called by `step`. The columns are already whole on every rank, so the figures are exact, the percentile too.
"""

from __future__ import annotations

import msgspec
import numpy as np


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Of d = log pi_learner - log pi_engine over some tokens. Without tokens all are nan: unknown, not zero."""

    tokens: int
    max_abs: float
    mean_abs: float
    p95_abs: float
    k3: float
    """mean(exp(d) - 1 - d): estimates KL(engine || learner), never negative (Schulman 2020, "Approximating KL divergence")."""


def difference(learner: np.ndarray, engine: np.ndarray, chosen: np.ndarray) -> Difference:
    """Args: logprobs [tokens], [tokens]; `chosen` [tokens] bool. Computed in float64."""
    d = learner[chosen].astype(np.float64) - engine[chosen]
    if not len(d):
        nan = float("nan")
        return Difference(tokens=0, max_abs=nan, mean_abs=nan, p95_abs=nan, k3=nan)
    size = np.abs(d)
    return Difference(
        tokens=len(d),
        max_abs=float(size.max()),
        mean_abs=float(size.mean()),
        p95_abs=float(np.quantile(size, 0.95)),
        k3=float((np.expm1(d) - d).mean()),
    )


def sampled_by(version: int, versions: np.ndarray, trainable: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[tokens] bool: trainable tokens of rollouts that `version` sampled from their first token on.

    A rollout that goes on across an update keeps the KV cache that older weights wrote (`keep`), so no single policy
    gives the logprobs of its later tokens: they say nothing of the engine's numerics, and count as drift.

    Args: `versions`, `trainable` [tokens]; `lengths` [rows] answer tokens of each rollout, which is never 0.
    """
    first = versions[np.cumsum(lengths) - lengths]
    chosen: np.ndarray = trainable & (versions == version) & np.repeat(first == version, lengths)
    return chosen
