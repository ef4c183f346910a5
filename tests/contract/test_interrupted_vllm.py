"""Rollouts on real vLLM between a dispatcher and a real buffer: interrupted and resumed they say the same, and a killed engine
core costs nothing but the tokens that had not left it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_worlds import VLLMWorld

from asyncrl.buffer import BufferClient
from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.engine import EngineDead
from asyncrl.generators.vllm_engine import VLLMEngine
from tests.buffers import admit, buffer_service
from tests.dispatching import dispatcher, read, until
from tests.interrupting import Interrupting

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4
TOKENS = 80
GREEDY = SamplingConfig(max_new_tokens=TOKENS, temperature=0.0, flush_tokens=8)
"""Temperature 0 is for tests and evaluation; a recipe cannot say it."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMWorld]:
    made = VLLMWorld(tmp_path_factory.mktemp("model"), tied=False)
    made.start()
    made.run(made.publish("random"))
    yield made
    made.close()
    assert made.children() == []


def check(world: VLLMWorld, rows: list[dict[str, Any]], expected: dict[tuple[int, ...], list[int]]) -> None:
    """Greedy rows: the tokens that nobody disturbed, and their logprobs by Hugging Face."""
    for row in rows:
        prompt = row["prompt_tokens"]
        assert row["tokens"] == expected[tuple(prompt)]
        reference = world.reference("random", prompt + row["tokens"])[len(prompt) - 1 :]
        assert row["logprobs"] == pytest.approx(reference.tolist(), abs=TOLERANCE)


async def undisturbed(world: VLLMWorld, prompts: list[list[int]]) -> dict[tuple[int, ...], list[int]]:
    requests = [world.request(tokens=prompt, n=TOKENS, temperature=0.0) for prompt in prompts]
    answers = await asyncio.gather(*map(world.answer, requests))
    return {tuple(prompt): answer.tokens for prompt, answer in zip(prompts, answers, strict=True)}


def test_interrupted_and_resumed_it_says_the_same(world: VLLMWorld, tmp_path: Path) -> None:
    prompts = [[1, 2, 3 + index] for index in range(8)]
    positions = {tuple(prompt): list(range(index, TOKENS, 7 + index)) for index, prompt in enumerate(prompts)}
    hits = sum(map(len, positions.values()))

    async def run(service: Any, client: Any) -> tuple[list[dict[str, Any]], dict[tuple[int, ...], list[int]]]:
        expected = await undisturbed(world, prompts)
        await admit(service.address, len(prompts))
        async with BufferClient(service.address) as buffer:

            async def interrupt() -> None:
                await d.set_concurrency(0)
                await d.set_concurrency(4)

            engine = Interrupting(world.engine, 3, positions, interrupt)
            d = dispatcher(engine, buffer, sampling=GREEDY, concurrency=4, stops=())
            running = asyncio.create_task(d.run())
            _, rows = await asyncio.to_thread(read, client)
            assert len(engine.interrupted) == hits > 40
            await d.stop()
            await running
        return rows.to_pylist(), expected

    with buffer_service(tmp_path, prompts_per_step=8, rollouts_per_prompt=1, bound=0) as (service, client):
        client.publish(0)
        rows, expected = world.run(run(service, client))
    check(world, rows, expected)


def test_what_a_killed_engine_core_held_goes_on_elsewhere(world: VLLMWorld, tmp_path: Path) -> None:
    """Two engines; the core of one is killed in full flight. Its process lives, and hands over all that had arrived."""
    prompts = [[1, 2, 3 + index] for index in range(16)]

    async def run(service: Any, client: Any) -> tuple[list[dict[str, Any]], dict[tuple[int, ...], list[int]]]:
        expected = await undisturbed(world, prompts)
        others = {child.pid for child in world.children()}
        doomed = VLLMEngine(world.pool, world.vllm._core.wanted.model_path, "doomed", world.max_tokens)
        await doomed.start()
        offer = world.offers.write(world.version, world.weights["random"])
        await doomed.stage(offer)
        await doomed.apply(offer)
        core = next(child.pid for child in world.children() if child.pid not in others)
        async with BufferClient(service.address) as buffer, BufferClient(service.address) as elsewhere:
            await admit(service.address, len(prompts))
            first = dispatcher(doomed, buffer, sampling=GREEDY, concurrency=16, stops=(), engine_id="doomed")
            running = asyncio.create_task(first.run())

            async def in_flight() -> bool:
                return doomed.stats().running == 16 and doomed.stats().generated_tokens > 16 * 30

            await until(in_flight, 30.0)
            os.kill(core, signal.SIGKILL)
            with pytest.raises(EngineDead):
                async with asyncio.timeout(20):
                    await running
            status = await buffer.status()
            assert status.states["leased"] == 0 and status.counts.live == 16
            arrived = doomed.stats().generated_tokens
            before = world.engine.stats().generated_tokens
            second = dispatcher(world.engine, elsewhere, sampling=GREEDY, concurrency=16, stops=())
            running = asyncio.create_task(second.run())
            _, rows = await asyncio.to_thread(read, client)
            await second.stop()
            await running
            # Nothing of what the dead engine's process had was sampled again.
            assert world.engine.stats().generated_tokens - before == 16 * TOKENS - arrived
        await doomed.shutdown()
        return rows.to_pylist(), expected

    with buffer_service(tmp_path, prompts_per_step=16, rollouts_per_prompt=1, bound=0) as (service, client):
        client.publish(0)
        rows, expected = world.run(run(service, client))
    check(world, rows, expected)
