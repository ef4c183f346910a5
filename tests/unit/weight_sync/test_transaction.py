"""The transaction: its paths one by one, then random schedules against its invariants."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from asyncrl.weight_sync.transaction import (
    Finished,
    Phase,
    SendAbort,
    SendApply,
    SendDismiss,
    SendOffer,
    Transaction,
)


def transaction(*members: str) -> Transaction:
    return Transaction(7, members, now=0.0, staging_deadline=10.0, deadline=20.0)


def finished(actions) -> bool:
    return [isinstance(action, Finished) for action in actions] == [False] * (len(actions) - 1) + [True]


def test_everyone_stages_then_everyone_applies():
    sync = transaction("a", "b")
    assert sync.begin(0.0) == [SendOffer("a"), SendOffer("b")]
    assert sync.staged("b", 1.0, 0.5) == []
    assert sync.waiting_for == ["a"]
    assert sync.staged("a", 2.0, 1.5) == [SendApply("a"), SendApply("b")]
    assert sync.applied("a", 3.0, 0.2, 0.1) == []
    (end,) = sync.applied("b", 4.0, 0.3, 0.2)
    report = end.report
    assert report.committed and report.seconds == 4.0 and not report.out_of_service
    assert report.members["b"].outcome == "applied"
    assert (report.members["b"].staged_after_s, report.members["b"].applied_after_s) == (1.0, 4.0)
    assert (report.members["a"].stage_s, report.members["a"].apply_s, report.members["a"].stall_s) == (
        1.5,
        0.2,
        0.1,
    )


def outcomes(sync: Transaction) -> dict[str, str]:
    return {name: member.outcome for name, member in sync.report.members.items()}


def test_the_others_go_on_without_who_fails_to_stage():
    sync = transaction("a", "b", "c")
    sync.begin(0.0)
    sync.staged("a", 1.0, 0.5)
    assert sync.failed("b", 2.0, "Traceback: boom") == [SendDismiss("b", "Traceback: boom")]
    assert sync.staged("c", 3.0, 0.5) == [SendApply("a"), SendApply("c")]
    sync.applied("a", 4.0, 0.1, 0.1)
    assert finished(sync.applied("c", 4.0, 0.1, 0.1))
    assert outcomes(sync) == {"a": "applied", "b": "failed", "c": "applied"}
    assert sync.report.committed and sync.report.out_of_service == {"b": "Traceback: boom"}
    assert "Traceback: boom" in sync.report.describe()


def test_the_last_failure_is_the_commit_point_if_the_others_have_staged():
    sync = transaction("a", "b")
    sync.begin(0.0)
    sync.staged("a", 1.0, 0.5)
    assert sync.failed("b", 2.0, "boom") == [SendDismiss("b", "boom"), SendApply("a")]


def test_a_lost_member_is_told_nothing():
    sync = transaction("a", "b")
    sync.begin(0.0)
    assert sync.lost("a", 1.0, "gone") == []
    assert sync.staged("b", 2.0, 0.1) == [SendApply("b")]
    sync.applied("b", 3.0, 0.1, 0.1)
    assert outcomes(sync) == {"a": "lost", "b": "applied"}


@pytest.mark.parametrize("when", ["pending", "staged", "applied"])
def test_a_member_that_leaves_is_out_at_any_time_and_not_out_of_service(when):
    sync = transaction("a", "b")
    sync.begin(0.0)
    if when != "pending":
        sync.staged("a", 1.0, 0.1)
    if when == "applied":
        sync.staged("b", 1.0, 0.1)
        sync.applied("a", 1.5, 0.1, 0.1)
    assert sync.left("a", 2.0, "drained") == []
    if when != "applied":
        assert sync.staged("b", 3.0, 0.1) == [SendApply("b")]
    assert finished(sync.applied("b", 4.0, 0.1, 0.1))
    assert outcomes(sync) == {"a": "left", "b": "applied"} and sync.report.out_of_service == {}


def test_the_staging_deadline_goes_on_without_who_is_late():
    sync = transaction("a", "b")
    sync.begin(0.0)
    sync.staged("a", 9.0, 1.0)
    assert sync.tick(9.9) == []
    late = "no answer within 10.0 s (staging)"
    assert sync.tick(10.0) == [SendDismiss("b", late), SendApply("a")]
    assert sync.staged("b", 10.1, 1.0) == []
    assert finished(sync.applied("a", 11.0, 0.1, 0.1))
    assert outcomes(sync) == {"a": "applied", "b": "late"} and sync.report.out_of_service == {"b": late}


def test_a_fact_that_comes_with_the_staging_deadline_brings_it():
    sync = transaction("a", "b")
    sync.begin(0.0)
    sync.staged("a", 9.0, 1.0)
    dismissed, applies = sync.staged("b", 10.0, 1.0)
    assert (dismissed.member, applies) == ("b", SendApply("a"))
    assert sync.applied("a", 10.5, 0.1, 0.1) and sync.report.ignored == {"staged while late": 1}


def test_a_clock_that_jumps_over_both_deadlines_tells_nobody_to_apply():
    sync = transaction("a", "b")
    sync.begin(0.0)
    sync.staged("a", 9.0, 1.0)
    actions = sync.tick(20.0)
    assert [type(action) for action in actions] == [SendDismiss, SendAbort, Finished]
    assert outcomes(sync) == {"a": "kept", "b": "late"} and not sync.report.committed


def test_nobody_left_aborts():
    sync = transaction("a", "b", "c")
    sync.begin(0.0)
    sync.lost("a", 1.0, "gone")
    sync.failed("b", 1.0, "boom")
    (end,) = sync.left("c", 1.0, "drained")
    assert not end.report.committed and end.report.offered and "no engine is left" in end.report.reason
    assert end.report.out_of_service == {"a": "gone", "b": "boom"}


def test_without_members_it_is_over_at_once():
    sync = transaction()
    (end,) = sync.begin(0.0)
    assert not end.report.committed and end.report.offered and not end.report.members


def test_a_sync_is_withdrawn_before_the_commit_point_and_not_after_it():
    sync = transaction("a", "b", "c")
    sync.begin(0.0)
    sync.staged("a", 1.0, 0.1)
    sync.failed("c", 1.0, "boom")
    actions = sync.withdraw(2.0, "something else comes first")
    assert actions[:-1] == [SendAbort("a"), SendAbort("b")] and finished(actions)
    assert outcomes(sync) == {"a": "kept", "b": "kept", "c": "failed"}
    assert sync.report.out_of_service == {"c": "boom"} and "comes first" in sync.report.reason

    sync = transaction("a")
    sync.begin(0.0)
    sync.staged("a", 1.0, 0.1)
    assert sync.withdraw(2.0, "too late") == []
    assert finished(sync.applied("a", 3.0, 0.1, 0.1)) and sync.report.committed


def test_writing_past_the_deadline_offers_nothing():
    sync = transaction("a")
    assert finished(sync.begin(11.0)) and outcomes(sync) == {"a": "kept"}
    assert not sync.report.committed and not sync.report.offered


def test_after_the_commit_point_the_others_go_on_without_who_fails():
    sync = transaction("a", "b", "c", "d")
    sync.begin(0.0)
    for name in "abcd":
        sync.staged(name, 1.0, 0.1)
    assert sync.failed("a", 2.0, "half written") == [SendDismiss("a", "half written")]
    assert sync.lost("b", 2.0, "gone") == []
    assert sync.applied("c", 3.0, 0.1, 0.1) == []
    assert sync.tick(10.0) == []
    dismissed, end = sync.tick(20.0)
    assert dismissed.member == "d" and isinstance(end, Finished)
    report = sync.report
    assert report.committed
    assert {name: m.outcome for name, m in report.members.items()} == {
        "a": "failed", "b": "lost", "c": "applied", "d": "late",
    }  # fmt: skip
    assert report.out_of_service.keys() == {"a", "b", "d"} and report.out_of_service["a"] == "half written"


def test_losing_an_engine_that_applied_puts_it_out_of_service():
    sync = transaction("a", "b")
    sync.begin(0.0)
    sync.staged("a", 1.0, 0.1)
    sync.staged("b", 1.0, 0.1)
    sync.applied("a", 2.0, 0.1, 0.1)
    assert sync.lost("a", 3.0, "gone") == []
    assert finished(sync.applied("b", 4.0, 0.1, 0.1))
    assert sync.report.out_of_service == {"a": "gone"}


def test_what_changes_nothing_is_counted_with_its_reason():
    sync = transaction("a", "b")
    sync.begin(0.0)
    sync.applied("a", 1.0, 0.1, 0.1)
    sync.staged("a", 1.0, 0.1)
    sync.staged("a", 1.5, 0.1)
    sync.staged("stranger", 1.5, 0.1)
    sync.failed("a", 1.5, "after it had staged")
    sync.staged("b", 2.0, 0.1)
    sync.applied("a", 3.0, 0.1, 0.1)
    sync.applied("a", 3.0, 0.1, 0.1)
    sync.applied("b", 3.0, 0.1, 0.1)
    assert sync.report.committed
    assert sync.report.ignored == {
        "applied while pending": 1,
        "staged while staged": 1,
        "staged from a stranger": 1,
        "failed while staged": 1,
        "applied while applied": 1,
    }
    before = sync.report
    assert (
        sync.applied("b", 4.0, 0.1, 0.1) == sync.failed("a", 4.0, "late") == sync.lost("b", 4.0, "late") == []
    )
    assert sync.tick(99.0) == [] and sync.report is before


def test_needs_ordered_deadlines():
    with pytest.raises(ValueError, match="after the deadline"):
        Transaction(1, ["a"], now=0.0, staging_deadline=3.0, deadline=2.0)


NAMES = ["a", "b", "c", "d"]
some_member = st.sampled_from([*NAMES, "stranger"])


class Schedules(RuleBasedStateMachine):
    """Facts in any order from anyone, while time goes on; a second, simpler account of the same rules beside it."""

    @initialize(members=st.sets(st.sampled_from(NAMES)))
    def begin(self, members):
        self.now = 0.0
        self.members = members
        self.staged, self.applied = set(), set()
        self.out: dict[str, str] = {}
        self.told = {SendOffer: [], SendApply: [], SendAbort: [], SendDismiss: []}
        self.report = None
        self.sync = Transaction(1, members, now=0.0, staging_deadline=10.0, deadline=20.0)
        self.take(self.sync.begin(0.0))

    def take(self, actions):
        for action in actions:
            assert self.report is None, "an action after Finished"
            if isinstance(action, Finished):
                self.report = action.report
            else:
                self.told[type(action)].append(action.member)

    @property
    def left(self):
        return self.members - self.out.keys()

    @property
    def commit_point(self):
        return bool(self.told[SendApply])

    def pass_deadlines(self):
        """The staging deadline puts out who has not staged; from the deadline on, nothing counts any more."""
        if self.report is not None:
            return
        if not self.commit_point and self.now >= 10.0:
            self.out |= dict.fromkeys(self.left - self.staged, "late")
        if self.commit_point and self.now >= 20.0:
            self.out |= dict.fromkeys(self.left - self.applied, "late")

    def is_open(self):
        return (
            self.report is None and self.now < 20.0 and not (self.now >= 10.0 and not self.staged & self.left)
        )

    @rule(seconds=st.floats(0.0, 4.0))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(seconds=st.floats(4.0, 30.0))
    def time_jumps(self, seconds):
        self.now += seconds

    @rule()
    def tick(self):
        self.pass_deadlines()
        self.take(self.sync.tick(self.now))
        assert self.report is not None or self.now < 20.0

    @rule(name=some_member)
    def stage(self, name):
        self.pass_deadlines()
        if self.is_open() and not self.commit_point and self.now < 10.0 and name in self.left:
            self.staged.add(name)
        self.take(self.sync.staged(name, self.now, 0.1))

    @rule(name=some_member)
    def apply(self, name):
        self.pass_deadlines()
        if self.is_open() and name in self.told[SendApply] and name in self.left:
            self.applied.add(name)
        self.take(self.sync.applied(name, self.now, 0.1, 0.1))

    @rule(name=some_member)
    def fail(self, name):
        self.pass_deadlines()
        owing = self.left - (self.applied if self.commit_point or self.now >= 10.0 else self.staged)
        if self.is_open() and name in owing:
            self.out[name] = "failed"
        self.take(self.sync.failed(name, self.now, "boom"))

    @rule(name=some_member, kind=st.sampled_from(["lost", "left"]))
    def go(self, name, kind):
        self.pass_deadlines()
        if self.is_open() and name in self.left:
            self.out[name] = kind
        self.take(getattr(self.sync, kind)(name, self.now, "gone"))

    @rule()
    def withdraw(self):
        self.pass_deadlines()
        self.take(self.sync.withdraw(self.now, "not now"))
        assert self.report is not None or self.commit_point

    @invariant()
    def who_is_told_what(self):
        assert sorted(self.told[SendOffer]) == sorted(self.members)
        assert set(self.told[SendApply]) <= self.staged
        assert not (self.told[SendApply] and self.told[SendAbort])
        for names in self.told.values():
            assert len(set(names)) == len(names)
        # Told to apply: everyone who was not out at the commit point, which came when the last of them had staged.
        for name in self.members - set(self.told[SendApply]) if self.commit_point else ():
            assert name in self.out
        dismissed = {name for name, why in self.out.items() if why in ("failed", "late")}
        assert set(self.told[SendDismiss]) == dismissed

    @invariant()
    def the_end_is_right(self):
        if self.report is None:
            assert self.sync.phase is (Phase.APPLYING if self.commit_point else Phase.STAGING)
            assert self.sync.waiting_for == sorted(
                self.left - (self.applied if self.commit_point else self.staged)
            )
            assert self.sync.waiting_for, "nobody is waited for, and it is not finished"
            return
        assert self.report.committed == self.commit_point == (self.sync.phase is Phase.COMMITTED)
        assert self.report.members.keys() == self.members and self.report.offered
        at_rest = "applied" if self.commit_point else "kept"
        assert {name: member.outcome for name, member in self.report.members.items()} == {
            name: self.out.get(name, at_rest) for name in self.members
        }
        if self.commit_point:
            assert self.left <= self.applied
        else:
            assert set(self.told[SendAbort]) == self.left and self.report.reason
        assert self.report.out_of_service.keys() == {name for name, why in self.out.items() if why != "left"}
        assert all(error for error in self.report.out_of_service.values())


Schedules.TestCase.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
test_schedules = Schedules.TestCase
