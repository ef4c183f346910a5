"""Surrogates, weights and aggregations together against other projects' losses and gradients, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from asyncrl.learner.aggregation import token_weights, weighted_sum
from asyncrl.learner.corrections import importance_ratio, truncated
from asyncrl.learner.surrogates import (
    clip_acts,
    clipped_surrogate,
    clipped_weight_surrogate,
    log_ratio,
    sequence_log_ratio,
    weight_is_clipped,
)

Oracle = Any
"""The fixture's class in conftest, which a test cannot import."""
Loss = Callable[[Oracle, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(oracle, current, proximal, advantages) -> [tokens]"""


def clipped(low: float, high: float, dual: float | None = None) -> Loss:
    return lambda _, current, proximal, a: clipped_surrogate(log_ratio(current, proximal), a, low, high, dual)


def gspo(oracle: Oracle, current: torch.Tensor, proximal: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    ratio = sequence_log_ratio(current, proximal, oracle.mask, oracle.row)
    return clipped_surrogate(ratio, a, 3e-2, 4e-2)


def cispo(low: float, high: float) -> Loss:
    return lambda _, current, proximal, a: clipped_weight_surrogate(
        log_ratio(current, proximal), current, a, low, high
    )


CASES: list[tuple[str, Loss, str, str | None]] = [
    ("verl/loss/vanilla[.2,.28,c3]/token-mean", clipped(0.2, 0.28, 3.0), "token_mean", None),
    ("verl/loss/vanilla[.2,.28,c3]/seq-mean-token-sum", clipped(0.2, 0.28, 3.0), "sequence_sum", None),
    ("verl/loss/vanilla[.2,.28,c3]/seq-mean-token-mean", clipped(0.2, 0.28, 3.0), "sequence_mean", None),
    ("verl/loss/vanilla[.2,.28,c3]/seq-mean-token-sum-norm", clipped(0.2, 0.28, 3.0), "fixed_divisor", None),
    ("verl/loss/vanilla[.2,.2,c3]/token-mean", clipped(0.2, 0.2, 3.0), "token_mean", None),
    ("verl/loss/vanilla[.2,.28,c=1e9 (no dual clip)]/token-mean", clipped(0.2, 0.28), "token_mean", None),
    ("verl/loss/vanilla[.2,.28,no dual]/seq-mean-token-mean", clipped(0.2, 0.28), "sequence_mean", None),
    ("verl/loss/vanilla[.2,.28,no dual]/seq-mean-token-sum-norm", clipped(0.2, 0.28), "fixed_divisor", None),
    ("verl/loss/gspo[3e-2,4e-2]/seq-mean-token-mean", gspo, "sequence_mean", None),
    ("verl/loss/gspo[3e-2,4e-2]/token-mean", gspo, "token_mean", None),
    ("verl/loss/cispo[.2,.28]/token-mean", cispo(0.2, 0.28), "token_mean", None),
    ("verl/loss/cispo[1.0,4.0]/token-mean", cispo(1.0, 4.0), "token_mean", None),
    ("verl/loss/decoupled vanilla x token-TIS2/token-mean", clipped(0.2, 0.28, 3.0), "token_mean", "token"),
    (
        "verl/loss/decoupled vanilla(no dual) x token-TIS2/token-mean",
        clipped(0.2, 0.28),
        "token_mean",
        "token",
    ),
    ("verl/loss/decoupled vanilla x seq-TIS2/token-mean", clipped(0.2, 0.28, 3.0), "token_mean", "sequence"),
    ("verl/loss/gspo x token-TIS2", gspo, "sequence_mean", "token"),
    ("verl/loss/cispo x token-TIS2", cispo(0.2, 0.28), "token_mean", "token"),
    ("trl/loss/grpo/token", clipped(0.2, 0.28), "sequence_mean", None),
    ("trl/loss/bnpo/token", clipped(0.2, 0.28), "token_mean", None),
    ("trl/loss/dr_grpo/token", clipped(0.2, 0.28), "fixed_divisor", None),
    ("trl/loss/dapo/token", clipped(0.2, 0.28), "token_mean", None),
    ("trl/loss/grpo/sequence(gspo)[3e-2,4e-2]", gspo, "sequence_mean", None),
    ("trl/loss/cispo[eps_high=5.0 absolute]", cispo(1.0, 4.0), "token_mean", None),
    ("trl/loss/dapo x token-TIS2", clipped(0.2, 0.28), "token_mean", "token"),
    ("areal/loss/ppo_actor[.2,.28]", clipped(0.2, 0.28), "token_mean", None),
    ("areal/loss/ppo_actor[.2,.28,c3]", clipped(0.2, 0.28, 3.0), "token_mean", None),
    ("areal/loss/ppo_actor decoupled clamp token [0,2]", clipped(0.2, 0.28), "token_mean", "token"),
    ("areal/loss/gspo[3e-2,4e-2]", gspo, "token_mean", None),
    ("areal/loss/cispo[1.0,4.0]", cispo(1.0, 4.0), "token_mean", None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "loss_of", "aggregation", "level"), CASES, ids=[case[0] for case in CASES])
def test_other_projects_have_the_same_loss_and_gradient(
    oracle: Oracle, name: str, loss_of: Loss, aggregation: Any, level: Any, dtype: torch.dtype
) -> None:
    current = oracle.flat("logp", dtype).requires_grad_()
    proximal, behaviour = oracle.flat("old_logp", dtype), oracle.flat("rollout_logp", dtype)
    losses = loss_of(oracle, current, proximal, oracle.per_token("adv_seq", dtype))
    if level is not None:
        ratio = importance_ratio(proximal, behaviour, oracle.mask, oracle.row, level)
        losses = truncated(ratio, 2.0) * losses
    divisor = 12 if aggregation == "fixed_divisor" else None
    loss = weighted_sum(losses, token_weights(aggregation, oracle.mask, oracle.row, divisor).to(dtype))
    loss.backward()
    assert loss.item() == pytest.approx(
        float(oracle.golden[name]), abs=1e-5 if dtype == torch.float32 else 1e-7
    )
    assert current.grad is not None
    np.testing.assert_allclose(current.grad.numpy(), oracle.want(name + "#grad").numpy(), atol=1e-5)


def test_the_two_clips_are_where_they_are_said_to_be() -> None:
    ratio = torch.tensor([1.27, 1.29, 0.81, 0.79, 1.29, 0.79, 2.9, 3.1], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    for dual, last in ((None, False), (3.0, True)):
        current = ratio.log().requires_grad_()
        clipped_surrogate(current, advantages, 0.2, 0.28, dual).sum().backward()
        assert current.grad is not None
        cut = torch.tensor([False, True, False, True, False, False, False, last])
        torch.testing.assert_close(current.grad == 0, cut)
        torch.testing.assert_close(clip_acts(current.detach(), advantages, 0.2, 0.28, dual), cut)


def test_the_dual_clip_bounds_the_loss() -> None:
    ratio = torch.tensor([2.0, 50.0, 50.0], dtype=torch.float64).log()
    losses = clipped_surrogate(ratio, torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64), 0.2, 0.28, 3.0)
    assert losses.tolist() == pytest.approx([2.0, 3.0, -1.28])


def test_cispo_keeps_every_gradient_and_bounds_its_weight() -> None:
    current = torch.tensor([0.1, 6.0, 0.5], dtype=torch.float64).log().requires_grad_()
    ratio = current.detach()
    clipped_weight_surrogate(ratio, current, torch.ones(3, dtype=torch.float64), 1.0, 4.0).sum().backward()
    assert current.grad is not None and (-current.grad).tolist() == pytest.approx([0.1, 5.0, 0.5])
    assert weight_is_clipped(ratio, 1.0, 4.0).tolist() == [False, True, False]
    assert weight_is_clipped(ratio, 0.2, 0.28).tolist() == [True, True, True]


def test_a_rollout_s_ratio_is_the_geometric_mean_over_its_trainable_tokens() -> None:
    current = torch.tensor([0.0, -1.0, -3.0, 9.0, -0.5], dtype=torch.float64, requires_grad=True)
    proximal = torch.tensor([-1.0, -1.5, -3.0, 0.0, -1.5], dtype=torch.float64)
    mask = torch.tensor([True, True, True, False, True])
    ratio = sequence_log_ratio(current, proximal, mask, torch.tensor([0, 0, 0, 0, 2]))
    assert ratio.tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5, 1.0])
    (ratio * mask).sum().backward()
    assert current.grad is not None and current.grad.tolist() == [1, 1, 1, 0, 1]


def test_the_proximal_policy_is_a_constant() -> None:
    proximal = torch.zeros(2, requires_grad=True)
    current = torch.zeros(2)
    assert not log_ratio(current, proximal).requires_grad
    assert not sequence_log_ratio(current, proximal, torch.ones(2).bool(), torch.tensor([0, 1])).requires_grad
