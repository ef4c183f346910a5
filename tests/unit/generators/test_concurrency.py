"""The concurrency controller: each rule by itself, any facts against its bounds, and a simulated engine, whose best fixed
limit is found by trying, against which it must come near.
"""

from __future__ import annotations

import math
import re

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.generators.concurrency import CUT, Controller, Decision, Facts

SETTLE_S = 10.0
MOST = 256

HUNGRY = Facts(
    now=0.0,
    limit=8,
    slots_used=8,
    kv_used_fraction=0.2,
    preemptions=0,
    waiting=0,
    tokens_per_s=800.0,
    learner_waiting=0.5,
    staleness_waiting=0.0,
    queued=20,
    stale=0,
)
"""The learner waits, and there is room."""
CONTENT = msgspec.structs.replace(HUNGRY, learner_waiting=0.0)


class Driven:
    """A controller whose decisions are carried out at once, with facts once a second."""

    def __init__(self, limit: int = 8, most: int = 256) -> None:
        self.controller = Controller(most, SETTLE_S)
        self.now = 0.0
        self.limit = limit
        self.limits = [limit]
        self.reasons: list[str] = []

    def tell(self, facts: Facts, seconds: float = 1.0, **changed: object) -> Decision:
        self.now += seconds
        known = {"slots_used": self.limit, **changed, "now": self.now, "limit": self.limit}
        decision = self.controller.decide(msgspec.structs.replace(facts, **known))
        if decision.limit != self.limit:
            self.limits.append(decision.limit)
            self.reasons.append(decision.reason)
        self.limit = decision.limit
        return decision

    def tell_for(self, seconds: int, facts: Facts, **changed: object) -> int:
        for _ in range(seconds):
            self.tell(facts, **changed)
        return self.limit

    def scaling(self, seconds: int, facts: Facts = HUNGRY, **changed: object) -> int:
        """As `tell_for`, with tokens that grow with the slots."""
        for _ in range(seconds):
            self.tell(facts, tokens_per_s=100.0 * self.limit, **changed)
        return self.limit


def test_it_doubles_while_all_is_well_up_to_the_most():
    driven = Driven(most=100)
    driven.scaling(120)
    assert driven.limits == [8, 16, 32, 64, 100]
    assert driven.reasons[0] == "8 -> 16: the learner waits 50 %, all slots are used, KV cache 20 % full"
    assert driven.tell(HUNGRY).reason.startswith("stays at 100: ")


def test_between_two_changes_it_waits_and_measures():
    driven = Driven()
    reasons = [driven.tell(HUNGRY).reason for _ in range(14)]
    assert driven.limits == [8, 16]
    assert (
        reasons[0] == reasons[1] == reasons[-1].replace("16", "8") == "stays at 8: a change is taking effect"
    )
    assert reasons[5] == "stays at 8: measured for 3 of 10 s" and reasons[-2].startswith("8 -> 16: ")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"learner_waiting": 0.03}, "the learner waits 3 %"),
        ({"slots_used": 5}, "5.0 of 8 slots are used"),
        ({"queued": 0}, "0.0 rollouts are queued"),
        ({"staleness_waiting": 0.6}, "held slots back 60 %"),
        ({"stale": 1}, "rollouts were too stale"),
        ({"kv_used_fraction": 0.85}, "up to 85 % full"),
        ({"waiting": 2}, "2.0 requests wait"),
    ],
)
def test_a_rise_needs_every_one_of_its_conditions(changed, told):
    driven = Driven()
    seen = [driven.tell(HUNGRY, **changed).reason for _ in range(60)]
    assert driven.limits == [8] and any(told in reason for reason in seen)


def test_one_crowded_moment_in_a_window_is_enough_not_to_rise():
    driven = Driven()
    driven.tell_for(5, HUNGRY)
    driven.tell(HUNGRY, kv_used_fraction=0.9)
    assert driven.tell_for(8, HUNGRY) == 8


def test_a_rise_is_no_more_than_the_cache_has_room_for():
    driven = Driven(limit=100)
    driven.scaling(15, kv_used_fraction=0.7)
    assert driven.limits == [100, 135]


@pytest.mark.parametrize(("changed", "limit"), [({"preemptions": 3}, 75), ({"kv_used_fraction": 0.97}, 90)])
def test_pressure_cuts_at_once(changed, limit):
    driven = Driven(limit=100)
    driven.tell(CONTENT)
    decision = driven.tell(CONTENT, **changed)
    assert decision.limit == limit and decision.reason.startswith(f"100 -> {limit}: ")


def test_one_event_is_punished_once():
    """Preemptions go on while the engine comes down to its new limit, and the cache empties slowly: no cascade."""
    driven = Driven(limit=1024, most=1024)
    driven.tell(HUNGRY, preemptions=50, kv_used_fraction=1.0)
    for _ in range(60):  # rollouts over the limit end one by one
        driven.tell(HUNGRY, slots_used=900, preemptions=20, kv_used_fraction=0.99)
    driven.tell_for(5, HUNGRY, kv_used_fraction=0.98)
    for step in range(30):
        driven.tell(HUNGRY, kv_used_fraction=0.98 - 0.01 * step)
    assert driven.limits == [1024, 768]


def test_pressure_that_stays_is_punished_again_once_per_settling():
    driven = Driven(limit=1024, most=1024)
    cuts = []
    for second in range(300):
        before = driven.limit
        driven.tell(HUNGRY, preemptions=5, kv_used_fraction=1.0)
        if driven.limit < before:
            cuts.append(second)
    assert cuts == [0, 11, 32, 73, 154] and driven.limits == [1024, 768, 576, 432, 324, 243]


def test_after_a_cut_it_grows_by_eighths_and_not_to_where_it_was():
    driven = Driven(limit=128)
    driven.tell(HUNGRY, preemptions=1)
    assert driven.limit == 96
    driven.scaling(100)
    assert driven.limits == [128, 96, 108, 115]
    driven.scaling(100)
    assert max(driven.limits) > 115, "after long enough it looks again"


def test_more_than_the_learner_takes_is_given_back_gently():
    driven = Driven(limit=100)
    driven.tell_for(13, CONTENT, staleness_waiting=0.4)
    assert driven.limits == [100, 90] and "the staleness bound held slots back 40 %" in driven.reasons[0]
    driven.tell_for(13, CONTENT, stale=2)
    assert driven.limits == [100, 90, 81]
    driven.tell_for(100, CONTENT)
    assert driven.limits == [100, 90, 81], "enough is enough"


def test_where_learner_and_engines_both_wait_nothing_is_taken_away():
    driven = Driven(limit=100)
    driven.tell_for(100, HUNGRY, staleness_waiting=0.9, stale=1)
    assert driven.limits == [100]


def test_slots_that_bring_nothing_are_not_added_to():
    driven = Driven()
    for _ in range(100):
        driven.tell(HUNGRY, tokens_per_s=100.0 * min(driven.limit, 33))
    assert driven.limits == [8, 16, 32, 64]
    driven.tell_for(60, HUNGRY, tokens_per_s=3300.0)
    driven.tell_for(200, HUNGRY, tokens_per_s=3300.0)
    assert max(driven.limits) < 64 * 1.5 and driven.limit <= 64 * 1.25, "it looks again and comes back"


def test_slots_that_slow_the_engine_down_are_given_back():
    driven = Driven()
    for _ in range(100):
        driven.tell(HUNGRY, tokens_per_s=100.0 * driven.limit if driven.limit <= 16 else 1000.0)
    assert driven.limits == [8, 16, 32, 16]


def test_a_limit_that_somebody_else_set_is_taken_over():
    driven = Driven(limit=64)
    driven.tell_for(5, CONTENT)
    driven.limit = 20
    assert driven.tell_for(20, CONTENT) == 20
    driven.limit = 1000
    assert driven.tell(CONTENT).limit == 256
    driven.limit = 0
    assert driven.tell(CONTENT).limit == 1


def test_an_engine_that_does_not_tell_its_cache_is_led_by_the_rest():
    driven = Driven()
    driven.scaling(15, kv_used_fraction=math.nan)
    assert driven.limit == 16
    assert driven.tell(HUNGRY, kv_used_fraction=math.nan, preemptions=1).limit == 12


# ---- any facts ---------------------------------------------------------------------------------------------------------

share = st.floats(0.0, 1.0)
any_facts = st.builds(
    Facts,
    now=st.floats(0.0, 30.0),  # since the ones before
    limit=st.integers(0, 600),
    slots_used=st.integers(0, 600),
    kv_used_fraction=st.one_of(share, st.just(math.nan)),
    preemptions=st.integers(0, 3),
    waiting=st.integers(0, 3),
    tokens_per_s=st.floats(0.0, 1e5),
    learner_waiting=share,
    staleness_waiting=share,
    queued=st.integers(0, 3),
    stale=st.integers(0, 2),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(any_facts, st.booleans()), min_size=1, max_size=60), st.integers(1, 500))
def test_bounds_and_steps_hold_for_any_facts(story, most):
    controller, now, limit = Controller(most, SETTLE_S), 0.0, 1
    cut_at = -math.inf
    for facts, interfered in story:
        now += facts.now
        before = facts.limit if interfered else limit
        decision = controller.decide(msgspec.structs.replace(facts, now=now, limit=before))
        limit = decision.limit
        assert 1 <= limit <= most and re.match(r"stays at \d+: |\d+ -> \d+: ", decision.reason)
        if not 1 <= before <= most:
            assert limit == min(max(before, 1), most)
            continue
        assert limit in (before - 1, before + 1) or CUT * before - 1 <= limit <= 2 * before
        if "preemptions" in decision.reason and limit < before:
            assert now - cut_at >= SETTLE_S
            cut_at = now


WORSE = {
    "kv_used_fraction": 1.0,
    "preemptions": 5,
    "learner_waiting": 0.0,
    "staleness_waiting": 1.0,
    "stale": 9,
}


@settings(max_examples=150, deadline=None)
@given(st.lists(any_facts, min_size=1, max_size=30), st.integers(0, 25), st.sampled_from(sorted(WORSE)))
def test_worse_facts_never_bring_a_higher_limit(story, same, name):
    """After a common past, one of the facts is worse for one of two controllers, until the two decide differently."""
    good, bad, now, limit = Controller(512, SETTLE_S), Controller(512, SETTLE_S), 0.0, 100
    for index, facts in enumerate(story):
        now += facts.now
        told = msgspec.structs.replace(facts, now=now, limit=limit)
        worse = msgspec.structs.replace(told, **{name: WORSE[name]}) if index >= same else told
        decided = good.decide(told).limit
        otherwise = bad.decide(worse).limit
        assert otherwise <= decided
        if otherwise != decided:
            return
        limit = decided


# ---- a simulated engine, buffer and learner -------------------------------------------------------------------------------


class World(msgspec.Struct, frozen=True, kw_only=True):
    """One engine whose tokens/s are peak * n / (n + half) with n slots, and one learner."""

    peak: float
    half: float
    kv_tokens: float
    median: float
    sigma: float = 0.8
    """Answers are lognormal, cut at ten medians: with 0.8 the longest of a hundred is about 6 times the median."""
    prompt: float = 50.0
    batch: int = 32
    """Rollouts per step."""
    step_s: float = 4.0
    bound: int = 2
    slower_at: float = math.inf
    """From then on a step takes three times as long."""


class Simulation:
    """Steps of half a second. Preempted rollouts wait, and their tokens are computed again at ten times the peak."""

    DT = 0.5

    def __init__(self, world: World, limit: int, seed: int = 0) -> None:
        self.world, self.limit = world, limit
        self.random = np.random.default_rng(seed)
        self.now = 0.0
        self.running = np.zeros((0, 2))  # tokens, target; the newest last
        self.queue: list[tuple[float, float]] = []
        self.preempted: list[tuple[float, float]] = []
        self.debt_s = 0.0
        self.used = 0
        self.tokens = 0.0
        self.finished = self.held = 0
        self.step_ends = math.inf
        self.count = dict.fromkeys(("tokens", "preemptions", "learner", "held_back"), 0.0)

    def step(self) -> None:
        world, self.now = self.world, self.now + self.DT
        while self.held < (world.bound + 1) * world.batch:
            self.held += 1
            spread = math.exp(world.sigma * self.random.standard_normal())
            self.queue.append((0.0, world.median * min(spread, 10.0)))
        self._place()
        self._generate()
        self._learn()

    @property
    def kv(self) -> float:
        return float(self.running[:, 0].sum() + self.world.prompt * len(self.running)) / self.world.kv_tokens

    def _place(self) -> None:
        for row in self.running[self.limit :][::-1]:
            self.queue.insert(0, tuple(row))
        self.running = self.running[: self.limit]
        for line in (self.preempted, self.queue):
            while line and len(self.running) < self.limit:
                if self.kv + (line[0][0] + self.world.prompt) / self.world.kv_tokens > 1.0:
                    self.used = len(self.running)
                    return
                self.debt_s += (line[0][0] + self.world.prompt) / (10 * self.world.peak)
                self.running = np.vstack([self.running, line.pop(0)])
        self.used = len(self.running)
        if not self.queue and self.used < self.limit:
            self.count["held_back"] += self.DT

    def _generate(self) -> None:
        n = len(self.running)
        if not n:
            return
        computing = max(self.DT - self.debt_s, 0.0)
        self.debt_s = max(self.debt_s - self.DT, 0.0)
        each = self.world.peak / (n + self.world.half) * computing
        tokens = float(np.minimum(self.running[:, 1] - self.running[:, 0], each).sum())
        self.count["tokens"] += tokens
        self.tokens += tokens
        self.running[:, 0] += each
        ended = self.running[:, 0] >= self.running[:, 1]
        self.finished += int(ended.sum())
        self.running = self.running[~ended]
        while self.kv > 1.0:
            self.preempted.insert(0, tuple(self.running[-1]))
            self.running = self.running[:-1]
            self.count["preemptions"] += 1

    def _learn(self) -> None:
        world = self.world
        if self.now >= self.step_ends:
            self.step_ends = math.inf
            self.held -= world.batch
        if self.step_ends == math.inf:
            if self.finished < world.batch:
                self.count["learner"] += self.DT
                return
            self.finished -= world.batch
            self.step_ends = self.now + world.step_s * (3 if self.now >= world.slower_at else 1)

    def facts(self, seconds: float) -> Facts:
        count, self.count = self.count, dict.fromkeys(self.count, 0.0)
        return Facts(
            now=self.now,
            limit=self.limit,
            slots_used=self.used,
            kv_used_fraction=self.kv,
            preemptions=int(count["preemptions"]),
            waiting=len(self.preempted),
            tokens_per_s=count["tokens"] / seconds,
            learner_waiting=count["learner"] / seconds,
            staleness_waiting=count["held_back"] / seconds,
            queued=len(self.queue),
            stale=0,
        )


def fixed(world: World, limit: int, seconds: float = 400.0) -> float:
    """Tokens per second with one limit, after a warm-up of a quarter. What is generated is trained: the bound sees to it."""
    simulation = Simulation(world, limit)
    while simulation.now < seconds / 4:
        simulation.step()
    before = simulation.tokens
    while simulation.now < seconds:
        simulation.step()
    return (simulation.tokens - before) / (seconds * 3 / 4)


class Course(msgspec.Struct):
    """What a controller did: the limit and the tokens generated by then, at each second; its changes with their reasons."""

    limits: list[int]
    tokens: list[float]
    changes: list[str]


def controlled(world: World, seconds: int, first: int = 8, seed: int = 0) -> Course:
    simulation, controller, course = (
        Simulation(world, first, seed),
        Controller(MOST, SETTLE_S),
        Course([], [], []),
    )
    while simulation.now < seconds:
        simulation.step()
        simulation.step()
        decision = controller.decide(simulation.facts(1.0))
        if decision.limit != simulation.limit:
            course.changes.append(f"{simulation.now:.0f} s: {decision.reason}")
        simulation.limit = decision.limit
        course.limits.append(decision.limit)
        course.tokens.append(simulation.tokens)
    return course


WORLDS = {
    "both sides alike": World(peak=4000, half=30, kv_tokens=1e6, median=150),
    "the learner limits": World(peak=6000, half=20, kv_tokens=1e6, median=100),
    "the engine limits": World(peak=20000, half=100, kv_tokens=1e6, median=300, batch=128, step_s=2.0),
    "slots stop helping": World(peak=2000, half=10, kv_tokens=1e6, median=150, batch=128, step_s=1.0),
    "the cache limits": World(peak=3000, half=20, kv_tokens=60e3, median=800, sigma=1.0, step_s=2.0),
    "a small cache": World(peak=500, half=4, kv_tokens=4000, median=100, batch=8, step_s=2.0),
    "long tails": World(peak=3000, half=20, kv_tokens=40e3, median=300, sigma=1.3, batch=64, step_s=2.0),
    "a batch at a time": World(peak=4000, half=30, kv_tokens=1e6, median=150, bound=0),
}


@pytest.mark.parametrize("name", WORLDS)
def test_it_comes_near_the_best_fixed_limit_and_stays_there(name):
    """At least 85 % of the best fixed limit's tokens/s, found among powers of two up to the most; its highest limit in the
    last half of 15 minutes is at most twice its lowest."""
    world = WORLDS[name]
    best = max(fixed(world, limit) for limit in (4, 8, 16, 32, 64, 128, 256))
    for seed in (0, 1):
        course = controlled(world, 900, seed=seed)
        rate = (course.tokens[-1] - course.tokens[449]) / 450
        late = course.limits[450:]
        assert rate >= 0.85 * best, course.changes
        assert max(late) <= 2 * min(late), course.changes
        assert min(course.limits) >= 1 and max(course.limits) <= MOST


@pytest.mark.parametrize("name", ["both sides alike", "the learner limits", "a small cache"])
def test_a_learner_that_gets_slower_gets_fewer_slots_and_as_much_as_it_takes(name):
    """A third of the tokens is taken from 300 s on: well before 600 s the limit is at most half of what it was."""
    world = msgspec.structs.replace(WORLDS[name], slower_at=300.0)
    course = controlled(world, 900)
    before, after = np.mean(course.limits[200:300]), np.mean(course.limits[600:])
    assert after <= before / 2, course.changes
    enough = fixed(msgspec.structs.replace(world, slower_at=0.0), MOST)
    assert (course.tokens[-1] - course.tokens[599]) / 300 >= 0.9 * enough, course.changes


@pytest.mark.parametrize("name", ["the cache limits", "long tails"])
def test_one_start_with_far_too_many_slots_is_no_cascade(name):
    """It never falls below half of where it settles, though the cache stays full for as long as old answers last."""
    course = controlled(WORLDS[name], 900, first=MOST)
    assert min(course.limits) >= np.median(course.limits[450:]) / 2, course.changes
    assert max(course.limits) == MOST and course.limits[-1] <= MOST / 2
