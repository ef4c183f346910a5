"""Scores answers: rules in worker processes (`worker_pool`), each reward model in a process of its own (`reward_model`).
Called by the dispatcher, from one event loop.

Invariant: an answer gets a score by every term, or it fails with the reason of a term that gave none.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from asyncrl.generators.config import RewardsConfig
from asyncrl.generators.functions import FunctionError
from asyncrl.generators.reward_model import RewardModel
from asyncrl.generators.rewards import Question, Values
from asyncrl.generators.score import RewardFailed, Score, combined
from asyncrl.generators.worker_pool import Job, WorkerPool, WorkFailed, check, prompt_named

_MAKE: Final = "asyncrl.generators.rewards:answerer"


class RewardPool:
    """Scores answers by the weighted sum of `config.terms`: rules in workers, each model in a process of its own."""

    def __init__(self, config: RewardsConfig, *, needs_cost: bool = False) -> None:
        """Starts the processes and waits until they have loaded every function (about a second) and model.

        `needs_cost`: an answer that no term gives a cost for is an error. Raises `FunctionError` for a function or a model
        that is not there, naming the way out.
        """
        _check_terms(config)
        self._terms, self._needs_cost = config.terms, needs_cost
        self._rules = [term for term in config.terms if term.function]
        self._pool = WorkerPool(_job(config), config.workers) if self._rules else None
        self._models: dict[str, RewardModel] = {}
        try:
            for term in config.terms:
                if term.model:
                    self._models[term.name] = RewardModel(term.model, term.served)
        except FunctionError:
            self._end()
            raise

    def pids(self) -> list[int]:
        """Process ids of the present workers, then of the models."""
        models = [pid for model in self._models.values() for pid in model.pids()]
        return [*(self._pool.pids() if self._pool else ()), *models]

    async def score(self, answer_text: str, payload: str) -> Score:
        """What `answer_text` is worth; `payload` is the prompt's JSON object. Raises `RewardFailed`, or what ends the engine:
        CostMissing, RewardModelDead.

        Waits for a free seat, which each score ahead gives back within `timeout_s` (and the start of a worker), and for the
        models, each until its own deadline.
        """
        rules, models = await asyncio.gather(
            self._by_rules(answer_text, payload), self._by_models(answer_text, payload)
        )
        said, read = iter(rules), iter(models)
        values = [next(read) if term.model else next(said) for term in self._terms]
        answer = next((one.answer for one in values if one.answer is not None), None)
        numbers = [one.numbers for one in values]
        return combined(self._terms, numbers, answer, needs_cost=self._needs_cost)

    async def _by_models(self, answer_text: str, payload: str) -> list[Values]:
        judges = [term for term in self._terms if term.model]
        found = await asyncio.gather(
            *(self._models[term.name].score(answer_text, payload) for term in judges)
        )
        # What gives a cost is worth nothing itself.
        return [
            Values({"reward": 0.0, term.served.gives: value}, None)
            for term, value in zip(judges, found, strict=True)
        ]

    async def _by_rules(self, answer_text: str, payload: str) -> list[Values]:
        if self._pool is None:
            return []
        asked = [
            msgspec.msgpack.encode(Question(function=index, answer_text=answer_text, payload=payload))
            for index in range(len(self._rules))
        ]
        try:
            answers = await self._pool.run(asked)
        except WorkFailed as error:
            name = self._rules[error.index].function
            raise RewardFailed(
                f"reward function {name!r} on {prompt_named(payload)}: {error.reason}"
            ) from error
        return [msgspec.msgpack.decode(answer, type=Values) for answer in answers]

    async def close(self) -> None:
        """Ends every process; scores in flight fail. Safe to call twice."""
        if self._pool is not None:
            await self._pool.close()
        for model in self._models.values():
            await model.close()

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.end()
        for model in self._models.values():
            model.end()


def check_functions(config: RewardsConfig) -> None:
    """Has one worker load every function, and ends it: for checks before launch. Raises `FunctionError`."""
    check(_job(config))


def _check_terms(config: RewardsConfig) -> None:
    names = [term.name for term in config.terms]
    if not names:
        raise FunctionError("[rewards] has no terms; add [[rewards.terms]] with a function or a model")
    for term in config.terms:
        if term.broken_rule:
            raise FunctionError(f"reward term {term.name!r}: {term.broken_rule}")
    if len(set(names)) < len(names):
        raise FunctionError(f"a reward term is listed twice: {names}; add up its weights in one term")


def _job(config: RewardsConfig) -> Job:
    names = [term.function for term in config.terms if term.function]
    return Job(
        what="reward",
        make=_MAKE,
        setup=msgspec.json.encode(names),
        timeout_s=config.timeout_s,
        memory_bytes=config.memory_bytes,
    )
