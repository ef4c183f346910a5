"""The planner's KV cache against vLLM's own account: how many tokens fit into the bytes that an engine is given."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import tiny

from asyncrl.generators.config import PoolConfig
from asyncrl.generators.vllm_engine import VLLMEngine
from asyncrl.recipes.model_sizes import read_shape

KV_BYTES = 2**26 + 4711


async def blocks(engine: VLLMEngine) -> tuple[int, int]:
    """(blocks, tokens in each) of an engine that is started for the question."""
    try:
        await engine.start()
        config = engine._core.serving().vllm_config.cache_config
        return config.num_gpu_blocks, config.block_size
    finally:
        await engine.shutdown()


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_holds_the_tokens_that_are_planned(tmp_path: Path, dtype: str) -> None:
    folder = tiny.write_model(tmp_path / "model", tied=True, hidden_size=128, layers=3)
    pool = PoolConfig(
        name="test",
        device="cpu",
        concurrency=4,
        kv_cache_bytes=KV_BYTES,
        dtype="float32" if dtype == "float32" else "bfloat16",
        start_timeout_s=240.0,
    )
    count, tokens = asyncio.run(blocks(VLLMEngine(pool, str(folder), f"plan-{dtype}", 768)))
    per_token = read_shape(folder).kv_bytes_per_token(dtype)
    assert count == KV_BYTES // (per_token * tokens)
    assert abs(count * tokens - KV_BYTES / per_token) < tokens
