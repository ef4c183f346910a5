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


def test_a_failure_before_the_commit_point_aborts_all():
    sync = transaction("a", "b", "c")
    sync.begin(0.0)
    sync.staged("a", 1.0, 0.5)
    actions = sync.failed("b", 2.0, "Traceback: boom")
    assert actions[:-1] == [SendAbort("a"), SendAbort("b"), SendAbort("c")] and finished(actions)
    report = sync.report
    assert not report.committed and report.out_of_service == {}
    assert {name: m.outcome for name, m in report.members.items()} == {
        "a": "kept",
        "b": "failed",
        "c": "kept",
    }
    assert "b failed to stage" in report.reason and "Traceback: boom" in report.describe()


def test_a_lost_member_is_told_nothing():
    sync = transaction("a", "b")
    sync.begin(0.0)
    assert sync.lost("a", 1.0, "gone")[:-1] == [SendAbort("b")]
    assert sync.report.members["a"].outcome == "lost"


def test_a_deadline_before_the_commit_point_aborts_all_and_names_who_is_late():
    sync = transaction("a", "b")
    sync.begin(0.0)
    sync.staged("a", 9.0, 1.0)
    assert sync.tick(9.9) == []
    assert finished(sync.tick(10.0))
    assert {name: m.outcome for name, m in sync.report.members.items()} == {"a": "kept", "b": "late"}
    assert "not staged within 10.0 s by b" in sync.report.reason


def test_writing_past_the_deadline_offers_nothing():
    sync = transaction("a")
    assert not any(isinstance(action, SendOffer) for action in sync.begin(11.0))
    assert not sync.report.committed


def test_after_the_commit_point_the_others_go_on_without_who_fails():
    sync = transaction("a", "b", "c", "d")
    sync.begin(0.0)
    for name in "abcd":
        sync.staged(name, 1.0, 0.1)
    assert sync.failed("a", 2.0, "half written") == []
    assert sync.lost("b", 2.0, "gone") == []
    assert sync.applied("c", 3.0, 0.1, 0.1) == []
    assert sync.tick(10.0) == []
    assert finished(sync.tick(20.0))
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


def test_needs_members_and_ordered_deadlines():
    with pytest.raises(ValueError, match="at least one engine"):
        transaction()
    with pytest.raises(ValueError, match="after the deadline"):
        Transaction(1, ["a"], now=0.0, staging_deadline=3.0, deadline=2.0)


NAMES = ["a", "b", "c", "d"]
some_member = st.sampled_from([*NAMES, "stranger"])


class Schedules(RuleBasedStateMachine):
    """Facts in any order from anyone, while time goes on."""

    @initialize(members=st.sets(st.sampled_from(NAMES), min_size=1))
    def begin(self, members):
        self.now = 0.0
        self.members = members
        self.staged, self.applied, self.broken, self.early = set(), set(), set(), set()
        self.commit_point = False
        self.told = {SendOffer: [], SendApply: [], SendAbort: []}
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

    def deadline_passed(self):
        return self.now >= (20.0 if self.commit_point else 10.0)

    @rule(seconds=st.floats(0.0, 4.0))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def tick(self):
        ended = self.report is None and self.deadline_passed()
        self.take(self.sync.tick(self.now))
        assert (self.report is not None) or not ended

    @rule(name=some_member)
    def stage(self, name):
        counts = (
            name in self.members - self.broken
            and self.report is None
            and not self.commit_point
            and self.now < 10.0
        )
        self.take(self.sync.staged(name, self.now, 0.1))
        if counts:
            self.staged.add(name)
            self.commit_point = self.staged == self.members

    @rule(name=some_member)
    def apply(self, name):
        counts = (
            name in self.members - self.broken
            and self.report is None
            and self.commit_point
            and self.now < 20.0
        )
        self.take(self.sync.applied(name, self.now, 0.1, 0.1))
        if counts:
            self.applied.add(name)

    @rule(name=some_member)
    def fail(self, name):
        owing = self.members - self.broken - (self.applied if self.commit_point else self.staged)
        counts = name in owing and self.report is None and not self.deadline_passed()
        self.take(self.sync.failed(name, self.now, "boom"))
        if counts:
            self.broken.add(name)

    @rule(name=some_member)
    def lose(self, name):
        counts = name in self.members - self.broken and self.report is None and not self.deadline_passed()
        self.take(self.sync.lost(name, self.now, "gone"))
        if counts:
            self.broken.add(name)

    @invariant()
    def apply_only_after_all_staged_and_never_with_abort(self):
        assert sorted(self.told[SendOffer]) == sorted(self.members)
        assert sorted(self.told[SendApply]) == (sorted(self.members) if self.commit_point else [])
        assert not (self.told[SendApply] and self.told[SendAbort])
        assert len(set(self.told[SendAbort])) == len(self.told[SendAbort])

    @invariant()
    def the_end_is_right(self):
        settled = self.commit_point and self.members <= self.applied | self.broken
        aborted = not self.commit_point and bool(self.broken)
        if settled or aborted:
            assert self.report is not None
        if self.report is None:
            assert self.sync.phase is (Phase.APPLYING if self.commit_point else Phase.STAGING)
            return
        assert self.report.committed == self.commit_point
        assert self.report.members.keys() == self.members
        assert (self.sync.phase is Phase.COMMITTED) == self.report.committed
        if self.report.committed:
            assert self.report.out_of_service.keys() == self.members - (self.applied - self.broken)
            assert all(error for error in self.report.out_of_service.values())
        else:
            assert self.report.reason and not self.report.out_of_service
            lost = {name for name, m in self.report.members.items() if m.outcome == "lost"}
            assert set(self.told[SendAbort]) == self.members - lost


Schedules.TestCase.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
test_schedules = Schedules.TestCase
