"""Which engines take versions, and which one each of them runs. Pure; kept by the publisher.

Invariants
----------
- An engine is here from its join until it leaves or a sync goes on without it; then only a new join brings it back.
- What it is said to run is what it said itself when it joined, or the version that it confirmed since.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from asyncrl.weight_sync.report import TransactionReport
from asyncrl.weight_sync.wire import Join, Leave

logger = logging.getLogger(__name__)


class Roster:
    """The engines of one publisher."""

    def __init__(self) -> None:
        self.versions: dict[str, int] = {}
        """Engine -> the version that it runs, -1 for none."""

    def note(self, engine_id: str, message: Join | Leave) -> None:
        if isinstance(message, Join):
            self.versions[engine_id] = message.version
            logger.info("engine=%s joined version=%d", engine_id, message.version)
        else:
            self.versions.pop(engine_id, None)
            logger.info("engine=%s left reason=%s", engine_id, message.reason)

    def settle(self, report: TransactionReport, comings: Mapping[str, Join | Leave]) -> None:
        """A transaction has ended. `comings`: who came and went while it ran, members or not."""
        for engine_id, member in report.members.items():
            if member.outcome == "applied":
                self.versions[engine_id] = report.version
            elif member.outcome != "kept":
                self.versions.pop(engine_id, None)
        for engine_id, message in comings.items():
            self.note(engine_id, message)

    def drop(self, engine_id: str) -> None:
        """A sync goes on without it, for a reason that its transaction does not know."""
        self.versions.pop(engine_id, None)

    def behind(self, version: int) -> list[str]:
        """Engines that run another version than `version`: the last committed one."""
        return [engine_id for engine_id, running in self.versions.items() if running != version]
