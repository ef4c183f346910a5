"""Held-out accuracy on a running engine, apart from the training accounts: nothing of it enters the buffer.

One answer per prompt, sampled like the run's own rollouts (the policy that is trained, not its greedy shadow), with the run's
own environment between its turns, scored by the run's own reward. Called by `runtime.engine_part` before the first prompt is
admitted and after the last step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from asyncrl.buffer.schema import ENVIRONMENT
from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.engine import Engine, GenerationRequest
from asyncrl.generators.prompts import Prompt
from asyncrl.generators.rollout_life import Scorer, TurnTaker
from asyncrl.generators.turns import fits


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine found. Rewards are in the order of the prompts."""

    version: int
    rewards: list[float]
    lengths: list[int]
    """Tokens per answer."""


async def evaluate(
    *,
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    stop_token_ids: tuple[int, ...],
    decode: Callable[[list[int]], str],
    concurrency: int,
    label: str,
    turns: TurnTaker | None = None,
) -> Evaluation:
    """Raises RewardFailed, EnvironmentFailed or EngineDead; an accuracy with holes would be none."""
    slots = asyncio.Semaphore(concurrency)

    async def answer(index: int, prompt: Prompt) -> tuple[float, int]:
        tokens: list[int] = []
        versions: list[int] = []
        # Ends with the environment's None, or with the budget.
        while len(tokens) < sampling.max_new_tokens:
            request = GenerationRequest(
                request_id=f"eval-{label}-{index}",
                tokens=[*prompt.tokens, *tokens],
                max_new_tokens=sampling.max_new_tokens - len(tokens),
                temperature=sampling.temperature,
                stop_token_ids=stop_token_ids,
            )
            async with slots:
                async for chunk in engine.generate(request):
                    tokens += chunk.tokens
                    versions += chunk.versions
            if turns is None or chunk.finish_reason != "stop":
                break
            reply = await turns.next_turn(prompt.tokens, tokens, versions, prompt.payload)
            if reply is None or not fits(reply, sampling.max_new_tokens - len(tokens)):
                break
            tokens += reply
            versions += [ENVIRONMENT] * len(reply)
        text = decode([t for t in tokens if t not in stop_token_ids])
        return (await scorer.score(text, prompt.payload)).reward, len(tokens)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(answer(i, p)) for i, p in enumerate(prompts)]
    results = [task.result() for task in tasks]
    return Evaluation(
        version=engine.stats().version, rewards=[r for r, _ in results], lengths=[n for _, n in results]
    )
