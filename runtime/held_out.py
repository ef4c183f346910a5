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
                if not up:
                    await asyncio.sleep(_LOOK_S)
                    continue
                shares = [share for i in range(len(up)) if (share := left[i :: len(up)])]
                asked = (_answer(fleet, k, share, label) for k, share in zip(up, shares, strict=False))
                left = []
                for share, result in zip(shares, await asyncio.gather(*asked), strict=True):
                    if isinstance(result, Evaluation):
                        found.append(result)
                    else:
                        failure, left = result, left + share
    except TimeoutError:
        if failure is not None:
            raise failure from None
        raise
    return found


async def _answer(
    fleet: Fleet, keeper: EngineKeeper, prompts: list[Prompt], label: str
) -> Evaluation | PartFailed:
    """Or what its engine died of, a little later: its keeper is about to find it dead."""
    try:
        answer: Evaluation = await fleet.watch.outcome(
            keeper.engine_id, keeper.actor.evaluate.remote(prompts, label)
        )
        return answer
    except PartFailed as error:
        await asyncio.sleep(_LOOK_S)
        return error
