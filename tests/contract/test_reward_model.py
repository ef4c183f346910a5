"""A reward model in its process: what it says, what becomes of answers when it dies or hangs, and a run's rollouts scored by it.

The model is a tiny, random one; its numbers are compared with those of a plain forward pass.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from buffers import admit, buffer_service
from dispatching import dispatcher, fake, read
from tiny import write_classifier

from asyncrl.buffer import BufferClient
from asyncrl.buffer.columns import slices
from asyncrl.generators import dispatcher as dispatching_module
from asyncrl.generators.config import RewardModelConfig, RewardsConfig, RewardTerm
from asyncrl.generators.functions import FunctionError
from asyncrl.generators.reward_classifier import Classifier
from asyncrl.generators.reward_model import MOST_DEATHS, RewardModel, RewardModelDead
from asyncrl.generators.reward_pool import RewardPool
from asyncrl.generators.score import RewardFailed

PAYLOAD = json.dumps({"prompt_id": "tests#1", "question": "1+2=", "answer": "3"})
QUICK = RewardModelConfig(
    device="cpu", dtype="float32", chat_template=False, tokens_per_batch=256, wait_s=0.01
)
SLOW = RewardModelConfig(device="cpu", dtype="float32", chat_template=False, wait_s=4.0)
"""An answer that is alone waits so long for company: time to kill the process that has it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_classifier(tmp_path_factory.mktemp("judge"), pad="eos"))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not [c for c in psutil.Process().children() if "reward_model_process" in " ".join(c.cmdline())]


@asynccontextmanager
async def judging(folder: str, config: RewardModelConfig = QUICK, **changes: Any):
    changed = {name: getattr(config, name) for name in config.__struct_fields__} | changes
    model = await asyncio.to_thread(RewardModel, folder, RewardModelConfig(**changed))
    try:
        yield model
    finally:
        await model.close()
        await model.close()


def by_hand(folder: str, *answers: str) -> list[float]:
    classifier = Classifier(folder, QUICK)
    return [classifier.score([classifier.tokens(PAYLOAD, answer)])[0] for answer in answers]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 (what is waited for tells nobody)
            await asyncio.sleep(0.01)


def run(work: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(240):
            return await work

    return asyncio.run(bounded())


def kill(model: RewardModel, number: int = signal.SIGKILL) -> None:
    os.kill(model.pids()[0], number)


def test_many_answers_of_mixed_lengths_get_the_model_s_own_numbers(folder: str) -> None:
    answers = [str(7**i % 9973) * (1 + 31 * i % 13) for i in range(60)]

    async def work() -> list[float]:
        async with judging(folder) as model:
            return await asyncio.gather(*(model.score(answer, PAYLOAD) for answer in answers))

    assert run(work()) == pytest.approx(by_hand(folder, *answers), abs=1e-5)


def test_what_cannot_be_read_fails_alone(folder: str) -> None:
    async def work() -> list[Any]:
        async with judging(folder) as model:
            texts = ("3", "1" * 2000, "4", "é" * 20_000_000)
            return await asyncio.gather(*(model.score(t, PAYLOAD) for t in texts), return_exceptions=True)

    three, long, four, huge = run(work())
    assert [three, four] == pytest.approx(by_hand(folder, "3", "4"), abs=1e-5)
    assert (
        isinstance(long, RewardFailed)
        and "prompt 'tests#1': question and answer are 2004 tokens" in long.reason
    )
    assert isinstance(huge, RewardFailed) and "16,777,216 is the most" in huge.reason


def test_answers_of_a_process_that_dies_are_asked_again(folder: str) -> None:
    async def work() -> list[float]:
        async with judging(folder) as model:
            await model.score("warm", PAYLOAD)
            before = model.pids()
            kill(model, signal.SIGSTOP)
            asked = [asyncio.create_task(model.score(str(i), PAYLOAD)) for i in range(5)]
            await asyncio.sleep(0.1)
            kill(model)
            found = await asyncio.gather(*asked)
            assert model.pids() != before
            return found

    assert run(work()) == pytest.approx(by_hand(folder, *map(str, range(5))), abs=1e-5)


def test_an_answer_that_was_there_at_two_deaths_fails_and_the_model_goes_on(folder: str) -> None:
    async def work() -> tuple[str, float]:
        async with judging(folder, SLOW) as model:
            asked = asyncio.create_task(model.score("3", PAYLOAD))
            for _ in range(2):
                await until(lambda: model.reading)
                await asyncio.sleep(0.3)
                kill(model)
                await until(lambda: not model.reading)
            with pytest.raises(RewardFailed) as failed:
                await asked
            return failed.value.reason, await model.score("4", PAYLOAD)

    reason, after = run(work())
    assert "its process ended with signal 9, for the second time while it had this answer" in reason
    assert [after] == pytest.approx(by_hand(folder, "4"), abs=1e-5)


def test_too_many_deaths_end_it_for_good(folder: str) -> None:
    async def work() -> str:
        async with judging(folder, SLOW) as model:
            asked = asyncio.create_task(model.score("3", PAYLOAD))
            seen: set[int] = set()
            for _ in range(MOST_DEATHS + 1):
                await until(lambda: model.pids()[0] not in seen)
                seen.update(model.pids())
                await asyncio.sleep(0.2)
                kill(model)
            with pytest.raises(RewardModelDead, match=f"died {MOST_DEATHS + 1} times within 600 s"):
                await asked
            with pytest.raises(RewardModelDead) as dead:
                await model.score("4", PAYLOAD)
            return str(dead.value)

    assert "signal 9" in run(work())


def test_a_process_that_hangs_costs_its_deadline_and_is_replaced(folder: str) -> None:
    async def work() -> tuple[float, float]:
        async with judging(folder, timeout_s=3.0) as model:
            await model.score("warm", PAYLOAD)
            stuck = model.pids()
            kill(model, signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(RewardFailed, match=r"no answer within serving.timeout_s = 3"):
                await model.score("3", PAYLOAD)
            waited = time.monotonic() - began
            await until(lambda: model.pids() != stuck and model.reading)
            return waited, await model.score("4", PAYLOAD)

    waited, after = run(work())
    assert 3.0 <= waited < 6.0
    assert [after] == pytest.approx(by_hand(folder, "4"), abs=1e-5)


def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    three = str(write_classifier(tmp_path / "three", labels=3))
    with pytest.raises(FunctionError, match="has 3 labels"):
        RewardPool(RewardsConfig(terms=[RewardTerm(function="sums"), RewardTerm(model=three, serving=QUICK)]))


def test_a_run_s_rollouts_are_scored_by_rule_and_model_together(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model says what the answers cost; a rule says what they are worth."""
    monkeypatch.setattr(dispatching_module, "_LEASE_WAIT_S", 0.3)
    cost = RewardModelConfig(device="cpu", dtype="float32", chat_template=False, gives="cost")
    terms = [RewardTerm(function="format", weight=2.0), RewardTerm(model=folder, serving=cost, weight=0.5)]

    async def work(service: Any, client: Any) -> None:
        await admit(service.address, 2)
        engine = await fake()
        rewards = await asyncio.to_thread(RewardPool, RewardsConfig(terms=terms), needs_cost=True)
        try:
            async with BufferClient(service.address) as buffer, asyncio.TaskGroup() as group:
                one = dispatcher(engine, buffer, rewards)
                group.create_task(one.run())
                _, rows = await asyncio.to_thread(read, client)
                await one.stop()
        finally:
            await rewards.close()
            await engine.shutdown()
        texts = [" ".join(str(t) for t in tokens if t) for tokens in slices(rows["tokens"])]
        classifier = Classifier(folder, QUICK)
        expected = [0.5 * classifier.score([classifier.tokens("{}", text)])[0] for text in texts]
        assert rows["cost"].to_pylist() == pytest.approx(expected, abs=1e-5)
        assert rows["reward"].to_pylist() == [0.0] * 4 and len({*texts}) > 1

    with buffer_service(tmp_path) as (service, client):
        client.publish(0)
        run(work(service, client))
