"""One sync as a two-phase transaction. Pure: facts in (with `now`), actions out; no clock, socket or file.

    begin --offers--> STAGING --every member staged--> APPLYING --every member applied or out--> COMMITTED
                         |                (the commit point)
                         +--any failure, or the staging deadline--> ABORTED

Invariants (held by `tests/unit/weight_sync/test_transaction.py` over random schedules)
----------
- A member is told to apply only after every member has staged; nobody is told both to apply and to abort.
- ABORTED: the old version stays live everywhere. COMMITTED: every member whose outcome is not `applied` is out of
  service, and named with its error.
- `Finished` comes exactly once and is the last action; a tick at or after `deadline` always brings it.
- Facts that are late, repeated, premature or from strangers change nothing; each is counted with its reason.

Times are seconds of one clock of the caller's. Called by the publisher.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Set
from typing import Literal

import msgspec

Outcome = Literal["pending", "staged", "applied", "kept", "failed", "lost", "late"]
"""pending and staged: on the way. applied: runs the new version. kept: did its part until others made it abort.
failed: said so itself. lost: its connection is gone. late: did not answer by the deadline."""


class Phase(enum.Enum):
    """Where the transaction is; COMMITTED and ABORTED are final."""

    STAGING = "staging"
    APPLYING = "applying"
    COMMITTED = "committed"
    ABORTED = "aborted"


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
    members: dict[str, MemberReport]
    ignored: dict[str, int]
    """Facts that changed nothing: reason -> count."""

    @property
    def out_of_service(self) -> dict[str, str]:
        """Members that a committed version left behind, with their errors; empty after an abort."""
        behind = {name: m.error for name, m in self.members.items() if m.outcome != "applied"}
        return behind if self.committed else {}

    def describe(self) -> str:
        """The whole report as text: the decision, then one line per engine with its traceback under it."""
        decision = (
            "was committed" if self.committed else f"was aborted: {self.reason}; the old version stays live"
        )
        lines = [f"version {self.version} {decision}"]
        for name, member in self.members.items():
            lines.append(f"  {name}: {member.outcome}")
            lines.extend(f"    {line}" for line in member.error.splitlines())
        lines.extend(f"  ignored {count} x {reason}" for reason, count in self.ignored.items())
        return "\n".join(lines)


class SendOffer(msgspec.Struct, frozen=True):
    """Tell `member` where the version's bytes are."""

    member: str


class SendApply(msgspec.Struct, frozen=True):
    """Tell `member` to make the version live."""

    member: str


class SendAbort(msgspec.Struct, frozen=True):
    """Tell `member` to forget the version."""

    member: str


class Finished(msgspec.Struct, frozen=True):
    """The last action."""

    report: TransactionReport


Action = SendOffer | SendApply | SendAbort | Finished
Actions = list[Action]


class Transaction:
    """The state of one sync. Each method takes one fact and returns what to do about it, in order."""

    def __init__(
        self, version: int, members: Iterable[str], *, now: float, staging_deadline: float, deadline: float
    ) -> None:
        """Past `staging_deadline` without every member staged, it aborts; past `deadline` it ends in any case.

        Raises `ValueError` for no members or a staging deadline after the deadline.
        """
        self.version = version
        self.phase = Phase.STAGING
        self.report: TransactionReport | None = None
        """Set once finished."""
        self._members = {name: MemberReport() for name in sorted(members)}
        self._started = now
        self._staging_deadline = staging_deadline
        self._deadline = deadline
        self._ignored: Counter[str] = Counter()
        if not self._members:
            raise ValueError(f"version {version}: expected at least one engine to send it to, got none")
        if staging_deadline > deadline:
            raise ValueError(f"staging deadline {staging_deadline} is after the deadline {deadline}")

    @property
    def members(self) -> Set[str]:
        """Every engine that takes part."""
        return self._members.keys()

    @property
    def next_deadline(self) -> float:
        """When the next `tick` is needed at the latest."""
        return self._staging_deadline if self.phase is Phase.STAGING else self._deadline

    @property
    def waiting_for(self) -> list[str]:
        """Members that owe an answer in the present phase."""
        owing = {Phase.STAGING: "pending", Phase.APPLYING: "staged"}.get(self.phase)
        return [name for name, member in self._members.items() if member.outcome == owing]

    def begin(self, now: float) -> Actions:
        """Make the offers, unless writing the bytes has used up the time already."""
        return self.tick(now) or [SendOffer(name) for name in self._members]

    def staged(self, name: str, now: float, stage_s: float) -> Actions:
        """`name` has the bytes and verified them. The last one to say so is the commit point."""
        ended = self.tick(now)
        if not self._expects(name, "staged", "pending", Phase.STAGING):
            return ended
        self._update(name, outcome="staged", stage_s=stage_s, staged_after_s=now - self._started)
        if self.waiting_for:
            return []
        self.phase = Phase.APPLYING
        return [SendApply(member) for member in self._members]

    def applied(self, name: str, now: float, apply_s: float, stall_s: float) -> Actions:
        """`name` runs the new version."""
        ended = self.tick(now)
        if not self._expects(name, "applied", "staged", Phase.APPLYING):
            return ended
        self._update(
            name, outcome="applied", apply_s=apply_s, stall_s=stall_s, applied_after_s=now - self._started
        )
        return self._finish_if_settled(now)

    def failed(self, name: str, now: float, error: str) -> Actions:
        """`name` could not do what it was told to, and says why."""
        ended = self.tick(now)
        owing: Outcome = "pending" if self.phase is Phase.STAGING else "staged"
        if not self._expects(name, "failed", owing, self.phase):
            return ended
        self._update(name, outcome="failed", error=error)
        return self._out(now, f"{name} failed to stage")

    def lost(self, name: str, now: float, error: str) -> Actions:
        """`name` can no longer be reached: it counts as out also if it had answered."""
        ended = self.tick(now)
        if not self._open("lost") or not self._known(name, "lost"):
            return ended
        if self._members[name].outcome in ("failed", "lost"):
            self.ignore("lost after it was out")
            return []
        self._update(name, outcome="lost", error=error)
        return self._out(now, f"{name} was lost: {error}")

    def tick(self, now: float) -> Actions:
        """Time has passed."""
        if self.report is not None or now < self.next_deadline:
            return []
        waiting = self.waiting_for
        allowed_s = self.next_deadline - self._started
        for name in waiting:
            self._update(
                name, outcome="late", error=f"no answer within {allowed_s:.1f} s ({self.phase.value})"
            )
        if self.phase is Phase.STAGING:
            return self._abort(now, f"not staged within {allowed_s:.1f} s by {', '.join(waiting)}")
        return self._finish_if_settled(now)

    def ignore(self, reason: str, count: int = 1) -> None:
        """Count a fact that changes nothing."""
        self._ignored[reason] += count

    def _known(self, name: str, fact: str) -> bool:
        if name not in self._members:
            self.ignore(f"{fact} from a stranger")
        return name in self._members

    def _open(self, fact: str) -> bool:
        if self.report is not None:
            self.ignore(f"{fact} after the end")
        return self.report is None

    def _expects(self, name: str, fact: str, outcome: Outcome, phase: Phase) -> bool:
        if not self._open(fact) or not self._known(name, fact):
            return False
        if self.phase is phase and self._members[name].outcome == outcome:
            return True
        self.ignore(f"{fact} while {self._members[name].outcome}")
        return False

    def _update(self, name: str, **facts: object) -> None:
        self._members[name] = msgspec.structs.replace(self._members[name], **facts)

    def _out(self, now: float, reason: str) -> Actions:
        if self.phase is Phase.STAGING:
            return self._abort(now, reason)
        return self._finish_if_settled(now)

    def _abort(self, now: float, reason: str) -> Actions:
        # Also to members that failed or are late: they may hold the bytes, or be about to.
        told: Actions = [SendAbort(name) for name, m in self._members.items() if m.outcome != "lost"]
        for name, member in self._members.items():
            if member.outcome in ("pending", "staged"):
                self._update(name, outcome="kept")
        self.phase = Phase.ABORTED
        return [*told, self._finish(now, reason)]

    def _finish_if_settled(self, now: float) -> Actions:
        if self.waiting_for:
            return []
        self.phase = Phase.COMMITTED
        return [self._finish(now, "")]

    def _finish(self, now: float, reason: str) -> Finished:
        self.report = TransactionReport(
            version=self.version,
            committed=self.phase is Phase.COMMITTED,
            seconds=now - self._started,
            reason=reason,
            members=dict(self._members),
            ignored=dict(self._ignored),
        )
        return Finished(self.report)
