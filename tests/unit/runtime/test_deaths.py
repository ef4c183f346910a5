"""How often a process may die, and how long is waited before it is started again."""

import pytest

from asyncrl.generators.score import CostMissing
from asyncrl.runtime.deaths import FIRST_WAIT_S, LONGEST_WAIT_S, Deaths, ends_the_run


def test_a_mistake_of_the_recipe_is_no_death_to_recover_from():
    assert ends_the_run(CostMissing("no term gave one"))
    assert not any(map(ends_the_run, (None, RuntimeError("no term gave one"), MemoryError())))


def test_deaths_are_counted_within_a_window():
    deaths = Deaths(most=5, within_s=600.0)
    assert not any(deaths.one_too_many(float(i)) for i in range(5))
    assert not deaths.one_too_many(600.5)  # the first of them is past
    assert deaths.one_too_many(600.6)
    assert deaths.total == 7


def test_a_process_that_may_not_die_at_all():
    assert Deaths(most=0, within_s=1.0).one_too_many(0.0)


def test_each_recent_death_doubles_the_wait():
    deaths = Deaths(most=20, within_s=100.0)
    waits = []
    for second in range(10):
        deaths.one_too_many(float(second))
        waits.append(deaths.wait_s(float(second)))
    assert waits[:4] == [FIRST_WAIT_S, 2 * FIRST_WAIT_S, 4 * FIRST_WAIT_S, 8 * FIRST_WAIT_S]
    assert max(waits) == LONGEST_WAIT_S
    deaths.one_too_many(500.0)
    assert deaths.wait_s(500.0) == FIRST_WAIT_S


@pytest.mark.parametrize("most", [0, 3])
def test_the_total_is_since_the_beginning(most):
    deaths = Deaths(most=most, within_s=0.5)
    for second in range(8):
        deaths.one_too_many(float(second))
    assert deaths.total == 8
