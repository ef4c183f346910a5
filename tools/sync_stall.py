"""How long a real vLLM engine pauses for an update, in milliseconds and in its own decode steps. Called by `bench_weight_sync`.

A version is staged before the pause, as it always is. `pause` is from the request to pause to the end of the resumption (what
`stall_s` in reports and metrics is); of this, `freeze` is from the moment when the last step had ended. `gap` is what one stream sees: the
longest time between two of its tokens around the update, a step included. The step is the median time between two tokens of a stream
over the same updates.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

from sync_models import MODELS, Weights, plan_of

from asyncrl.generators.config import PoolConfig
from asyncrl.generators.engine import GenerationRequest
from asyncrl.generators.vllm_engine import VLLMEngine
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.slots import Slots
from asyncrl.weight_sync.wire import Offer, SharedFile

MAX_TOKENS = 4096
BETWEEN_S = 0.25
"""Between two updates, for steps without one."""
UPDATES = 20


class Stream:
    """Requests under way; one of them is listened to."""

    def __init__(self, engine: VLLMEngine, concurrency: int, tokens: int) -> None:
        self.times: list[float] = []
        self._tasks = [
            asyncio.create_task(self._read(engine, f"r{index}", tokens, listen=index == 0))
            for index in range(concurrency)
        ]

    async def _read(self, engine: VLLMEngine, name: str, tokens: int, *, listen: bool) -> None:
        request = GenerationRequest(
            request_id=name,
            tokens=[index % 10 for index in range(16)],
            max_new_tokens=tokens,
            temperature=1.0,
            stop_token_ids=(),
        )
        async for _ in engine.generate(request):
            if listen:
                self.times.append(time.perf_counter())

    def longest_gap(self, since: float) -> float:
        times = [time for time in self.times if time >= since]
        return max(after - before for before, after in pairwise(times))

    def step(self, since: float) -> float:
        times = [time for time in self.times if time >= since]
        return statistics.median(after - before for before, after in pairwise(times))

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Versions:
    """The same weights, again and again, in the files that a learner has."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._plan: Plan = plan_of(weights, "float32", 2**28)
        self._slots = Slots(f"bench-stall-{os.getpid()}", self._plan)
        self._version = -1

    def next(self) -> Offer:
        slot = self._slots.next()
        sums = tuple(
            slot.fill(bucket, cut(self._plan, bucket, self._weights)) for bucket in self._plan.buckets
        )
        self._slots.committed()
        self._version += 1
        return Offer(
            version=self._version, source=SharedFile(path=str(slot.path)), plan=self._plan, checksums=sums
        )

    def close(self) -> None:
        self._slots.close()


def write_model(folder: str, name: str) -> Weights:
    """A model of this size that vLLM can load, and its weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = MODELS[name]
    heads = shape.hidden // 64
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=heads,
            num_key_value_heads=shape.key_value // 64,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    return dict(model.named_parameters())


async def updates(
    engine: VLLMEngine, versions: Versions, concurrency: int, paused: list[float]
) -> dict[str, Any]:
    """Medians over `UPDATES` updates while `concurrency` requests are under way. `paused`: when each pause began to hold."""
    freezes: list[float] = []
    stream = Stream(engine, concurrency, MAX_TOKENS - 16)
    try:
        await asyncio.sleep(2.0)
        began, pauses, gaps = time.perf_counter(), [], []
        for _ in range(UPDATES):
            offer = versions.next()
            await engine.stage(offer)
            await asyncio.sleep(BETWEEN_S)
            before = time.perf_counter()
            pauses.append(await engine.apply(offer))
            freezes.append(time.perf_counter() - paused[-1])
            await asyncio.sleep(BETWEEN_S)
            gaps.append(stream.longest_gap(before - BETWEEN_S / 2))
        step = stream.step(began)
    finally:
        await stream.end()
    middle = {
        "pause": statistics.median(pauses),
        "freeze": statistics.median(freezes),
        "gap": statistics.median(gaps),
    }
    return {
        "concurrency": concurrency,
        "updates": UPDATES,
        "step_ms": round(1000 * step, 2),
        **{f"{name}_ms": round(1000 * value, 1) for name, value in middle.items()},
        **{f"{name}_in_steps": round(value / step, 2) for name, value in middle.items()},
    }


def _timed_pause(engine: VLLMEngine) -> list[float]:
    """When each pause began to hold."""
    core = engine._core.serving().engine_core
    pause: Callable[..., Awaitable[None]] = core.pause_scheduler_async
    times: list[float] = []

    async def timed(*args: Any, **kwargs: Any) -> None:
        await pause(*args, **kwargs)
        times.append(time.perf_counter())

    setattr(core, "pause_scheduler_async", timed)  # noqa: B010 (a method of vLLM's)
    return times


async def engine_stall(model: str, concurrencies: list[int]) -> list[dict[str, Any]]:
    """Rows for an engine of `model` in float32 on one core of the CPU."""
    pool = PoolConfig(
        name="bench", device="cpu", concurrency=max(concurrencies), dtype="float32", kv_cache_bytes=2**29
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        versions = Versions(write_model(folder, model))
        engine = VLLMEngine(pool, folder, "bench", MAX_TOKENS)
        try:
            await engine.start()
            first = versions.next()
            await engine.stage(first)
            await engine.apply(first)
            paused = _timed_pause(engine)
            for concurrency in concurrencies:
                rows.append({"model": model, **await updates(engine, versions, concurrency, paused)})
                print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        finally:
            await engine.shutdown()
            versions.close()
    return rows
