"""The engine's side of the transports: whatever the source of an offer, its bytes come to this host before the engine sees it.

                  SharedFile, DeviceMemory ------------------------> the offer as it is
    fetch(offer)  Served ----> `pulling` ----> memory of this host -> an offer of a SharedFile
                  Group -----> `collective_fetch` ------^

Invariants: generation goes on meanwhile; what is fetched is not verified here, as every engine does that when it stages; the
memory of a version is written again only by the next `fetch`, which the receiver asks for when the engine has applied or
discarded the one before. What a transport needs is imported when its first offer comes. Called by the receiver.
"""

from __future__ import annotations

from typing import Protocol

from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.sockets import Secure
from asyncrl.weight_sync.wire import DeviceMemory, Offer, SharedFile


class Fetcher(Protocol):
    """One transport. Runs in the engine's event loop, which it must not block."""

    async def fetch(self, offer: Offer, timeout_s: float) -> Offer:
        """The offer of the same version whose source is a `SharedFile` of this host.

        May be cancelled at any await: nobody reads what was fetched by then. Raises `WeightSyncError` when it did not come.
        """

    def close(self) -> None:
        """Free memory and connections. May be called twice."""


class Fetching:
    """A fetcher for every source."""

    def __init__(self, engine_id: str, secure: Secure | None = None) -> None:
        """`secure` is called on sockets before they connect to the learner's."""
        self._engine_id = engine_id
        self._secure = secure
        self._fetchers: dict[str, Fetcher] = {}
        """By transport."""

    async def fetch(self, offer: Offer, timeout_s: float) -> Offer:
        """See `Fetcher`."""
        if isinstance(offer.source, SharedFile | DeviceMemory):
            return offer
        transport = str(offer.source.__struct_config__.tag)
        if transport not in self._fetchers:
            self._fetchers[transport] = self._made(transport)
        return await self._fetchers[transport].fetch(offer, timeout_s)

    def close(self) -> None:
        """See `Fetcher`."""
        for fetcher in self._fetchers.values():
            fetcher.close()

    def _made(self, transport: str) -> Fetcher:
        if transport == "collective":
            from asyncrl.weight_sync.collective_fetch import CollectiveFetch  # imports torch

            return CollectiveFetch(self._engine_id)
        if transport == "tcp":
            from asyncrl.weight_sync.pulling import Puller

            return Puller(self._engine_id, self._secure)
        raise WeightSyncError(f"engine {self._engine_id}: no way to fetch over {transport!r}")
