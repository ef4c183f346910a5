"""What the dispatcher's tests share: scorers, engines, and a dispatcher between a fake engine and a real buffer."""

import asyncio

from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.dispatcher import Dispatcher
from asyncrl.generators.fake_engine import FakeEngine
from asyncrl.generators.score import Score

SAMPLING = SamplingConfig(max_new_tokens=40, temperature=1.0, flush_tokens=4)
STOP = (0,)


class Scorer:
    """Real scores of a simple rule."""

    async def score(self, answer_text, payload):
        return Score(float(len(answer_text)), 0.0, {})


def dispatcher(
    engine, buffer, scorer=None, concurrency=4, engine_id="e", sampling=SAMPLING, turns=None, stops=STOP
):
    return Dispatcher(
        engine=engine,
        engine_id=engine_id,
        buffer=buffer,
        scorer=scorer or Scorer(),
        sampling=sampling,
        concurrency=concurrency,
        stop_token_ids=stops,
        decode=lambda tokens: " ".join(map(str, tokens)),
        turns=turns,
    )


async def fake(vocab_size=50_021, version=0, **settings):
    engine = FakeEngine(vocab_size=vocab_size, version=version, **settings)
    await engine.start()
    return engine


def read(client):
    got = client.read_batch(20.0)
    assert got is not None
    return got


async def until(condition, timeout_s=5.0):
    """Looks again every millisecond; raises TimeoutError at the deadline."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 (what is waited for tells nobody)
            await asyncio.sleep(0.001)
