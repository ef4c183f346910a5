"""What asyncrl costs between an engine and the buffer.

    python tools/bench_generators.py vllm [--slots 8 32 64] [--tokens 96] [--rounds 4] [--json FILE]
    python tools/bench_generators.py fake [--slots 1000] [--seconds 20] [--json FILE]

`vllm`: tokens per second through asyncrl (dispatcher, a real durable buffer process, a reward worker) against raw
`AsyncLLM.generate` with the same prompts, lengths and sampling. Both engines are up at once and take turns, so that a busy
machine slows both alike; the ratio is the median over rounds. Each round is two waves of `slots` requests, from the first
request to the last answer (through asyncrl: until the learner's side has the batch). `raw` streams every token, as vLLM does
by default; `raw, N at once` is told to stream as many at once as asyncrl asks for. Budget: asyncrl / raw >= 0.95 at 32.

`fake`: so many concurrent rollouts of one dispatcher on a fake engine in the same process, for a while; how long the event
loop was held up at most, as a task saw it that wants to run every millisecond. Budget: 50 ms. `late` is by the clock, `held` in
CPU time of the loop's thread, which other work on the machine does not change.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow.compute as pc
import rich
from bench_engine import Bench
from buffer_shards import GROUP, Shards
from rich.table import Table

from asyncrl.buffer import BlockingBufferClient, BufferClient, BufferConfig, PromptRow
from asyncrl.generators.collector import leave_out_what_is_loaded
from asyncrl.generators.config import PoolConfig, RewardsConfig, RewardTerm, SamplingConfig
from asyncrl.generators.dispatcher import Dispatcher
from asyncrl.generators.engine import Engine
from asyncrl.generators.fake_engine import FakeEngine
from asyncrl.generators.fake_speech import Lengths
from asyncrl.generators.reward_pool import RewardPool

PROMPT_TOKENS: Final = 16
FLUSH_TOKENS: Final = 32
WAVES: Final = 2
PAYLOAD: Final = '{"prompt_id": "bench", "question": "1+1", "answer": "2"}'
READ_S: Final = 120.0
NEVER_STALE: Final = 10_000
"""Versions: batches are committed as if they had been trained, and the engine keeps version 0."""
AHEAD: Final = 6
"""Batches that are admitted at once (fake)."""
Row = dict[str, float]


class Through:
    """asyncrl around one engine: batches of `rollouts` answers, of at most `tokens` tokens each."""

    def __init__(self, shards: Shards, buffer: BufferClient, dispatcher: Dispatcher, prompts: int) -> None:
        self.buffer, self.dispatcher, self._prompts = buffer, dispatcher, prompts
        self._learner = BlockingBufferClient(shards.address)
        self.trained = 0
        self._learner.publish(0)

    async def admit(self) -> None:
        first = self.trained * self._prompts
        rows = [
            PromptRow(
                prompt_id=f"p{at}",
                tokens=[(at + index) % 10 for index in range(PROMPT_TOKENS)],
                payload=PAYLOAD,
                position=at,
            )
            for at in range(first, first + self._prompts)
        ]
        await self.buffer.admit(0, rows)

    async def read(self) -> tuple[list[int], int]:
        """The next batch: its ids, and its tokens."""
        got = await asyncio.to_thread(self._learner.read_batch, READ_S)
        if got is None:
            raise RuntimeError(f"no batch within {READ_S:.0f} s")
        batch, rows = got
        return batch.batch_ids, int(pc.sum(pc.list_value_length(rows["tokens"])).as_py())

    async def commit(self, batch_ids: list[int]) -> None:
        """As if it had been trained."""
        self.trained += 1
        await asyncio.to_thread(self._learner.commit, batch_ids, self.trained)

    async def round(self, slots: int) -> tuple[float, float]:
        """(tokens per second, CPU microseconds of this process per token) of one batch, from the first lease on."""
        await self.admit()
        began, used = time.perf_counter(), time.process_time()
        await self.dispatcher.set_concurrency(slots)
        batch_ids, tokens = await self.read()
        took, used = time.perf_counter() - began, time.process_time() - used
        await self.dispatcher.set_concurrency(0)
        await self.commit(batch_ids)
        return tokens / took, 1e6 * used / tokens

    def close(self) -> None:
        self._learner.close()


@asynccontextmanager
async def through(engine: Engine, rollouts: int, tokens: int, concurrency: int) -> AsyncIterator[Through]:
    """A buffer process, a reward worker and a dispatcher at work, ended at the end."""
    rewards = await asyncio.to_thread(RewardPool, RewardsConfig(terms=[RewardTerm(function="sums")]))
    with tempfile.TemporaryDirectory() as folder:
        prompts = rollouts // GROUP
        shards = await asyncio.to_thread(Shards, Path(folder), BufferConfig(), prompts, NEVER_STALE)
        try:
            async with BufferClient(shards.address) as buffer:
                dispatcher = Dispatcher(
                    engine=engine,
                    engine_id="bench",
                    buffer=buffer,
                    scorer=rewards,
                    sampling=SamplingConfig(max_new_tokens=tokens, flush_tokens=FLUSH_TOKENS),
                    concurrency=concurrency,
                    stop_token_ids=(),
                    decode=lambda answer: "".join(map(str, answer)),
                )
                running = asyncio.create_task(dispatcher.run())
                made = Through(shards, buffer, dispatcher, prompts)
                leave_out_what_is_loaded()
                try:
                    yield made
                finally:
                    made.close()
                    await dispatcher.stop()
                    await running
        finally:
            await asyncio.to_thread(shards.close)
            await rewards.close()


# ---- vLLM ------------------------------------------------------------------------------------------------------


async def raw_round(bench: Bench, slots: int, interval: int) -> tuple[float, float]:
    """As `Through.round`, by vLLM alone, which streams `interval` tokens at once."""
    places = asyncio.Semaphore(slots)

    async def one() -> int:
        async with places:
            return await bench.one_raw(interval)

    began, used = time.perf_counter(), time.process_time()
    tokens = sum(await asyncio.gather(*(one() for _ in range(WAVES * slots))))
    took, used = time.perf_counter() - began, time.process_time() - used
    return tokens / took, 1e6 * used / tokens


async def compare(bench: Bench, slots: int, tokens: int, rounds: int) -> Row:
    chunk = FLUSH_TOKENS // 4
    found: dict[str, list[tuple[float, float]]] = {"raw": [], "raw_chunked": [], "asyncrl": []}
    async with through(bench.engine, WAVES * slots, tokens, 0) as ours:
        for turn in range(rounds + 1):
            measured = {
                "raw": await raw_round(bench, slots, 1),
                "asyncrl": await ours.round(slots),
                "raw_chunked": await raw_round(bench, slots, chunk),
            }
            if turn:  # the first round warms up
                for name, value in measured.items():
                    found[name].append(value)
    row: Row = {"slots": slots}
    for name, values in found.items():
        row[f"{name}_tokens_per_s"] = statistics.median(speed for speed, _ in values)
        row[f"{name}_cpu_us_per_token"] = statistics.median(used for _, used in values)
    for name in ("raw", "raw_chunked"):
        ratios = [ours[0] / raw[0] for ours, raw in zip(found["asyncrl"], found[name], strict=True)]
        row[f"ratio_to_{name}"] = statistics.median(ratios)
        row[f"least_ratio_to_{name}"] = min(ratios)
    return row


def write_model(folder: str, hidden: int, layers: int) -> tuple[str, int]:
    """(folder, parameters)"""
    from asyncrl.learner.tiny_model import character_tokenizer, new_model

    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(folder)
    model = new_model(
        tokenizer, hidden_size=hidden, layers=layers, heads=hidden // 64, max_tokens=4096, seed=0
    )
    model.save_pretrained(folder)
    return folder, sum(weight.numel() for weight in model.parameters())


async def run_vllm(arguments: argparse.Namespace) -> list[Row]:
    pool = PoolConfig(
        name="bench",
        device=arguments.device,
        concurrency=max(arguments.slots),
        dtype="float32" if arguments.device == "cpu" else "bfloat16",
        memory_fraction=0.4,
        kv_cache_bytes=2**29,
    )
    with tempfile.TemporaryDirectory() as folder:
        model, parameters = write_model(folder, arguments.hidden, arguments.layers)
        bench = Bench(pool, model, arguments.tokens)
        try:
            await bench.start()
            rows = [
                await compare(bench, slots, arguments.tokens, arguments.rounds) for slots in arguments.slots
            ]
        finally:
            await bench.close()
    return [row | {"parameters": parameters, "tokens": arguments.tokens} for row in rows]


# ---- fake ------------------------------------------------------------------------------------------------------


class LoopGaps:
    """How late a task ran that wanted to run every millisecond, and how long this thread computed meanwhile, in seconds. Where
    other work has the cores, the first grows and the second does not."""

    def __init__(self) -> None:
        self.late_s: list[float] = []
        self.held_s: list[float] = []

    async def run(self) -> None:
        """Ends when it is cancelled."""
        wanted = 0.001
        while True:
            began, used = time.perf_counter(), time.thread_time()
            await asyncio.sleep(wanted)
            self.late_s.append(time.perf_counter() - began - wanted)
            self.held_s.append(time.thread_time() - used)


async def run_fake(arguments: argparse.Namespace) -> list[Row]:
    rows = []
    for slots in arguments.slots:
        lengths = Lengths(median_tokens=arguments.tokens, sigma=0.6)
        engine = FakeEngine(vocab_size=10, slots=slots, step_s=arguments.step_s, lengths=lengths, version=0)
        await engine.start()
        rollouts = max(1, slots // GROUP // 2) * GROUP
        async with through(engine, rollouts, 4 * arguments.tokens, slots) as ours:
            feeding = asyncio.create_task(feed(ours, rollouts // GROUP))
            await asyncio.sleep(arguments.seconds / 4)  # all slots are filled, and lengths have spread
            rows.append(await watch(ours, engine, arguments))
            feeding.cancel()
            await asyncio.wait({feeding})
        await engine.shutdown()
    return rows


async def feed(ours: Through, prompts: int) -> None:
    """Admits as much as there is room for and trains what comes at once; ends when it is cancelled."""
    at = 0
    while True:
        while at < (ours.trained + AHEAD) * prompts:
            rows = [
                PromptRow(prompt_id=f"p{i}", tokens=[i % 10] * PROMPT_TOKENS, payload=PAYLOAD, position=i)
                for i in range(at, at + prompts)
            ]
            await ours.buffer.admit(0, rows)
            at += prompts
        batch_ids, _ = await ours.read()
        await ours.commit(batch_ids)


async def watch(ours: Through, engine: FakeEngine, arguments: argparse.Namespace) -> Row:
    gaps, profile = LoopGaps(), cProfile.Profile() if arguments.profile else None
    watching = asyncio.create_task(gaps.run())
    began, used, before = time.perf_counter(), time.process_time(), engine.stats().generated_tokens
    if profile:
        profile.enable()
    used_slots = []
    while time.perf_counter() - began < arguments.seconds:
        used_slots.append(ours.dispatcher.slots_used)
        await asyncio.sleep(0.05)
    if profile:
        profile.disable()
        profile.dump_stats(arguments.profile)
    watching.cancel()
    tokens = engine.stats().generated_tokens - before
    took, used = time.perf_counter() - began, time.process_time() - used
    found = {}
    for name, values in (("late", sorted(gaps.late_s)), ("held", sorted(gaps.held_s))):
        found[f"loop_{name}_p99_ms"] = 1e3 * values[int(0.99 * len(values))]
        found[f"loop_{name}_max_ms"] = 1e3 * values[-1]
    return {
        "slots": ours.dispatcher.concurrency,
        "slots_used": statistics.mean(used_slots),
        "tokens_per_s": tokens / took,
        "cpu_us_per_token": 1e6 * used / tokens,
        "cpu_share": used / took,
        **found,
    }


# ---- the command -----------------------------------------------------------------------------------------------


def show(rows: list[Row], title: str) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in row.values()))
    rich.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["vllm", "fake"])
    parser.add_argument("--slots", type=int, nargs="+", help="8 32 64 (vllm), 1000 (fake)")
    parser.add_argument(
        "--tokens", type=int, default=96, help="of an answer (vllm), median of the lengths (fake)"
    )
    parser.add_argument("--rounds", type=int, default=4, help="vllm")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="vllm")
    parser.add_argument("--hidden", type=int, default=512, help="size of the tiny model (vllm)")
    parser.add_argument("--layers", type=int, default=8, help="of the tiny model (vllm)")
    parser.add_argument("--seconds", type=float, default=20.0, help="fake")
    parser.add_argument("--step-s", type=float, default=0.05, help="of the fake engine")
    parser.add_argument("--profile", default="", help="write what cProfile saw here (fake)")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    run: Callable[[argparse.Namespace], Any] = run_vllm if arguments.what == "vllm" else run_fake
    arguments.slots = arguments.slots or ([8, 32, 64] if arguments.what == "vllm" else [1000])
    rows = asyncio.run(run(arguments))
    show(rows, f"generators, {arguments.what}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
