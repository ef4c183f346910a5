"""The learner's ranks, as the supervisor calls them: all at once for a collective, or the first alone.

A collective that fails on one rank fails on the others a little later, or makes them wait for its timeout: so the first failure
ends the call, after a short time in which the others may say more.
Called by the supervisor and `checkpointing`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from asyncrl.runtime.learner_faults import PART, verdict
from asyncrl.runtime.watch import PartFailed, Watch

_VERDICT_S = 5.0
"""For the others after the first failure: Ray takes about a second to be sure of a death."""


class LearnerRanks:
    """`timeout_s` is for calls that name no other."""

    def __init__(self, actors: list[Any], watch: Watch, timeout_s: float) -> None:
        self._actors, self._watch, self._timeout_s = actors, watch, timeout_s

    async def first(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """Raises PartFailed."""
        return await self._call(0, method, *arguments, timeout_s=timeout_s)

    async def everyone(
        self, method: str, *arguments: Any, timeout_s: float | None = None, **named: Any
    ) -> Any:
        """The first rank's answer, once every rank has answered. Raises PartFailed of the rank at fault."""
        ranks = range(len(self._actors))
        calls = [
            asyncio.ensure_future(self._call(rank, method, *arguments, timeout_s=timeout_s, **named))
            for rank in ranks
        ]
        try:
            done, left = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            if left:
                done, _ = await asyncio.wait(calls, timeout=_VERDICT_S)
            errors = [error for call in calls if call in done and (error := call.exception())]
            if parts := [error for error in errors if isinstance(error, PartFailed)]:
                raise verdict(parts)
            return calls[0].result()
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def close(self) -> None:
        """Tells each to leave; one that is gone need not hear of it."""
        await asyncio.gather(*(actor.close.remote() for actor in self._actors), return_exceptions=True)

    async def _call(
        self, rank: int, method: str, *arguments: Any, timeout_s: float | None = None, **named: Any
    ) -> Any:
        reference = getattr(self._actors[rank], method).remote(*arguments, **named)
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return await self._watch.call(f"{PART}{rank}", reference, limit_s)
