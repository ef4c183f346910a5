"""The learner's side of weight sync over `collective`: offers a version when it begins, broadcasts it bucket by bucket to every
engine at once, and sees the transaction through. Rank 0 owns one; where every rank sends, the others own a `CollectiveShare`, and
`begin`, `resend`, `commit` are collectives of all ranks. Calls come one at a time, from one thread or under one lock.

    publisher.begin(1)                        # the engines start to receive
    for bucket in plan.of(0):
        publisher.write(bucket, gathered_pieces)
    report = publisher.commit(probe)
    publisher.resend(1)                       # later, if engines are `behind`: write and commit as before

Invariants
----------
- Before the commit point an engine that fails, dies, hangs or leaves takes the attempt with it, as the group breaks: `write` does
  nothing more then, and `commit` raises `SyncAborted` with everyone's error. The old version is live on the others, and the version
  may be begun again at once: it goes through with the rest, over a new group.
- After the commit point each engine is on its own, as over the other transports.
- A group is made anew when the members are others than last time, and after a version that was not committed.
- A version that was committed is not kept: an engine that comes later takes the next one, or this one if it is sent again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence, Set
from typing import NoReturn

import torch

from asyncrl.weight_sync.checksum import version_digest
from asyncrl.weight_sync.collective_attempt import Attempt
from asyncrl.weight_sync.collective_drafts import Drafts
from asyncrl.weight_sync.collective_sender import CollectiveSender
from asyncrl.weight_sync.collective_words import Outcome, Refused, Sent, decode_sent, encode
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import SyncAborted, WeightSyncError
from asyncrl.weight_sync.members import Members
from asyncrl.weight_sync.plan import Bucket, Plan
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.publisher import never
from asyncrl.weight_sync.ranks import Alone, Ranks
from asyncrl.weight_sync.report import SyncReport, TransactionReport
from asyncrl.weight_sync.settling import sync_report
from asyncrl.weight_sync.sockets import Secure
from asyncrl.weight_sync.verification import differences, shared_fault


class CollectivePublisher:
    """Sends versions of one model, laid out by one plan, to the engines that joined."""

    def __init__(
        self,
        config: WeightSyncConfig,
        plan: Plan,
        host: str = "127.0.0.1",
        secure: Secure | None = None,
        *,
        ranks: Ranks | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Binds two free ports of `host`: for the engines' connections, and for the store in which the group's members meet.
        `ranks`: all that send, `plan.senders` of them. `device`: what buckets are packed on; it decides between gloo and NCCL.
        A collective."""
        self.version = -1
        """The last committed one."""
        self._plan = plan
        self._ranks: Ranks = ranks if ranks is not None and plan.senders > 1 else Alone()
        if plan.senders != self._ranks.size:
            raise WeightSyncError(
                f"expected a rank for each of {plan.senders} senders, got {self._ranks.size}"
            )
        device = device or torch.device("cpu")
        self._members = Members(host, secure)
        self.endpoint = self._members.endpoint
        self._sender = CollectiveSender(plan, 0, host, device, config.timeout_s)
        stores = tuple(each.decode() for each in self._ranks.collect(self._sender.address.encode()))
        self._drafts = Drafts(self._members, plan, self._sender, stores, device, config.timeout_s)
        self._draft: Attempt | None = None
        self._closed = False

    def __enter__(self) -> CollectivePublisher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def engines(self) -> dict[str, int]:
        """Engines that the next version goes to, and the version that each runs, -1 for none."""
        return self._members.engines

    @property
    def behind(self) -> list[str]:
        """Engines that joined and do not run the last committed version; they have it after a `resend`."""
        self._members.take_in()
        return self._members.roster.behind(self.version) if self.version >= 0 else []

    def wait_for_engines(self, engine_ids: Set[str], timeout_s: float) -> None:
        """Return when all of `engine_ids` have joined. Raises `EnginesMissing` after `timeout_s`."""
        self._members.wait_for(engine_ids, timeout_s)

    def begin(self, version: int) -> None:
        """Offer `version`, which must be above the last committed one, to every engine that joined; buckets come next. The time
        of the sync runs from here. A collective."""
        fault = "" if version > self.version else f"expected one above {self.version}, the last committed"
        self._begin(version, lambda: self._members.roster.versions, fault)

    def resend(self, version: int) -> None:
        """`begin` of the last committed version once more, for the engines that are `behind`. A collective."""
        fault = "" if version == self.version >= 0 else f"expected {self.version}, the last committed"
        self._begin(version, lambda: self._members.roster.behind(version), fault)

    def write(self, bucket: Bucket, pieces: Sequence[torch.Tensor]) -> None:
        """Broadcast one bucket of rank 0: a flat tensor for each of its pieces, from any device, cast to the wire dtype on the way.

        Buckets come in the plan's order. Returns when the bucket is on its way, at once if the version no longer is. Raises
        `WeightSyncError` for what does not fit the plan.
        """
        draft, started = self._begun("write"), time.monotonic()
        own = self._plan.of(0)
        if draft.written == len(own) or bucket != own[draft.written]:
            raise WeightSyncError(
                f"version {draft.stream.version}: bucket {bucket.index} out of order, expected bucket {draft.written} of "
                f"{len(own)} that rank 0 sends"
            )
        draft.written += 1
        draft.send(bucket, pieces)
        draft.write_s += time.monotonic() - started

    def abandon(self) -> None:
        """Forget a version that is begun and not committed, such as when gathering failed; engines are told."""
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.exchange.withdraw("the learner gave it up")
            self._settle(draft)

    def commit(self, probe: Probe | None = None) -> SyncReport:
        """Return when every engine runs the version. A collective.

        Raises `SyncAborted` (the old version is live everywhere; the version may be begun again) if an engine or a sender dropped
        out before all had it, `ProbeMismatch` (live, but not right) if engines failed the probe and none is left that runs it, or
        `WeightSyncError` if buckets are missing and no engine is there. Engines that did not take it after that are in the
        report's `out_of_service`.
        """
        draft, self._draft = self._draft, None
        fault = _missing(draft, len(self._plan.of(0)))
        if draft is None:
            self._end_without(self._collected(fault)[0] or [fault])
        draft.probe = probe
        try:
            checksums = self._finish_sending(draft, fault)
            report = draft.see_through()
        except BaseException as interruption:
            draft.exchange.interrupt(interruption)
            raise
        finally:
            self._settle(draft)
        if draft.faults and not report.members:
            self._end_without(draft.faults)
        error = _described(report, draft.faults) if report.members and not report.committed else ""
        self._ranks.share(encode(Outcome(report=report, error=error)))
        if error:
            raise SyncAborted(error, report)
        self.version = report.version
        return self._reported(draft, report, version_digest(checksums))

    def welcome(self, give_way: Callable[[], bool] = never) -> SyncReport | None:
        """Takes note of engines that came. They get a version with the next `begin` or `resend`, so there is never a report."""
        if self._draft is None:
            self._members.take_in()
        return None

    def close(self) -> None:
        """Free the engines' port, leave the group; the store's port goes with this object. May be called twice."""
        self._closed = True
        if self._draft is not None:
            self.abandon()
        self._sender.close()
        self._members.close()

    def _begin(self, version: int, members_of: Callable[[], Iterable[str]], fault: str) -> None:
        self._members.take_in()
        if self._closed or self._draft is not None:
            fault = "the publisher is closed" if self._closed else "another version is begun"
        if fault:
            self._ranks.share(encode(Refused(error=f"version {version}: {fault}")))
            raise WeightSyncError(f"version {version}: {fault}")
        names = tuple(sorted(members_of()))
        self._draft = draft = self._drafts.draft(version, names)
        self._ranks.share(encode(draft.stream))
        try:
            draft.start()
        except BaseException as error:
            draft.exchange.interrupt(error)
            self._settle(draft)
            raise

    def _begun(self, what: str) -> Attempt:
        if self._draft is None:
            raise WeightSyncError(f"{what}: no version is begun; call begin(version) first")
        return self._draft

    def _finish_sending(self, draft: Attempt, fault: str) -> list[int]:
        """All ranks have sent, or the version is off. The checksums of all buckets, where all were sent."""
        if not fault:
            draft.drain()
        draft.faults, checksums = self._collected(fault)
        if draft.faults and not draft.off:
            draft.broke("\n".join(draft.faults))
        draft.tell_checksums()
        return checksums

    def _collected(self, fault: str) -> tuple[list[str], list[int]]:
        """What kept a rank from sending its share, and the checksums of what was sent, of all ranks. A collective."""
        mine = Sent(error=fault, checksums=tuple(self._sender.checksums))
        said = [decode_sent(each) for each in self._ranks.collect(encode(mine))]
        faults = [f"learner rank {rank}: {each.error}" for rank, each in enumerate(said) if each.error]
        return faults, [checksum for each in said for checksum in each.checksums]

    def _end_without(self, faults: Sequence[str]) -> NoReturn:
        """No engine had to be asked."""
        error = "the version is not complete. " + "; ".join(faults)
        self._ranks.share(encode(Outcome(report=None, error=error)))
        raise WeightSyncError(error)

    def _settle(self, draft: Attempt) -> None:
        self._draft = None
        report, exchange = draft.report, draft.exchange
        if report is None:
            return
        self._members.roster.settle(report, exchange.comings, exchange.answers.keys())
        if report.committed:
            self._sender.end()
        else:
            self._drafts.forget_group()
            if report.members:
                self._sender.call_off(report.reason)

    def _reported(self, draft: Attempt, report: TransactionReport, digest: str) -> SyncReport:
        found = differences(draft.probe, draft.exchange.answers)
        sync = sync_report(
            self._members, self._plan, digest, report, draft.exchange, found, draft.started, draft.write_s
        )
        if (fault := shared_fault(draft.probe, found, sync)) is not None:
            raise fault
        return sync


def _missing(draft: Attempt | None, expected: int) -> str:
    """What of a version is not there; empty: nothing."""
    if draft is None:
        return "commit: no version is begun; call begin(version) first"
    if draft.written < expected:
        return f"version {draft.stream.version}: expected {expected} buckets, {draft.written} are written"
    return ""


def _described(report: TransactionReport, faults: Sequence[str]) -> str:
    """`faults` are the ranks', of which an engine may have heard before rank 0 did: the report then has its words alone."""
    described = report.describe()
    return "\n".join([described, *(fault for fault in faults if fault not in described)])
