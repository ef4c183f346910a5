"""What the answers to a version's probe, and the digests of the bytes that engines loaded, mean for the sync. Pure.

An engine judges its own probe before a token leaves it, and ends if it fails (`receiver`); here the publisher finds out how far
apart they are, whether the fault is all engines', and whether one loaded other bytes than the learner wrote. Called by publishers.
"""

from __future__ import annotations

from collections.abc import Mapping

from asyncrl.weight_sync.errors import ProbeMismatch
from asyncrl.weight_sync.probe import Difference, Probe, largest_difference
from asyncrl.weight_sync.report import SyncReport, TransactionReport


def differences(probe: Probe | None, answers: Mapping[str, tuple[float, ...]]) -> dict[str, Difference]:
    """Of each engine that answered the probe, right or wrong."""
    return {} if probe is None else {name: largest_difference(probe, each) for name, each in answers.items()}


def shared_fault(
    probe: Probe | None, found: Mapping[str, Difference], report: SyncReport
) -> ProbeMismatch | None:
    """The mismatch that leaves no engine at the version, after one or more failed its probe: what it takes to serve is not one
    engine's matter then. None while another engine runs it, whether it was asked this time or passed before."""
    wrong = {name: each for name, each in found.items() if probe and not each.size <= probe.tolerance}
    if not wrong or any(member.outcome == "applied" for member in report.engines.values()):
        return None
    engine, worst = max(wrong.items(), key=lambda item: item[1].size)
    return ProbeMismatch(
        engine, report.version, worst.position, worst.expected, worst.got, len(wrong), report
    )


def other_bytes(report: TransactionReport, digest: str, digests: Mapping[str, str]) -> dict[str, str]:
    """Engines that applied what is not the learner's version, with the error of each."""
    applied = {name: got for name, got in digests.items() if report.members[name].outcome == "applied"}
    return {
        name: error for name, got in applied.items() if (error := strange_digest(report.version, digest, got))
    }


def strange_digest(version: int, expected: str, got: str) -> str:
    """Why what an engine loaded is not this version; empty if it is, or if the engine gives no digest: its device has compared the
    bytes itself then."""
    if got in ("", expected):
        return ""
    return f"version {version}: expected bytes with digest {expected}, as the learner wrote them, the engine loaded {got}"
