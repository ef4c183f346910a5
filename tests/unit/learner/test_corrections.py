from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.learner.corrections import importance_ratio, interpolated, masked, truncated

Oracle = Any
"""The fixture's class in conftest, which a test cannot import."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("level", "how", "name"),
    [
        ("token", (None, 2.0), "verl/rollout_is/token/TIS2.0"),
        ("sequence", (None, 2.0), "verl/rollout_is/sequence/TIS2.0"),
        ("token", (0.5, 2.0), "verl/rollout_is/token/IcePop.5_2"),
        ("sequence", (0.5, 2.0), "verl/rollout_is/sequence/IcePop.5_2"),
        ("token", (None, 3.0), "trl/vllm_is/token_truncate(C=3)"),
        ("token", (0.0, 3.0), "trl/vllm_is/token_mask(C=3)"),
    ],
)
def test_other_projects_have_the_same_weights(
    oracle: Oracle, level: Any, how: tuple[float | None, float], name: str, dtype: torch.dtype
) -> None:
    proximal, behaviour = oracle.flat("old_logp", dtype), oracle.flat("rollout_logp", dtype)
    ratio = importance_ratio(proximal, behaviour, oracle.mask, oracle.row, level)
    ours = truncated(ratio, how[1]) if how[0] is None else masked(ratio, how[0], how[1])
    kept = oracle.mask
    torch.testing.assert_close(ours[kept].double(), oracle.want(name)[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_trl_has_the_same_weights_of_whole_rollouts(oracle: Oracle, mode: str) -> None:
    ratio = importance_ratio(
        oracle.flat("old_logp"), oracle.flat("rollout_logp"), oracle.mask, oracle.row, "sequence"
    )
    ours = truncated(ratio, 3.0) if mode == "truncate" else masked(ratio, 0.0, 3.0)
    theirs = torch.from_numpy(oracle.golden[f"trl/vllm_is/sequence_{mode}(C=3)"])[:, 0]
    torch.testing.assert_close(ours, theirs[oracle.row], atol=1e-7, rtol=1e-7)


def test_weights_are_constants() -> None:
    proximal = torch.zeros(3, requires_grad=True)
    row, mask = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    for level in ("token", "sequence"):
        assert not importance_ratio(proximal, torch.zeros(3), mask, row, level).requires_grad  # type: ignore[arg-type]
    assert not interpolated(proximal, proximal, torch.ones(3)).requires_grad


LOGPROBS = st.floats(-6, 0)
ROLLOUTS = st.lists(
    st.lists(st.tuples(LOGPROBS, LOGPROBS, st.booleans()), max_size=5), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(ROLLOUTS)
def test_a_rollout_s_ratio_is_the_product_over_its_trainable_tokens(
    rollouts: list[list[tuple[float, float, bool]]],
) -> None:
    flat = [(i, *token) for i, each in enumerate(rollouts) for token in each]
    row = torch.tensor([i for i, *_ in flat], dtype=torch.int64)
    proximal, behaviour = (torch.tensor([t[k] for t in flat], dtype=torch.float64) for k in (1, 2))
    mask = torch.tensor([t[3] for t in flat], dtype=torch.bool)
    found = importance_ratio(proximal, behaviour, mask, row, "sequence")
    for i, each in enumerate(rollouts):
        product = torch.tensor(1.0, dtype=torch.float64)
        for p, b, kept in each:
            product = product * torch.tensor(p - b, dtype=torch.float64).exp() if kept else product
        torch.testing.assert_close(found[row == i], product.expand(len(each)))


def test_masking_leaves_the_ratio_within_its_bounds_alone() -> None:
    ratio = torch.tensor([0.49, 0.5, 1.0, 5.0, 5.01, torch.inf, torch.nan])
    found = masked(ratio, 0.5, 5.0)
    assert found[:6].tolist() == [0.0, 0.5, 1.0, 5.0, 0.0, 0.0]
    assert found[6].isnan()


def test_without_a_cap_the_ratio_is_the_weight() -> None:
    ratio = torch.tensor([0.1, 100.0])
    assert torch.equal(truncated(ratio, None), ratio)
    assert truncated(ratio, 2.0).tolist() == pytest.approx([0.1, 2.0])


def test_the_interpolated_policy_is_one_version_before_the_learner_s() -> None:
    behaviour, current = torch.full((5,), -4.0), torch.full((5,), -2.0)
    found = interpolated(current, behaviour, torch.tensor([0, 1, 2, 4, -1]))
    assert found.tolist() == pytest.approx([-4.0, -4.0, -3.0, -2.5, -4.0])
