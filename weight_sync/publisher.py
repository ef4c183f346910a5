"""The learner's side of weight sync: writes a version into shared memory, offers it to every engine, and sees the
transaction through; brings engines that come later to it. Rank 0 owns one. Calls come one at a time, from one thread or
under one lock (`welcomer`); between calls nothing runs.

    publisher.wait_for_engines({"small-0"}, timeout_s=60)
    publisher.begin(1)
    for bucket in plan.buckets:
        publisher.write(bucket, gathered_tensors)
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
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Final

import msgspec
import torch
import zmq

from asyncrl.weight_sync import sockets, wire
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import EnginesMissing, ProbeMismatch, SyncAborted, WeightSyncError
from asyncrl.weight_sync.exchange import Exchange, messages
from asyncrl.weight_sync.plan import Bucket, Plan
from asyncrl.weight_sync.probe import Difference, Probe, largest_difference
from asyncrl.weight_sync.report import SyncReport, TransactionReport
from asyncrl.weight_sync.roster import Roster
from asyncrl.weight_sync.slots import Slots
from asyncrl.weight_sync.transaction import Transaction
from asyncrl.weight_sync.version import Version

logger = logging.getLogger(__name__)

STAGING_SHARE: Final = 0.75
"""Part of `timeout_s` until the commit point; the rest is for applying, which nothing can take back."""


def never() -> bool:
    """Gives way to nobody."""
    return False


class Publisher:
    """Sends versions of one model, laid out by one plan, to the engines that joined."""

    def __init__(self, config: WeightSyncConfig, run_id: str, plan: Plan, host: str = "127.0.0.1") -> None:
        """Takes twice the plan's bytes of shared memory and binds a free port. Raises `SharedMemoryError`."""
        self.version = -1
        """The last committed one."""
        self._timeout_s = config.timeout_s
        self._plan = plan
        self._slots = Slots(run_id, plan)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._socket, self.endpoint = sockets.router(self._context, host)
        except BaseException:
            self._slots.close()
            raise
        self._roster = Roster()
        self._attempt = 0
        self._draft: Version | None = None
        self._live: Version | None = None
        self._ignored: Counter[str] = Counter()
        self._closed = False

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def engines(self) -> dict[str, int]:
        """Engines that the next version goes to, and the version that each runs, -1 for none."""
        self._take_in()
        return dict(self._roster.versions)

    def wait_for_engines(self, engine_ids: Set[str], timeout_s: float) -> None:
        """Return when all of `engine_ids` have joined. Raises `EnginesMissing` after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        # Waits for: joins. Unblocked by: engines that connect. Ends: all joined, or the deadline.
        while missing := frozenset(engine_ids) - self.engines.keys():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise EnginesMissing(
                    f"expected {len(engine_ids)} engines at {self.endpoint} within {timeout_s:g} s, missing: "
                    f"{', '.join(sorted(missing))}. Look in their logs, or raise the pool's start_timeout_s.",
                    missing,
                )
            self._socket.poll(math.ceil(left_s * 1000))

    def begin(self, version: int) -> None:
        """Start writing `version`, which must be above the last committed one. The time of the sync runs from here."""
        if self._closed:
            raise WeightSyncError(f"version {version}: the publisher is closed")
        if self._draft is not None:
            raise WeightSyncError(
                f"version {version}: version {self._draft.number} is begun; commit or abandon it first"
            )
        if version <= self.version:
            raise WeightSyncError(f"version {version}: expected one above {self.version}, the last committed")
        self._draft = Version(version, self._slots.next(), self._plan)

    def write(self, bucket: Bucket, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy one bucket into shared memory, from any device, cast to the wire dtype on the way. Buckets come in the
        plan's order; tensors of other buckets are ignored. Raises `WeightSyncError` for what does not fit the plan."""
        self._begun("write").write(bucket, tensors)

    def abandon(self) -> None:
        """Forget a version that is begun and not committed, such as when gathering failed. No engine knows of it."""
        self._draft = None

    def commit(self, probe: Probe | None = None) -> SyncReport:
        """Offer the version to every engine that joined, and return when it is settled.

        Engines that could not take it are named in the report's `out_of_service`; they may be all. Raises `SyncAborted`
        (the old version is live everywhere; the version may be begun again) if writing took too long or the bytes changed
        since, `ProbeMismatch` (live, but not right), or `WeightSyncError` if buckets are missing.
        """
        draft = self._begun("commit")
        draft.offer()
        self._draft, draft.probe = None, probe
        self._take_in()
        report, exchange = self._send(draft, self._roster.versions, draft.started, never)
        if not report.committed:
            self._commit_alone(draft, report)
        differences = _differences(probe, report, exchange)
        sync = self._report(report, differences, draft.started, draft.write_s)
        if probe is not None and differences:
            engine, worst = max(differences.items(), key=lambda item: item[1].size)
            if not worst.size <= probe.tolerance:
                raise ProbeMismatch(engine, report.version, worst.position, worst.expected, worst.got, sync)
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
        self._take_in()
        waiting = self._roster.behind(live.number)
        if not waiting:
            return None
        report, exchange = self._send(live, waiting, started, give_way)
        differences = _differences(live.probe, report, exchange)
        sync = self._report(report, differences, started, write_s=0.0)
        for engine, found in differences.items():
            if live.probe is None or found.size <= live.probe.tolerance:
                continue
            error = ProbeMismatch(engine, live.number, found.position, found.expected, found.got, sync)
            self._roster.drop(engine)
            exchange.dismiss(engine, str(error))
            sync = msgspec.structs.replace(sync, out_of_service={**sync.out_of_service, engine: str(error)})
        return sync

    def close(self) -> None:
        """Free the port and the shared memory. May be called twice."""
        self._closed = True
        self._draft = self._live = None
        self._slots.close()
        if not self._socket.closed:
            sockets.close(self._socket)
            self._context.term()

    def _begun(self, what: str) -> Version:
        if self._draft is None:
            raise WeightSyncError(f"{what}: no version is begun; call begin(version) first")
        return self._draft

    def _take_in(self) -> None:
        """Joins and farewells that came since the last call; anything else answers an attempt that is over."""
        for engine_id, message in messages(self._socket, self._ignored):
            if isinstance(message, wire.Join | wire.Leave):
                self._roster.note(engine_id, message)
            else:
                self._ignored[f"{type(message).__name__.lower()} after its attempt"] += 1

    def _send(
        self, version: Version, engines: Iterable[str], started: float, give_way: Callable[[], bool]
    ) -> tuple[TransactionReport, Exchange]:
        """One attempt. `started`: when the time of the sync began to run. Settled also if it raises."""
        self._attempt += 1
        staging_deadline = started + STAGING_SHARE * self._timeout_s
        now = time.monotonic()
        transaction = Transaction(
            version.number,
            engines,
            now=now,
            staging_deadline=staging_deadline,
            deadline=started + self._timeout_s,
        )
        for reason, count in self._ignored.items():
            transaction.ignore(reason, count)
        self._ignored.clear()
        propose = wire.Propose(
            attempt=self._attempt, offer=version.offer(), timeout_s=max(staging_deadline - now, 0.0)
        )
        exchange = Exchange(self._socket, transaction, propose, version.probe.tokens if version.probe else ())
        try:
            return exchange.run(give_way), exchange
        finally:
            if transaction.report is not None:
                self._settle(version, transaction.report, exchange)

    def _settle(self, version: Version, report: TransactionReport, exchange: Exchange) -> None:
        self._roster.settle(report, exchange.comings)
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
        report: TransactionReport,
        differences: Mapping[str, Difference],
        started: float,
        write_s: float,
    ) -> SyncReport:
        return SyncReport(
            version=report.version,
            seconds=time.monotonic() - started,
            write_s=write_s,
            transaction_s=report.seconds,
            total_bytes=self._plan.total_bytes,
            engines=report.members,
            out_of_service=report.out_of_service,
            probe_max_diff={name: difference.size for name, difference in differences.items()},
            ignored=report.ignored,
        )


def _differences(probe: Probe | None, report: TransactionReport, exchange: Exchange) -> dict[str, Difference]:
    """Of the engines that run the version, where it was probed."""
    if probe is None:
        return {}
    applied = (name for name, member in report.members.items() if member.outcome == "applied")
    return {name: largest_difference(probe, exchange.answers[name]) for name in applied}
