"""The one formula, and the two rules that follow from it."""

from hypothesis import given
from hypothesis import strategies as st

from asyncrl.buffer import staleness


def test_a_token_is_trainable_up_to_the_bound_and_never_from_the_future():
    assert staleness.staleness(7, 5) == 2
    assert staleness.is_trainable(7, 5, 2)
    assert not staleness.is_trainable(7, 4, 2)
    assert not staleness.is_trainable(7, 8, 2)


@given(held=st.integers(0, 200), batch=st.integers(1, 20), bound=st.integers(0, 8))
def test_what_is_admitted_can_be_trained_inside_the_bound(held, batch, bound):
    capacity = staleness.admission_capacity(held, batch, bound)
    if capacity:
        last_admitted = held + capacity - 1  # groups ahead of the last one
        assert last_admitted // batch <= bound
    else:
        assert held // batch > bound


@given(deadlines=st.lists(st.integers(0, 6), max_size=12), version=st.integers(0, 3), batch=st.integers(1, 4))
def test_may_hand_over_is_exactly_earliest_deadline_first_feasibility(deadlines, version, batch):
    left, now, feasible = sorted(deadlines), version, True
    while left:
        now += 1  # the next hand-over
        feasible = feasible and left[0] >= now
        feasible = feasible and all(d >= now for d in left[:batch])
        left = left[batch:]
    assert staleness.may_hand_over(version, deadlines, batch) == feasible


def test_ages_split_a_token_s_staleness_into_flight_and_queue():
    in_flight, in_queue = staleness.ages(9, 7, [(5, 10), (7, 4)])
    assert (in_flight, in_queue) == (20, 28)
    total = 10 * staleness.staleness(9, 5) + 4 * staleness.staleness(9, 7)
    assert in_flight + in_queue == total
