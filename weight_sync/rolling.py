"""Rolling updates: each engine on its own way to the newest version. Pure: facts in (with `now`), actions out; no clock,
socket or file. The counterpart of `transaction` where engines may run different versions for a while.

                 +------- a newer version is published (another attempt) ------+
                 v                                                             |
    at rest --propose--> staging --staged--> told to apply --applied--> at rest, or proposed what is newest by now

Nobody waits for anybody else, but the learner: it may not begin version v while an engine in service runs less than
v - `max_lag` (`may_begin`). So an engine is overtaken at most `max_lag` times in a row, and then gets its time.

Invariants (held by `tests/unit/weight_sync/test_rolling.py` over random schedules)
----------
- Whoever does not run the newest version has a proposal open; whoever runs it has none. Only the newest is ever proposed.
- Within one membership (from a join to the next one, or the end) the versions that an engine is told to apply go up.
- A version that was superseded before an engine was told to apply it is never applied there.
- Every proposal has an attempt number of its own, and a deadline; so has every order to apply. Who is past it, fails or is
  lost is out, named in one `Settled` with its error, and dismissed unless its connection is gone.
- `readers`: who may be reading a version's bytes. A superseded proposal counts until a later one is staged.
- An engine that comes without a version serves nothing yet. It counts as if it ran the first version that it is proposed: so
  nobody waits for one that has just come, and yet it is overtaken no more often than the others.
- Facts that are late, repeated, premature or from strangers change nothing; each is counted with its reason.

Facts do not bring deadlines, only `tick` does: whoever was kept from reading the answers reads them first. Times are seconds of
one clock of the caller's. Called by `rolling_exchange` and the publisher.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from asyncrl.weight_sync.report import OUT_OF_SERVICE, MemberReport


class SendPropose(msgspec.Struct, frozen=True):
    """Tell `member` where the bytes of `version` are; an earlier proposal that it has is over."""

    member: str
    attempt: int
    version: int
    timeout_s: float
    """Time to stage it."""


class SendApply(msgspec.Struct, frozen=True):
    """Tell `member` to make the version of `attempt` live."""

    member: str
    attempt: int
    version: int


class SendDismiss(msgspec.Struct, frozen=True):
    """Tell `member`, which last heard of `attempt`, that it is out of service."""

    member: str
    attempt: int
    reason: str


class Settled(msgspec.Struct, frozen=True):
    """One engine's way to one version has ended."""

    member: str
    version: int
    seconds: float
    """From the proposal."""
    report: MemberReport
    error: str
    """Why it is out of service; empty: it is not."""
    reading: tuple[int, ...]
    """Versions whose bytes it may go on reading although it is no member any more."""


Action = SendPropose | SendApply | SendDismiss | Settled
Actions = list[Action]


@dataclass(slots=True)
class _Update:
    """A proposal under way. `report.outcome` is `pending` until it is staged, then `staged`: it is told to apply."""

    attempt: int
    version: int
    started: float
    deadline: float
    report: MemberReport


@dataclass(slots=True)
class _Member:
    version: int
    counts_as: int | None
    """Against the learner's lag; None: it has no version, and has not been proposed one."""
    update: _Update | None = None
    attempt: int = 0
    """The last that it was told of."""
    reading: set[int] = field(default_factory=set)


class Rolling:
    """The state of every engine's updates. Each method takes one fact and returns what to do about it, in order."""

    def __init__(self, max_lag: int, *, stage_s: float, apply_s: float, attempts: Iterator[int]) -> None:
        """`stage_s`, `apply_s`: how long an engine may take for either. `attempts` go up and never repeat. Raises `ValueError`
        for a lag below 1: engines that are never behind are the joint transaction's."""
        if max_lag < 1:
            raise ValueError(f"max_lag: expected at least 1, got {max_lag}; 0 is for `Transaction`")
        self.newest = -1
        """The version last published, -1 for none."""
        self.ignored: Counter[str] = Counter()
        """Facts that changed nothing: reason -> count. The caller clears it once reported."""
        self._max_lag = max_lag
        self._stage_s = stage_s
        self._apply_s = apply_s
        self._attempts = attempts
        self._members: dict[str, _Member] = {}

    @property
    def versions(self) -> dict[str, int]:
        """Every engine that joined and is not out, and the version that it runs, -1 for none."""
        return {name: member.version for name, member in self._members.items()}

    @property
    def waiting_for(self) -> list[str]:
        """Engines that owe an answer."""
        return [name for name, member in self._members.items() if member.update is not None]

    @property
    def next_deadline(self) -> float:
        """When the next `tick` is needed at the latest; infinite while nobody owes an answer."""
        return min(
            (m.update.deadline for m in self._members.values() if m.update is not None), default=math.inf
        )

    def readers(self, version: int) -> list[str]:
        """Engines that may be reading the bytes of `version`, members all."""
        return [name for name, member in self._members.items() if version in member.reading]

    def applying(self, name: str, attempt: int) -> int | None:
        """The version that this engine was told to apply by `attempt`, if it owes the answer still."""
        member = self._members.get(name)
        update = member.update if member else None
        return update.version if update and update.attempt == attempt and _is_applying(update) else None

    def holding_up(self, version: int, replaced: int) -> list[str]:
        """Engines for which the learner must wait before it begins `version` in the place of the bytes of `replaced`: those that
        would be too far behind, and those that were told to apply these bytes. Who only stages them has been told otherwise."""
        least = min(version - self._max_lag, self.newest)
        return [
            name
            for name, member in self._members.items()
            if (member.counts_as is not None and member.counts_as < least)
            or (
                member.update is not None
                and _is_applying(member.update)
                and member.update.version == replaced
            )
        ]

    def may_begin(self, version: int, replaced: int = -1) -> bool:
        """Whether the learner may begin to write `version` now."""
        return not self.holding_up(version, replaced)

    # ---- facts -------------------------------------------------------------------------------------------------

    def published(self, version: int, now: float) -> Actions:
        """Its bytes are complete. Proposed to everyone who has not been told to apply something else; those get it afterwards.

        Raises `ValueError` for one that is not above the last.
        """
        if version <= self.newest:
            raise ValueError(f"version {version}: expected one above {self.newest}, the last published")
        self.newest = version
        free = [n for n, m in self._members.items() if m.update is None or not _is_applying(m.update)]
        return [self._propose(name, now) for name in free]

    def joined(self, name: str, version: int, now: float) -> Actions:
        """A connection is there that runs `version`; one that was never published is of another history and counts as none. What
        was open with the connection before is over."""
        told = self.left(name, now, "it connected anew") if name in self._members else []
        known = 0 <= version <= self.newest
        self._members[name] = _Member(version=version if known else -1, counts_as=version if known else None)
        return [*told, *self._go_on(name, now)]

    def left(self, name: str, now: float, reason: str) -> Actions:
        """It is no member any more, and nothing is wrong with it."""
        return self._out(name, now, "left", reason) if self._known(name, "left") else []

    def lost(self, name: str, now: float, error: str) -> Actions:
        """It can no longer be reached."""
        return self._out(name, now, "lost", error) if self._known(name, "lost") else []

    def staged(self, name: str, attempt: int, now: float, stage_s: float) -> Actions:
        """It has the bytes of its proposal and verified them: it may apply them at its next step boundary."""
        update = self._expects(name, attempt, "staged", "pending")
        if update is None:
            return []
        report = msgspec.structs.replace(
            update.report, outcome="staged", stage_s=stage_s, staged_after_s=now - update.started
        )
        update.report, update.deadline = report, now + self._apply_s
        self._members[name].reading = {update.version}
        return [SendApply(name, attempt, update.version)]

    def applied(
        self, name: str, attempt: int, now: float, apply_s: float, stall_s: float, unfit: str = ""
    ) -> Actions:
        """It runs the version of its proposal. `unfit`: what is wrong with how it runs it; it is dismissed then."""
        update = self._expects(name, attempt, "applied", "staged")
        if update is None:
            return []
        member = self._members[name]
        member.version = member.counts_as = update.version
        member.update, member.reading = None, set()
        report = msgspec.structs.replace(
            update.report,
            outcome="applied",
            apply_s=apply_s,
            stall_s=stall_s,
            applied_after_s=now - update.started,
        )
        settled = Settled(name, update.version, now - update.started, report, unfit, ())
        if unfit:
            del self._members[name]
            return [SendDismiss(name, attempt, unfit), settled]
        return [settled, *self._go_on(name, now)]

    def failed(self, name: str, attempt: int, now: float, error: str) -> Actions:
        """It could not do what it was told to, and says why."""
        update = self._expects(name, attempt, "failed", "pending", "staged")
        return [] if update is None else self._dismissed(name, now, "failed", error)

    def tick(self, now: float) -> Actions:
        """Time has passed, and the answers that came in it have been told."""
        actions: Actions = []
        for name, member in list(self._members.items()):
            update = member.update
            if update is None or now < update.deadline:
                continue
            what, allowed_s = ("apply", self._apply_s) if _is_applying(update) else ("stage", self._stage_s)
            error = f"no answer within {allowed_s:.1f} s when it was to {what} version {update.version}"
            actions += self._dismissed(name, now, "late", error)
        return actions

    def give_up(self, version: int, replaced: int, now: float) -> Actions:
        """The learner waits no longer to begin `version`: who is holding it up is late."""
        actions: Actions = []
        for name in self.holding_up(version, replaced):
            error = (
                f"still at version {self._members[name].version} when version {version} was due "
                f"(weight_sync.max_lag_versions = {self._max_lag})"
            )
            actions += self._dismissed(name, now, "late", error)
        return actions

    # ---- inside ------------------------------------------------------------------------------------------------

    def _go_on(self, name: str, now: float) -> Actions:
        behind = self.newest >= 0 and self._members[name].version != self.newest
        return [self._propose(name, now)] if behind else []

    def _propose(self, name: str, now: float) -> SendPropose:
        member, attempt = self._members[name], next(self._attempts)
        if member.counts_as is None:
            member.counts_as = self.newest
        member.update = _Update(attempt, self.newest, now, now + self._stage_s, MemberReport())
        member.attempt = attempt
        member.reading.add(self.newest)
        return SendPropose(name, attempt, self.newest, self._stage_s)

    def _dismissed(self, name: str, now: float, outcome: Literal["failed", "late"], error: str) -> Actions:
        attempt = self._members[name].attempt
        return [SendDismiss(name, attempt, error), *self._out(name, now, outcome, error)]

    def _out(
        self, name: str, now: float, outcome: Literal["failed", "late", "lost", "left"], error: str
    ) -> Actions:
        member = self._members.pop(name)
        update = member.update
        if update is None and outcome == "left":
            return []
        report = msgspec.structs.replace(
            update.report if update else MemberReport(), outcome=outcome, error=error
        )
        version, seconds = (update.version, now - update.started) if update else (member.version, 0.0)
        reason = error if outcome in OUT_OF_SERVICE else ""
        return [Settled(name, version, seconds, report, reason, tuple(sorted(member.reading)))]

    def _known(self, name: str, fact: str) -> bool:
        if name not in self._members:
            self.ignored[f"{fact} from a stranger"] += 1
        return name in self._members

    def _expects(
        self, name: str, attempt: int, fact: str, *outcomes: Literal["pending", "staged"]
    ) -> _Update | None:
        """The update that the fact belongs to, or None."""
        if not self._known(name, fact):
            return None
        update = self._members[name].update
        if update is None or attempt != update.attempt:
            self.ignored[f"{fact} of an earlier attempt"] += 1
            return None
        if update.report.outcome not in outcomes:
            self.ignored[f"{fact} while {update.report.outcome}"] += 1
            return None
        return update


def _is_applying(update: _Update) -> bool:
    return update.report.outcome == "staged"
