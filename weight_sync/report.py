"""What one sync was like: for each engine, as a transaction, and as a whole. Made by the transaction and the publisher;
read by the learner's metrics and the supervisor.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Outcome = Literal["pending", "staged", "applied", "kept", "failed", "lost", "late", "left"]
"""pending and staged: on the way. applied: runs the new version. kept: did its part until it was told to abort.
failed: said so itself. lost: its connection is gone. late: did not answer by the deadline. left: in order, or to join anew
over another connection."""

OUT_OF_SERVICE: Final = frozenset({"failed", "lost", "late"})


class MemberReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one engine. Seconds are 0 for what it did not get to."""

    outcome: Outcome = "pending"
    error: str = ""
    """The engine's traceback, or why it is counted out."""
    staged_after_s: float = 0.0
    """From the start of the transaction to the fact, by the publisher's clock."""
    applied_after_s: float = 0.0
    stage_s: float = 0.0
    """By the engine's clock, as are the next two."""
    apply_s: float = 0.0
    stall_s: float = 0.0
    """Time in which the engine could run no decode step."""


class TransactionReport(msgspec.Struct, frozen=True, kw_only=True):
    """How the transaction ended."""

    version: int
    committed: bool
    seconds: float
    reason: str
    """Why it was aborted; empty if it was committed."""
    offered: bool
    """Whether anyone was asked to take it: not if the time for that was over before."""
    members: dict[str, MemberReport]
    ignored: dict[str, int]
    """Facts that changed nothing: reason -> count."""

    @property
    def out_of_service(self) -> dict[str, str]:
        """Members that did not do what they were told to, with their errors. Who left or kept its version is none."""
        return {name: m.error for name, m in self.members.items() if m.outcome in OUT_OF_SERVICE}

    def describe(self) -> str:
        """The whole report as text: the decision, then one line per engine with its traceback under it."""
        decision = "was committed" if self.committed else f"was taken by nobody: {self.reason}"
        lines = [f"version {self.version} {decision}"]
        for name, member in self.members.items():
            lines.append(f"  {name}: {member.outcome}")
            lines.extend(f"    {line}" for line in member.error.splitlines())
        lines.extend(f"  ignored {count} x {reason}" for reason, count in self.ignored.items())
        return "\n".join(lines)


class SyncReport(msgspec.Struct, frozen=True, kw_only=True):
    """One version on its way, from `begin` to the last engine's confirmation, or from the welcome of those that came late
    to theirs. Times in seconds."""

    version: int
    seconds: float
    """From `begin` (or the welcome) until settled."""
    wait_s: float = 0.0
    """Of them, at the beginning: for engines that were too far behind."""
    write_s: float
    """Of them, within `write`: copies and checksums. The rest before the offer is the learner's gathering. A welcome
    writes nothing."""
    transaction_s: float
    """Of them, from the offer until settled."""
    total_bytes: int
    engines: dict[str, MemberReport]
    """stage_s, apply_s and stall_s of each, and what became of it."""
    out_of_service: dict[str, str]
    """Engines that did not take the version, with their errors. Each was told to end, if it could be told; one that is
    `late` may hang and never hear of it."""
    probe_max_diff: dict[str, float]
    """Largest |difference| of a probe logprob, for each engine that was probed."""
    digest: str = ""
    """Of the version's bytes as the learner wrote them (`checksum.version_digest`)."""
    ignored: dict[str, int]
    """Messages that changed nothing: reason -> count."""

    @property
    def max_stall_s(self) -> float:
        """The longest time that one engine could run no decode step."""
        return max((member.stall_s for member in self.engines.values()), default=0.0)
