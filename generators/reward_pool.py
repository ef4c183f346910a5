"""Scores answers in worker processes (`worker_pool`). Called by the dispatcher, from one event loop.

Invariant: an answer gets a score by every term, or it fails with the reason of the first term that gave none.
"""

from __future__ import annotations

from typing import Final

import msgspec

from asyncrl.generators.config import RewardsConfig
from asyncrl.generators.functions import FunctionError
from asyncrl.generators.rewards import Question
from asyncrl.generators.worker_pool import Job, WorkerPool, WorkFailed, check, prompt_named

_MAKE: Final = "asyncrl.generators.rewards:answerer"


class Score(msgspec.Struct, frozen=True):
    """What an answer is worth."""

    reward: float
    """Sum of weight * value over the terms."""
    parts: dict[str, float]
    """Value of each term by its function's name, before weighting; further numbers of a function as `name/key`."""


class RewardFailed(RuntimeError):
    """One answer could not be scored; its rollout fails with this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RewardPool:
    """Scores answers by the weighted sum of `config.terms`."""

    def __init__(self, config: RewardsConfig) -> None:
        """Starts the workers and waits until they have loaded every function (about a second).

        Raises `FunctionError` for a function that is not there, naming the way out.
        """
        self._terms = config.terms
        self._pool = WorkerPool(_job(config), config.workers)

    def pids(self) -> list[int]:
        """Process ids of the present workers."""
        return self._pool.pids()

    async def score(self, answer_text: str, payload: str) -> Score:
        """What `answer_text` is worth; `payload` is the prompt's JSON object. Raises `RewardFailed`.

        Waits for a free seat, which each score ahead gives back within `timeout_s` (and the start of a worker).
        """
        asked = [
            msgspec.msgpack.encode(Question(function=index, answer_text=answer_text, payload=payload))
            for index in range(len(self._terms))
        ]
        try:
            answers = await self._pool.run(asked)
        except WorkFailed as error:
            name = self._terms[error.index].function
            raise RewardFailed(
                f"reward function {name!r} on {prompt_named(payload)}: {error.reason}"
            ) from error
        reward, parts = 0.0, {}
        for term, answer in zip(self._terms, answers, strict=True):
            values = msgspec.msgpack.decode(answer, type=dict[str, float])
            reward += term.weight * values["reward"]
            for key, value in values.items():
                parts[term.function if key == "reward" else f"{term.function}/{key}"] = value
        return Score(reward=reward, parts=parts)

    async def close(self) -> None:
        """Ends every worker; scores in flight fail. Safe to call twice."""
        await self._pool.close()


def check_functions(config: RewardsConfig) -> None:
    """Has one worker load every function, and ends it: for checks before launch. Raises `FunctionError`."""
    check(_job(config))


def _job(config: RewardsConfig) -> Job:
    names = [term.function for term in config.terms]
    if not names:
        raise FunctionError("[rewards] has no terms; add [[rewards.terms]] with a function")
    if len(set(names)) < len(names):
        raise FunctionError(f"a reward function is listed twice: {names}; add up its weights in one term")
    return Job(
        what="reward",
        make=_MAKE,
        setup=msgspec.json.encode(names),
        timeout_s=config.timeout_s,
        memory_bytes=config.memory_bytes,
    )
