"""The versions of one publisher as its chunk server gives them out: opened when the first engine is to pull one, closed before
its slot is written again. The server, its port and its threads are there from the first engine on that needs them.

Invariant: after `free(slot)` nobody reads the slot's bytes, or the slot is retired and keeps them.
Called by publishers, from one thread at a time.
"""

from __future__ import annotations

from typing import Final

from asyncrl.weight_sync.device_memory import DeviceSlot
from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.serving import ChunkServer
from asyncrl.weight_sync.slots import Slot
from asyncrl.weight_sync.sockets import Secure
from asyncrl.weight_sync.version import Version
from asyncrl.weight_sync.wire import Served

FREE_S: Final = 1.0
"""How long a begun version waits for the end of what is on its way to engines that take no part any more."""


class ServedVersions:
    """The versions that are open."""

    def __init__(self, plan: Plan, host: str, secure: Secure | None, *, deltas: bool) -> None:
        self._plan = plan
        self._host = host
        self._secure = secure
        self._deltas = deltas
        self._server: ChunkServer | None = None
        self._open: dict[int, Version] = {}

    def source(self, version: Version) -> Served:
        """Where engines pull `version`, which is complete. Raises `WeightSyncError` if the server has failed."""
        if self._server is None:
            self._server = ChunkServer(self._host, self._secure, deltas=self._deltas)
        if self._open.get(version.number) is not version:
            if version.number in self._open:  # an attempt that was aborted
                self._close_version(self._open[version.number])
            assert isinstance(version.slot, Slot)
            self._server.open(version.number, version.slot.view, self._plan, version.checksums)
            self._open[version.number] = version
        self._server.check()
        return Served(endpoint=self._server.endpoint, base=self._server.base_of(version.number))

    def free(self, slot: Slot | DeviceSlot) -> None:
        """`slot` is to be written again."""
        for version in [each for each in self._open.values() if each.slot is slot]:
            self._close_version(version)

    def close(self) -> None:
        """End the server; what engines pull breaks off. May be called twice. Raises `WeightSyncError` if it does not end."""
        self._open.clear()
        if self._server is not None:
            self._server.stop()

    def _close_version(self, version: Version) -> None:
        assert self._server is not None
        del self._open[version.number]
        if not self._server.close_version(version.number, FREE_S):
            version.slot.retire()
