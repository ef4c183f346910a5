"""Tokens per second of raw vLLM (`AsyncLLM.generate`) against asyncrl's engine on it, at the same concurrency.

    python tools/bench_engine.py [--model FOLDER] [--device cpu] [--concurrency 1 16 64] [--tokens 128] [--json FILE]

Both engines run at once and take turns, so that a busy machine slows both alike; the ratio is the median over rounds.
Both stream every token with its logprob. Budget: asyncrl / raw >= 0.95.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from asyncrl.generators import vllm_settings
from asyncrl.generators.child_processes import environment_for_children
from asyncrl.generators.config import PoolConfig
from asyncrl.generators.engine import GenerationRequest
from asyncrl.generators.vllm_engine import VLLMEngine
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.slots import Slots
from asyncrl.weight_sync.wire import Offer, SharedFile

PROMPT_TOKENS = 16


class Bench:
    """Two engines of one pool and one model: `raw` is vLLM's own, `engine` is asyncrl's."""

    def __init__(self, pool: PoolConfig, model: str, tokens: int) -> None:
        self.tokens = tokens
        self.max_model_len = PROMPT_TOKENS + tokens
        self.pool = pool
        self.model = model
        self.engine = VLLMEngine(pool, model, "bench", self.max_model_len)
        self.raw: Any = None
        self._requests = 0

    async def start(self) -> None:
        await self.engine.start()
        await self._publish()
        self.raw = await asyncio.to_thread(self._start_raw)

    def _start_raw(self) -> Any:
        variables = vllm_settings.environment(self.pool, None, os.getpid(), tempfile.gettempdir(), "WARNING")
        with environment_for_children(variables):
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            arguments = vllm_settings.arguments(self.pool, self.model, self.max_model_len, seed=1)
            config = AsyncEngineArgs(**arguments).create_engine_config()
            return AsyncLLM.from_vllm_config(config, disable_log_stats=True)

    async def _publish(self) -> None:
        from transformers import AutoModelForCausalLM

        weights = dict(AutoModelForCausalLM.from_pretrained(self.model).named_parameters())
        specs = [(name, str(w.dtype).removeprefix("torch."), tuple(w.shape)) for name, w in weights.items()]
        slots = Slots(f"bench-{os.getpid()}", plan := make_plan(specs, 256 * 2**20))
        try:
            slot = slots.next()
            sums = tuple(slot.fill(bucket, cut(plan, bucket, weights)) for bucket in plan.buckets)
            source = SharedFile(path=str(slot.path))
            offer = Offer(version=0, source=source, plan=plan, checksums=sums)
            await self.engine.stage(offer)
            await self.engine.apply(offer)
        finally:
            slots.close()

    def _prompt(self) -> list[int]:
        self._requests += 1
        return [(self._requests + index) % 10 for index in range(PROMPT_TOKENS)]

    async def one_raw(self, stream_interval: int = 1) -> int:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=self.tokens,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=stream_interval,
        )
        count = 0
        prompt = {"type": "token", "prompt_token_ids": self._prompt()}
        async for output in self.raw.generate(prompt, sampling, f"raw-{self._requests}"):
            count += len(output.outputs[0].token_ids)
        return count

    async def one_asyncrl(self) -> int:
        request = GenerationRequest(
            request_id=f"engine-{self._requests}",
            tokens=self._prompt(),
            max_new_tokens=self.tokens,
            temperature=1.0,
            stop_token_ids=(),
        )
        count = 0
        async for chunk in self.engine.generate(request):
            count += len(chunk.tokens)
        return count

    async def speed(self, one: Callable[[], Awaitable[int]], concurrency: int) -> tuple[float, float]:
        """Tokens per second of `concurrency` requests at once, from the first to the last token of all, and the CPU
        time of this process per token in microseconds (which other work on the machine changes less)."""
        began, used = time.perf_counter(), time.process_time()
        counts = await asyncio.gather(*(one() for _ in range(concurrency)))
        used = time.process_time() - used
        return sum(counts) / (time.perf_counter() - began), 1e6 * used / sum(counts)

    async def close(self) -> None:
        await self.engine.shutdown()
        if self.raw is not None:
            await asyncio.to_thread(self.raw.shutdown)
            self.raw = None


async def measure(bench: Bench, concurrencies: list[int], rounds: int) -> list[dict[str, float]]:
    rows = []
    for concurrency in concurrencies:
        pairs = []
        for turn in range(rounds + 1):
            pair = (
                await bench.speed(bench.one_raw, concurrency),
                await bench.speed(bench.one_asyncrl, concurrency),
            )
            if turn:  # the first round warms up
                pairs.append(pair)
        rows.append(
            {
                "concurrency": concurrency,
                "raw_tokens_per_s": statistics.median(raw[0] for raw, _ in pairs),
                "asyncrl_tokens_per_s": statistics.median(ours[0] for _, ours in pairs),
                "ratio": statistics.median(ours[0] / raw[0] for raw, ours in pairs),
                "raw_cpu_us_per_token": statistics.median(raw[1] for raw, _ in pairs),
                "asyncrl_cpu_us_per_token": statistics.median(ours[1] for _, ours in pairs),
            }
        )
    return rows


def write_tiny_model(folder: str) -> str:
    from asyncrl.learner.tiny_model import character_tokenizer, new_model

    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(folder)
    new_model(tokenizer, hidden_size=128, layers=3, heads=4, max_tokens=4096, seed=0).save_pretrained(folder)
    return folder


async def run(arguments: argparse.Namespace) -> list[dict[str, float]]:
    pool = PoolConfig(
        name="bench",
        device=arguments.device,
        concurrency=max(arguments.concurrency),
        dtype="float32" if arguments.device == "cpu" else "bfloat16",
        memory_fraction=0.4,
        kv_cache_bytes=2**28,
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pool, arguments.model or write_tiny_model(folder), arguments.tokens)
        try:
            await bench.start()
            return await measure(bench, arguments.concurrency, arguments.rounds)
        finally:
            await bench.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a Hugging Face folder; default: a tiny random Qwen2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=128, help="per request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    rows = asyncio.run(run(arguments))
    print(
        f"{'concurrency':>11} {'raw tok/s':>10} {'asyncrl tok/s':>14} {'ratio':>6} {'CPU us/token here, raw':>23} {'asyncrl':>8}"
    )
    for row in rows:
        print(
            f"{row['concurrency']:>11} {row['raw_tokens_per_s']:>10.0f} {row['asyncrl_tokens_per_s']:>14.0f} "
            f"{row['ratio']:>6.3f} {row['raw_cpu_us_per_token']:>23.0f} {row['asyncrl_cpu_us_per_token']:>8.0f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
