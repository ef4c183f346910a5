"""One sync as a two-phase transaction. Pure: facts in (with `now`), actions out; no clock, socket or file.

    begin --offers--> STAGING --everyone left staged--> APPLYING --everyone left applied--> COMMITTED
                         |                 (the commit point)
                         +--nobody is left, or it is withdrawn--> ABORTED

A member that fails, is lost, leaves, or does not stage by the staging deadline is out, and the others go on without it.

Not so where the bytes come to all members `together`, over a group that breaks with any of them: who fails, is lost or leaves
before the commit point takes the attempt with it. That the group broke (`broke`, `cut`, or nothing by the staging deadline)
does not say whose fault it is: `broken` is set, whoever sends calls the transfer off, and members that say within `settle_s`
that they were cut off, or that they have staged, keep their version; who says nothing is late.

Invariants (held by `tests/unit/weight_sync/test_transaction.py` over random schedules)
----------
- A member is told to apply only after it staged, and when every other one staged or is out; nobody is told both to apply
  and to abort.
- ABORTED: nobody was told to apply. COMMITTED: every member applied, left, or is out of service. Together: also that every
  member staged.
- A member that is out of service is named with its error, and dismissed unless its connection is gone.
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

from asyncrl.weight_sync.report import MemberReport, Outcome, TransactionReport
from asyncrl.weight_sync.transaction_actions import (
    Actions,
    Finished,
    SendAbort,
    SendApply,
    SendDismiss,
    SendOffer,
)


class Phase(enum.Enum):
    """Where the transaction is; COMMITTED and ABORTED are final."""

    STAGING = "staging"
    APPLYING = "applying"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Transaction:
    """The state of one sync. Each method takes one fact and returns what to do about it, in order."""

    def __init__(
        self,
        version: int,
        members: Iterable[str],
        *,
        now: float,
        staging_deadline: float,
        deadline: float,
        together: bool = False,
        settle_s: float = 0.0,
    ) -> None:
        """Past `staging_deadline` it goes on without those that have not staged; past `deadline` it ends in any case.

        `together`, `settle_s`: see above. Without members it aborts at once. Raises `ValueError` for a staging deadline after
        the deadline.
        """
        self.version = version
        self.phase = Phase.STAGING
        self.report: TransactionReport | None = None
        """Set once finished."""
        self.broken = ""
        """Why the group broke; set only where members take it together."""
        self._members = {name: MemberReport() for name in sorted(members)}
        self._started = now
        self._staging_deadline = staging_deadline
        self._deadline = deadline
        self._together = together
        self._settle_s = settle_s
        self._settled_by = deadline
        self._offered = False
        self._ignored: Counter[str] = Counter()
        if staging_deadline > deadline:
            raise ValueError(f"staging deadline {staging_deadline} is after the deadline {deadline}")

    @property
    def members(self) -> Set[str]:
        """Every engine that takes part."""
        return self._members.keys()

    @property
    def next_deadline(self) -> float:
        """When the next `tick` is needed at the latest."""
        if self.phase is not Phase.STAGING:
            return self._deadline
        return self._settled_by if self.broken else self._staging_deadline

    @property
    def waiting_for(self) -> list[str]:
        """Members that owe an answer in the present phase."""
        owing = {Phase.STAGING: "pending", Phase.APPLYING: "staged"}.get(self.phase)
        return [name for name, member in self._members.items() if member.outcome == owing]

    def begin(self, now: float) -> Actions:
        """Make the offers, unless the time to stage is over already."""
        if now >= self._staging_deadline:
            return self._abort(now, "its time to be staged was over before it could be offered")
        self._offered = True
        return [SendOffer(name) for name in self._members] or self._go_on(now)

    def staged(self, name: str, now: float, stage_s: float) -> Actions:
        """`name` has the bytes and verified them. The last one to say so is the commit point."""
        due = self.tick(now)
        if not self._expects(name, "staged", "pending", Phase.STAGING):
            return due
        self._update(name, outcome="staged", stage_s=stage_s, staged_after_s=now - self._started)
        return [*due, *self._go_on(now)]

    def applied(self, name: str, now: float, apply_s: float, stall_s: float) -> Actions:
        """`name` runs the new version."""
        due = self.tick(now)
        if not self._expects(name, "applied", "staged", Phase.APPLYING):
            return due
        self._update(
            name, outcome="applied", apply_s=apply_s, stall_s=stall_s, applied_after_s=now - self._started
        )
        return [*due, *self._go_on(now)]

    def failed(self, name: str, now: float, error: str) -> Actions:
        """`name` could not do what it was told to, and says why."""
        due = self.tick(now)
        owing: Outcome = "pending" if self.phase is Phase.STAGING else "staged"
        if not self._expects(name, "failed", owing, self.phase):
            return due
        self._update(name, outcome="failed", error=error)
        return [*due, SendDismiss(name, error), *self._without(name, now)]

    def cut(self, name: str, now: float, error: str) -> Actions:
        """The group broke while `name` received, and nothing is wrong with `name` itself. Not together, that is its failure."""
        if not self._together:
            return self.failed(name, now, error)
        due = self.tick(now)
        if not self._expects(name, "cut", "pending", Phase.STAGING):
            return due
        self._update(name, outcome="kept", error=error)
        return [*due, *self.broke(now, f"{name}: {error}")]

    def broke(self, now: float, error: str) -> Actions:
        """Sending to the group failed."""
        due = self.tick(now)
        if not self._together or self.report is not None or self.phase is not Phase.STAGING:
            return due
        self._break(now, error)
        return [*due, *self._go_on(now)]

    def lost(self, name: str, now: float, error: str) -> Actions:
        """`name` can no longer be reached: it is out also if it had answered."""
        return self._gone(name, now, "lost", error)

    def left(self, name: str, now: float, reason: str) -> Actions:
        """`name` is no member any more, and nothing is wrong with it: it is out also if it had answered."""
        return self._gone(name, now, "left", reason)

    def withdraw(self, now: float, reason: str) -> Actions:
        """Who asked for the sync needs the engines otherwise. Aborts before the commit point, changes nothing after it."""
        due = self.tick(now)
        if self.report is None and self.phase is Phase.STAGING:
            return [*due, *self._abort(now, reason)]
        return due

    def tick(self, now: float) -> Actions:
        """Time has passed."""
        if self.report is not None or now < self.next_deadline:
            return []
        allowed_s = self.next_deadline - self._started
        error = f"no answer within {allowed_s:.1f} s ({self.phase.value})"
        if self.phase is Phase.STAGING and self._together and not self.broken:
            if now < self._deadline:
                self._break(now, f"not every engine had it within {allowed_s:.1f} s")
                return []
            # Nobody was asked whose fault that is.
            return self._abort(now, "no time was left to apply it")
        dismissed: Actions = [SendDismiss(name, error) for name in self.waiting_for]
        for name in self.waiting_for:
            self._update(name, outcome="late", error=error)
        if self.phase is Phase.STAGING and now >= self._deadline:
            return [*dismissed, *self._abort(now, self.broken or "no time was left to apply it")]
        return [*dismissed, *self._go_on(now)]

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

    def _gone(self, name: str, now: float, outcome: Literal["lost", "left"], error: str) -> Actions:
        due = self.tick(now)
        if not self._open(outcome) or not self._known(name, outcome):
            return due
        if self._members[name].outcome in ("failed", "late", "lost", "left"):
            self.ignore(f"{outcome} after it was out")
            return due
        self._update(name, outcome=outcome, error=error)
        return [*due, *self._without(name, now)]

    def _without(self, name: str, now: float) -> Actions:
        """`name` is out."""
        if self._together and self.phase is Phase.STAGING:
            return self._abort(now, f"{name} {self._members[name].outcome}: {self._members[name].error}")
        return self._go_on(now)

    def _break(self, now: float, error: str) -> None:
        if not self.broken:
            self.broken = error
            self._settled_by = min(now + self._settle_s, self._deadline)

    def _go_on(self, now: float) -> Actions:
        """To the next phase, once nobody is waited for."""
        if self.waiting_for:
            return []
        if self.broken and self.phase is Phase.STAGING:
            return self._abort(now, self.broken)
        if self.phase is Phase.APPLYING:
            self.phase = Phase.COMMITTED
            return [self._finish(now, "")]
        staged = [name for name, member in self._members.items() if member.outcome == "staged"]
        if not staged:
            return self._abort(now, "no engine is left that could take it")
        self.phase = Phase.APPLYING
        return [SendApply(name) for name in staged]

    def _abort(self, now: float, reason: str) -> Actions:
        kept = [name for name, m in self._members.items() if m.outcome in ("pending", "staged")]
        for name in kept:
            self._update(name, outcome="kept")
        self.phase = Phase.ABORTED
        told: Actions = [SendAbort(name) for name in kept if self._offered]
        return [*told, self._finish(now, reason)]

    def _finish(self, now: float, reason: str) -> Finished:
        self.report = TransactionReport(
            version=self.version,
            committed=self.phase is Phase.COMMITTED,
            seconds=now - self._started,
            reason=reason,
            offered=self._offered,
            members=dict(self._members),
            ignored=dict(self._ignored),
        )
        return Finished(self.report)
