"""What every engine must do, whoever makes the tokens: one suite for the fake engine and for real vLLM on the CPU, with
tied and with untied embeddings.

One engine of each kind serves all tests of this file, in order: pytest runs one kind after the other. The first test
needs an engine without weights, the last one ends it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from engine_worlds import FakeWorld, VLLMWorld, World

from asyncrl.generators.engine import EngineDead
from asyncrl.weight_sync.errors import ChecksumError

TOLERANCE = 1e-4
KINDS = ["fake", *(pytest.param(kind, marks=pytest.mark.vllm) for kind in ("vllm-untied", "vllm-tied"))]


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if request.param == "fake":
        made: World = FakeWorld()
    else:
        made = VLLMWorld(tmp_path_factory.mktemp("model"), tied=request.param == "vllm-tied")
        made.start()
    yield made
    made.close()
    assert made.children() == []


@pytest.fixture
def vllm(world: World) -> VLLMWorld:
    if not isinstance(world, VLLMWorld):
        pytest.skip("the fake engine's tokens do not come from weights")
    return world


def test_no_generation_before_the_first_weights(world: World) -> None:
    assert world.engine.stats().version == -1
    with pytest.raises(RuntimeError, match="weights") as error:
        world.run(world.answer(world.request()))
    assert not isinstance(error.value, EngineDead)


def test_first_weights_are_in_service(world: World) -> None:
    stall_s = world.run(world.publish("random"))
    assert 0 <= stall_s < 30
    assert world.engine.stats().version == 0
    answer = world.run(world.answer(world.request()))
    assert set(answer.versions) == {0}


def test_each_token_once_with_logprob_and_version(world: World) -> None:
    before = world.engine.stats().generated_tokens

    async def many() -> list[int]:
        answers = await asyncio.gather(*(world.answer(world.request(n=30 + index)) for index in range(8)))
        for index, answer in enumerate(answers):
            assert len(answer.tokens) == len(answer.logprobs) == len(answer.versions) == 30 + index
            assert all(
                len(chunk.tokens) == len(chunk.logprobs) == len(chunk.versions) for chunk in answer.chunks
            )
            assert [chunk.finish_reason for chunk in answer.chunks[:-1]] == [None] * (len(answer.chunks) - 1)
            assert all(0 <= token < world.vocab_size for token in answer.tokens)
            assert all(logprob <= 0 for logprob in answer.logprobs)
            assert answer.finish_reason == "length"
        return [len(answer.tokens) for answer in answers]

    counts = world.run(many())
    assert world.engine.stats().generated_tokens - before == sum(counts)
    assert world.engine.stats().running == 0


def test_tokens_are_streamed_while_they_are_sampled(world: World) -> None:
    answer = world.run(world.answer(world.request(n=100)))
    assert len(answer.chunks) > 10


def test_greedy_is_the_same_whenever_and_among_whomever_it_is_asked(world: World) -> None:
    """Also where it goes on from a prefix, as on another engine, and while others are sampled in the same steps."""

    async def among_others() -> list[int]:
        requests = [world.request(tokens=[5, 6, 7], n=40, temperature=t) for t in (0.0, 1.0, 1.0)]
        greedy, *sampled = await asyncio.gather(*(world.answer(request) for request in requests))
        assert all(other.tokens != greedy.tokens for other in sampled)
        return greedy.tokens

    alone = world.run(world.answer(world.request(tokens=[5, 6, 7], n=40, temperature=0.0))).tokens
    assert world.run(among_others()) == alone
    rest = world.run(world.answer(world.request(tokens=[5, 6, 7, *alone[:15]], n=25, temperature=0.0)))
    assert rest.tokens == alone[15:]


def test_greedy_is_the_likeliest_token_each_time(vllm: VLLMWorld) -> None:
    answer = vllm.run(vllm.answer(vllm.request(tokens=[5, 6, 7], n=40, temperature=0.0)))
    context = [5, 6, 7, *answer.tokens]
    best = [
        max(range(vllm.vocab_size), key=vllm.logprobs_after("random", context[:end]).__getitem__)
        for end in range(3, len(context))
    ]
    assert answer.tokens == best


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_the_model(vllm: VLLMWorld, temperature: float) -> None:
    vllm.run(vllm.publish("random"))
    request = vllm.request(tokens=range(20), n=60, temperature=temperature)
    answer = vllm.run(vllm.answer(request))
    expected = vllm.reference("random", request.tokens + answer.tokens, temperature or 1.0)[-60:]
    assert answer.logprobs == pytest.approx(expected.tolist(), abs=TOLERANCE)


def test_greedy_and_sampled_requests_share_a_batch(vllm: VLLMWorld) -> None:
    vllm.run(vllm.publish("random"))
    requests = [
        vllm.request(tokens=[index, 5], n=40, temperature=t) for index, t in enumerate([0.0, 0.5, 1.0] * 2)
    ]

    async def together() -> None:
        for request, answer in zip(requests, await asyncio.gather(*map(vllm.answer, requests)), strict=True):
            expected = vllm.reference("random", request.tokens + answer.tokens, request.temperature or 1.0)[
                -40:
            ]
            assert answer.logprobs == pytest.approx(expected.tolist(), abs=TOLERANCE)

    vllm.run(together())


def test_two_requests_of_one_prompt_are_sampled_apart(vllm: VLLMWorld) -> None:
    vllm.run(vllm.publish("random"))
    first = vllm.run(vllm.answer(vllm.request(n=40)))
    second = vllm.run(vllm.answer(vllm.request(n=40)))
    assert first.tokens != second.tokens


def test_a_stop_token_ends_the_stream_and_is_its_last_token(world: World) -> None:
    """Some token of an unstopped answer is made the stop token of the next; greedy, so that both say the same."""
    free = world.run(world.answer(world.request(n=40, temperature=0.0)))
    stop = free.tokens[7]
    answer = world.run(world.answer(world.request(n=40, temperature=0.0, stops=(stop,))))
    if isinstance(world, VLLMWorld):
        assert answer.finish_reason == "stop"
        assert answer.tokens == free.tokens[: free.tokens.index(stop) + 1]
    else:
        assert stop not in answer.tokens[:-1]  # the fake engine says stop tokens only at the length it drew
    assert len(answer.logprobs) == len(answer.versions) == len(answer.tokens)


def test_a_request_that_cannot_be_served_is_refused(world: World) -> None:
    with pytest.raises(ValueError):
        world.run(world.answer(world.request(n=0)))


def test_abort_yields_what_was_sampled(world: World) -> None:
    async def aborted() -> None:
        request = world.request(n=700)
        stream = aiter(world.engine.generate(request))
        chunks = [await anext(stream)]
        await asyncio.sleep(0.1)  # tokens wait to be taken
        await world.engine.abort([request.request_id, "never-heard-of"])
        chunks += [chunk async for chunk in stream]
        taken = [token for chunk in chunks for token in chunk.tokens]
        assert chunks[-1].finish_reason == "abort"
        assert 5 < len(taken) < 700
        assert all(len(chunk.tokens) == len(chunk.logprobs) == len(chunk.versions) for chunk in chunks)
        assert world.engine.stats().running == 0

    world.run(aborted())


def test_a_stream_that_nobody_reads_on_is_given_up(world: World) -> None:
    async def left() -> None:
        stream = aiter(world.engine.generate(world.request(n=700)))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert world.engine.stats().running == 0
        answer = await world.answer(world.request(n=5))
        assert len(answer.tokens) == 5

    world.run(left())


def test_probe(world: World) -> None:
    tokens = list(range(40))
    for kind in ("other", "random"):
        offer = world.offer(kind)
        world.run(world.engine.stage(offer))
        world.run(world.engine.apply(offer))
        world.version = offer.version
        got = world.run(world.engine.probe(tokens))
        assert got == pytest.approx(world.expected_probe(offer, kind, tokens), abs=TOLERANCE)


def test_a_stream_goes_on_across_an_update(world: World) -> None:
    """Old tokens under the old version, new ones under the new, in one stream that changes over once."""
    world.run(world.publish("repeat"))
    old = world.version

    async def spanning() -> tuple[list[int], list[int]]:
        request = world.request(tokens=[5], n=400)
        tokens, versions = [], []
        sync: asyncio.Task[float] | None = None
        async for chunk in world.engine.generate(request):
            tokens += chunk.tokens
            versions += chunk.versions
            if sync is None and len(tokens) >= 20:
                sync = asyncio.create_task(world.publish("change"))
        assert sync is not None
        assert await sync > 0
        return tokens, versions

    tokens, versions = world.run(spanning())
    switch = versions.index(old + 1)
    assert versions == [old] * switch + [old + 1] * (400 - switch)
    assert 20 <= switch < 400
    if isinstance(world, VLLMWorld):
        repeats = [token == before for token, before in zip(tokens, [5, *tokens[:-1]], strict=True)]
        assert repeats == [version == old for version in versions]


def test_old_tokens_of_streams_in_flight_are_the_old_models(vllm: VLLMWorld) -> None:
    vllm.run(vllm.publish("random"))
    for request, answer, kept in vllm.run(vllm.across_an_update("other", after_s=0.1)):
        expected = vllm.reference("random", request.tokens + answer.tokens)[2 : 2 + kept]
        assert answer.logprobs[:kept] == pytest.approx(expected.tolist(), abs=TOLERANCE)


def test_new_requests_never_read_the_kv_of_older_weights(vllm: VLLMWorld) -> None:
    """A prefix of several KV blocks, computed and cached under one version, is asked for again under the next."""
    prefix = [index % 37 for index in range(400)]
    for kind in ("random", "other", "random"):
        vllm.run(vllm.publish(kind))
        for _ in range(2):  # the second time the blocks come from the cache of this version
            answer = vllm.run(vllm.answer(vllm.request(tokens=prefix, n=20)))
            expected = vllm.reference(kind, prefix + answer.tokens)[-20:]
            assert answer.logprobs == pytest.approx(expected.tolist(), abs=TOLERANCE)


def test_requests_that_come_during_an_update_are_prefilled_with_the_new_weights(vllm: VLLMWorld) -> None:
    prefix = [index % 31 for index in range(400)]
    vllm.run(vllm.publish("random"))
    vllm.run(vllm.answer(vllm.request(tokens=prefix, n=5)))
    offer = vllm.offer("other")
    vllm.run(vllm.engine.stage(offer))

    async def crowd() -> None:
        update = asyncio.create_task(vllm.engine.apply(offer))
        await asyncio.sleep(0)  # the update has begun
        requests = [vllm.request(tokens=prefix, n=20) for _ in range(4)]
        doomed = vllm.request(n=20)
        waiting = asyncio.create_task(vllm.answer(doomed))
        answers = [asyncio.create_task(vllm.answer(request)) for request in requests]
        await asyncio.sleep(0)
        assert not update.done()
        await vllm.engine.abort([doomed.request_id])
        await update
        for answer in await asyncio.gather(*answers):
            assert set(answer.versions) == {offer.version}
            expected = vllm.reference("other", prefix + answer.tokens)[-20:]
            assert answer.logprobs == pytest.approx(expected.tolist(), abs=TOLERANCE)
        assert (await waiting).finish_reason == "abort"

    vllm.run(crowd())
    vllm.version = offer.version


def test_corrupted_bytes_change_nothing(world: World) -> None:
    world.run(world.publish("random"))
    offer = world.offer("other")
    world.offers.corrupt(offer)
    with pytest.raises(ChecksumError):
        world.run(world.engine.stage(offer))
    with pytest.raises(RuntimeError, match="staged"):
        world.run(world.engine.apply(offer))
    assert world.engine.stats().version == world.version
    answer = world.run(world.answer(world.request(n=20)))
    assert set(answer.versions) == {world.version}
    if isinstance(world, VLLMWorld):
        expected = world.reference("random", [1, 2, 3, *answer.tokens])[-20:]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=TOLERANCE)


def test_a_discarded_version_cannot_be_applied(world: World) -> None:
    offer = world.offer("other")
    world.run(world.engine.stage(offer))
    world.run(world.engine.discard(offer.version))
    world.run(world.engine.discard(offer.version))  # as a publisher that repeats itself
    with pytest.raises(RuntimeError, match="staged"):
        world.run(world.engine.apply(offer))
    assert world.engine.stats().version == world.version


def test_stall_is_counted(world: World) -> None:
    before = world.engine.stats().update_stall_s
    stall_s = world.run(world.publish("random"))
    assert world.engine.stats().update_stall_s - before == pytest.approx(stall_s)


def test_kv_use_is_seen(world: World) -> None:
    async def watched() -> None:
        await world.publish("random")
        stream = aiter(world.engine.generate(world.request(n=300)))
        for _ in range(20):
            await anext(stream)
        stats = world.engine.stats()
        assert stats.running == 1
        assert 0 < stats.kv_used_fraction <= 1
        await stream.aclose()  # type: ignore[attr-defined]

    world.run(watched())


def test_the_end_of_the_engine_is_heard_by_all(world: World) -> None:
    async def ends() -> None:
        tasks = [asyncio.create_task(world.answer(world.request(n=700))) for _ in range(4)]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await world.end()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.monotonic() - began < 10
        assert [type(outcome) for outcome in outcomes] == [EngineDead] * 4
        with pytest.raises(EngineDead):
            await world.answer(world.request())
        with pytest.raises(EngineDead):
            await world.engine.stage(world.offer("random"))

    world.run(ends())
    assert world.children() == []
