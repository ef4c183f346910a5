"""Asks the environment, in worker processes (`worker_pool`), what comes after a turn of the model. Called by the dispatcher,
by the held-out evaluation and by the warm start, from one event loop.

Invariants:
- What is asked depends on the tokens so far and the payload alone, so any engine may ask, and ask again.
- After `max_turns` turns of the model the environment is not asked: the rollout ends.
- Without an environment, or with `single_turn`, there are no workers and nothing is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from asyncrl.buffer.schema import ENVIRONMENT
from asyncrl.generators.config import EnvironmentConfig
from asyncrl.generators.environment import SINGLE_TURN, Asked, Setup
from asyncrl.generators.worker_pool import Job, WorkerPool, WorkFailed, check, prompt_named

_MAKE: Final = "asyncrl.generators.environment:answerer"


class EnvironmentFailed(RuntimeError):
    """The environment gave no answer; the rollout fails with this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Turns:
    """One environment in `config.workers` processes."""

    def __init__(self, config: EnvironmentConfig, model: str) -> None:
        """Starts the workers and waits until they have loaded tokenizer and environment. `model` is a folder or hub name.

        Raises `FunctionError` for an environment that is not there or a stop token that is none.
        """
        self._config = config
        self._pool = WorkerPool(_job(config, model), config.workers)

    def pids(self) -> list[int]:
        """Process ids of the present workers."""
        return self._pool.pids()

    async def next_turn(
        self,
        prompt_tokens: Sequence[int],
        answer_tokens: Sequence[int],
        versions: Sequence[int],
        payload: str,
    ) -> list[int] | None:
        """The tokens to append after a turn that ended with a stop token, at least one; None ends the rollout.

        `answer_tokens` [tokens] are all so far; `versions` [tokens] say whose they are (`schema.ENVIRONMENT`); `payload` is
        the prompt's JSON object. Raises `EnvironmentFailed`. Waits for a free worker, which each call ahead gives back
        within `timeout_s`.
        """
        sampled = [version != ENVIRONMENT for version in versions]
        if turns_taken(sampled) >= self._config.max_turns:
            return None
        asked = Asked(list(prompt_tokens), list(answer_tokens), sampled, payload)
        try:
            (answer,) = await self._pool.run([msgspec.msgpack.encode(asked)])
        except WorkFailed as error:
            raise EnvironmentFailed(
                f"{self._config.function!r} on {prompt_named(payload)}: {error.reason}"
            ) from error
        return msgspec.msgpack.decode(answer, type=list[int] | None)

    async def close(self) -> None:
        """Ends every worker; calls in flight fail. Safe to call twice."""
        await self._pool.close()

    def end(self) -> None:
        """`close` for a caller without an event loop; it waits."""
        self._pool.end()


def fits(reply: Sequence[int], tokens_left: int) -> bool:
    """Whether the model can still say something after `reply`, where an answer has room for `tokens_left` more. If not, the
    reply is left out and the rollout ends with finish reason `length`."""
    return len(reply) < tokens_left


def turns_taken(sampled: Sequence[bool]) -> int:
    """Turns of the model: runs of tokens that it sampled without the environment in between."""
    before = [False, *sampled]
    return sum(now and not last for last, now in zip(before, sampled, strict=False))


def open_turns(config: EnvironmentConfig | None, model: str) -> Turns | None:
    """None where every rollout has one turn, and costs nothing more. Raises `FunctionError`."""
    return Turns(config, model) if has_turns(config) and config is not None else None


def has_turns(config: EnvironmentConfig | None) -> bool:
    """Whether the environment may answer at all."""
    return config is not None and config.function != SINGLE_TURN


def check_environment(config: EnvironmentConfig, model: str | None) -> None:
    """Has one worker load the environment, and ends it: for checks before launch. Raises `FunctionError`.

    `model` None: it is not made yet, so neither settings nor stop tokens can be checked, but that there is such a factory.
    """
    check(_job(config, model))


def _job(config: EnvironmentConfig, model: str | None) -> Job:
    setup = Setup(config.function, config.settings, config.stop_tokens, model)
    return Job(
        what="environment",
        make=_MAKE,
        setup=msgspec.json.encode(setup),
        timeout_s=config.timeout_s,
        memory_bytes=config.memory_bytes,
    )
