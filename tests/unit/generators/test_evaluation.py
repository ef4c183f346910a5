"""Held-out answers come the way training's do: with the environment's turns, within the budget, stamped with their versions."""

import asyncio

import pytest

from asyncrl.generators.engine import EngineDead
from asyncrl.generators.evaluation import Asking, Means, evaluate
from asyncrl.generators.evaluation_config import EvaluationConfig, broken_evaluation_rules
from asyncrl.generators.fake_speech import Lengths
from asyncrl.generators.prompts import Prompt
from asyncrl.generators.reward_pool import RewardFailed, Score
from asyncrl.generators.turns import EnvironmentFailed
from tests.dispatching import STOP, Scorer, fake, until


class Twice:
    async def next_turn(self, prompt_tokens, answer_tokens, versions, payload):
        assert len(versions) == len(answer_tokens)
        return [5, 6, 7] if answer_tokens.count(STOP[0]) < 2 else None


class Silent:
    async def next_turn(self, prompt_tokens, answer_tokens, versions, payload):
        raise EnvironmentFailed("it hung")


class Answering:
    """Names the final answer itself; has no score for the prompt that ends in 4."""

    async def score(self, answer_text, payload):
        if payload == "4":
            raise RewardFailed("it raised")
        return Score(1.0, 0.0, {}, f"final of {payload}")


def means(engine, scorer=None, turns=None):
    return Means(
        engine=engine,
        scorer=scorer or Scorer(),
        turns=turns,
        stop_token_ids=STOP,
        decode=lambda tokens: "x" * len(tokens),
    )


def asking(**changes):
    settings = {
        "label": "t",
        "rollouts_per_prompt": 1,
        "temperature": 1.0,
        "max_new_tokens": 100,
        "slots": 2,
    }
    return Asking(**(settings | changes))


PROMPTS = [Prompt(prompt_id=f"p{i}", tokens=[1, 2, 3 + i], payload=str(i)) for i in range(5)]


def answers_of(wanted, *, scorer=None, turns=None, **engine_settings):
    async def run():
        engine = await fake(lengths=Lengths(median_tokens=10), **engine_settings)
        try:
            return await evaluate(means(engine, scorer, turns), PROMPTS, wanted)
        finally:
            await engine.shutdown()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("turns", "limit", "length", "stops", "truncated"),
    [
        (None, 100, 10, 1, False),
        (None, 7, 7, 0, True),
        (Twice(), 100, 23, 2, False),
        (Twice(), 18, 18, 1, True),
        (Twice(), 13, 10, 1, True),  # the environment's words would leave no room for the model's
    ],
)
def test_lengths_count_every_turn(turns, limit, length, stops, truncated):
    found = answers_of(asking(max_new_tokens=limit), turns=turns)
    assert [len(row) for row in found] == [1] * 5
    for (answer,) in found:
        assert (answer.tokens, answer.truncated) == (length, truncated)
        assert answer.reward == length - stops and answer.final == "x" * (length - stops)
        assert (answer.oldest_version, answer.newest_version, answer.failure) == (0, 0, "")


def test_every_prompt_has_its_answers_in_their_order_and_a_failure_costs_its_own():
    found = answers_of(asking(rollouts_per_prompt=3), scorer=Answering())
    assert [[answer.final for answer in row] for row in found] == [
        *([f"final of {i}"] * 3 for i in range(4)),
        [""] * 3,
    ]
    assert [answer.failure for answer in found[4]] == ["it raised"] * 3
    assert all(answer.reward == 0.0 and answer.tokens == 10 for answer in found[4])


def test_an_environment_that_fails_costs_the_answer():
    found = answers_of(asking(), turns=Silent())
    assert {answer.failure for (answer,) in found} == {"it hung"}


def test_no_more_at_once_than_slots():
    most = 0

    class Watched:
        def __init__(self, engine):
            self.engine = engine

        async def generate(self, request):
            nonlocal most
            async for chunk in self.engine.generate(request):
                most = max(most, self.engine.stats().running)
                yield chunk

    async def run():
        engine = await fake(lengths=Lengths(median_tokens=10), slots=64)
        await evaluate(means(Watched(engine)), PROMPTS, asking(rollouts_per_prompt=4, slots=3))
        await engine.shutdown()

    asyncio.run(run())
    assert 2 <= most <= 3


def test_an_answer_says_which_versions_it_is_of():
    class Updated:
        """Weights change after the sixth token."""

        async def generate(self, request):
            async for chunk in self.engine.generate(request):
                at = self.said.get(request.request_id, 0)
                self.said[request.request_id] = at + len(chunk.tokens)
                versions = [4 + (at + i >= 6) for i in range(len(chunk.tokens))]
                yield type(chunk)(
                    tokens=chunk.tokens,
                    logprobs=chunk.logprobs,
                    versions=versions,
                    finish_reason=chunk.finish_reason,
                )

    async def run(limit):
        updated = Updated()
        updated.engine, updated.said = await fake(lengths=Lengths(median_tokens=10)), {}
        found = await evaluate(means(updated, turns=Twice()), PROMPTS[:1], asking(max_new_tokens=limit))
        await updated.engine.shutdown()
        return found[0][0]

    over, within = asyncio.run(run(100)), asyncio.run(run(6))
    assert (over.oldest_version, over.newest_version) == (4, 5)  # the environment's -1 is none
    assert (within.oldest_version, within.newest_version) == (4, 4)


def test_a_dead_engine_raises_and_a_cancelled_evaluation_leaves_it_idle():
    async def run():
        engine = await fake(lengths=Lengths(median_tokens=30), step_s=0.01)
        task = asyncio.create_task(evaluate(means(engine), PROMPTS, asking(max_new_tokens=1000)))

        async def busy():
            return engine.stats().running == 2

        await until(busy)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine.stats().running == 0
        dying = asyncio.create_task(evaluate(means(engine), PROMPTS, asking(max_new_tokens=1000)))
        await until(busy)
        await engine.shutdown()
        with pytest.raises(BaseExceptionGroup) as error:
            await dying
        assert error.group_contains(EngineDead)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"k": [1, 8], "rollouts_per_prompt": 4}, "evaluation.k"),
        ({"temperature": 0.0, "rollouts_per_prompt": 2}, "evaluation.rollouts_per_prompt"),
        ({"max_new_tokens": 128}, "evaluation.max_new_tokens"),
    ],
)
def test_settings_that_do_not_go_together(changes, path):
    ((found, _, advice),) = broken_evaluation_rules(EvaluationConfig(source="sums:test", **changes), 128)
    assert found == path and len(advice) > 30


def test_settings_that_do():
    config = EvaluationConfig(source="sums:test", k=[4, 1, 4], rollouts_per_prompt=4)
    assert list(broken_evaluation_rules(config, 128)) == [] and config.counts == [1, 4]
    assert EvaluationConfig().counts == [] and EvaluationConfig(rollouts_per_prompt=8).counts == [8]
