from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from asyncrl.learner.mismatch import difference, sampled_by

Oracle = Any
"""The fixture's class in conftest, which a test cannot import."""


def test_k3_is_the_one_of_verl(oracle: Oracle) -> None:
    old, behaviour = oracle.inputs["old_logp"], oracle.inputs["rollout_logp"]
    found = difference(old, behaviour, oracle.inputs["mask"].astype(bool))
    assert found.k3 == pytest.approx(float(oracle.golden["verl/offpolicy/k3_kl"]), abs=1e-10)


def test_figures_by_hand() -> None:
    learner = np.array([0.0, -1.0, -2.0, -3.0], dtype=np.float32)
    engine = np.array([0.5, -1.0, -2.25, 7.0], dtype=np.float32)
    found = difference(learner, engine, np.array([True, True, True, False]))
    assert (found.tokens, found.max_abs, found.mean_abs) == (3, 0.5, 0.25)
    assert found.p95_abs == pytest.approx(0.475)
    assert found.k3 == pytest.approx((math.exp(-0.5) - 0.5 + math.exp(0.25) - 1.25) / 3)


def test_only_trainable_tokens_of_rollouts_wholly_of_the_present_version_count_as_mismatch() -> None:
    versions = np.array([3, 4, 4, 4, 4, 4, 5])
    trainable = np.array([True, True, True, False, True, True, True])
    lengths = np.array([2, 3, 1, 1])  # the first spans an update: its second token has keys of version 3
    chosen = sampled_by(4, versions, trainable, lengths)
    assert chosen.tolist() == [False, False, True, False, True, True, False]


def test_an_environment_between_two_turns_of_one_version_changes_nothing() -> None:
    """Its tokens are prefilled by the weights that sample on: all keys are of one version."""
    versions = np.array([4, -1, -1, 4, 3, -1, 4])
    trainable = versions >= 0
    chosen = sampled_by(4, versions, trainable, np.array([4, 3]))
    assert chosen.tolist() == [True, False, False, True, False, False, False]


def test_nothing_to_measure_is_not_zero() -> None:
    found = difference(np.zeros(2), np.zeros(2), np.zeros(2, dtype=bool))
    assert found.tokens == 0 and math.isnan(found.max_abs) and math.isnan(found.k3)
