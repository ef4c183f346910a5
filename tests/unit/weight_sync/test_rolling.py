"""Rolling updates: their paths one by one, then random schedules against their invariants."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncrl.weight_sync.rolling import Rolling, SendApply, SendDismiss, SendPropose, Settled


def rolling(max_lag: int = 2) -> Rolling:
    return Rolling(max_lag, stage_s=10.0, apply_s=5.0, attempts=itertools.count(1))


def outcomes(actions) -> dict[str, str]:
    return {a.member: a.report.outcome for a in actions if isinstance(a, Settled)}


def brought(machine: Rolling, name: str, now: float = 0.0) -> None:
    """It has a proposal open, and does as it is told."""
    attempt = machine._members[name].attempt
    machine.staged(name, attempt, now, 0.1)
    machine.applied(name, attempt, now, 0.1, 0.1)


def test_each_engine_goes_its_own_way():
    machine = rolling()
    assert machine.joined("a", -1, 0.0) == machine.joined("b", -1, 0.0) == []
    assert machine.published(0, 1.0) == [SendPropose("a", 1, 0, 10.0), SendPropose("b", 2, 0, 10.0)]
    assert machine.staged("b", 2, 2.0, 0.5) == [SendApply("b", 2, 0)]
    (settled,) = machine.applied("b", 2, 4.0, 0.3, 0.2)
    assert (settled.member, settled.version, settled.seconds, settled.error) == ("b", 0, 3.0, "")
    report = settled.report
    assert report.outcome == "applied" and (report.staged_after_s, report.applied_after_s) == (1.0, 3.0)
    assert (report.stage_s, report.apply_s, report.stall_s) == (0.5, 0.3, 0.2)
    assert machine.versions == {"a": -1, "b": 0} and machine.waiting_for == ["a"]
    assert machine.staged("a", 1, 5.0, 4.0) == [SendApply("a", 1, 0)]


def test_a_superseded_version_is_proposed_to_nobody_again_and_not_applied():
    machine = rolling()
    machine.joined("a", -1, 0.0)
    machine.published(0, 0.0)
    assert machine.published(1, 1.0) == [SendPropose("a", 2, 1, 10.0)]
    assert machine.published(2, 2.0) == [SendPropose("a", 3, 2, 10.0)]
    assert machine.staged("a", 1, 3.0, 0.1) == machine.staged("a", 2, 3.0, 0.1) == []
    assert machine.ignored == {"staged of an earlier attempt": 2}
    assert machine.joined("b", -1, 3.0) == [SendPropose("b", 4, 2, 10.0)]
    assert machine.readers(0) == machine.readers(1) == ["a"]
    assert machine.staged("a", 3, 4.0, 0.1) == [SendApply("a", 3, 2)]
    assert machine.readers(0) == machine.readers(1) == [] and machine.readers(2) == ["a", "b"]


def test_what_an_engine_was_told_to_apply_it_applies_and_then_takes_the_newest():
    machine = rolling(max_lag=3)
    machine.joined("a", -1, 0.0)
    machine.published(0, 0.0)
    machine.staged("a", 1, 1.0, 0.1)
    assert machine.published(1, 1.0) == machine.published(2, 1.0) == []
    settled, propose = machine.applied("a", 1, 2.0, 0.1, 0.1)
    assert settled.version == 0 and propose == SendPropose("a", 2, 2, 10.0)


def test_the_learner_waits_for_who_is_too_far_behind_and_for_nobody_else():
    machine = rolling(max_lag=2)
    for name in "ab":
        machine.joined(name, -1, 0.0)
    machine.published(0, 0.0)
    brought(machine, "a")
    brought(machine, "b")
    for version in (1, 2):
        assert machine.may_begin(version)
        machine.published(version, float(version))
        brought(machine, "b")
    assert machine.holding_up(3, 1) == ["a"] and not machine.may_begin(3)
    brought(machine, "a")
    assert machine.may_begin(3) and machine.may_begin(4) and machine.versions == {"a": 2, "b": 2}
    assert machine.may_begin(9), "nobody can be nearer than the newest version that there is"


def test_one_that_has_just_come_is_not_waited_for_but_is_overtaken_no_more_often_than_others():
    machine = rolling(max_lag=2)
    machine.published(0, 0.0)
    machine.joined("late", -1, 0.0)
    for version in (1, 2):
        assert machine.may_begin(version)
        machine.published(version, 0.0)
    assert machine.holding_up(3, 1) == ["late"]


def test_one_that_comes_again_counts_by_what_it_runs():
    machine = rolling(max_lag=2)
    for version in range(5):
        machine.published(version, 0.0)
    machine.joined("back", 1, 0.0)
    assert machine.holding_up(5, 3) == ["back"], "it generates with version 1"
    assert machine.joined("back", 3, 0.0)[0].report.outcome == "left"
    assert machine.may_begin(5)
    assert machine.joined("stranger", 40, 0.0) == [SendPropose("stranger", 3, 4, 10.0)], "of another history"
    assert machine.may_begin(5) and machine.versions["stranger"] == -1


def test_bytes_that_an_engine_was_told_to_apply_are_not_written_over():
    machine = rolling(max_lag=1)
    machine.published(0, 0.0)
    machine.joined("a", -1, 0.0)
    machine.staged("a", 1, 0.0, 0.1)
    assert machine.may_begin(1, replaced=-1)
    machine.published(1, 0.0)
    assert machine.holding_up(2, replaced=0) == ["a"]
    machine.applied("a", 1, 0.0, 0.1, 0.1)
    assert machine.holding_up(2, replaced=0) == ["a"], "now by its lag"
    brought(machine, "a")
    assert machine.may_begin(2, replaced=0) and machine.readers(0) == []


def test_when_the_learner_waits_no_longer_those_that_hold_it_up_are_late():
    machine = rolling(max_lag=1)
    for name in "ab":
        machine.joined(name, -1, 0.0)
    machine.published(0, 0.0)
    brought(machine, "a")
    brought(machine, "b")
    machine.published(1, 0.0)
    brought(machine, "b")
    dismiss, settled = machine.give_up(2, 0, 7.0)
    assert isinstance(dismiss, SendDismiss) and (dismiss.member, dismiss.attempt) == ("a", 3)
    assert "still at version 0 when version 2 was due" in settled.error and settled.reading == (1,)
    assert machine.may_begin(2, 0) and machine.versions == {"b": 1}


def test_deadlines_are_each_engines_own():
    machine = rolling()
    machine.published(0, 0.0)
    assert machine.next_deadline == math.inf
    machine.joined("a", -1, 0.0)
    machine.joined("b", -1, 3.0)
    assert machine.next_deadline == 10.0
    assert machine.tick(9.9) == []
    dismiss, settled = machine.tick(10.0)
    assert dismiss.reason == settled.error == "no answer within 10.0 s when it was to stage version 0"
    assert outcomes([settled]) == {"a": "late"} and machine.next_deadline == 13.0
    machine.staged("b", 2, 20.0, 1.0)
    assert machine.next_deadline == 25.0, (
        "an answer that was read late counts, and its next deadline is from then"
    )
    assert outcomes(machine.tick(25.0)) == {"b": "late"} and machine.versions == {}


def test_who_fails_is_lost_or_unfit_is_out_and_named_once():
    machine = rolling()
    machine.published(0, 0.0)
    for name in "abc":
        machine.joined(name, -1, 0.0)
    dismiss, settled = machine.failed("a", 1, 1.0, "boom")
    assert dismiss == SendDismiss("a", 1, "boom") and settled.error == "boom" and settled.reading == (0,)
    (settled,) = machine.lost("b", 1.0, "gone")
    assert settled.report.outcome == "lost" and settled.error == "gone"
    machine.staged("c", 3, 1.0, 0.1)
    dismiss, settled = machine.applied("c", 3, 2.0, 0.1, 0.1, unfit="other logprobs")
    assert dismiss.reason == settled.error == "other logprobs" and settled.report.outcome == "applied"
    assert machine.versions == {} and machine.published(1, 3.0) == []
    assert machine.failed("a", 1, 3.0, "again") == machine.lost("b", 3.0, "again") == []
    assert machine.ignored == {"failed from a stranger": 1, "lost from a stranger": 1}


def test_a_farewell_is_named_only_if_something_was_open():
    machine = rolling()
    machine.published(0, 0.0)
    machine.joined("a", 0, 0.0)
    assert machine.left("a", 1.0, "drained") == []
    machine.joined("b", -1, 0.0)
    (settled,) = machine.left("b", 1.0, "drained")
    assert settled.report.outcome == "left" and settled.error == "" and settled.reading == (0,)
    assert machine.left("b", 1.0, "again") == [] and machine.ignored == {"left from a stranger": 1}


def test_versions_and_lags_that_make_no_sense_are_errors():
    machine = rolling()
    machine.published(3, 0.0)
    with pytest.raises(ValueError, match="above 3"):
        machine.published(3, 0.0)
    with pytest.raises(ValueError, match="at least 1"):
        rolling(max_lag=0)


NAMES = ["a", "b", "c"]
some_engine = st.sampled_from([*NAMES, "stranger"])


class Life:
    """One membership, as a simpler account of it."""

    def __init__(self, version: int, newest: int) -> None:
        self.serves = 0 <= version <= newest
        self.version = version if self.serves else -1
        self.told = [self.version]
        """What it was told to apply, after what it came with."""
        self.proposed: list[tuple[int, int]] = []
        """(attempt, version)"""
        self.state = "rest"
        self.due = math.inf
        self.overtaken = 0
        self.reading: set[int] = set()


class Schedules(RuleBasedStateMachine):
    """Facts in any order from anyone, while time goes on and the learner publishes whenever it may."""

    @initialize(max_lag=st.integers(1, 4))
    def begin(self, max_lag):
        self.now, self.max_lag = 0.0, max_lag
        self.machine = rolling(max_lag)
        self.newest = -1
        self.lives: dict[str, Life] = {}
        self.attempts: list[int] = []
        self.dismissed: set[int] = set()

    def take(self, actions) -> dict[str, Settled]:
        """Carries actions out in the account; returns who was settled."""
        settled = {}
        for action in actions:
            if isinstance(action, SendPropose):
                life = self.lives[action.member]
                assert action.version == self.newest != life.version and life.state in ("rest", "staging")
                assert action.attempt > max(self.attempts, default=0)
                self.attempts.append(action.attempt)
                life.overtaken += life.state == "staging" and not life.serves
                life.proposed.append((action.attempt, action.version))
                life.state, life.due = "staging", self.now + 10.0
                life.reading.add(action.version)
            elif isinstance(action, SendApply):
                life = self.lives[action.member]
                assert (action.attempt, action.version) == life.proposed[-1] and life.state == "staged"
                assert action.version == self.newest and all(action.version > told for told in life.told)
                life.told.append(action.version)
                life.state, life.due, life.reading = "applying", self.now + 5.0, {action.version}
            elif isinstance(action, SendDismiss):
                assert action.attempt not in self.dismissed
                self.dismissed.add(action.attempt)
            else:
                assert action.member not in settled
                settled[action.member] = action
        return settled

    def gone(self, name: str, settled: dict[str, Settled], outcome: str, dismissed: bool) -> None:
        life = self.lives.pop(name)
        assert settled[name].report.outcome == outcome
        assert bool(settled[name].error) == (outcome != "left")
        assert set(settled[name].reading) == life.reading
        assert (bool(life.proposed) and life.proposed[-1][0] in self.dismissed) == dismissed

    @rule(seconds=st.floats(0.0, 6.0))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def tick(self):
        late = [name for name, life in self.lives.items() if self.now >= life.due]
        settled = self.take(self.machine.tick(self.now))
        assert sorted(settled) == sorted(late)
        for name in late:
            self.gone(name, settled, "late", dismissed=True)
        assert self.machine.next_deadline > self.now

    @rule(name=st.sampled_from(NAMES), version=st.integers(-1, 6))
    def join(self, name, version):
        before = self.lives.get(name)
        actions = self.machine.joined(name, version, self.now)
        self.lives[name] = life = Life(version, self.newest)
        settled = self.take(actions)
        if before is None or before.state == "rest":
            assert not settled
        else:
            assert settled[name].report.outcome == "left" and set(settled[name].reading) == before.reading
        assert bool(life.proposed) == (life.version != self.newest)

    @rule(name=some_engine, newest=st.booleans(), data=st.data())
    def stage(self, name, newest, data):
        attempt, expected = self.answer(name, newest, "staging", data)
        if expected:
            self.lives[name].state = "staged"
        actions = self.machine.staged(name, attempt, self.now, 0.1)
        assert bool(actions) == expected
        assert not self.take(actions)

    @rule(name=some_engine, newest=st.booleans(), unfit=st.sampled_from(["", "", "wrong"]), data=st.data())
    def apply(self, name, newest, unfit, data):
        attempt, expected = self.answer(name, newest, "applying", data)
        actions = self.machine.applied(name, attempt, self.now, 0.1, 0.1, unfit)
        if not expected:
            assert not actions
            return
        life = self.lives[name]
        life.version, life.serves, life.state, life.due, life.reading = (
            life.told[-1],
            True,
            "rest",
            math.inf,
            set(),
        )
        settled = self.take(actions)[name]
        assert settled.report.outcome == "applied" and settled.version == life.version
        assert settled.error == unfit and not settled.reading
        if unfit:
            assert life.proposed[-1][0] in self.dismissed
            del self.lives[name]

    @rule(name=some_engine, newest=st.booleans(), data=st.data())
    def fail(self, name, newest, data):
        attempt, expected = self.answer(name, newest, "any", data)
        settled = self.take(self.machine.failed(name, attempt, self.now, "boom"))
        if expected:
            self.gone(name, settled, "failed", dismissed=True)
        else:
            assert not settled

    def answer(self, name, newest, state, data) -> tuple[int, bool]:
        """An attempt to answer, the engine's own newest or anybody's, and whether that is what it owes."""
        life = self.lives.get(name)
        own = life.proposed[-1][0] if life and life.proposed else 0
        attempt = own if newest else data.draw(st.sampled_from([0, *self.attempts]))
        owes = life is not None and life.state in (("staging", "applying") if state == "any" else (state,))
        return attempt, owes and attempt == own

    @rule(name=some_engine, kind=st.sampled_from(["lost", "left"]))
    def go(self, name, kind):
        life = self.lives.get(name)
        settled = self.take(getattr(self.machine, kind)(name, self.now, "gone"))
        if life is None or (kind == "left" and life.state == "rest"):
            assert not settled
            self.lives.pop(name, None)
        else:
            self.gone(name, settled, kind, dismissed=False)

    @property
    def replaced(self) -> int:
        """The version whose bytes the next one's are written over."""
        return self.newest + 1 - max(2, self.max_lag)

    def holders(self) -> list[str]:
        return self.machine.holding_up(self.newest + 1, self.replaced)

    @precondition(lambda self: not self.holders())
    @rule()
    def publish(self):
        for name in self.machine.readers(self.replaced):
            life = self.lives[name]
            assert life.state == "staging" and life.proposed[-1][1] > self.replaced, "it was told otherwise"
        self.newest += 1
        for life in self.lives.values():
            assert not life.serves or life.version >= self.newest - self.max_lag
            assert life.overtaken <= self.max_lag
        assert not self.take(self.machine.published(self.newest, self.now))

    @precondition(lambda self: self.holders())
    @rule()
    def give_up(self):
        holders = self.holders()
        settled = self.take(self.machine.give_up(self.newest + 1, self.replaced, self.now))
        assert list(settled) == holders
        for name in holders:
            self.gone(name, settled, "late", dismissed=True)
        assert not self.holders()

    @invariant()
    def the_account_is_the_same(self):
        if not hasattr(self, "machine"):
            return
        assert self.machine.versions == {name: life.version for name, life in self.lives.items()}
        for name, life in self.lives.items():
            assert (
                (life.state == "rest")
                == (life.version == self.newest)
                == (name not in self.machine.waiting_for)
            )
        assert self.machine.next_deadline == min((life.due for life in self.lives.values()), default=math.inf)
        for version in range(self.newest + 1):
            reading = [name for name, life in self.lives.items() if version in life.reading]
            assert sorted(self.machine.readers(version)) == sorted(reading)


Schedules.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_schedules = Schedules.TestCase
