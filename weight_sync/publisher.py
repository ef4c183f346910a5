"""The learner's side of weight sync: writes a version into shared memory, offers it to every engine, and sees the
transaction through. Rank 0 owns one and calls it from one thread; between calls nothing runs.

    publisher.wait_for_engines({"small-0"}, timeout_s=60)
    publisher.begin(1)
    for bucket in plan.buckets:
        publisher.write(bucket, gathered_tensors)
    report = publisher.commit(probe)

Invariants
----------
- Versions go up. An aborted one may be tried again, as a new attempt; answers to older attempts change nothing.
- Whatever a call raises, no version is left half offered: before the commit point every engine is told to abort.
- An engine that a committed version left behind gets no later version until it joins again, over a new connection.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Set
from typing import Final

import torch
import zmq

from asyncrl.weight_sync import sockets, wire
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import (
    EnginesMissing,
    NoEngineApplied,
    ProbeMismatch,
    SyncAborted,
    WeightSyncError,
)
from asyncrl.weight_sync.exchange import Exchange, messages
from asyncrl.weight_sync.plan import Bucket, Plan
from asyncrl.weight_sync.probe import Difference, Probe, largest_difference
from asyncrl.weight_sync.report import SyncReport
from asyncrl.weight_sync.slots import Slot, Slots
from asyncrl.weight_sync.transaction import Transaction, TransactionReport

logger = logging.getLogger(__name__)

STAGING_SHARE: Final = 0.75
"""Part of `timeout_s` until the commit point; the rest is for applying, which nothing can take back."""


class _Draft:
    """A version begun and not yet settled."""

    def __init__(self, version: int, slot: Slot, now: float) -> None:
        self.version = version
        self.slot = slot
        self.started = now
        self.write_s = 0.0
        self.checksums: list[int] = []


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
        self._joined: dict[str, int] = {}
        self._attempt = 0
        self._draft: _Draft | None = None
        self._ignored: Counter[str] = Counter()
        self._closed = False

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def engines(self) -> dict[str, int]:
        """Engines that the next version goes to, and the version each said it runs when it joined."""
        self._take_in()
        return dict(self._joined)

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
                f"version {version}: version {self._draft.version} is begun; commit or abandon it first"
            )
        if version <= self.version:
            raise WeightSyncError(f"version {version}: expected one above {self.version}, the last committed")
        self._draft = _Draft(version, self._slots.next(), time.monotonic())

    def write(self, bucket: Bucket, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy one bucket into shared memory, from any device, cast to the wire dtype on the way. Buckets come in the
        plan's order; tensors of other buckets are ignored. Raises `WeightSyncError` for what does not fit the plan."""
        draft = self._begun("write")
        started = time.monotonic()
        index = len(draft.checksums)
        if index == len(self._plan.buckets) or bucket != self._plan.buckets[index]:
            raise WeightSyncError(
                f"version {draft.version}: bucket {bucket.index} out of order, expected bucket {index} of "
                f"{len(self._plan.buckets)} of the publisher's plan"
            )
        draft.checksums.append(draft.slot.fill(bucket, tensors))
        draft.write_s += time.monotonic() - started

    def abandon(self) -> None:
        """Forget a version that is begun and not committed, such as when gathering failed. No engine knows of it."""
        self._draft = None

    def commit(self, probe: Probe | None = None) -> SyncReport:
        """Offer the version to every engine that joined, and return when it is settled.

        Engines that could not apply it after the commit point are named in the report's `out_of_service`. Raises
        `SyncAborted` (the old version is live everywhere; the version may be begun again), `NoEngineApplied`,
        `ProbeMismatch` (live, but not right), or `WeightSyncError` if buckets or engines are missing. In every case
        the version is settled when this returns.
        """
        draft = self._begun("commit")
        self._take_in()
        if len(draft.checksums) < len(self._plan.buckets):
            raise WeightSyncError(
                f"version {draft.version}: expected {len(self._plan.buckets)} buckets, {len(draft.checksums)} are written"
            )
        if not self._joined:
            raise WeightSyncError(
                f"version {draft.version}: no engine has joined {self.endpoint}, or all are out of service; "
                f"wait_for_engines first"
            )
        self._attempt += 1
        transaction = Transaction(
            draft.version,
            self._joined,
            now=time.monotonic(),
            staging_deadline=draft.started + STAGING_SHARE * self._timeout_s,
            deadline=draft.started + self._timeout_s,
        )
        for reason, count in self._ignored.items():
            transaction.ignore(reason, count)
        self._ignored.clear()
        exchange = Exchange(self._socket, transaction, self._propose(draft), probe.tokens if probe else ())
        try:
            report = exchange.run()
        finally:
            self._settle(draft, transaction.report, exchange)
        return self._judge(draft, report, exchange.answers, probe)

    def close(self) -> None:
        """Free the port and the shared memory. May be called twice."""
        self._closed = True
        self._draft = None
        self._slots.close()
        if not self._socket.closed:
            sockets.close(self._socket)
            self._context.term()

    def _begun(self, what: str) -> _Draft:
        if self._draft is None:
            raise WeightSyncError(f"{what}: no version is begun; call begin(version) first")
        return self._draft

    def _propose(self, draft: _Draft) -> wire.Propose:
        offer = wire.Offer(
            version=draft.version,
            transport="shm",
            location=str(draft.slot.path),
            plan=self._plan,
            checksums=tuple(draft.checksums),
        )
        left_s = draft.started + STAGING_SHARE * self._timeout_s - time.monotonic()
        return wire.Propose(attempt=self._attempt, offer=offer, timeout_s=max(left_s, 0.0))

    def _take_in(self) -> None:
        """Joins and farewells that came since the last call; anything else answers an attempt that is over."""
        for engine_id, message in messages(self._socket, self._ignored):
            if isinstance(message, wire.Join | wire.Leave):
                self._note(engine_id, message)
            else:
                self._ignored[f"{type(message).__name__.lower()} after its attempt"] += 1

    def _note(self, engine_id: str, message: wire.Join | wire.Leave) -> None:
        if isinstance(message, wire.Join):
            self._joined[engine_id] = message.version
            logger.info("engine=%s joined version=%d", engine_id, message.version)
        else:
            self._joined.pop(engine_id, None)
            logger.info("engine=%s left reason=%s", engine_id, message.reason)

    def _settle(self, draft: _Draft, report: TransactionReport | None, exchange: Exchange) -> None:
        self._draft = None
        if report is None:
            return
        for engine_id, member in report.members.items():
            if member.outcome == "lost" or engine_id in report.out_of_service:
                self._joined.pop(engine_id, None)
        for engine_id, message in exchange.comings:
            self._note(engine_id, message)
        if report.committed:
            self.version = draft.version
            self._slots.committed()
        if report.out_of_service:
            # A late or unreachable engine may be copying still: it keeps the bytes, later versions get others.
            self._slots.retire(draft.slot)

    def _judge(
        self,
        draft: _Draft,
        report: TransactionReport,
        answers: dict[str, tuple[float, ...]],
        probe: Probe | None,
    ) -> SyncReport:
        if not report.committed:
            raise SyncAborted(report.describe(), report)
        if len(report.out_of_service) == len(report.members):
            raise NoEngineApplied(report.describe(), report)
        applied = {name: answer for name, answer in answers.items() if name not in report.out_of_service}
        differences = (
            {name: largest_difference(probe, answer) for name, answer in applied.items()} if probe else {}
        )
        now = time.monotonic()
        sync = SyncReport(
            version=report.version,
            seconds=now - draft.started,
            write_s=draft.write_s,
            transaction_s=report.seconds,
            total_bytes=self._plan.total_bytes,
            engines=report.members,
            out_of_service=report.out_of_service,
            probe_max_diff={name: difference.size for name, difference in differences.items()},
            ignored=report.ignored,
        )
        if probe is not None:
            _check(probe, differences, sync)
        return sync


def _check(probe: Probe, differences: Mapping[str, Difference], report: SyncReport) -> None:
    engine, worst = max(differences.items(), key=lambda item: item[1].size)
    if not worst.size <= probe.tolerance:
        raise ProbeMismatch(engine, report.version, worst.position, worst.expected, worst.got, report)
