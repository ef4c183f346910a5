"""Real vLLM: incomplete weights are refused before a byte is written; no process outlives an engine that is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny

SCRIPT = """
import asyncio, os, signal, sys
import offers, psutil
from transformers import Qwen2ForCausalLM
from asyncrl.generators.config import PoolConfig
from asyncrl.generators.vllm_engine import VLLMEngine
from asyncrl.weight_sync.errors import IncompleteWeights

async def main(folder):
    pool = PoolConfig(name="test", device="cpu", concurrency=4, kv_cache_bytes=2**26, dtype="float32")
    engine = VLLMEngine(pool, folder, "test", 256)
    await engine.start()
    children = [c.pid for c in psutil.Process().children(recursive=True) if "resource" not in " ".join(c.cmdline())]
    weights = dict(Qwen2ForCausalLM.from_pretrained(folder).named_parameters())
    del weights["model.layers.1.mlp.down_proj.weight"]
    with offers.Offers(f"test-{os.getpid()}", weights) as versions:
        offer = versions.write(0, weights)
        try:
            await engine.stage(offer)
        except IncompleteWeights as error:
            print("REFUSED", error)
    print("CHILDREN", *children, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.vllm
def test_incomplete_weights_are_refused_and_a_killed_engine_leaves_no_process(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", tied=True)
    script = tmp_path / "engine.py"
    script.write_text(SCRIPT)
    seen = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    lines = {
        line.split()[0]: line for line in seen.stdout.splitlines() if line.startswith(("REFUSED", "CHILDREN"))
    }
    assert set(lines) == {"REFUSED", "CHILDREN"}, seen.stderr[-3000:]
    assert "down_proj" in lines["REFUSED"]
    children = [int(pid) for pid in lines["CHILDREN"].split()[1:]]
    assert children
    deadline = time.monotonic() + 10
    # Waits for the children's end, which their owner's death brings about; ends with it, or at the deadline.
    while any(psutil.pid_exists(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in children if psutil.pid_exists(pid)] == []
