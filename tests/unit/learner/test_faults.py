"""Which gradient is a fault, and what a fault says of itself."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from gathered import gathered
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.buffer.schema import BATCH
from asyncrl.learner.batch import read_table
from asyncrl.learner.faults import (
    NORMS_BEFORE_A_MEDIAN,
    REMEMBERED_NORMS,
    Culprits,
    ExplodingGradient,
    NonFiniteLoss,
    NonFiniteWeights,
    NormHistory,
    NormLimits,
    check_norm,
    culprits_of,
    fault_line,
)
from asyncrl.learner.objective_config import GRPO
from asyncrl.learner.step import Learner

Open = Callable[..., Learner]
Tables = Callable[..., pa.Table]
CULPRITS = Culprits((7, 9), ((3, 4), None))
LIMITS = NormLimits(absolute=0.0, ratio=100.0, clip=1.0)


def _history(*norms: float) -> NormHistory:
    history = NormHistory()
    history.remember(norms)
    return history


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_a_fault_whatever_the_limits(norm: float) -> None:
    with pytest.raises(NonFiniteLoss, match=f"gradient norm is {norm}: rollouts 7"):
        check_norm(
            "policy", norm, _history(), NormLimits(absolute=0.0, ratio=0.0, clip=1.0), lambda: CULPRITS
        )


def test_the_absolute_limit_holds_from_the_first_step() -> None:
    limits = NormLimits(absolute=50.0, ratio=0.0, clip=1.0)
    assert _history().verdict(50.0, limits) is None
    with pytest.raises(ExplodingGradient, match=r"51, past fault_grad_norm = 50: roll"):
        check_norm("policy", 51.0, _history(), limits, lambda: CULPRITS)


def test_the_ratio_waits_for_a_median() -> None:
    few, enough = [2.0] * (NORMS_BEFORE_A_MEDIAN - 1), [2.0] * NORMS_BEFORE_A_MEDIAN
    assert _history(*few).verdict(1e6, LIMITS) is None
    assert _history(*enough).verdict(200.0, LIMITS) is None
    verdict = _history(*enough).verdict(201.0, LIMITS)
    assert verdict is not None and "fault_grad_norm_ratio = 100 times 2" in verdict


def test_after_steps_without_signal_a_usual_gradient_is_none() -> None:
    quiet = _history(*[0.0] * 20, *[1e-7] * 20)
    assert quiet.verdict(99.0, LIMITS) is None
    assert quiet.verdict(101.0, LIMITS) is not None


@given(st.lists(st.floats(0, 10), max_size=200), st.floats(0, 100))
def test_norms_near_the_usual_are_never_faults(norms: list[float], norm: float) -> None:
    history = _history(*norms)
    assert len(history.recent) == min(len(norms), REMEMBERED_NORMS)
    assert history.verdict(norm, LIMITS) is None


@given(st.lists(st.floats(0, 1e3), min_size=NORMS_BEFORE_A_MEDIAN), st.floats(0, 1e9), st.floats(1, 1e6))
def test_a_larger_norm_is_no_better(norms: list[float], norm: float, factor: float) -> None:
    history = _history(*norms)
    if history.verdict(norm, LIMITS) is not None:
        assert history.verdict(norm * factor, LIMITS) is not None


def test_a_fault_travels_pickled_and_as_text() -> None:
    """Ray pickles an actor's exception, and shows it within the text of its own."""
    fault = ExplodingGradient("gradient norm is 51", Culprits(tuple(range(100, 112)), ((3, 4),) * 12))
    again = pickle.loads(pickle.dumps(fault))
    assert type(again) is ExplodingGradient
    assert again.rollouts == tuple(range(100, 112)) and again.versions == ((3, 4),) * 12
    text = (
        f"ray::Learner.train() (pid=7)\n  File x.py\nasyncrl.learner.faults.ExplodingGradient: {again}\nmore"
    )
    line = fault_line(text)
    assert line == str(fault) == str(again)
    assert line.endswith("106 (versions 3-4), 107 (versions 3-4) and 4 more")
    assert fault_line("ValueError: learner batch has no rows") is None


def test_culprits_have_the_versions_of_their_sampled_tokens(make_table: Tables) -> None:
    batch = read_table(make_table(groups=2, rollouts=3))
    found = culprits_of(batch, np.array([1, 4]))
    assert found.rollouts == (101, 104)
    starts = batch.sequences.answer_starts
    for row, span in zip((1, 4), found.versions, strict=True):
        own = batch.versions[starts[row] : starts[row + 1]]
        assert span == (own.min(), own.max())
    assert "no sampled tokens" in str(CULPRITS)


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    return gathered(learner, learner.plan(10_000))


def _rewarded(table: pa.Table, reward: float) -> pa.Table:
    column = pa.array([reward * (i % 3) for i in range(table.num_rows)], BATCH.field("reward").type)
    return table.set_column(table.schema.get_field_index("reward"), BATCH.field("reward"), column)


def test_a_gradient_far_above_the_usual_takes_no_step(learner: Open, make_table: Tables) -> None:
    one = learner(objective=GRPO(normalise_std=False), fault_grad_norm_ratio=50.0)
    for seed in range(NORMS_BEFORE_A_MEDIAN):
        one.train(make_table(seed=seed), 4)
    before, steps = _weights(one), one.trained["policy"].steps_taken
    with pytest.raises(
        ExplodingGradient, match=r"policy: gradient norm is .* rollouts 100 .* and 8 more$"
    ) as caught:
        one.train(_rewarded(make_table(), 1e4), 4)
    assert len(caught.value.rollouts) == 16
    assert all(torch.equal(before[name], tensor) for name, tensor in _weights(one).items())
    assert one.trained["policy"].steps_taken == steps
    one.train(make_table(), 4)  # nothing of that gradient is left
    assert one.trained["policy"].steps_taken == steps + 1


def test_a_limit_of_the_recipe_s_own(learner: Open, make_table: Tables) -> None:
    one = learner(fault_grad_norm=1e-6)
    before = _weights(one)
    with pytest.raises(ExplodingGradient, match="past fault_grad_norm = 1e-06"):
        one.train(make_table(), 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in _weights(one).items())


def test_weights_that_a_step_broke_are_a_fault_and_a_checkpoint_mends_them(
    learner: Open, make_table: Tables, tmp_path: Path
) -> None:
    one = learner(learning_rate=1e39)
    before = _weights(one)
    one.checkpoint(tmp_path / "step-0")
    with pytest.raises(NonFiniteWeights, match="weights are not finite after optimizer step 1: rollouts 100"):
        one.train(make_table(), 4)
    one.restore(one.checkpoint_finished(60))
    assert all(torch.equal(before[name], tensor) for name, tensor in _weights(one).items())
    assert one.trained["policy"].steps_taken == 0
