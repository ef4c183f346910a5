from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from asyncrl.learner.objective import clip_acts, clipped_surrogate, importance_weights, token_mean

ORACLE = Path(__file__).parents[2] / "data" / "objectives.npz"


@pytest.fixture(scope="module")
def oracle() -> Iterator[dict[str, np.ndarray]]:
    with np.load(ORACLE) as file:
        yield dict(file)


def _inputs(oracle: dict[str, np.ndarray]) -> tuple[torch.Tensor, ...]:
    """current, proximal, behaviour, advantages, mask: [13, 12] each, float64."""
    mask = torch.from_numpy(oracle["mask"]).bool()
    advantages = torch.from_numpy(oracle["adv_seq"])[:, None] * mask
    names = ("logp", "old_logp", "rollout_logp")
    current, proximal, behaviour = (torch.from_numpy(oracle[name]) for name in names)
    return current.requires_grad_(), proximal, behaviour, advantages, mask


@pytest.mark.parametrize(
    ("capped", "name", "tolerance"),
    [
        (False, "verl/loss/vanilla[.2,.28,c=1e9 (no dual clip)]/token-mean", 1e-12),
        (True, "verl/loss/decoupled vanilla(no dual) x token-TIS2/token-mean", 1e-12),
        (False, "trl/loss/dapo/token", 1e-8),
        (True, "trl/loss/dapo x token-TIS2", 1e-8),
    ],
)
def test_other_projects_have_the_same_loss_and_gradient(
    oracle: dict[str, np.ndarray], capped: bool, name: str, tolerance: float
) -> None:
    current, proximal, behaviour, advantages, mask = _inputs(oracle)
    losses = clipped_surrogate(current, proximal, advantages, 0.2, 0.28)
    if capped:
        losses = losses * importance_weights(proximal, behaviour, 2.0)
    loss = token_mean(losses, mask, int(mask.sum()))
    loss.backward()
    assert loss.item() == pytest.approx(float(oracle[name]), abs=tolerance)
    assert current.grad is not None
    np.testing.assert_allclose(current.grad.numpy(), oracle[name + "#grad"], atol=tolerance)


def test_other_projects_have_the_same_importance_weights(oracle: dict[str, np.ndarray]) -> None:
    _, proximal, behaviour, _, mask = _inputs(oracle)
    ours = importance_weights(proximal, behaviour, 2.0)
    np.testing.assert_allclose((ours * mask).numpy(), oracle["verl/rollout_is/token/TIS2.0"], atol=1e-12)


def test_importance_weights_are_constants() -> None:
    proximal = torch.zeros(3, requires_grad=True)
    assert not importance_weights(proximal, torch.zeros(3), 2.0).requires_grad


def test_the_two_clips_are_where_they_are_said_to_be() -> None:
    ratio = torch.tensor([1.27, 1.29, 0.81, 0.79, 1.29, 0.79], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    current = ratio.log().requires_grad_()
    proximal = torch.zeros_like(ratio)
    clipped_surrogate(current, proximal, advantages, 0.2, 0.28).sum().backward()
    assert current.grad is not None
    cut = torch.tensor([False, True, False, True, False, False])
    torch.testing.assert_close(current.grad == 0, cut)
    torch.testing.assert_close(clip_acts(current.detach(), proximal, advantages, 0.2, 0.28), cut)


def test_the_parts_of_a_token_mean_add_up_to_the_whole() -> None:
    losses = torch.linspace(-1, 2, 11, dtype=torch.float64)
    mask = torch.arange(11) % 3 != 0
    count = int(mask.sum())
    whole = token_mean(losses, mask, count)
    parts = token_mean(losses[:4], mask[:4], count) + token_mean(losses[4:], mask[4:], count)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(whole, losses[mask].mean())
