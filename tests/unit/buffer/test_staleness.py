"""The one formula, and the rules that follow from it."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.buffer import staleness
from asyncrl.buffer.schema import ENVIRONMENT


def test_a_token_is_trainable_up_to_the_bound_and_never_from_the_future():
    assert staleness.staleness(7, 5) == 2
    assert staleness.is_trainable(7, 5, 2)
    assert not staleness.is_trainable(7, 4, 2)
    assert not staleness.is_trainable(7, 8, 2)


def test_a_token_of_the_environment_is_never_trainable():
    """Not at version 0 with a wide bound either, where its version would count as one publication old."""
    assert not any(staleness.is_trainable(v, ENVIRONMENT, k) for v in range(4) for k in range(9))
    for version, bound in ((0, 8), (1, 2), (2, 2), (9, 2)):
        oldest = staleness.oldest_trainable(version, bound)
        assert [v >= oldest for v in range(ENVIRONMENT, version + 1)] == [
            staleness.is_trainable(version, v, bound) for v in range(ENVIRONMENT, version + 1)
        ]


def test_ageing_leaves_the_environment_out():
    ageing = staleness.ageing(9, [(7, [(5, 10), (ENVIRONMENT, 99), (7, 4)])])
    assert ageing == staleness.ageing(9, [(7, [(5, 10), (7, 4)])])


@settings(deadline=None)
@given(held=st.integers(0, 200), batch=st.integers(1, 20), bound=st.integers(0, 8))
def test_what_is_admitted_can_be_trained_inside_the_bound(held, batch, bound):
    capacity = staleness.admission_capacity(held, batch, bound)
    if capacity:
        last_admitted = held + capacity - 1  # groups ahead of the last one
        assert last_admitted // batch <= bound
    else:
        assert held // batch > bound


@settings(deadline=None)
@given(deadlines=st.lists(st.integers(0, 6), max_size=12), version=st.integers(0, 3), batch=st.integers(1, 4))
def test_may_hand_over_is_exactly_earliest_deadline_first_feasibility(deadlines, version, batch):
    left, now, feasible = sorted(deadlines), version, True
    while left:
        now += 1  # the next hand-over
        feasible = feasible and all(d >= now for d in left[:batch])
        left = left[batch:]
    assert staleness.may_hand_over(version, Counter(deadlines), batch) == feasible


def test_a_deadline_that_nobody_has_any_more_does_not_count():
    assert staleness.may_hand_over(5, {3: 0, 6: 1}, 1)


def test_ageing_splits_a_token_s_staleness_into_flight_and_queue():
    ageing = staleness.ageing(9, [(7, [(5, 10), (7, 4)]), (9, [(9, 1)])])
    assert ageing.tokens_by_staleness == {4: 10, 2: 4, 0: 1}
    assert (ageing.in_flight, ageing.in_queue) == (20, 28)


@settings(deadline=None)
@given(
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(0, 9), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5))))),
)
def test_flight_and_queue_are_all_of_the_ageing(version, answers):
    ageing = staleness.ageing(version, answers)
    total = sum(age * tokens for age, tokens in ageing.tokens_by_staleness.items())
    assert ageing.in_flight + ageing.in_queue == total
    assert sum(ageing.tokens_by_staleness.values()) == sum(n for _, spans in answers for _, n in spans)


def test_drops_are_counted_by_the_decile_of_their_length():
    lengths = dict.fromkeys(range(1, 101), 1)
    assert staleness.drops_by_length_decile(lengths, {}) == [0] * 10
    assert staleness.drops_by_length_decile(lengths, {5: 1, 10: 1, 11: 1, 100: 1}) == [2, 1, *[0] * 7, 1]


def test_rollouts_of_one_length_count_where_the_middle_one_lies():
    assert staleness.drops_by_length_decile({7: 10}, {7: 3}) == [0, 0, 0, 0, 0, 3, 0, 0, 0, 0]
    assert staleness.drops_by_length_decile({1: 80, 2: 20}, {2: 6}) == [0] * 9 + [6]
    assert staleness.drops_by_length_decile({}, {}) == [0] * 10


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 50), st.integers(1, 9), min_size=1), st.data())
def test_no_drop_is_lost_and_longer_ones_are_in_no_lower_decile(lengths, data):
    dropped = {k: data.draw(st.integers(0, n)) for k, n in lengths.items()}
    assert sum(staleness.drops_by_length_decile(lengths, dropped)) == sum(dropped.values())
    where = [staleness.drops_by_length_decile(lengths, {k: 1}).index(1) for k in sorted(lengths)]
    assert where == sorted(where)
