"""Slots: never more than the limit, steppers-out first, the newest back."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncrl.generators.slots import Slots


def test_the_newest_go_back_when_the_limit_falls():
    slots = Slots(4)
    for key in "abcd":
        slots.take(key)
    slots.step_out("a")
    slots.line_up("a")
    assert slots.free == 0 and slots.admit() == ["a"]
    # Its slot is its newest, but it is the oldest rollout.
    assert slots.resize(2) == ["d", "c"]
    assert slots.used == 4 and slots.free == 0
    slots.end("d")
    slots.end("c")
    assert slots.used == 2 and slots.free == 0
    assert slots.resize(3) == [] and slots.free == 1


def test_who_waits_in_line_comes_before_new_ones():
    slots = Slots(2)
    slots.take("a")
    slots.take("b")
    slots.step_out("a")
    assert slots.free == 1
    slots.line_up("a")
    assert slots.free == 0
    assert slots.admit() == ["a"]
    assert slots.admit() == []


def test_zero_sends_everyone_back_with_a_slot_or_without():
    slots = Slots(2)
    for key in "ab":
        slots.take(key)
    slots.step_out("a")
    slots.take("c")
    slots.line_up("a")
    assert slots.resize(0) == ["c", "b", "a"]
    assert slots.free == 0 and slots.admit() == []
    for key in "abc":
        slots.end(key)
    assert slots.used == 0 and slots.known == []


@pytest.mark.parametrize("make", [lambda: Slots(-1), lambda: Slots(3).resize(-2)])
def test_a_negative_limit_is_refused(make):
    with pytest.raises(ValueError, match="expected 0"):
        make()


class Model(RuleBasedStateMachine):
    """Slots under any order of events."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(3)
        self.inside: set[str] = set()
        self.outside: set[str] = set()
        self.line: list[str] = []
        self.count = 0

    @precondition(lambda self: self.slots.free > 0)
    @rule()
    def take(self) -> None:
        assert not self.line
        self.count += 1
        key = f"{self.count}"
        self.slots.take(key)
        self.inside.add(key)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def step_out(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.inside)))
        self.slots.step_out(key)
        self.inside.remove(key)
        self.outside.add(key)
        self.admitted()

    @precondition(lambda self: self.outside)
    @rule(data=st.data())
    def line_up(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.outside)))
        self.slots.line_up(key)
        self.outside.remove(key)
        self.line.append(key)
        self.admitted()

    @precondition(lambda self: self.inside | self.outside | set(self.line))
    @rule(data=st.data())
    def end(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.inside | self.outside | set(self.line))))
        self.slots.end(key)
        self.inside.discard(key)
        self.outside.discard(key)
        if key in self.line:
            self.line.remove(key)
        self.admitted()

    @rule(limit=st.integers(0, 6))
    def resize(self, limit) -> None:
        back = self.slots.resize(limit)
        if limit:
            assert len(back) == max(0, len(self.inside) - limit)
            kept = self.inside - set(back)
            assert not back or max(map(int, kept)) < min(map(int, back))
        else:
            assert set(back) == self.inside | self.outside | set(self.line)
        self.admitted()

    def admitted(self) -> None:
        before = len(self.inside)
        for key in self.slots.admit():
            assert key == self.line.pop(0), "first come, first served"
            self.inside.add(key)
        assert len(self.inside) <= max(before, self.slots.limit)

    @invariant()
    def counts(self) -> None:
        assert self.slots.used == len(self.inside)
        assert set(self.slots.known) == self.inside | self.outside | set(self.line)
        assert self.slots.free == max(0, self.slots.limit - len(self.inside) - len(self.line))
        assert not (self.line and len(self.inside) < self.slots.limit), "a slot is free and somebody waits"


Model.TestCase.settings = settings(max_examples=60, deadline=None)
TestModel = Model.TestCase
