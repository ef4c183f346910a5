"""tools/gpu_check.py: without a GPU it says so, and what runs on a CPU gives figures that hang together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gpu_check.py"


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, **(env or {})}
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path: Path) -> None:
    done = run("--json", str(tmp_path / "out.json"))
    assert done.returncode == 2, done.stderr
    assert "no CUDA device" in done.stdout
    assert not (tmp_path / "out.json").exists()


def test_parts_on_the_cpu(tmp_path: Path) -> None:
    """The parts are processes of their own; one whose packages are missing, or that needs a GPU, says so and is no failure."""
    out = tmp_path / "out.json"
    done = run(
        *("--device", "cpu", "--mb", "3", "--tensors", "5", "--json", str(out)),
        *("--parts", "memcpy", "nccl"),
        env={"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert parts["memcpy"] == {"skipped": "needs a GPU"}
    assert parts["nccl"]["broadcast_gb_per_s"] > 0
    assert parts["nccl"]["group_s"] < parts["nccl"]["seconds"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\nu.find_spec = lambda n, *a: None if n in ('xxhash', 'zmq') else find(n, *a)\n"
    )
    done = run("--device", "cpu", "--parts", "version", "sum", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("not installed here: xxhash, zmq") == 1
    assert done.stdout.count("not installed here: xxhash\n") == 1


def test_a_part_that_fails_is_an_error_and_the_next_one_runs(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run(
        *("--device", "cpu", "--mb", "1", "--tensors", "1", "--part-s", "1", "--json", str(out)),
        *("--parts", "sum", "memcpy"),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert parts["sum"]["error"].startswith("exit not done after 1 s")
    assert parts["memcpy"] == {"skipped": "needs a GPU"}
