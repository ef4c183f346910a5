"""Rows of two NCCL ranks on one GPU, gathered and each by itself: the bytes of the full tensors."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from batches import write_folder
from rank_processes import run_ranks
from sending_cases import SENDS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not torch.distributed.is_nccl_available(),
    reason="no CUDA device, or a torch without NCCL",
)


def test_the_bytes_are_those_of_the_full_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_folder(folder)
    run_ranks(SENDS, folder, tmp_path / "out", 2, "1", "cuda", groups=1)
    wrong = [msgspec.json.decode((tmp_path / "out" / f"wrong-{rank}").read_bytes()) for rank in range(2)]
    assert wrong == [[], []]
