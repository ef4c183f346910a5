"""Which answers a reward model reads together, and when."""

from hypothesis import given
from hypothesis import strategies as st

from asyncrl.generators.reward_batching import Batch, Later, Waiting, fitting, next_batch

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)


def waiting(*lengths, since=0.0):
    return [Waiting(since, tokens) for tokens in lengths]


def test_an_answer_that_is_alone_waits_for_company_and_then_goes_alone():
    assert next_batch(waiting(5, since=10.0), 10.25, 100, 0.5) == Later(0.25)
    assert next_batch(waiting(5, since=10.0), 10.5, 100, 0.5) == Batch([0])


def test_a_full_batch_leaves_at_once():
    assert next_batch(waiting(5, 5, 5), 0.0, 10, 0.5) == Batch([0, 1])
    assert next_batch(waiting(10), 0.0, 10, 0.5) == Batch([0])


def test_one_that_is_longer_than_a_batch_goes_alone():
    assert next_batch(waiting(50, 3), 0.0, 10, 0.5) == Batch([0])


def test_company_is_of_like_length():
    assert fitting([10, 30, 11, 9, 31, 10], 40) == [0, 2, 5]
    assert fitting([10, 30, 11, 9, 31, 10], 44) == [0, 2, 3, 5]


@given(LENGTHS, st.integers(1, 200))
def test_a_batch_holds_the_budget_and_nobody_else_would_fit(lengths, budget):
    chosen = fitting(lengths, budget)
    rectangle = len(chosen) * max(lengths[i] for i in chosen)
    assert chosen == sorted({*chosen}) and 0 in chosen
    assert rectangle <= budget or chosen == [0]
    for i in {*range(len(lengths))} - {*chosen}:
        assert (len(chosen) + 1) * max(*(lengths[j] for j in chosen), lengths[i]) > budget


@given(LENGTHS, st.integers(1, 200), st.floats(0.0, 2.0))
def test_everybody_is_read_and_the_oldest_first(lengths, budget, wait_s):
    """Time goes on as far as the decision says, and it is enough."""
    left, now = [Waiting(0.001 * i, tokens) for i, tokens in enumerate(lengths)], 0.001 * len(lengths)
    while left:
        decided = next_batch(left, now, budget, wait_s)
        if isinstance(decided, Later):
            assert 0 < decided.seconds <= wait_s
            now += decided.seconds + 1e-9
            decided = next_batch(left, now, budget, wait_s)
        assert isinstance(decided, Batch) and decided.indices[0] == 0
        left = [one for i, one in enumerate(left) if i not in decided.indices]
