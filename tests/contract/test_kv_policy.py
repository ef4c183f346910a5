"""KV cache at a weight update: what new requests read, what becomes of running ones, and which version each token gets.

One engine of each kind serves all tests of this file, in order.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from engine_worlds import Answer, FakeWorld, VLLMWorld, World

TOLERANCE = 1e-4
SMALL_CACHE = 2**20
"""Bytes: 2,048 tokens of the tiny model (2 layers of one key and one value head of 32 float32)."""
UPDATES = 200
PROMPT = [index % 29 for index in range(150)]
KINDS = [
    "fake-keep",
    "fake-recompute",
    *(pytest.param(kind, marks=pytest.mark.vllm) for kind in ("vllm-keep", "vllm-recompute")),
]


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    engine, policy = request.param.split("-")
    if engine == "fake":
        made: World = FakeWorld(in_flight=policy)
    else:
        made = VLLMWorld(
            tmp_path_factory.mktemp("model"),
            tied=False,
            in_flight=policy,
            kv_cache_bytes=SMALL_CACHE if policy == "recompute" else 2**27,
        )
        made.start()
    made.policy = policy  # type: ignore[attr-defined]
    yield made
    made.close()
    assert made.children() == []


@pytest.fixture
def vllm(world: World) -> VLLMWorld:
    if not isinstance(world, VLLMWorld):
        pytest.skip("the fake engine's tokens do not come from weights")
    return world


def recomputes(world: World) -> bool:
    return bool(world.policy == "recompute")  # type: ignore[attr-defined]


async def across_an_update(
    world: World, kind: str, count: int, tokens: int
) -> list[tuple[list[int], Answer]]:
    """`count` requests of `PROMPT` and a token of their own, with one update in their midst."""
    requests = [world.request(tokens=[*PROMPT, index], n=tokens) for index in range(count)]
    tasks = [asyncio.create_task(world.answer(request)) for request in requests]
    while world.engine.stats().generated_tokens < count * 20:  # noqa: ASYNC110 (bounded by `World.run`)
        await asyncio.sleep(0.005)
    await world.publish(kind)
    return [(request.tokens, await task) for request, task in zip(requests, tasks, strict=True)]


def test_a_running_request_goes_on_with_its_cache_or_with_a_new_one(world: World) -> None:
    world.run(world.publish("random"))
    old, before = world.version, world.engine.stats().recomputed
    seen: list[tuple[int, int]] = []

    async def watched() -> list[tuple[list[int], Answer]]:
        going = asyncio.create_task(across_an_update(world, "other", 4, 200))
        while not going.done():
            stats = world.engine.stats()
            if stats.version == old + 1 and stats.running:
                seen.append((stats.stale_kv, stats.recomputed - before))
            await asyncio.sleep(0.002)
        return await going

    answers = world.run(watched())
    assert max(stale for stale, _ in seen[1:]) == (0 if recomputes(world) else 4)
    assert {recomputed for _, recomputed in seen} == {4 if recomputes(world) else 0}
    for prompt, answer in answers:
        assert len(answer.tokens) == 200 and answer.finish_reason == "length"
        switch = answer.versions.index(old + 1)
        assert answer.versions == [old] * switch + [old + 1] * (200 - switch)
        if isinstance(world, VLLMWorld):
            got, whole = np.array(answer.logprobs), prompt + answer.tokens
            ours = slice(len(prompt) - 1, None)
            under_old = world.reference("random", whole)[ours].numpy()
            under_new = world.reference("other", whole)[ours].numpy()
            assert np.abs(got - under_old)[:switch].max() < TOLERANCE
            off = np.abs(got - under_new)[switch:]
            # A cold start that prefills these tokens under the new weights says the same, or it does not.
            assert off.max() < TOLERANCE if recomputes(world) else np.median(off) > 100 * TOLERANCE


def test_a_new_request_reads_no_cache_of_older_weights(vllm: VLLMWorld) -> None:
    """Its prompt's blocks lie in the prefix cache, written under the old weights, and by running requests under both."""
    vllm.run(vllm.publish("random"))
    vllm.run(vllm.answer(vllm.request(tokens=PROMPT, n=10)))
    vllm.run(across_an_update(vllm, "other", 3, 150))
    for _ in range(2):  # the second time from the cache of this version
        answer = vllm.run(vllm.answer(vllm.request(tokens=PROMPT, n=30)))
        whole = PROMPT + answer.tokens
        assert answer.logprobs == pytest.approx(vllm.reference("other", whole)[-30:].tolist(), abs=TOLERANCE)
        # The same engine without any cache.
        assert answer.logprobs == pytest.approx(vllm.run(vllm.engine.probe(whole))[-30:], abs=TOLERANCE)


def test_an_abort_in_the_midst_of_an_update_is_honoured(world: World) -> None:
    world.run(world.publish("random"))

    async def doomed() -> None:
        request = world.request(tokens=PROMPT, n=400)
        task = asyncio.create_task(world.answer(request))
        while world.engine.stats().running == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        offer = world.offer("other")
        await world.engine.stage(offer)
        update = asyncio.create_task(world.engine.apply(offer))
        await asyncio.sleep(0)
        await world.engine.abort([request.request_id])
        async with asyncio.timeout(1.0):
            answer = await task
        await update
        world.version = offer.version
        assert answer.finish_reason == "abort" and len(answer.tokens) < 400
        assert world.engine.stats().running == 0

    world.run(doomed())


def test_no_token_of_many_updates_under_load_has_a_wrong_version(world: World) -> None:
    """Even versions say the last token again, odd ones say another (the fake engine's tokens show nothing; its stamps are
    compared with the order of updates alone)."""
    if (world.version + 1) % 2:
        world.run(world.publish("change"))
    world.run(world.publish("repeat"))
    assert world.version % 2 == 0
    first = world.version
    done = asyncio.Event()
    answers: list[tuple[int, Answer]] = []

    async def load(which: int) -> None:
        for turn in itertools.count():
            if done.is_set():
                return
            prompt = [(which + turn) % world.vocab_size, which]
            request = world.request(tokens=prompt, n=150 + 30 * which, temperature=0.0)
            answers.append((which, await world.answer(request)))

    async def update() -> None:
        for index in range(UPDATES):
            await world.publish("repeat" if index % 2 else "change")
            # Two of three versions sample something; each third is replaced as fast as can be.
            seen = world.engine.stats().generated_tokens
            while index % 3 and world.engine.stats().generated_tokens < seen + 6:  # noqa: ASYNC110 (bounded by `World.run`)
                await asyncio.sleep(0.001)
        done.set()

    async def both() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(update())
            for which in range(6):
                tasks.create_task(load(which))

    world.run(both())
    versions = {version for _, answer in answers for version in answer.versions}
    assert world.version == first + UPDATES and len(versions) > UPDATES // 2
    assert sum(len(set(answer.versions)) > 1 for _, answer in answers) > 5
    for which, answer in answers:
        assert answer.versions == sorted(answer.versions) and len(answer.tokens) == 150 + 30 * which
        if isinstance(world, VLLMWorld):
            repeats = [
                token == before
                for token, before in zip(answer.tokens, [which, *answer.tokens[:-1]], strict=True)
            ]
            assert repeats == [version % 2 == 0 for version in answer.versions]


def test_a_cache_too_small_shows_in_the_counts_and_in_nothing_else(vllm: VLLMWorld) -> None:
    if not recomputes(vllm):
        pytest.skip("this engine's cache is large")
    vllm.run(vllm.publish("random"))
    before = vllm.engine.stats()
    assert before.kv_capacity_tokens == before.kv_free_tokens == SMALL_CACHE // (2 * 2 * 32 * 4)
    most_waiting, least_free = 0, before.kv_capacity_tokens

    async def crowd() -> list[Answer]:
        nonlocal most_waiting, least_free
        requests = [vllm.request(tokens=[index] * 20, n=500) for index in range(10)]
        tasks = [asyncio.create_task(vllm.answer(request)) for request in requests]
        while not all(task.done() for task in tasks):
            stats = vllm.engine.stats()
            most_waiting = max(most_waiting, stats.waiting)
            least_free = min(least_free, stats.kv_free_tokens)
            await asyncio.sleep(0.01)
        return [await task for task in tasks]

    for index, answer in enumerate(vllm.run(crowd())):
        whole = [index] * 20 + answer.tokens
        assert answer.logprobs == pytest.approx(
            vllm.reference("random", whole)[-500:].tolist(), abs=TOLERANCE
        )
    assert vllm.engine.stats().preemptions > before.preemptions
    assert most_waiting > 0 and least_free < before.kv_capacity_tokens // 10
    assert vllm.engine.stats().kv_free_tokens == before.kv_capacity_tokens


def test_auto_decides_by_request() -> None:
    """Of two running requests the one with a short prefix and much to come is recomputed, and the other is not."""
    world = FakeWorld(in_flight="auto")
    try:
        world.run(world.publish("random"))
        world.run(world.answer(world.request(n=100)))  # the mean length is known then

        async def two() -> None:
            young = world.request(tokens=[1, 2, 3], n=500)
            ending = world.request(tokens=[4] * 4000, n=60)
            tasks = [asyncio.create_task(world.answer(request)) for request in (young, ending)]
            while world.engine.stats().generated_tokens < 100 + 2 * 10:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            await world.publish("other")
            stats = world.engine.stats()
            assert (stats.running, stats.recomputed, stats.stale_kv) == (2, 1, 1)
            assert [len((await task).tokens) for task in tasks] == [500, 60]

        world.run(two())
    finally:
        world.close()
