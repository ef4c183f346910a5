"""The learner's side of weight sync: writes a version into shared memory, offers it to every engine, and sees the
transaction through; brings engines that come later to it. Rank 0 owns one. Calls come one at a time, from one thread or
under one lock (`welcomer`); between calls nothing runs.

    publisher.wait_for_engines({"small-0"}, timeout_s=60)
    publisher.begin(1)
    for bucket in plan.buckets:
        publisher.write(bucket, gathered_pieces)
    report = publisher.commit(probe)
    publisher.welcome()             # again and again, until the next begin

Invariants
----------
- Versions go up. An aborted one may be tried again, as a new attempt; answers to older attempts change nothing.
- Whatever a call raises, no version is left half offered: before the commit point every engine is told to abort.
- No engine can keep a version from being committed: who fails, dies, hangs or leaves is gone on without, and a version
  that nobody takes is committed all the same. Its bytes stay in shared memory until the version after the next is begun.
- An engine that was gone on without gets no later version until it joins again, over a new connection; it is told to end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Final

import torch

from asyncrl.weight_sync import wire
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.device_memory import DeviceSlot, DeviceSlots
from asyncrl.weight_sync.errors import SyncAborted, WeightSyncError
from asyncrl.weight_sync.exchange import Exchange
from asyncrl.weight_sync.hosts import this_host
from asyncrl.weight_sync.members import Members
from asyncrl.weight_sync.plan import Bucket, Plan
from asyncrl.weight_sync.probe import Difference, Probe
from asyncrl.weight_sync.ranks import Alone, Ranks
from asyncrl.weight_sync.report import SyncReport, TransactionReport
from asyncrl.weight_sync.served import ServedVersions
from asyncrl.weight_sync.settling import sync_report
from asyncrl.weight_sync.share import Begun, Written, gather_checksums, tell
from asyncrl.weight_sync.shm import SLOTS
from asyncrl.weight_sync.slots import Slots
from asyncrl.weight_sync.sockets import Secure
from asyncrl.weight_sync.topology import pulled_by
from asyncrl.weight_sync.transaction import Transaction
from asyncrl.weight_sync.verification import differences, shared_fault
from asyncrl.weight_sync.version import Version
from asyncrl.weight_sync.wire import SharedFile, Source

logger = logging.getLogger(__name__)

STAGING_SHARE: Final = 0.75
"""Part of `timeout_s` until the commit point; the rest is for applying, which nothing can take back."""


def never() -> bool:
    """Gives way to nobody."""
    return False


class Publisher:
    """Sends versions of one model, laid out by one plan, to the engines that joined."""

    def __init__(
        self,
        config: WeightSyncConfig,
        run_id: str,
        plan: Plan,
        host: str = "127.0.0.1",
        secure: Secure | None = None,
        *,
        slots: int = SLOTS,
        device: DeviceSlots | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Takes `slots` (2 or more) times the plan's bytes of shared memory and binds a free port. With `device`, which it closes,
        versions are in the memory of a GPU and nowhere else, for engines on that GPU. `ranks`: the learner's, where each of
        them writes its share of the plan; on the others it is a `ShareWriter` that does. Raises `SharedMemoryError`."""
        self.version = -1
        """The last committed one."""
        self._timeout_s = config.timeout_s
        self._plan = plan
        self._ranks: Ranks = ranks if ranks is not None and plan.senders > 1 else Alone()
        if plan.senders != self._ranks.size:
            raise WeightSyncError(
                f"expected a rank for each of {plan.senders} senders, got {self._ranks.size}"
            )
        self._slots: Slots | DeviceSlots = device or Slots(run_id, plan, slots)
        try:
            self._members = Members(host, secure)
        except BaseException:
            self._slots.close()
            raise
        self.endpoint = self._members.endpoint
        self._transport = config.transport
        self._host = this_host()
        self._served = ServedVersions(plan, host, secure, deltas=config.delta)
        self._draft: Version | None = None
        self._live: Version | None = None
        self._closed = False

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def engines(self) -> dict[str, int]:
        """Engines that the next version goes to, and the version that each runs, -1 for none."""
        return self._members.engines

    def wait_for_engines(self, engine_ids: Set[str], timeout_s: float) -> None:
        """Return when all of `engine_ids` have joined. Raises `EnginesMissing` after `timeout_s`."""
        self._members.wait_for(engine_ids, timeout_s)

    def begin(self, version: int) -> None:
        """Start writing `version`, which must be above the last committed one. The time of the sync runs from here. Where every
        rank writes its share, this and `commit` are collectives."""
        try:
            self._draft = self._begin(version)
        except Exception as error:
            tell(self._ranks, Begun(version=version, error=str(error)))
            raise
        tell(self._ranks, Begun(version=version, path=str(self._draft.slot.path), host=self._host))

    def _begin(self, version: int) -> Version:
        if self._closed:
            raise WeightSyncError(f"version {version}: the publisher is closed")
        if self._draft is not None:
            raise WeightSyncError(
                f"version {version}: version {self._draft.number} is begun; commit or abandon it first"
            )
        if version <= self.version:
            raise WeightSyncError(f"version {version}: expected one above {self.version}, the last committed")
        self._make_room(version)
        self._served.free(self._slots.oldest)
        draft = Version(version, self._slots.next(), self._plan)
        if self._live is not None and self._live.slot is draft.slot:
            self._live = None  # the only slot: who joins waits for the commit
        return draft

    def write(self, bucket: Bucket, pieces: Sequence[torch.Tensor]) -> None:
        """Copy one bucket into shared memory: a flat tensor for each of its pieces, from any device, cast to the wire dtype on
        the way. Buckets come in the plan's order. Raises `WeightSyncError` for what does not fit the plan."""
        self._begun("write").write(bucket, pieces)

    def abandon(self) -> None:
        """Forget a version that is begun and not committed, such as when gathering failed. No engine knows of it."""
        self._draft = None

    def commit(self, probe: Probe | None = None) -> SyncReport:
        """Offer the version to every engine that joined, and return when it is settled.

        Engines that could not take it are named in the report's `out_of_service`; they may be all. Raises `SyncAborted`
        (the old version is live everywhere; the version may be begun again) if writing took too long or the bytes changed
        since, `ProbeMismatch` (live, but not right) if engines failed the probe and none is left that runs it, or
        `WeightSyncError` if buckets are missing.
        """
        draft = self._written()
        self._draft, draft.probe = None, probe
        self._members.take_in()
        report, exchange = self._send(draft, self._members.roster.versions, draft.started, never)
        if not report.committed:
            self._commit_alone(draft, report)
        found = differences(probe, exchange.answers)
        sync = self._report(draft, report, exchange, found, draft.started, draft.write_s)
        if (fault := shared_fault(probe, found, sync)) is not None:
            raise fault
        return sync

    def welcome(self, give_way: Callable[[], bool] = never) -> SyncReport | None:
        """Bring engines that joined since the last commit to its version, now; None if there are none.

        Returns when it is settled, within `timeout_s`; earlier if `give_way` becomes true: who has not been told to apply
        by then waits for the next call. Those that fail, or fail the version's probe, are in `out_of_service`. What
        `give_way` raises ends it.
        """
        live, started = self._live, time.monotonic()
        if live is None:
            return None
        self._members.take_in()
        waiting = self._members.roster.behind(live.number)
        if not waiting:
            return None
        report, exchange = self._send(live, waiting, started, give_way)
        found = differences(live.probe, exchange.answers)
        return self._report(live, report, exchange, found, started, write_s=0.0)

    def close(self) -> None:
        """Free the port and the shared memory. May be called twice."""
        self._closed = True
        self._draft = self._live = None
        self._served.close()
        self._slots.close()
        self._members.close()

    def _make_room(self, version: int) -> None:
        """Nobody reads what is to be written over: who took part in the last sync is at rest, or has its bytes to itself."""

    def _written(self) -> Version:
        """The version that is begun, with every rank's share of it. A collective. Raises `WeightSyncError` if some is missing."""
        draft = self._begun("commit")
        own = Written(checksums=dict(enumerate(draft.checksums)))
        draft.complete(gather_checksums(self._ranks, draft.number, own))
        draft.check_complete()
        return draft

    def _begun(self, what: str) -> Version:
        if self._draft is None:
            raise WeightSyncError(f"{what}: no version is begun; call begin(version) first")
        return self._draft

    def _source(self, version: Version, engine_id: str) -> Source:
        """Where this engine gets the version's bytes."""
        if isinstance(version.slot, DeviceSlot):
            return version.slot.source(version.checksums)
        engine_host = self._members.roster.joins[engine_id].host
        pulled = pulled_by(self._host, engine_host) if self._transport == "auto" else self._transport
        if pulled == "tcp":
            return self._served.source(version)
        return SharedFile(path=str(version.slot.path))

    def _send(
        self, version: Version, engines: Iterable[str], started: float, give_way: Callable[[], bool]
    ) -> tuple[TransactionReport, Exchange]:
        """One attempt. `started`: when the time of the sync began to run. Settled also if it raises."""
        attempt, now = self._members.next_attempt(), time.monotonic()
        staging_deadline = started + STAGING_SHARE * self._timeout_s
        transaction = Transaction(
            version.number,
            engines,
            now=now,
            staging_deadline=staging_deadline,
            deadline=started + self._timeout_s,
        )
        for reason, count in self._members.ignored.items():
            transaction.ignore(reason, count)
        self._members.ignored.clear()

        def propose_for(engine_id: str) -> wire.Propose:
            offer = version.offer(self._source(version, engine_id))
            return wire.Propose(attempt=attempt, offer=offer, timeout_s=max(staging_deadline - now, 0.0))

        def probe_for(engine_id: str) -> Probe | None:
            return self._members.roster.to_ask(engine_id, version.probe)

        exchange = Exchange(self._members.socket, transaction, attempt, propose_for, probe_for)
        try:
            return exchange.run(give_way), exchange
        finally:
            if transaction.report is not None:
                self._settle(version, transaction.report, exchange)

    def _settle(self, version: Version, report: TransactionReport, exchange: Exchange) -> None:
        self._members.roster.settle(report, exchange.comings, exchange.answers.keys())
        if not report.committed:
            return
        self._make_live(version)
        if any(member.outcome != "applied" for member in report.members.values()):
            # A late, lost or returning engine may be copying still: it keeps the bytes, later versions get others.
            version.slot.retire()

    def _make_live(self, version: Version) -> None:
        if version is not self._live:
            self.version, self._live = version.number, version
            self._slots.committed()

    def _commit_alone(self, draft: Version, report: TransactionReport) -> None:
        """Nobody took it. That ends the sync only where the fault is the learner's: who is not there can come later."""
        if not report.offered:
            raise SyncAborted(
                f"{report.describe()}\ngathering and writing took {time.monotonic() - draft.started:.1f} s of "
                f"weight_sync.timeout_s = {self._timeout_s:g}: raise it",
                report,
            )
        failed = any(member.outcome == "failed" for member in report.members.values())
        if failed and not draft.is_intact():
            raise SyncAborted(
                f"{report.describe()}\nThe bytes in {draft.slot.path} are not those that were written. Look for another "
                f"writer of this file, or for bad memory.",
                report,
            )
        if report.members:
            logger.warning("committed without an engine: %s", report.describe())
        self._make_live(draft)

    def _report(
        self,
        version: Version,
        report: TransactionReport,
        exchange: Exchange,
        found: Mapping[str, Difference],
        started: float,
        write_s: float,
    ) -> SyncReport:
        return sync_report(
            self._members, self._plan, version.digest, report, exchange, found, started, write_s
        )
