"""Keeps an engine's tokens in while its new weights are unproven. Called by engines, on their event loop.

Invariants: what is sampled while it holds comes out after `release`, or never, where the engine ends first; after `end` nobody
waits here, whatever is called then.
"""

from __future__ import annotations

import asyncio

from asyncrl.generators.engine import EngineDead


class Hearing:
    """Open at first."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._ended: str | None = None
        self.muted = False
        """The engine ended while it held: tokens that are not out yet stay in."""

    def hold(self) -> None:
        """See `WeightTarget`. Nothing, once the engine has ended."""
        if self._ended is None:
            self._open.clear()

    def release(self) -> None:
        """See `WeightTarget`. Nothing, once the engine has ended."""
        self._open.set()

    def end(self, reason: str) -> None:
        """The engine has ended. The first call counts."""
        if self._ended is None:
            self._ended, self.muted = reason, not self._open.is_set()
            self._open.set()

    async def heard(self) -> None:
        """Return when tokens may come out; at once, mostly. Raises `EngineDead` where they never will.

        Waits for the judgement of a probe; unblocked by `release` or `end`.
        """
        await self._open.wait()
        if self.muted:
            raise EngineDead(f"{self._ended}, before its new weights were proven")
