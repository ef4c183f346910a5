"""The gradient of a batch is the same on 1, 2 and 4 ranks, however the batch is split and whatever `[learner.sharding]` says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from gradient_cases import SCRIPT, SPLITS, on_one_rank, settings, write_cases
from rank_processes import run_ranks
from safetensors.numpy import load_file

TOLERANCE = 1e-5
HALF_TOLERANCE = 0.02
"""Of the gradient's norm, with bfloat16 somewhere: 8 bits are kept of each product, and errors of many add up by chance."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("splits"))


@pytest.fixture(scope="module")
def one_rank(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return on_one_rank(folder, tmp_path_factory.mktemp("one") / "out")


CASES = {
    1: {
        "small passes": settings(40),
        "computed again": settings(activation_checkpointing="full"),
        "offloaded": settings(cpu_offload=True),
        "compiled": settings(compile=True),
    },
    2: {
        "plain": settings(),
        "small passes": settings(40),
        "large passes": settings(8192),
        "layers kept whole": settings(reshard_after_forward=False),
        "computed again": settings(activation_checkpointing="full"),
        "offloaded": settings(cpu_offload=True),
        "two replicas of one shard": settings(replicas=2),
        "compiled, computed again": settings(compile=True, activation_checkpointing="full"),
    },
    4: {
        "plain": settings(),
        "small passes": settings(40),
        "two replicas": settings(replicas=2),
        "two replicas, computed again, layers kept whole": settings(
            replicas=2, activation_checkpointing="full", reshard_after_forward=False
        ),
        "two replicas, offloaded": settings(replicas=2, cpu_offload=True),
        "computed again": settings(activation_checkpointing="full"),
        "offloaded": settings(cpu_offload=True),
    },
}


@pytest.mark.parametrize("ranks", CASES)
def test_gradients_are_normalised_over_the_global_token_count(
    folder: Path, one_rank: dict[str, np.ndarray], tmp_path: Path, ranks: int
) -> None:
    """Whoever has the tokens, they are those of one rank."""
    run_ranks(SCRIPT, folder, tmp_path / "out", ranks, *CASES[ranks].values())
    found = load_file(tmp_path / "out" / "gradients")
    for index, case in enumerate(CASES[ranks]):
        for name, want in one_rank.items():
            other = found[f"{index}/{name.removeprefix('0/')}"]
            np.testing.assert_allclose(other, want, atol=TOLERANCE, rtol=0, err_msg=f"{case}: {name}")
    assert len(found) == len(CASES[ranks]) * len(one_rank)  # names are the same whatever the settings
    norms = [msgspec.json.decode((tmp_path / "out" / f"norms-{rank}").read_bytes()) for rank in range(ranks)]
    assert all(each == norms[0] for each in norms)


def test_bfloat16_is_float32_up_to_rounding(
    folder: Path, one_rank: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """In computing, and in summing over ranks."""
    cases = {
        "reduced": settings(reduce_dtype="bfloat16"),
        "computed": settings(dtype="bfloat16"),
        "both, computed again": settings(
            dtype="bfloat16", reduce_dtype="bfloat16", activation_checkpointing="full"
        ),
    }
    run_ranks(SCRIPT, folder, tmp_path / "out", 2, *cases.values())
    found = load_file(tmp_path / "out" / "gradients")
    for index, case in enumerate(cases):
        for split in range(len(SPLITS)):
            names = [name.removeprefix("0/") for name in one_rank if f"/batch-{split}/" in name]
            want = np.concatenate([one_rank[f"0/{name}"].ravel() for name in names])
            other = np.concatenate([found[f"{index}/{name}"].ravel() for name in names])
            error = np.linalg.norm(other - want) / np.linalg.norm(want)
            assert 1e-5 < error < HALF_TOLERANCE, (case, split, error)
