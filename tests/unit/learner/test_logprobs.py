from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from asyncrl.learner.logprobs import (
    CHUNK_BYTES,
    chunk_rows,
    token_logprobs,
    token_logprobs_and_entropies,
)

Oracle = Any
"""The fixture's class in conftest, which a test cannot import."""


@pytest.mark.parametrize("rows", [1, 4, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_log_softmax(rows: int, temperature: float) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(17, 8), torch.randn(11, 8), torch.randint(0, 11, (17,))
    upstream = torch.randn(17, dtype=torch.float64)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    found = token_logprobs(ours[0], ours[1], targets, temperature, rows)
    (found * upstream).sum().backward()
    want = torch.log_softmax(theirs[0] @ theirs[1].T / temperature, -1).gather(-1, targets[:, None])[:, 0]
    (want * upstream).sum().backward()
    torch.testing.assert_close(found.double(), want, atol=2e-6, rtol=0)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_and_their_gradients_are_those_of_softmax(rows: int, temperature: float) -> None:
    torch.manual_seed(1)
    hidden, weight, targets = torch.randn(17, 8), torch.randn(11, 8), torch.randint(0, 11, (17,))
    upstream = torch.randn(2, 17, dtype=torch.float64)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    found = torch.stack(token_logprobs_and_entropies(ours[0], ours[1], targets, temperature, rows))
    (found * upstream).sum().backward()
    every = torch.log_softmax(theirs[0] @ theirs[1].T / temperature, -1)
    want = torch.stack([every.gather(-1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)])
    (want * upstream).sum().backward()
    torch.testing.assert_close(found.double(), want, atol=3e-6, rtol=0)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, atol=3e-5, rtol=1e-5)


def test_verl_has_the_same_logprobs_and_entropy(oracle: Oracle) -> None:
    logits, labels = oracle.inputs["logits"].reshape(-1, 17), oracle.inputs["labels"].reshape(-1)
    found, entropy = token_logprobs_and_entropies(
        torch.from_numpy(logits).float(), torch.eye(17), torch.from_numpy(labels), 1.0
    )
    want = oracle.golden["verl/logprobs_from_logits"].reshape(-1)
    np.testing.assert_allclose(found.numpy(), want, atol=2e-6)
    mean = entropy[torch.from_numpy(oracle.inputs["mask"].reshape(-1)).bool()].mean()
    assert float(mean) == pytest.approx(float(oracle.golden["verl/entropy/token-mean"]), abs=1e-5)


def test_no_tokens_still_have_a_gradient() -> None:
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), 1.0).sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_a_frozen_weight_costs_no_gradient() -> None:
    """As under adapters. What flows to the hidden states is the same."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(17, 8), torch.randn(11, 8), torch.randint(0, 11, (17,))
    found = []
    for frozen in (False, True):
        inputs, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        token_logprobs_and_entropies(inputs, head, targets, 1.0, 4)[0].sum().backward()
        found.append(inputs.grad)
        assert (head.grad is None) == frozen
    assert found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])


def test_a_chunk_is_bounded_and_never_empty() -> None:
    assert chunk_rows(152_000) * 152_000 * 4 <= CHUNK_BYTES
    assert chunk_rows(10**9) == 1


def test_temperature_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be > 0"):
        token_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64), 0.0)
