"""Checkpoints on CUDA: copied through pinned memory while training goes on, restored there and on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from asyncrl.buffer.schema import BATCH
from asyncrl.learner.config import LearnerConfig
from asyncrl.learner.sharding_config import ShardingConfig
from asyncrl.learner.step import Learner
from asyncrl.learner.tiny_model import character_tokenizer, new_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
WAIT_S = 60


def _table(seed: int) -> pa.Table:
    random = np.random.default_rng(seed)
    rows = [
        {
            "rollout_id": index,
            "group_id": index // 4,
            "prompt_tokens": [1, 10, index // 4],
            "tokens": random.integers(0, 13, 20).tolist(),
            "logprobs": random.normal(-2.7, 0.3, 20).tolist(),
            "versions": [3] * 20,
            "trainable": [True] * 20,
            "reward": float(random.integers(0, 2)),
            "cost": 0.0,
            "greedy": False,
            "finish_reason": "stop",
        }
        for index in range(16)
    ]
    return pa.Table.from_pylist(rows, schema=BATCH)


def _state(learner: Learner) -> dict[str, torch.Tensor]:
    """Masters and moments, on the host."""
    one, state = learner.trained["policy"], {}
    for of, parameter in one.parameters.items():
        state[of] = parameter.detach().full_tensor().cpu().clone()
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{of}/{key}"] = one.optimizer.state[parameter][key].full_tensor().cpu().clone()
    return state


@pytest.mark.parametrize("offload", [False, True])
def test_it_goes_on_from_a_checkpoint(tmp_path: Path, offload: bool) -> None:
    base = tmp_path / "base"
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(base)
    new_model(tokenizer, hidden_size=64, layers=2, heads=2, max_tokens=128, seed=3).save_pretrained(base)
    config = LearnerConfig(learning_rate=1e-3, sharding=ShardingConfig(cpu_offload=offload))
    learner = Learner(config, base, 1.0)
    try:
        learner.train(_table(0), 3)
        want = _state(learner)
        learner.checkpoint(tmp_path / "step-1")
        learner.train(_table(1), 3)  # while it is written
        torch.cuda.manual_seed(5)
        assert learner.checkpoint_finished(WAIT_S) == tmp_path / "step-1"
        learner.restore(tmp_path / "step-1")
        _same(_state(learner), want)
        learner.train(_table(1), 3)
    finally:
        learner.close()
    on_cpu = Learner(LearnerConfig(learning_rate=1e-3, device="cpu"), base, 1.0)
    try:
        on_cpu.restore(tmp_path / "step-1")
        _same(_state(on_cpu), want)
    finally:
        on_cpu.close()


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
