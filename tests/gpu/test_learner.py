"""The learner on CUDA (NCCL, one rank) against the same learner on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from gathered import gathered

from asyncrl.buffer.schema import BATCH
from asyncrl.learner.config import LearnerConfig
from asyncrl.learner.lora_config import LoraConfig
from asyncrl.learner.metrics import StepMetrics
from asyncrl.learner.step import Learner
from asyncrl.learner.tiny_model import character_tokenizer, new_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def _table() -> pa.Table:
    random = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for index in range(24):
        size = int(random.integers(2, 60))
        rows.append(
            {
                "rollout_id": index,
                "group_id": index // 4,
                "prompt_tokens": [1, 10, index // 4],
                "tokens": random.integers(0, 13, size).tolist(),
                "logprobs": random.normal(-2.7, 0.3, size).tolist(),
                "versions": [3] * size,
                "trainable": [True] * size,
                "reward": float(random.integers(0, 2)),
                "cost": 0.0,
                "greedy": False,
                "finish_reason": "stop",
            }
        )
    return pa.Table.from_pylist(rows, schema=BATCH)


def _step(folder: Path, **settings: object) -> tuple[StepMetrics, dict[str, torch.Tensor]]:
    config = LearnerConfig(learning_rate=1e-3, tokens_per_microbatch=400, **settings)  # type: ignore[arg-type]
    learner = Learner(config, folder, 1.0)
    try:
        metrics = learner.train(_table(), 3)
        plan = learner.plan(2**20)
        return metrics, gathered(learner, plan)
    finally:
        learner.close()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_a_step_is_the_one_of_the_cpu(tmp_path: Path, dtype: str, tolerance: float) -> None:
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(tmp_path)
    new_model(tokenizer, hidden_size=128, layers=2, heads=2, max_tokens=128, seed=3).save_pretrained(tmp_path)
    want, weights = _step(tmp_path, device="cpu")
    found, moved = _step(tmp_path, device="cuda", dtype=dtype)
    assert found.entropy == pytest.approx(want.entropy, abs=tolerance)
    assert found.loss == pytest.approx(want.loss, abs=tolerance)
    assert found.grad_norm == pytest.approx(want.grad_norm, rel=20 * tolerance)
    # AdamW's first step is the rate times a sign, so a gradient near 0 may differ by twice the rate.
    for name, tensor in weights.items():
        assert (tensor - moved[name]).abs().max() <= 2.1e-3, name


@pytest.mark.parametrize("quantise", ["none", "nf4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_a_step_of_adapters_is_the_one_of_the_cpu(
    tmp_path: Path, dtype: str, tolerance: float, quantise: Literal["none", "nf4"]
) -> None:
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(tmp_path)
    new_model(tokenizer, hidden_size=128, layers=2, heads=2, max_tokens=128, seed=3).save_pretrained(tmp_path)
    lora = LoraConfig(rank=4, quantise=quantise)
    want, weights = _step(tmp_path, device="cpu", lora=lora)
    found, moved = _step(tmp_path, device="cuda", dtype=dtype, lora=lora)
    assert found.entropy == pytest.approx(want.entropy, abs=tolerance)
    assert found.grad_norm == pytest.approx(want.grad_norm, rel=20 * tolerance)
    # The first step moves each entry of B from 0 by the rate: W by alpha / rank x rate x the sum of 4 entries of A, up to 0.09 each.
    for name, tensor in weights.items():
        assert (tensor - moved[name]).abs().max() <= 6e-3, name
