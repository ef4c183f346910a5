"""Answers to held-out prompts by a running engine, apart from the training accounts: nothing of it enters the buffer.

    prompt --> [sample a turn --stop--> ask the environment --tokens--> sample ...] --end--> score --> HeldOutAnswer

- Sampled with the run's own environment between its turns and scored by the run's own reward, beside the rollouts that the
  engine has, across weight updates: each answer says which versions it is of.
- An answer whose environment or reward failed has reward 0 and says why: as a rollout it would cost itself and nothing else,
  and leaving it out would make the others look better than they are.
Called by `runtime.engine_part`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from asyncrl.buffer.schema import ENVIRONMENT
from asyncrl.generators.engine import Engine, GenerationRequest
from asyncrl.generators.final_answers import final_answer
from asyncrl.generators.prompts import Prompt
from asyncrl.generators.rollout_life import Scorer, TurnTaker
from asyncrl.generators.score import RewardFailed
from asyncrl.generators.turns import EnvironmentFailed, fits

NO_VERSION = -1
"""Of an answer without a sampled token."""


class Asking(msgspec.Struct, frozen=True, kw_only=True):
    """How prompts are asked."""

    label: str
    """Of this asking alone: request ids are made of it."""
    rollouts_per_prompt: int
    temperature: float
    max_new_tokens: int
    slots: int
    """Answers under way at once."""
    version: int = 0
    """An engine begins once it runs this version, or a later one."""


class HeldOutAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    reward: float
    final: str
    """What it ends in: see `final_answers`. Empty: nothing."""
    tokens: int
    """Of the whole answer, the environment's included."""
    truncated: bool
    """Its budget ended it."""
    oldest_version: int
    """Of its sampled tokens; `NO_VERSION` where there are none."""
    newest_version: int
    failure: str = ""
    """Why the environment or the reward gave nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What answering takes."""

    engine: Engine
    scorer: Scorer
    turns: TurnTaker | None
    stop_token_ids: tuple[int, ...]
    decode: Callable[[list[int]], str]


async def evaluate(means: Means, prompts: Sequence[Prompt], asking: Asking) -> list[list[HeldOutAnswer]]:
    """The answers to each prompt, in the order of the prompts. Raises EngineDead. Waits for the engine; each answer ends with
    its budget at the latest. Where it is cancelled, so are the engine's requests."""
    slots = asyncio.Semaphore(asking.slots)
    async with asyncio.TaskGroup() as group:
        tasks = [
            [
                group.create_task(
                    _Asked(means, prompt, asking, f"eval-{asking.label}-{i}.{j}", slots).answer()
                )
                for j in range(asking.rollouts_per_prompt)
            ]
            for i, prompt in enumerate(prompts)
        ]
    return [[task.result() for task in row] for row in tasks]


class _Asked:
    """One answer under way."""

    def __init__(
        self, means: Means, prompt: Prompt, asking: Asking, key: str, slots: asyncio.Semaphore
    ) -> None:
        self._means, self._prompt, self._asking, self._key, self._slots = means, prompt, asking, key, slots
        self._tokens: list[int] = []
        self._versions: list[int] = []

    async def answer(self) -> HeldOutAnswer:
        truncated = False
        try:
            truncated = await self._play()
            score = await self._means.scorer.score(self._text(), self._prompt.payload)
        except (EnvironmentFailed, RewardFailed) as error:
            return self._said(0.0, "", truncated, error.reason)
        final = final_answer(self._text()) if score.answer is None else score.answer
        return self._said(score.reward, final, truncated)

    async def _play(self) -> bool:
        """Plays to the end; True where the budget was the end."""
        # Ends with the environment's None, or with the budget.
        while self._left > 0:
            finish = await self._sample()
            if self._means.turns is None or finish != "stop":
                return finish != "stop"
            reply = await self._means.turns.next_turn(
                self._prompt.tokens, self._tokens, self._versions, self._prompt.payload
            )
            if reply is None:
                return False
            if not fits(reply, self._left):
                return True
            self._tokens += reply
            self._versions += [ENVIRONMENT] * len(reply)
        return True

    async def _sample(self) -> str:
        request = GenerationRequest(
            request_id=self._key,
            tokens=[*self._prompt.tokens, *self._tokens],
            max_new_tokens=self._left,
            temperature=self._asking.temperature,
            stop_token_ids=self._means.stop_token_ids,
        )
        finish = None
        async with self._slots:
            async for chunk in self._means.engine.generate(request):
                self._tokens += chunk.tokens
                self._versions += chunk.versions
                finish = chunk.finish_reason
        if finish in (None, "abort"):
            raise RuntimeError(f"held-out answer {self._key} ended with {finish!r}; expected stop or length")
        return finish

    @property
    def _left(self) -> int:
        return self._asking.max_new_tokens - len(self._tokens)

    def _text(self) -> str:
        return self._means.decode([t for t in self._tokens if t not in self._means.stop_token_ids])

    def _said(self, reward: float, final: str, truncated: bool, failure: str = "") -> HeldOutAnswer:
        sampled = [version for version in self._versions if version != ENVIRONMENT]
        return HeldOutAnswer(
            reward=reward,
            final=final,
            tokens=len(self._tokens),
            truncated=truncated,
            oldest_version=min(sampled, default=NO_VERSION),
            newest_version=max(sampled, default=NO_VERSION),
            failure=failure,
        )
