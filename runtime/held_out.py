"""Held-out accuracy over the engines of a fleet: the prompts are dealt out to those that are up, and what a dying engine
leaves undone goes to the others. Called by the supervisor."""

from __future__ import annotations

import asyncio

from asyncrl.generators.evaluation import Evaluation
from asyncrl.generators.prompts import Prompt
from asyncrl.runtime.engine_keeper import EngineKeeper
from asyncrl.runtime.fleet import Fleet
from asyncrl.runtime.watch import PartFailed

_LOOK_S = 0.5


async def evaluate(fleet: Fleet, prompts: list[Prompt], label: str, timeout_s: float) -> list[Evaluation]:
    """One answer for each prompt. Waits for engines to be up; unblocked by their keepers. Raises PartFailed at the deadline
    with what the last engine said, or `TimeoutError` where none was ever up."""
    found: list[Evaluation] = []
    left, failure = list(prompts), None
    try:
        async with asyncio.timeout(timeout_s):
            while left:
                up = [keeper for keeper in fleet.keepers() if keeper.actor is not None]
                shares = [left[i :: len(up)] for i in range(len(up))]
                results = await asyncio.gather(
                    *(_answer(fleet, k, s, label) for k, s in zip(up, shares, strict=True) if s),
                    return_exceptions=True,
                )
                left = []
                for share, result in zip(shares, results, strict=False):
                    if isinstance(result, Evaluation):
                        found.append(result)
                    elif isinstance(result, PartFailed):
                        failure, left = result, left + share
                    else:
                        raise result
                if not up or left:
                    left = left or list(prompts)
                    await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        if failure is not None:
            raise failure from None
        raise
    return found


async def _answer(fleet: Fleet, keeper: EngineKeeper, prompts: list[Prompt], label: str) -> Evaluation:
    answer: Evaluation = await fleet.watch.outcome(
        keeper.engine_id, keeper.actor.evaluate.remote(prompts, label)
    )
    return answer
