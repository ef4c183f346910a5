"""The fake engine: what it says is pure, it steps and stamps like an engine, and its faults happen as scripted."""

from __future__ import annotations

import asyncio
import statistics
import struct
import subprocess
import sys
import uuid

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.generators.engine import Engine, EngineDead, GenerationRequest
from asyncrl.generators.fake_batch import Batch, Stream
from asyncrl.generators.fake_engine import FakeEngine, Fault, InjectedFault
from asyncrl.generators.fake_speech import Lengths, Speech, probe_logprobs, weights_digest

STOP = 0
LENGTHS = Lengths(median_tokens=20, sigma=0.8)

prompts = st.lists(st.integers(0, 40), max_size=12)


def answer(seed: int, vocab_size: int, tokens: list[int], limit: int = 400) -> list[tuple[int, float]]:
    speech = Speech(seed, vocab_size, LENGTHS, (STOP,), tokens)
    said = []
    while len(said) < limit and (not said or said[-1][0] != STOP):
        said.append(speech.speak())
    return said


@given(st.integers(0, 5), st.integers(2, 40), prompts, st.data())
def test_an_answer_cut_anywhere_goes_on_the_same(seed, vocab_size, prompt, data):
    whole = answer(seed, vocab_size, prompt)
    assert whole[-1][0] == STOP and STOP not in [token for token, _ in whole[:-1]]
    cut = data.draw(st.integers(0, len(whole) - 1))
    prefix = [token for token, _ in whole[:cut]]
    assert answer(seed, vocab_size, prompt + prefix) == whole[cut:]


@given(st.integers(0, 2**64 - 1))
def test_lengths_and_logprobs_stay_in_range(hashed):
    assert 1 <= LENGTHS.draw(hashed) < 20 * 2.72 ** (0.8 * 7.2)
    assert Lengths(median_tokens=20).draw(hashed) == 20


def test_lengths_are_lognormal_and_belong_to_the_prompt():
    lengths = [len(answer(1, 5000, [1000 + i, 2000])) for i in range(600)]
    assert 17 <= statistics.median(lengths) <= 23
    deciles = statistics.quantiles(lengths, n=10)
    assert 2.3 < deciles[8] / deciles[4] < 3.4  # exp(0.8 * 1.28) = 2.8
    assert len(answer(2, 5000, [1000, 2000])) != lengths[0]


def test_logprobs_are_exact_in_float32_and_below_zero():
    values = [logprob for i in range(50) for _, logprob in answer(0, 100, [200 + i])]
    assert all(struct.unpack("f", struct.pack("f", value))[0] == value for value in values)
    assert all(-8 < value <= 0 for value in values) and len(set(values)) > len(values) * 0.9


def test_refuses_a_vocabulary_of_stop_tokens():
    with pytest.raises(ValueError, match="all 2 tokens are stop tokens"):
        Speech(0, 2, LENGTHS, (0, 1), [])


def test_probe_depends_on_the_weights_and_on_every_token_before():
    tokens = [3, 1, 4, 1, 5]
    one = probe_logprobs(weights_digest([1, 2]), tokens)
    assert len(one) == 4 and one == probe_logprobs(weights_digest([1, 2]), tokens)
    other = probe_logprobs(weights_digest([1, 3]), tokens)
    assert all(a != b for a, b in zip(one, other, strict=True))
    changed = probe_logprobs(weights_digest([1, 2]), [3, 1, 9, 1, 5])
    assert changed[0] == one[0] and changed[1:] != one[1:]


def ask(tokens: list[int], name: str = "", limit: int = 400) -> GenerationRequest:
    return GenerationRequest(
        request_id=name or uuid.uuid4().hex,
        tokens=tokens,
        max_new_tokens=limit,
        temperature=1.0,
        stop_token_ids=(STOP,),
    )


async def collect(
    engine: FakeEngine, request: GenerationRequest
) -> tuple[list[int], list[float], list[int], str]:
    tokens, logprobs, versions, finish = [], [], [], ""
    async for chunk in engine.generate(request):
        assert not finish, "a chunk after the last"
        assert len(chunk.tokens) == len(chunk.logprobs) == len(chunk.versions)
        tokens += chunk.tokens
        logprobs += chunk.logprobs
        versions += chunk.versions
        finish = chunk.finish_reason or ""
    return tokens, logprobs, versions, finish


def on_engine(scenario, **settings_of_engine) -> None:
    """Run `scenario(engine)` on a started engine that has version 0, within 30 s."""

    async def run() -> None:
        engine: Engine = FakeEngine(
            **{"vocab_size": 500, "lengths": LENGTHS, "version": 0, **settings_of_engine}
        )
        await engine.start()
        try:
            async with asyncio.timeout(30):
                await scenario(engine)
        finally:
            await engine.shutdown()

    asyncio.run(run())


def test_streams_are_the_pure_answers():
    async def scenario(engine):
        prompts = [[600 + i, 700] for i in range(20)]
        answers = await asyncio.gather(*(collect(engine, ask(prompt)) for prompt in prompts))
        for prompt, (tokens, logprobs, versions, finish) in zip(prompts, answers, strict=True):
            assert list(zip(tokens, logprobs, strict=True)) == answer(0, 500, prompt)
            assert finish == "stop" and versions == [0] * len(tokens)
        stats = engine.stats()
        assert stats.generated_tokens == sum(len(tokens) for tokens, *_ in answers) and stats.running == 0

    on_engine(scenario, slots=7)


@settings(max_examples=15, deadline=None)
@given(prompts.filter(bool), st.integers(1, 30), st.integers(1, 9))
def test_an_aborted_rollout_goes_on_elsewhere(prompt, after, tokens_per_step):
    async def scenario(engine):
        whole = [token for token, _ in answer(0, 500, prompt)]
        got: list[int] = []
        request = ask(prompt, "cut")
        async for chunk in engine.generate(request):
            got += chunk.tokens
            if len(got) >= after and chunk.finish_reason is None:
                await engine.abort(["cut", "nobody"])
        other = FakeEngine(vocab_size=500, lengths=LENGTHS, version=3)
        await other.start()
        if got[-1] != STOP:
            rest, _, versions, finish = await collect(other, ask(prompt + got))
            assert finish == "stop" and set(versions) == {3}
            got += rest
        await other.shutdown()
        assert got == whole

    on_engine(scenario, tokens_per_step=tokens_per_step)


def test_abort_ends_a_stream_with_its_tokens_so_far():
    async def scenario(engine):
        stream = engine.generate(ask([600], "x"))
        first = await anext(stream)
        await engine.abort(["x"])
        last = await anext(stream)
        assert first.finish_reason is None and last.finish_reason == "abort"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert engine.stats().running == 0
        said = [token for token, _ in answer(0, 500, [600])]
        got = first.tokens + last.tokens
        assert got == said[: len(got)]

    on_engine(scenario, step_s=0.01)


def test_the_limit_ends_with_length_and_the_next_lease_continues():
    async def scenario(engine):
        whole = [token for token, _ in answer(0, 500, [600])]
        tokens, _, _, finish = await collect(engine, ask([600], limit=5))
        assert finish == "length" and tokens == whole[:5]
        exact = await collect(engine, ask([600], limit=len(whole)))
        assert exact[0] == whole and exact[3] == "stop"

    on_engine(scenario)


@pytest.mark.alone
def test_speed_is_set_by_step_time_and_slots():
    async def scenario(engine):
        loop = asyncio.get_running_loop()
        started = loop.time()
        await asyncio.gather(*(collect(engine, ask([600 + i], limit=5)) for i in range(4)))
        # 4 requests in 2 slots: twice 5 steps of 20 ms.
        assert 0.2 <= loop.time() - started < 2.0

    on_engine(scenario, step_s=0.02, slots=2, lengths=Lengths(median_tokens=50))


def test_generate_before_weights_or_start_is_an_error():
    async def scenario(engine):
        with pytest.raises(RuntimeError, match="apply weights first"):
            await collect(engine, ask([600]))
        with pytest.raises(RuntimeError, match="start the engine"):
            await collect(FakeEngine(version=0), ask([600]))

    on_engine(scenario, version=-1)


def test_refuses_a_running_id_and_no_tokens():
    async def scenario(engine):
        stream = engine.generate(ask([600], "x"))
        await anext(stream)
        with pytest.raises(ValueError, match="request x"):
            await collect(engine, ask([601], "x"))
        with pytest.raises(ValueError, match="got 0"):
            await collect(engine, ask([601], "y", limit=0))
        await stream.aclose()
        assert engine.stats().running == 0
        await collect(engine, ask([601], "x"))

    on_engine(scenario, step_s=0.005)


def test_a_token_fault_strikes_one_stream_once():
    async def scenario(engine):
        whole = [token for token, _ in answer(0, 500, [600])]
        got = []
        with pytest.raises(InjectedFault, match="raise at token 4"):
            async for chunk in engine.generate(ask([600])):
                got += chunk.tokens
        assert got == whole[:3]
        assert (await collect(engine, ask([600, *got])))[0] == whole[3:]

    on_engine(scenario, faults=[Fault(kind="raise", where="token", at=4)])


def test_a_dead_engine_ends_every_stream_and_call():
    async def scenario(engine):
        streams = [asyncio.create_task(collect(engine, ask([600 + i]))) for i in range(5)]
        for stream in streams:
            with pytest.raises(EngineDead, match="die at token 12"):
                await stream
        with pytest.raises(EngineDead):
            await collect(engine, ask([700]))
        with pytest.raises(EngineDead):
            await engine.probe([1, 2])

    on_engine(scenario, faults=[Fault(kind="die", where="token", at=12)], lengths=Lengths(median_tokens=50))


def test_a_hung_engine_says_nothing_until_it_is_shut_down():
    async def scenario(engine):
        stream = engine.generate(ask([600]))
        got = []
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                async for chunk in stream:
                    got += chunk.tokens
        assert len(got) == 2
        waiting = asyncio.create_task(collect(engine, ask([601])))
        await asyncio.sleep(0.05)
        await engine.shutdown()
        with pytest.raises(EngineDead, match="shut down"):
            await waiting

    on_engine(scenario, faults=[Fault(kind="hang", where="token", at=3)], lengths=Lengths(median_tokens=50))


def test_an_idle_engine_does_not_spin():
    async def scenario(engine):
        await collect(engine, ask([600]))
        await asyncio.sleep(0.05)
        steps = 0
        original = engine._step

        async def counted():
            nonlocal steps
            steps += 1
            await original()

        engine._step = counted
        await asyncio.sleep(0.1)
        assert steps == 0

    on_engine(scenario)


def test_weights_change_between_two_steps_and_streams_go_on():
    torch = pytest.importorskip("torch")
    from offers import fill, offer_of

    from asyncrl.weight_sync.plan import make_plan
    from asyncrl.weight_sync.slots import Slots
    from asyncrl.weight_sync.wire import Offer

    plan = make_plan([("w", "float32", (1000,)), ("v", "bfloat16", (77,))], 1024)

    def offer(slots: Slots, version: int) -> Offer:
        slot = slots.next()
        fill(slot, plan, {spec.name: torch.full(spec.shape, float(version)) for spec in plan.tensors})
        slots.committed()
        return offer_of(slot, plan, version)

    async def scenario(engine):
        slots = Slots(f"test-{uuid.uuid4().hex[:12]}", plan)
        try:
            offers = [offer(slots, version) for version in (0, 1)]
            await engine.stage(offers[0])
            assert engine.stats().version == -1
            with pytest.raises(RuntimeError, match="version 1 is not staged"):
                await engine.apply(offers[1])
            await engine.apply(offers[0])
            streams = [asyncio.create_task(collect(engine, ask([600 + i]))) for i in range(4)]
            await asyncio.sleep(0.05)
            await engine.stage(offers[1])
            stall_s = await engine.apply(offers[1])
            assert 0 < stall_s <= engine.stats().update_stall_s
            assert await engine.probe([1, 2, 3]) == probe_logprobs(
                weights_digest(offers[1].checksums), [1, 2, 3]
            )
            switches = set()
            for i, stream in enumerate(streams):
                tokens, _, versions, _ = await stream
                assert tokens == [token for token, _ in spoken(600 + i)]
                assert versions == sorted(versions) and set(versions) == {0, 1}
                switches.add(versions.index(1))
            assert len(switches) == 1, "all slots change at one step"
            await engine.stage(offer(slots, 2))
            await engine.discard(2)
            await engine.discard(9)
            assert engine.stats().version == 1
        finally:
            slots.close()

    def spoken(prompt: int) -> list[tuple[int, float]]:
        speech = Speech(0, 500, Lengths(median_tokens=60), (STOP,), [prompt])
        return [speech.speak() for _ in range(60)]

    on_engine(scenario, version=-1, step_s=0.005, lengths=Lengths(median_tokens=60))


def test_a_small_cache_preempts_the_newest_and_changes_no_token():
    async def scenario(engine):
        tasks = [asyncio.create_task(collect(engine, ask([600 + i] * 10))) for i in range(4)]
        least_free, most_waiting, most_used = 100, 0, 0.0
        while not all(task.done() for task in tasks):
            stats = engine.stats()
            assert stats.kv_capacity_tokens == 100 and stats.kv_free_tokens >= 0
            least_free, most_waiting = min(least_free, stats.kv_free_tokens), max(most_waiting, stats.waiting)
            most_used = max(most_used, stats.kv_used_fraction)
            await asyncio.sleep(0)
        for i, task in enumerate(tasks):
            assert (await task)[0] == [token for token, _ in spoken([600 + i] * 10)]
        stats = engine.stats()
        assert stats.preemptions >= 2 and most_waiting >= 2 and least_free < 5 and most_used > 0.95
        assert stats.running == stats.waiting == 0 and stats.kv_free_tokens == 100

    def spoken(prompt: list[int]) -> list[tuple[int, float]]:
        speech = Speech(0, 500, Lengths(median_tokens=40), (STOP,), prompt)
        return [speech.speak() for _ in range(40)]

    on_engine(scenario, kv_capacity_tokens=100, lengths=Lengths(median_tokens=40))


def test_the_oldest_keeps_its_cache_and_one_alone_always_runs():
    batch = Batch(slots=3, kv_capacity_tokens=20)
    streams = [Stream(ask([1] * size, name), None) for name, size in (("a", 8), ("b", 8), ("c", 30))]
    for stream in streams:
        batch.add(stream)
    batch.schedule(version=4, tokens_each=1)
    assert list(batch.running) == ["a", "b"] and batch.waiting == 1 and streams[0].kv_version == 4
    streams[0].context = streams[1].context = 10
    batch.schedule(version=5, tokens_each=1)
    assert list(batch.running) == ["a"] and batch.preemptions == 1
    batch.remove("a")
    batch.schedule(version=5, tokens_each=1)
    assert list(batch.running) == ["b"] and streams[1].kv_version == 5
    batch.remove("b")
    batch.schedule(version=6, tokens_each=1)
    assert list(batch.running) == ["c"], "too long for the cache, and alone"


def test_chunks_are_as_long_as_was_asked_for():
    async def scenario(engine):
        request = msgspec.structs.replace(ask([600], limit=21), chunk_tokens=5)
        sizes = [len(chunk.tokens) async for chunk in engine.generate(request)]
        assert sizes == [5, 5, 5, 5, 1]

    on_engine(scenario, step_s=0.001, lengths=Lengths(median_tokens=50))


def test_it_is_light():
    code = (
        "import sys, asyncrl.generators.fake_engine, asyncrl.weight_sync.receiver\n"
        "heavy = {'torch', 'numpy', 'vllm', 'ray', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
