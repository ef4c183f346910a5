"""`[learner.sharding]` on CUDA: gradients are those of the CPU in float32, whatever is set; several GPUs where there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gradient_cases import SCRIPT, on_one_rank, settings, write_cases
from rank_processes import run_ranks
from safetensors.numpy import load_file

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.03
"""Of the gradient's norm, in float32 (which sums in another order there) and in bfloat16."""

CASES = {
    "plain": settings(device="cuda"),
    "offloaded": settings(device="cuda", cpu_offload=True),
    "computed again": settings(device="cuda", activation_checkpointing="full"),
    "compiled": settings(device="cuda", compile=True),
    "compiled, computed again, offloaded": settings(
        device="cuda", compile=True, activation_checkpointing="full", cpu_offload=True
    ),
}
HALF = {
    "bfloat16": settings(device="cuda", dtype="bfloat16", reduce_dtype="bfloat16"),
    "bfloat16, compiled": settings(device="cuda", dtype="bfloat16", compile=True),
}
HYBRID = {
    "two replicas": settings(device="cuda", replicas=2),
    "two replicas, offloaded": settings(device="cuda", replicas=2, cpu_offload=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("splits"))


@pytest.fixture(scope="module")
def on_cpu(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return on_one_rank(folder, tmp_path_factory.mktemp("cpu") / "out")


def _errors(found: dict[str, np.ndarray], want: dict[str, np.ndarray], case: int) -> dict[str, float]:
    """Of each batch: the difference's norm over the gradient's."""
    batches = sorted({name.split("/")[1] for name in want})
    errors = {}
    for batch in batches:
        names = [name.partition("/")[2] for name in want if name.split("/")[1] == batch]
        ours = np.concatenate([found[f"{case}/{name}"].ravel() for name in names])
        theirs = np.concatenate([want[f"0/{name}"].ravel() for name in names])
        errors[batch] = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    return errors


@pytest.mark.parametrize(("cases", "tolerance"), [(CASES, TOLERANCE), (HALF, HALF_TOLERANCE)])
def test_gradients_are_those_of_the_cpu(
    folder: Path, on_cpu: dict[str, np.ndarray], tmp_path: Path, cases: dict[str, str], tolerance: float
) -> None:
    run_ranks(SCRIPT, folder, tmp_path / "out", 1, *cases.values())
    found = load_file(tmp_path / "out" / "gradients")
    for index, case in enumerate(cases):
        assert all(error < tolerance for error in _errors(found, on_cpu, index).values()), case


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs 4 GPUs: two replicas of two shards")
def test_replicas_and_shards_on_four_gpus(
    folder: Path, on_cpu: dict[str, np.ndarray], tmp_path: Path
) -> None:
    run_ranks(SCRIPT, folder, tmp_path / "out", 4, *HYBRID.values())
    found = load_file(tmp_path / "out" / "gradients")
    for index, case in enumerate(HYBRID):
        assert all(error < TOLERANCE for error in _errors(found, on_cpu, index).values()), case
