"""Holds new requests back while weights are replaced. Called by an engine, on its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable


class Gate:
    """Open at first. Whoever comes while it is closed waits until it opens, or is turned away."""

    def __init__(self) -> None:
        self._open = True
        self._waiting: dict[str, asyncio.Future[bool]] = {}

    def __contains__(self, key: str) -> bool:
        """Whether it waits here."""
        return key in self._waiting

    async def passes(self, key: str) -> bool:
        """At once while the gate is open, without suspending; else waits for `open`, or for `turn_away`: False then."""
        while not self._open:
            waiting = self._waiting[key] = asyncio.get_running_loop().create_future()
            try:
                if not await waiting:
                    return False
            finally:
                del self._waiting[key]
        return True

    def close(self) -> None:
        self._open = False

    def open(self) -> None:
        self._open = True
        self._answer(self._waiting, passes=True)

    def turn_away(self, keys: Iterable[str]) -> None:
        """Those of them that wait go without having passed."""
        self._answer(keys, passes=False)

    def _answer(self, keys: Iterable[str], *, passes: bool) -> None:
        for key in keys:
            waiting = self._waiting.get(key)
            if waiting is not None and not waiting.done():
                waiting.set_result(passes)
