"""Which engines come and go, and how a pool stands."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.generators.config import PoolConfig
from asyncrl.runtime.facts import EngineState
from asyncrl.runtime.fleet_rules import UP, has_begun, pool_facts, pool_state, resize, slots

STATES = list(EngineState.__args__)
ANY = st.sampled_from(STATES)
POOL = PoolConfig(name="p", engines=2)


@given(st.dictionaries(st.integers(0, 12), ANY, max_size=8), st.integers(0, 12))
def test_a_pool_gets_as_many_engines_as_are_wanted(present, wanted):
    change = resize(present, wanted)
    assert not (change.add and change.remove)
    after = (set(present) | set(change.add)) - set(change.remove)
    assert len(after) == wanted
    assert not set(change.add) & set(present) and set(change.remove) <= set(present)
    if change.add:  # no index is skipped over
        assert max(change.add) == min(set(range(100)) - set(present) - set(change.add[:-1]))


@given(st.dictionaries(st.integers(0, 12), ANY, min_size=1, max_size=8), st.integers(0, 12))
def test_what_works_is_removed_last(present, wanted):
    removed = resize(present, wanted).remove
    if any(present[i] in UP for i in removed):
        assert all(present[i] in (*UP, "draining") for i in present if i not in removed)


def test_of_equals_the_highest_index_goes():
    assert resize({0: "idle", 1: "serving", 2: "idle"}, 1).remove == [2, 1]
    assert resize({0: "dead", 1: "idle", 2: "starting"}, 1).remove == [0, 2]


def test_a_paused_run_and_a_drained_pool_have_no_slots():
    assert slots(8, paused=False, drained=False) == 8
    assert slots(8, paused=True, drained=False) == slots(8, paused=False, drained=True) == 0


@pytest.mark.parametrize(
    ("states", "wanted", "begun", "state"),
    [
        (["serving", "idle"], 2, True, "serving"),
        (["serving", "restarting"], 2, True, "short"),
        (["dead", "serving"], 2, True, "short"),
        (["dead", "dead"], 2, True, "failed"),
        (["starting", "joining"], 2, False, "starting"),
        ([], 0, True, "serving"),
        (["waiting for room"], 1, True, "short"),
    ],
)
def test_how_a_pool_stands(states, wanted, begun, state):
    assert pool_state(states, wanted=wanted, begun=begun) == state


def test_a_pool_says_why_it_is_short():
    facts = pool_facts(
        POOL, ["idle", "dead"], wanted=2, concurrency="auto", begun=True, reasons=["", "p-1: it broke", "x"]
    )
    assert (facts.state, facts.engines_serving, facts.reason) == ("short", 1, "p-1: it broke")


def test_a_run_begins_with_what_its_recipe_asks_for():
    few = PoolConfig(name="few", engines=3, min_engines=1)
    assert not has_begun([(POOL, ["idle", "starting"])])
    assert has_begun([(POOL, ["idle", "serving"]), (few, ["joining", "idle"])])
    assert not has_begun([(few, ["waiting for room"] * 3)])
