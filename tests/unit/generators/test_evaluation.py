"""Held-out answers come the way training's do: with the environment's turns, and within the budget."""

import asyncio

import pytest

from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.evaluation import evaluate
from asyncrl.generators.fake_speech import Lengths
from asyncrl.generators.prompts import Prompt
from tests.dispatching import STOP, Scorer, fake


class Twice:
    async def next_turn(self, prompt_tokens, answer_tokens, versions, payload):
        assert len(versions) == len(answer_tokens)
        return [5, 6, 7] if answer_tokens.count(STOP[0]) < 2 else None


@pytest.mark.parametrize(
    ("turns", "limit", "length", "stops"),
    [(None, 100, 10, 1), (Twice(), 100, 23, 2), (Twice(), 18, 18, 1), (Twice(), 13, 10, 1)],
)
def test_lengths_count_every_turn(turns, limit, length, stops):
    async def run():
        engine = await fake(lengths=Lengths(median_tokens=10))
        prompts = [Prompt(prompt_id=f"p{i}", tokens=[1, 2, 3 + i], payload="{}") for i in range(5)]
        found = await evaluate(
            engine=engine,
            scorer=Scorer(),
            prompts=prompts,
            sampling=SamplingConfig(max_new_tokens=limit),
            stop_token_ids=STOP,
            decode=lambda tokens: "x" * len(tokens),
            concurrency=2,
            label="t",
            turns=turns,
        )
        await engine.shutdown()
        assert found.version == 0 and found.lengths == [length] * 5
        assert found.rewards == [length - stops] * 5

    asyncio.run(run())
