"""The engine's side of weight sync: what an engine must offer, and the client that drives it through a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from asyncrl.weight_sync.wire import Offer


class WeightTarget(Protocol):
    """An engine as weight sync sees it. Called from the engine's event loop, one call at a time."""

    async def stage(self, offer: Offer) -> None:
        """Get the bytes of `offer` and verify their checksums while generation goes on. Raises `ChecksumError`."""

    async def apply(self, offer: Offer) -> float:
        """Replace the weights at a step boundary and label what follows with `offer.version`.

        Returns the seconds in which no decode step could run. Generation goes on afterwards also when this raises
        before the first byte was written.
        """

    async def discard(self, version: int) -> None:
        """Forget a staged version that will not be applied."""

    async def probe(self, tokens: Sequence[int]) -> list[float]:
        """Logprob of each token after the first under the present weights: [len(tokens) - 1]."""
