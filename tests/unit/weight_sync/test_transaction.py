"""The transaction: its paths one by one, then random schedules against its invariants."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from asyncrl.weight_sync.transaction import Phase, Transaction
from asyncrl.weight_sync.transaction_actions import (
    Finished,
    SendAbort,
    SendApply,
    SendDismiss,
    SendOffer,
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


def joint(*members: str) -> Transaction:
    """One whose members take the bytes together."""
    sync = Transaction(7, members, now=0.0, staging_deadline=10.0, deadline=20.0, together=True, settle_s=3.0)
    sync.begin(0.0)
    return sync


@pytest.mark.parametrize("how", ["failed", "lost", "left"])
def test_together_one_that_is_out_takes_the_attempt_with_it(how):
    sync = joint("a", "b", "c")
    sync.staged("a", 1.0, 0.1)
    actions = getattr(sync, how)("b", 2.0, "boom")
    told = [SendDismiss("b", "boom")] if how == "failed" else []
    assert actions[:-1] == [*told, SendAbort("a"), SendAbort("c")] and finished(actions)
    assert outcomes(sync) == {"a": "kept", "b": how, "c": "kept"} and not sync.report.committed
    assert sync.report.out_of_service == ({} if how == "left" else {"b": "boom"})
    assert "b" in sync.report.reason and "boom" in sync.report.reason


def test_together_after_the_commit_point_each_is_on_its_own():
    sync = joint("a", "b")
    sync.staged("a", 1.0, 0.1)
    assert sync.staged("b", 1.0, 0.1) == [SendApply("a"), SendApply("b")]
    assert sync.lost("a", 2.0, "gone") == [] and sync.broke(2.0, "the group is gone") == []
    assert finished(sync.applied("b", 3.0, 0.1, 0.1))
    assert sync.report.committed and outcomes(sync) == {"a": "lost", "b": "applied"}


def test_together_who_was_cut_off_is_not_to_blame_and_who_is_lost_is():
    sync = joint("a", "b", "c")
    assert sync.cut("a", 1.0, "connection closed by peer") == []
    assert sync.broken == "a: connection closed by peer" and sync.next_deadline == 4.0
    assert sync.broke(1.0, "send failed") == [] and sync.cut("c", 1.2, "connection reset") == []
    assert sync.waiting_for == ["b"]
    assert finished(sync.lost("b", 1.5, "gone"))
    assert outcomes(sync) == {"a": "kept", "b": "lost", "c": "kept"}
    assert sync.report.members["a"].error == "connection closed by peer"
    assert sync.report.out_of_service == {"b": "gone"}


def test_together_who_says_nothing_after_the_group_broke_is_late():
    sync = joint("a", "b", "c")
    sync.broke(1.0, "send timed out")
    sync.cut("a", 1.1, "called off")
    sync.staged("c", 1.2, 0.1)
    assert sync.tick(3.9) == []
    actions = sync.tick(4.0)
    assert [type(action) for action in actions] == [SendDismiss, SendAbort, Finished]
    assert outcomes(sync) == {"a": "kept", "b": "late", "c": "kept"}
    assert (
        sync.report.reason == "send timed out" and "no answer within 4.0 s" in sync.report.out_of_service["b"]
    )


def test_together_nobody_is_to_blame_where_all_were_cut_off():
    sync = joint("a", "b")
    sync.cut("a", 1.0, "closed")
    assert finished(sync.cut("b", 1.0, "closed"))
    assert outcomes(sync) == {"a": "kept", "b": "kept"} and sync.report.out_of_service == {}
    assert sync.report.reason == "a: closed" and sync.report.ignored == {}


def test_together_the_staging_deadline_asks_first_who_is_there():
    sync = joint("a", "b")
    assert sync.tick(10.0) == [] and "within 10.0 s" in sync.broken and sync.next_deadline == 13.0
    sync.cut("a", 10.5, "called off")
    dismissed, end = sync.tick(13.0)
    assert dismissed.member == "b" and isinstance(end, Finished)
    assert outcomes(sync) == {"a": "kept", "b": "late"}

    sync = joint("a", "b")
    assert finished(sync.tick(25.0)), "a clock that jumps over everything blames nobody"
    assert outcomes(sync) == {"a": "kept", "b": "kept"}


def test_a_member_that_is_cut_off_from_a_transport_of_its_own_has_failed():
    sync = transaction("a", "b")
    sync.begin(0.0)
    assert sync.cut("a", 1.0, "server gone") == [SendDismiss("a", "server gone")] and not sync.broken
    assert sync.broke(1.0, "no group") == [] and sync.staged("b", 2.0, 0.1) == [SendApply("b")]


def test_needs_ordered_deadlines():
    with pytest.raises(ValueError, match="after the deadline"):
        Transaction(1, ["a"], now=0.0, staging_deadline=3.0, deadline=2.0)


NAMES = ["a", "b", "c", "d"]
some_member = st.sampled_from([*NAMES, "stranger"])


class Schedules(RuleBasedStateMachine):
    """Facts in any order from anyone, while time goes on; a second, simpler account of the same rules beside it."""

    @initialize(members=st.sets(st.sampled_from(NAMES)), together=st.booleans())
    def begin(self, members, together):
        self.now = 0.0
        self.together = together
        self.cut_off: set[str] = set()
        self.asked_at: float | None = None
        self.members = members
        self.staged, self.applied = set(), set()
        self.out: dict[str, str] = {}
        self.told = {SendOffer: [], SendApply: [], SendAbort: [], SendDismiss: []}
        self.report = None
        self.sync = Transaction(
            1, members, now=0.0, staging_deadline=10.0, deadline=20.0, together=together, settle_s=3.0
        )
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
        if self.together and not self.commit_point:
            if self.asked_at is None and 10.0 <= self.now < 20.0:
                self.asked_at = self.now
            elif self.asked_at is not None and self.now >= min(self.asked_at + 3.0, 20.0):
                self.out |= dict.fromkeys(self.left - self.staged - self.cut_off, "late")
        elif not self.commit_point and self.now >= 10.0:
            self.out |= dict.fromkeys(self.left - self.staged, "late")
        if self.commit_point and self.now >= 20.0:
            self.out |= dict.fromkeys(self.left - self.applied, "late")

    def is_open(self):
        if self.report is not None or self.now >= 20.0:
            return False
        if self.together and not self.commit_point:
            return self.asked_at is None or self.now < self.asked_at + 3.0
        return not (self.now >= 10.0 and not self.staged & self.left)

    def takes_bytes(self, name):
        """Whether its answer to the offer counts."""
        in_time = self.together or self.now < 10.0
        return self.is_open() and not self.commit_point and in_time and name in self.left - self.cut_off

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
        if self.takes_bytes(name):
            self.staged.add(name)
        self.take(self.sync.staged(name, self.now, 0.1))

    @rule(name=some_member)
    def cut(self, name):
        self.pass_deadlines()
        if not self.together:
            self.note_failure(name)
        elif self.takes_bytes(name) and name not in self.staged:
            self.cut_off.add(name)
            self.asked_at = self.now if self.asked_at is None else self.asked_at
        self.take(self.sync.cut(name, self.now, "closed by peer"))

    @rule()
    def break_group(self):
        self.pass_deadlines()
        if self.together and self.is_open() and not self.commit_point and self.asked_at is None:
            self.asked_at = self.now
        self.take(self.sync.broke(self.now, "send failed"))

    @rule(name=some_member)
    def apply(self, name):
        # First the time, as an engine applies nothing before it is told to, which the time may bring about.
        self.tick()
        if self.is_open() and name in self.told[SendApply] and name in self.left:
            self.applied.add(name)
        self.take(self.sync.applied(name, self.now, 0.1, 0.1))

    @rule(name=some_member)
    def fail(self, name):
        self.pass_deadlines()
        self.note_failure(name)
        self.take(self.sync.failed(name, self.now, "boom"))

    def note_failure(self, name):
        applying = self.commit_point or (self.now >= 10.0 and not self.together)
        owing = self.left - (self.applied if applying else self.staged | self.cut_off)
        if self.is_open() and name in owing:
            self.out[name] = "failed"

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
                self.left - (self.applied if self.commit_point else self.staged | self.cut_off)
            )
            if self.together and not self.commit_point:
                assert not self.out and bool(self.sync.broken) == (self.asked_at is not None)
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
            assert set(self.told[SendAbort]) == self.left - self.cut_off and self.report.reason
        assert self.report.out_of_service.keys() == {name for name, why in self.out.items() if why != "left"}
        assert all(error for error in self.report.out_of_service.values())


Schedules.TestCase.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
test_schedules = Schedules.TestCase
