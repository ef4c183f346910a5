"""Which engines take versions, and which one each of them runs. Pure; kept by the publisher.

Invariants
----------
- An engine is here from its join until it leaves or a sync goes on without it; then only a new join brings it back.
- `epoch` is another one after every change of who is here; also where an engine came anew, which has other connections.
- What it is said to run is what it said itself when it joined, or the version that it confirmed since.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping

from asyncrl.weight_sync.probe import PROOFS, Probe
from asyncrl.weight_sync.report import TransactionReport
from asyncrl.weight_sync.wire import Join, Leave

logger = logging.getLogger(__name__)


class Roster:
    """The engines of one publisher."""

    def __init__(self) -> None:
        self.versions: dict[str, int] = {}
        """Engine -> the version that it runs, -1 for none."""
        self.joins: dict[str, Join] = {}
        """Engine -> what it said when it joined."""
        self.epoch = 0
        self._proofs: Counter[str] = Counter()
        """Engine -> probes passed since it joined."""

    def note(self, engine_id: str, message: Join | Leave) -> None:
        if isinstance(message, Join):
            self.versions[engine_id] = message.version
            self.joins[engine_id] = message
            self._proofs.pop(engine_id, None)
            self.epoch += 1
            logger.info("engine=%s joined version=%d", engine_id, message.version)
        else:
            self.drop(engine_id)
            logger.info("engine=%s left reason=%s", engine_id, message.reason)

    def to_ask(self, engine_id: str, probe: Probe | None) -> Probe | None:
        """What this engine is to answer, given a version's probe."""
        if probe is None or (not probe.every and self._proofs[engine_id] >= PROOFS):
            return None
        return probe

    def settle(
        self, report: TransactionReport, comings: Mapping[str, Join | Leave], probed: Collection[str] = ()
    ) -> None:
        """A transaction has ended. `comings`: who came and went while it ran, members or not. `probed`: who answered a probe;
        of them those that applied have passed it."""
        for engine_id, member in report.members.items():
            if member.outcome == "applied":
                self.took(engine_id, report.version, probed=engine_id in probed)
            elif member.outcome != "kept":
                self.drop(engine_id)
        for engine_id, message in comings.items():
            self.note(engine_id, message)

    def took(self, engine_id: str, version: int, *, probed: bool) -> None:
        """It runs `version` now, and has passed its probe if there was one."""
        self.versions[engine_id] = version
        self._proofs[engine_id] += probed

    def drop(self, engine_id: str) -> None:
        """Versions go on without it."""
        if self.versions.pop(engine_id, None) is not None:
            self.joins.pop(engine_id)
            self._proofs.pop(engine_id, None)
            self.epoch += 1

    def behind(self, version: int) -> list[str]:
        """Engines that run another version than `version`: the last committed one."""
        return [engine_id for engine_id, running in self.versions.items() if running != version]
