"""The report of a sync that is settled, and the last thing that is done about it: an engine that runs other bytes than the
learner wrote is put out of service. Called by publishers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from asyncrl.weight_sync.exchange import Exchange
from asyncrl.weight_sync.members import Members
from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.probe import Difference
from asyncrl.weight_sync.report import SyncReport, TransactionReport
from asyncrl.weight_sync.verification import other_bytes


def sync_report(
    members: Members,
    plan: Plan,
    digest: str,
    report: TransactionReport,
    exchange: Exchange,
    found: Mapping[str, Difference],
    started: float,
    write_s: float,
) -> SyncReport:
    """`digest`: of the version as the learner wrote it. `found`: of the engines that were probed. `started`: of the sync, by
    `time.monotonic`."""
    strange = other_bytes(report, digest, exchange.digests)
    for engine, error in strange.items():
        members.roster.drop(engine)
        exchange.dismiss(engine, error)
    return SyncReport(
        version=report.version,
        seconds=time.monotonic() - started,
        write_s=write_s,
        transaction_s=report.seconds,
        total_bytes=plan.total_bytes,
        engines=report.members,
        out_of_service={**report.out_of_service, **strange},
        probe_max_diff={name: difference.size for name, difference in found.items()},
        ignored=report.ignored,
        digest=digest,
    )
